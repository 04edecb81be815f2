"""Start the server: settings checked here, where a mistake is one line, and handed to BentoML."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path

from cmlib.formats import need


def address(host: str, port: int) -> str:
    """The IP address of `host`, once all that a server needs is there and the port is free. Raises ValueError."""
    need("bentoml", "fastapi", "onnxruntime")
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "no such name"
        raise ValueError(f"cannot listen on {host}:{port} ({why}); give another --host or --port") from error
    return str(place[0])


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

    `host` is an IP address. `workers` processes share the port; in each, `queue` images may wait, and a request takes at most
    `timeout` seconds. At the end, a client that does not take its answer is waited for as long, and five seconds.
    """
    os.environ.setdefault("BENTOML_HOME", str((folder / "bentoml").resolve()))  # its metrics, apart from another server's
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    from _bentoml_impl.server.serving import serve_http  # `bentoml.serve` calls it, and waits for such a client for a day
    from bentoml._internal.log import configure_logging
    from bentoml._internal.utils.args import set_arguments

    settings = {"folder": str(folder.resolve()), "name": name, "workers": workers, "timeout": timeout, "queue": queue}
    set_arguments({**settings, "tensorrt": tensorrt})
    configure_logging()
    from cmlib.serving.service import Student  # which reads the arguments

    Student.inject_config()  # type: ignore[attr-defined]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"{url} has the page, {url}/docs the endpoints; Ctrl+C stops it", flush=True)
    serve_http(Student, host=host, port=port, timeout_graceful_shutdown=math.ceil(timeout) + 5)  # type: ignore[arg-type]
