"""The pair cache while processes die, the disk fills up and several builders share the work."""

import errno
import itertools
import os
import random
import shutil
import signal
import stat
import subprocess
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from cmlib import cache as module
from cmlib.cache import PairCache
from cmlib.process import DDPM
from cmlib.teacher import Teacher
from cmlib.unet import UNet
from tests.faults.counts import fault
from tests.small import UNET

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, to import torch once")

SHAPE = (1, 8, 8)
IMAGES = torch.randint(0, 256, (100, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
SOURCES = {
    "data": {"source": "data", "images": IMAGES, "solver": "ancestral", "batch_size": 10},
    "rollout": {"source": "rollout", "shape": SHAPE, "solver": "ddim", "steps": 5, "batch_size": 4},
}
source = pytest.mark.parametrize("source", SOURCES)


def make_teacher(seed: int) -> Teacher:
    torch.manual_seed(seed)
    return Teacher(UNet(**UNET), DDPM.linear(50, 1e-3, 0.2)).to("cpu")


A, B, C = map(make_teacher, range(3))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 10)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # it matters when the power goes, which no test can do


def build(folder: Path, source: str = "data", teacher: Teacher = A, pairs: int = 60) -> PairCache:
    """Six shards; two at a time for rollouts."""
    return PairCache.build(folder, teacher, pairs, **SOURCES[source])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the locks: the shards, the manifest with their hashes, and temporary files if any."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix != ".lock"}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD", 10)
        folders = {name: tmp_path_factory.mktemp(name) for name in SOURCES}
        return {name: contents(build(folder, name).folder) for name, folder in folders.items()}


RUNNING: set[int] = set()


@pytest.fixture(autouse=True)
def nobody_stays():
    """A test that fails leaves no process behind."""
    yield
    for pid in RUNNING:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    RUNNING.clear()


