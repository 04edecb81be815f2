"""Run a command that nobody has read: in namespaces of its own where the machine has them, always under limits."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/fonts", "/etc/ld.so.cache"]
STOP = threading.Event()  # set: whatever runs here is killed
USERS = itertools.count()
UNCOVERED = 97  # exit status: a place could not be hidden, so nothing ran
PROBE = """import os, pathlib, subprocess, sys, cmlib.grader.runner
files = (pathlib.Path(cmlib.__file__).parents[1] / "data").rglob("*")
seen = all(os.access(f, os.R_OK) for f in files)
sys.exit(not seen or subprocess.call([sys.executable, "-c", "import ipykernel, torch"]))"""
PROMISES = {
    "bubblewrap": "no network, own processes, a file system with nothing in it but Python and cmlib (read-only) and its folder",
    "unshare": "no network, own processes; hidden tests and gradebook are covered, other files as the system protects them",
    "limits alone": "THE NETWORK AND YOUR FILES ARE OPEN to submissions: install bubblewrap, or grade in a container",
}


@dataclass(frozen=True)
class Limits:
    """Of one submission: seconds, bytes, processes. `cell` is one cell's seconds, after which the next one has its turn."""

    wall: float = 300
    cpu: float = 180
    cell: int = 90
    memory: int = 4 * 2**30
    disk: int = 2**28
    processes: int = 50

    def told(self) -> str:
        """As JSON for `cmlib.grader.runner`, which sets what the kernel of the system can hold."""
        threads = 200  # more than of all processes of a user who has others
        if os.getuid() != 0:
            mine = (p.info for p in psutil.process_iter(["uids", "num_threads"]))
            threads += sum(p["num_threads"] or 0 for p in mine if p["uids"] and p["uids"].real == os.getuid())
        rlimits = {"CPU": int(self.cpu), "DATA": self.memory, "FSIZE": self.disk // 4, "NPROC": threads, "CORE": 0}
        return json.dumps({"cell": self.cell, "rlimits": rlimits})


def _dropped(folder: Path) -> list[str]:
    """A prefix that gives up every privilege; root becomes the owner of `folder`, who owns nothing else."""
    user = folder.stat().st_uid
    other = ["--clear-groups", f"--reuid={user}", f"--regid={user}"] if os.getuid() == 0 else []
    return ["setpriv", *other, "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "--"]


def _bubblewrap(folder: Path, hidden: Sequence[Path]) -> list[str]:
    places = [*SYSTEM, sys.base_prefix, sys.prefix, str(ROOT / "cmlib"), str(ROOT / "data")]
    if os.environ.get("CMLIB_DATASETS"):
        places.append(str(Path(os.environ["CMLIB_DATASETS"]).resolve()))
    root = os.getuid() == 0
    covers = [
        ["--tmpfs", str(p), "--remount-ro", str(p)] if p.is_dir() else ["--ro-bind", os.devnull, str(p)]
        for p in hidden
        if any(p.is_relative_to(place) for place in places)
    ]
    return [
        *["bwrap", "--die-with-parent", "--new-session", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"],
        *([] if root else ["--unshare-user"]),
        *["--cap-drop", "ALL"],
        *(" ".join(f"--cap-add CAP_{c}" for c in ("SETUID", "SETGID", "SETPCAP")).split() if root else []),
        *["--proc", "/proc", "--dev", "/dev", "--bind", f"{folder}/tmp", "/tmp"],
        *(word for p in places for above in reversed(Path(p).parents[:-1]) for word in ("--dir", str(above))),
        *(word for p in places for word in ("--ro-bind-try", p, p)),
        *itertools.chain(*covers),
        *["--bind", str(folder), str(folder), "--bind", f"{folder}/tmp", "/dev/shm"],
        *["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", str(folder), "--"],
        *_dropped(folder),
    ]


def _unshare(folder: Path, hidden: Sequence[Path]) -> list[str]:
    empty = 'if [ -d "$p" ]; then mount -t tmpfs -o size=4k,ro none "$p"; else mount --bind /dev/null "$p"; fi'
    cover = f'for p in $COVER; do {empty} || exit {UNCOVERED}; done; exec "$@"'
    user = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    spaces = ["--net", "--pid", "--mount", "--ipc", "--fork", "--kill-child", "--mount-proc"]
    covered = f"IFS=:; COVER={shlex.quote(':'.join(map(str, hidden)))}; "
    return ["unshare", *user, *spaces, "sh", "-c", covered + cover, "sh", *_dropped(folder)]


def _bare(folder: Path, hidden: Sequence[Path]) -> list[str]:
    if os.getuid() == 0:
        raise ValueError(
            "root must not run submissions without bubblewrap or namespaces, and their user must be able to read"
            f" {sys.base_prefix}, {sys.prefix} and {ROOT}: be another user, use a Python outside /root, or install bubblewrap"
        )
    return []


LEVELS = {"bubblewrap": _bubblewrap, "unshare": _unshare, "limits alone": _bare}


@functools.cache
def level() -> str:
    """The strongest of LEVELS that works on this machine."""
    for name in LEVELS:
        with tempfile.TemporaryDirectory(prefix="cmlib-") as folder:
            try:
                if not run([sys.executable, "-c", PROBE], Path(folder), Limits(), [ROOT / "notebooks"], name=name):
                    return name
            except OSError:
                continue
    raise ValueError("a Python that knows cmlib cannot be started under limits here; see `cmlib doctor`")


def run(
    command: Sequence[str],
    folder: Path,
    limits: Limits,
    hidden: Sequence[Path] = (),
    extra: dict[str, str] | None = None,
    name: str | None = None,
) -> str:
    """Run `command` in `folder`, its own and the only place that it may write to; empty, or why it did not end well.

    `hidden` are places that it must not see, `extra` is added to an environment of its own. What it prints is lost.
    """
    folder = folder.resolve()
    user = 61_000 + next(USERS) % 4_000  # one each, since the kernel counts processes by user
    for path in (folder, folder / "tmp", folder / "home", folder / "handed"):
        path.mkdir(exist_ok=True)
        path.chmod(0o711)  # bubblewrap goes there with root's name, but without its powers
        if os.getuid() == 0:
            os.chown(path, user, user)
    environment = {
        **{k: os.environ[k] for k in ("LANG", "CMLIB_DATASETS", "LD_LIBRARY_PATH") if k in os.environ},
        **{"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        **{"HOME": f"{folder}/home", "TMPDIR": f"{folder}/tmp", "JUPYTER_RUNTIME_DIR": f"{folder}/tmp/r", "USER": "learner"},
        **{"OMP_NUM_THREADS": "1", "CMLIB_PROFILE": "ci", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        **(extra or {}),
    }
    outermost = [p for p in hidden if p.exists() and not any(q in p.parents for q in hidden)]
    prefix = LEVELS[name or level()](folder, outermost)
    with open(os.devnull, "r+b") as null:
        pipes = {"stdin": null, "stdout": null, "stderr": null}
        where = {"cwd": folder, "env": environment, "start_new_session": True, "umask": 0o022}
        process = subprocess.Popen([*prefix, *command], **pipes, **where)  # type: ignore[call-overload]
    family: list[psutil.Process] = []
    try:
        return _watch(process, folder, limits, family)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()


def _watch(process: subprocess.Popen, folder: Path, limits: Limits, family: list[psutil.Process]) -> str:
    begin = time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=0.3)
            if code == UNCOVERED:
                raise OSError("the sandbox could not hide what the submission must not see")
            return "" if code == 0 else f"it ended with status {code}"
        with contextlib.suppress(psutil.NoSuchProcess):
            family[:] = psutil.Process(process.pid).children(recursive=True)
        if STOP.is_set():
            return "grading was interrupted"
        if time.monotonic() - begin > limits.wall:
            return f"it ran longer than {limits.wall:g} s"
        if len(family) > limits.processes:
            return f"it started more than {limits.processes} processes"
        used = [_used(child) for child in family]
        if sum(seconds for seconds, _ in used) > limits.cpu:
            return f"it used more than {limits.cpu:g} s of processor time"
        if sum(size for _, size in used) > limits.memory:
            return f"it used more than {limits.memory / 2**30:g} GiB of memory"
        if _size(folder, limits.disk) > limits.disk:
            return f"it wrote more than {limits.disk // 2**20} MiB"


def _used(process: psutil.Process) -> tuple[float, int]:
    """Seconds of processor time and bytes of memory, pages that it shares with others included."""
    try:
        times = process.cpu_times()
        return times.user + times.system, process.memory_info().rss
    except psutil.Error:
        return 0.0, 0


def _size(folder: Path, enough: int) -> int:
    """Bytes under `folder`; stops counting beyond `enough`."""
    total = 0
    for where, folders, names in os.walk(folder):
        for name in (*folders, *names):
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_size + 4096
            if total > enough:
                return total
    return total
