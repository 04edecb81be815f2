"""`python -m cmlib.grader.runner`, inside the sandbox: execute notebook.ipynb of this folder and keep what it printed.

Nothing here is trusted by the grader: the notebook that runs may change or kill this process.
"""

from __future__ import annotations

import json
import resource
import sys
from collections import Counter
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError

ROOM = 500_000  # bytes of a cell's outputs
KILLED = 9  # exit status: a cell ended its own kernel, so those after it did not run


class Client(NotebookClient):
    """Goes on after an error or a cell that takes too long, and keeps at most ROOM bytes of output a cell."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.shown: Counter[int] = Counter()

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        if msg["msg_type"] in ("stream", "display_data", "update_display_data", "execute_result", "error"):
            before = self.shown[cell_index]
            self.shown[cell_index] += len(json.dumps(msg["content"]))
            if self.shown[cell_index] > ROOM:
                if before <= ROOM:
                    cell.outputs.append(nbformat.v4.new_output("stream", text="\n… the rest of this output was cut off\n"))
                return None
        return super().process_message(msg, cell, cell_index)


def main() -> None:
    limits = json.loads(sys.argv[1])
    for name, most in limits["rlimits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    notebook = nbformat.read("notebook.ipynb", 4)
    manager = AsyncKernelManager(kernel_name="python3", transport="ipc")  # no network in here
    client = Client(
        notebook,
        km=manager,
        timeout=limits["cell"],
        interrupt_on_timeout=True,
        allow_errors=True,
        store_widget_state=False,
        coalesce_streams=True,
        on_cell_executed=lambda **_: nbformat.write(notebook, "executed.ipynb"),
    )
    try:
        client.execute()
    except (DeadKernelError, CellControlSignal):
        sys.exit(KILLED)
    finally:
        nbformat.write(notebook, "executed.ipynb")


if __name__ == "__main__":
    main()