def start(work: Callable[[], object]) -> int:
    """Run `work` in a new process; its id."""
    pid = os.fork()
    if pid:
        RUNNING.add(pid)
        return pid
    try:
        torch.set_num_threads(1)  # a forked process must not wait for the threads of its parent
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def wait(pid: int, seconds: float = 60.0) -> int:
    """Its exit code, or minus the signal that killed it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            RUNNING.discard(pid)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    pytest.fail(f"still running after {seconds:g} s")


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


# ---- killed


@source
def test_killed_at_a_random_moment_and_resumed_it_is_bit_identical(tmp_path, unbroken, source):
    rng, lasts, killed = random.Random(source), 0.3, 0
    while killed < 10:
        folder = tmp_path / str(rng.random())
        pid = start(lambda folder=folder: build(folder, source))
        time.sleep(rng.random() * lasts)
        os.kill(pid, signal.SIGKILL)
        if wait(pid) == 0:
            lasts *= 0.9  # it was faster than that
            continue
        killed += 1
        with fault("kill -9: cache build"):
            assert build(folder, source).verify() == []
            assert contents(folder) == unbroken[source]


def die_at(step: int) -> None:
    """This process is killed at its `step`-th step of writing: just before or just after a rename."""
    steps, replace = itertools.count(1), os.replace

    def survive() -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(a, b) -> None:
        survive()
        replace(a, b)
        survive()

    os.replace = watched


def every_step(folder: Path, prepare: Callable[[Path], object], work: Callable[[Path], object]):
    """Folders in which `work` was killed at its first, second, … step of writing; ends when it comes through."""
    for step in range(1, 100):
        mine = folder / str(step)
        prepare(mine)
        code = wait(start(lambda mine=mine, step=step: (die_at(step), work(mine))))
        if code == 0:
            assert step > 8
            return
        assert code == -signal.SIGKILL
        with fault("kill -9 at a step of writing"):
            yield mine


def test_killed_at_every_step_of_writing_a_build_resumes(tmp_path):
    good = contents(build(tmp_path / "good", pairs=20).folder)
    for folder in every_step(tmp_path, lambda mine: None, lambda mine: build(mine, pairs=20)):
        build(folder, pairs=20)
        assert contents(folder) == good


def test_killed_at_every_step_of_writing_a_refresh_is_finished_by_the_next(tmp_path):
    """… refresh, be it to the same teacher or another, or by a build with the new teacher."""
    old, between = build(tmp_path / "old", pairs=20).folder, None
    good = {teacher: contents(build(tmp_path / teacher.hash(), teacher=teacher, pairs=20).folder) for teacher in (B, C)}
    for folder in every_step(tmp_path, lambda mine: shutil.copytree(old, mine), lambda mine: PairCache(mine).refresh(B)):
        switched = PairCache(folder).key["teacher"] == B.hash()
        if switched and PairCache(folder).verify():
            with pytest.raises(ValueError, match=r"shards in .* are missing; run the build \(or refresh\) again"):
                PairCache.open(folder)
        copy = shutil.copytree(folder, tmp_path / "copy" / folder.name)
        PairCache(copy).refresh(B)
        assert contents(copy) == good[B]
        known = {entry["sha256"] for entry in PairCache(folder).shards.values()}
        if between is None and any(module.sha256(path) not in known for path in folder.glob("shard-*.pt")):
            between = shutil.copytree(folder, tmp_path / "between")
        if switched:
            build(folder, teacher=B, pairs=20)
            assert contents(folder) == good[B]
    # killed between a shard's renaming and its recording, and then, on the way to a third teacher, anywhere else again
    for folder in every_step(
        tmp_path / "twice", lambda mine: shutil.copytree(between, mine), lambda f: PairCache(f).refresh(C)
    ):
        PairCache(folder).refresh(C)
        assert contents(folder) == good[C]


@fault("power cut: cache build")
def test_the_bytes_reach_the_disk_before_their_name_and_the_name_before_the_next_file(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file"))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(Path(b).name), replace(a, b)))
    build(tmp_path, pairs=20)
    names = ["manifest.json", "shard-00000.pt", "manifest.json", "shard-00001.pt", "manifest.json"]
    assert calls == [call for name in names for call in ("file", name, "folder")]


# ---- together


@source
def test_builders_together_write_what_one_would(tmp_path, unbroken, source):
    for k, stagger in enumerate([0.0, 0.02, 0.1]):
        folder = tmp_path / str(k)
        pids = []
        for _ in range(3):
            pids.append(start(lambda folder=folder: build(folder, source)))
            time.sleep(stagger)
        with fault("builders together"):
            assert [wait(pid) for pid in pids] == [0, 0, 0]
            assert contents(folder) == unbroken[source]
            assert not list(folder.glob("group-*"))


@fault("builders together")
def test_two_builders_share_the_work(tmp_path, monkeypatch):
    """Each shard is computed once. A slow teacher makes sure that both are at it at the same time."""
    step = Teacher.step

    def slow(*args):
        with open(tmp_path / "log", "a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(0.1)
        return step(*args)

    monkeypatch.setattr(Teacher, "step", slow)
    pids = [start(lambda: build(tmp_path / "c")) for _ in range(2)]
    assert [wait(pid) for pid in pids] == [0, 0]
    log = list(map(int, (tmp_path / "log").read_text().split()))
    assert len(log) == 6 and set(log) == set(pids)


@pytest.mark.parametrize("lock", ["group-00000.lock", "manifest.lock"])
@fault("kill -9 of who holds a lock")
def test_a_process_that_dies_holding_a_lock_blocks_nobody(tmp_path, unbroken, lock):
    folder = tmp_path / "c"
    build(folder)
    module.PairCache.path(PairCache(folder), 0).unlink()

    def hold():
        with FileLock(folder / lock):
            (folder / "shard-00000.pt.1.tmp").write_bytes(b"half a sh")  # what it was writing
            (tmp_path / "held").touch()
            time.sleep(600)

    holder = start(hold)
    until((tmp_path / "held").exists)
    builders = [start(lambda: build(folder)) for _ in range(2)]
    time.sleep(0.3)
    assert [os.waitpid(pid, os.WNOHANG)[0] for pid in builders] == [0, 0]  # they wait for it …
    os.kill(holder, signal.SIGKILL)
    assert [wait(pid) for pid in (holder, *builders)] == [-signal.SIGKILL, 0, 0]  # … no longer than it lives
    assert contents(folder) == unbroken["data"]


def test_a_builder_killed_among_others_is_replaced(tmp_path, unbroken):
    for k in range(3):
        folder = tmp_path / str(k)
        pids = [start(lambda folder=folder: build(folder)) for _ in range(3)]
        until(lambda folder=folder: list(folder.glob("shard-*.pt")))
        os.kill(pids[k], signal.SIGKILL)
        with fault("kill -9 of one of three builders"):
            assert sum(wait(pid) == 0 for pid in pids) >= 2
            build(folder)  # clears what the killed one left half-written, if nobody did
            assert contents(folder) == unbroken["data"]


# ---- no space, no permission


@pytest.mark.parametrize(("source", "code"), [("data", errno.ENOSPC), ("rollout", errno.EDQUOT), ("data", errno.EIO)])
def test_a_failing_write_is_one_clear_error_and_loses_nothing(tmp_path, unbroken, monkeypatch, source, code):
    for fail_at in (1, 2, 3, 5, 8, 17):
        folder, calls = tmp_path / str(fail_at), iter(range(1, 1000))

        def full(file, fail_at=fail_at, calls=calls):
            if next(calls) >= fail_at:
                raise OSError(code, os.strerror(code))

        with fault(f"{errno.errorcode[code]}: cache build"), monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match=r"cannot write in .*what is finished is safe: mend that and run it") as error:
                build(folder, source)
        assert error.value.errno == code and os.strerror(code) in str(error.value)
        assert not list(folder.glob("*.tmp"))
        if fail_at > 2:
            cache = PairCache(folder)
            assert all(cache._is_good(int(shard)) for shard in cache.shards)
            assert len(cache.shards) >= (fail_at - 4) // 4
        build(folder, source)
        assert contents(folder) == unbroken[source]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", folder]).returncode != 0:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@source
def test_a_full_disk_is_one_clear_error_and_loses_nothing(small_disk, unbroken, source):
    folder = small_disk / "cache"
    done = 0
    for size in (32, 44):  # nor is there anything to gain from a second try
        subprocess.run(["mount", "-o", f"remount,size={size}k", small_disk], check=True)
        with (
            fault("disk full: cache build"),
            pytest.raises(OSError, match=r"cannot write in .*cache \(No space left on device\); what is finished is safe"),
        ):
            build(folder, source)
        assert not list(folder.glob("*.tmp"))
        cache = PairCache(folder)
        assert done < len(cache.shards) < 6 and all(cache._is_good(int(shard)) for shard in cache.shards)
        done = len(cache.shards)
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    build(folder, source)
    assert contents(folder) == unbroken[source]


@fault("disk full: cache refresh")
def test_a_full_disk_during_a_refresh_loses_nothing(small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    folder = small_disk / "cache"
    build(folder)
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (small_disk / "film").write_bytes(bytes(free - 4096))
    with pytest.raises(OSError, match="No space left on device"):
        PairCache(folder).refresh(B)
    (small_disk / "film").unlink()
    PairCache(folder).refresh(B)
    assert contents(folder) == contents(build(tmp_path / "good", teacher=B).folder)


def test_a_read_only_folder_is_one_clear_error(small_disk, unbroken):
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    build(small_disk / "cache")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for write in (
        lambda: build(small_disk / "new"),
        lambda: build(small_disk / "cache"),
        PairCache(small_disk / "cache").refresh,
    ):
        with fault("read-only disk"), pytest.raises(OSError, match=r"cannot write in .*\(Read-only file system") as error:
            write(*[B] * (write.__name__ == "refresh"))
        assert error.value.errno == errno.EROFS
    cache = PairCache.open(small_disk / "cache")  # reading needs no permission to write
    assert cache.verify() == [] and len(next(cache.loader(8))["t"]) == 8


@fault("folder of somebody else")
def test_a_folder_of_somebody_else_is_one_clear_error(tmp_path):
    """As another user, since root may write anywhere."""
    outside = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())  # others cannot enter tmp_path
    outside.chmod(0o555)

    def attempt():
        if os.getuid() == 0:
            os.setuid(65534)
        with pytest.raises(PermissionError, match=r"cannot write in .*\(Permission denied\)"):
            build(outside / "cache")

    try:
        assert wait(start(attempt)) == 0
        assert not list(outside.iterdir())
    finally:
        outside.rmdir()
