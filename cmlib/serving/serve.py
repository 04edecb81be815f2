"""Start the server: settings checked here, where a mistake is one line, and handed to BentoML."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from cmlib.formats import need


def start(
    folder: Path,
    name: str,
    host: str = "127.0.0.1",
    port: int = 3000,
    workers: int = 1,
    timeout: float = 30.0,
    queue: int = 256,
    tensorrt: bool = False,
) -> None:
    """Serve model `name` of what `site.write` left in `folder` until SIGTERM or SIGINT; answer what is at work, and return.

    `workers` processes share the port; in each, `queue` images may wait, and a request takes at most `timeout` seconds.
    """
    need("bentoml", "fastapi", "onnxruntime")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen on {host}:{port} ({error.strerror}); give another --host or --port") from error
    os.environ.setdefault("BENTOML_HOME", str((folder / "bentoml").resolve()))  # its metrics, apart from another server's
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    import bentoml

    settings = {"folder": str(folder.resolve()), "name": name, "workers": workers, "timeout": timeout, "queue": queue}
    print(f"http://{host}:{port} has the page, http://{host}:{port}/docs the endpoints; Ctrl+C stops it", flush=True)
    bentoml.serve("cmlib.serving.service:Student", host=host, port=port, blocking=True, args={**settings, "tensorrt": tensorrt})
