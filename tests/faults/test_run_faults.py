"""Every stage of the command line while it is killed, interrupted, starved of disk space, or fed damaged files.

Each fault is counted: injected, survived (the result is, bit for bit, that of a run without it, or one clear line said what
to do and nothing was touched), lost. Moments are random; CMLIB_FAULT_SEED repeats them.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cmlib import cli, profiles
from cmlib.cache import PairCache
from cmlib.consistency import ConsistencyFunction
from cmlib.process import DDPM
from cmlib.teacher import Teacher
from cmlib.unet import UNet
from tests.faults.counts import RANDOM, fault
from tests.faults.test_cache_faults import start, wait
from tests.small import UNET

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, to import torch once")

TINY = replace(profiles.CI, name="tiny", widths=(8, 16), pairs=200, rollout_steps=5, samples=40, timesteps=2, batch_size=16)


@pytest.fixture(scope="module", autouse=True)
def tiny_profile():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(profiles.PROFILES, "tiny", TINY)
        patch.setattr(os, "fsync", lambda file: None)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


# ---- the stages, in a folder whose name has spaces and letters

STAGES = {
    "teacher": "teacher finetune --teacher {here}/first --updates 8 --limit 64 --resume --out {here}/teacher",
    "cache": "cache build --teacher {here}/first --batch-size 10 --out {here}/cache",
    "distill": "distill --objective endpoint-regression --teacher {here}/first --cache {here}/cache --updates 8 --resume"
    " --out {here}/student",
    "sample": "sample --checkpoint {here}/student/student.pt --n 20 --evaluations 2 --out {here}/samples",
    "evaluate": "evaluate --checkpoint {here}/student/student.pt --teacher {here}/first --limit 60 --out {here}/evaluation",
}
NEEDS = {"teacher": (), "cache": (), "distill": ("cache",), "sample": ("student",), "evaluate": ("student",)}
MAKES = {"teacher": "teacher", "cache": "cache", "distill": "student", "sample": "samples", "evaluate": "evaluation"}
EXPORT = {"export": "export --format diffusers --checkpoint {here}/student/student.pt --out {here}/exported"}
NEEDS["export"], MAKES["export"] = ("student",), "exported"


def run(stage: str, here: Path) -> int:
    return cli.main([part.format(here=here) for part in (STAGES | EXPORT)[stage].split()] + ["--profile", "tiny"])


def results(folder: Path) -> dict[str, object]:
    """All that a stage leaves, but for seconds and memory, file names of its own, and pictures, which matplotlib stamps."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.endswith("metrics.json"):
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if "seconds" not in k and "memory" not in k}
        elif path.name == "checkpoint.pt":
            state = torch.load(path, weights_only=True)
            found[name] = [[v.tolist() for v in state[part].values()] for part in ("model", "ema")], state["step"]
        elif path.is_file() and path.suffix not in (".lock", ".png"):
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """All stages, undisturbed."""
    here = tmp_path_factory.mktemp("väärä σ 道") / "with spaces"
    torch.manual_seed(0)
    Teacher(UNet(**UNET), DDPM.linear()).save_pretrained(here / "first")
    for stage in STAGES:
        began = time.monotonic()
        with fault("path with spaces and Unicode"):
            assert run(stage, here) == 0
        SECONDS[stage] = time.monotonic() - began
    return here


SECONDS: dict[str, float] = {}


def fresh(whole: Path, folder: Path, stage: str) -> Path:
    """A folder in which only what `stage` needs exists."""
    here = folder / f"ein Ort {RANDOM.getrandbits(40):x} ß"
    for name in ("first", *NEEDS[stage]):
        shutil.copytree(whole / name, here / name)
    return here


def same_as_whole(whole: Path, here: Path, stage: str) -> None:
    made = MAKES[stage]
    assert results(here / made) == results(whole / made)
    assert not list((here / made).rglob("*.tmp"))


def hit(whole: Path, folder: Path, stage: str, how: int) -> tuple[Path, list[str]]:
    """A folder in which `how` met the stage at work, and the lines it said; where it was done already, once more and sooner."""
    span = SECONDS[stage]
    for _ in range(20):
        here = fresh(whole, folder, stage)
        said = here.with_suffix(".txt")

        def work(here=here, said=said):
            with open(said, "w") as file, contextlib.redirect_stdout(None), contextlib.redirect_stderr(file):
                code = run(stage, here)
            os._exit(code)

        pid = start(work)
        while not said.exists():  # it has not begun
            time.sleep(0.001)
        time.sleep(RANDOM.random() * span)
        os.kill(pid, how)
        code, lines = wait(pid), re.findall("cmlib: .*", said.read_text())
        assert not [line for line in lines if "unforeseen" in line]
        if code == -signal.SIGKILL or (code == 130 and how == signal.SIGINT):
            return here, lines
        span *= 0.8 if code == 0 else 1.25  # done already, or not yet past reading its arguments
    raise AssertionError(f"{stage} is too fast to be met at work")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_stopped_at_a_random_moment_ends_as_if_it_had_not_been(whole, tmp_path, stage, how):
    for _ in range(2):
        with fault(f"{'kill -9' if how == signal.SIGKILL else 'ctrl-c'}: {stage}"):
            here, said = hit(whole, tmp_path, stage, how)
            assert said == ([] if how == signal.SIGKILL else ["cmlib: interrupted; the same command goes on from here"])
            assert run(stage, here) == 0
            for left in (here / MAKES[stage]).rglob("*.tmp"):  # a kill may leave one, outside the cache; nobody reads it
                assert how == signal.SIGKILL
                left.unlink()
            same_as_whole(whole, here, stage)


# ---- the disk


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up_is_one_line_and_the_next_run_is_whole(whole, tmp_path, stage, monkeypatch, capfd):
    writes: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: writes.append(file))
        here = fresh(whole, tmp_path, stage)
        assert run(stage, here) == 0
    for _ in range(2):
        here, left = fresh(whole, tmp_path, stage), RANDOM.randrange(len(writes))
        with fault(f"disk full: {stage}"), monkeypatch.context() as patch:
            budget = iter(range(left))

            def full(file, budget=budget):
                if next(budget, None) is None:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(os, "fsync", full)
            capfd.readouterr()
            assert run(stage, here) == 2
            told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cmlib:")]
            assert len(told) == 1 and "No space left on device" in told[0]
            assert not list(here.rglob("*.tmp"))
            patch.setattr(os, "fsync", lambda file: None)
            assert run(stage, here) == 0
            same_as_whole(whole, here, stage)


@pytest.mark.parametrize("stage", [*STAGES, *EXPORT])
def test_nothing_gets_its_name_before_its_bytes_are_on_the_disk(whole, tmp_path, stage, monkeypatch):
    """A power cut may lose whatever was not fsynced: every file but locks comes by a rename of one that was, and the folder
    is fsynced after it."""
    here, synced, named, order = fresh(whole, tmp_path, stage), set(), set(), []
    move, opened = os.replace, []
    sys.addaudithook(lambda event, args: opened.append(args) if event == "open" and str(here) in str(args[0]) else None)

    def fsync(file):
        path = os.readlink(f"/proc/self/fd/{file}")
        synced.add(path)
        order.append(("sync", path))

    def watched(a, b):
        assert str(Path(a).resolve()) in synced, f"{b} was renamed before its bytes were on the disk"
        order.append(("name", str(Path(b).resolve().parent)))
        named.add(str(Path(b).resolve()))
        move(a, b)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", watched)
    with fault(f"power cut: {stage}"):
        assert run(stage, here) == 0
        for k, (what, path) in enumerate(order):
            assert what == "sync" or order[k + 1] == ("sync", path)
        made = {str(p.resolve()) for p in (here / MAKES[stage]).rglob("*") if p.is_file() and p.suffix != ".lock"}
        assert made == {path for path in named if path.startswith(str(here.resolve()))} and opened


def test_a_folder_that_cannot_be_written_is_one_line(whole, capfd):
    """/proc takes no files from anybody, not even from root."""
    for stage in STAGES:
        with fault("read-only folder"):
            command = [p.format(here=whole) for p in STAGES[stage].split()]
            command[command.index("--out") + 1] = "/proc/cmlib"
            assert cli.main([*command, "--profile", "tiny"]) == 2
            assert capfd.readouterr().err.splitlines()[-1].startswith("cmlib: cannot make the folder --out /proc/cmlib")


# ---- damaged files


def damage(path: Path, how: str, other: Path | None = None) -> None:
    raw = bytearray(path.read_bytes())
    if how == "flipped":
        raw[RANDOM.randrange(len(raw))] ^= 1 << RANDOM.randrange(8)
    elif how == "cut":
        raw = raw[: RANDOM.randrange(len(raw))]
    elif how == "swapped":
        raw = bytearray(other.read_bytes())
    path.unlink() if how == "missing" else path.write_bytes(raw)


@pytest.mark.parametrize("how", ["flipped", "cut", "swapped", "missing"])
def test_a_damaged_shard_is_found_and_rebuilt(tmp_path, how, monkeypatch):
    from cmlib import cache as module

    monkeypatch.setattr(module, "SHARD", 20)
    torch.manual_seed(0)
    teacher, folder = Teacher(UNet(**UNET), DDPM.linear()), tmp_path / "c"
    build = dict(pairs=100, source="rollout", solver="ddim", steps=5, shape=(1, 8, 8), batch_size=4)
    cache = PairCache.build(folder, teacher, **build)
    good = {p.name: p.read_bytes() for p in folder.glob("shard-*")}
    for _ in range(6):
        with fault(f"shard {how}"):
            k = RANDOM.randrange(cache.n_shards)
            damage(cache.path(k), how, cache.path((k + 1) % cache.n_shards))
            assert PairCache(folder).verify() == [k]
            with pytest.raises(ValueError, match=f"shard {k} of .* is missing or damaged|1 of 5 shards"):
                next(PairCache.open(folder).loader(100))
            PairCache.build(folder, teacher, **build)
            assert {p.name: p.read_bytes() for p in folder.glob("shard-*")} == good


@pytest.mark.parametrize("how", ["flipped", "cut"])
@pytest.mark.parametrize(("name", "stage"), [("student/student.pt", "sample"), ("student/training/checkpoint.pt", "distill")])
def test_damaged_weights_are_one_line_and_never_used(whole, tmp_path, capfd, name, stage, how):
    """torch.load itself does not notice a flipped bit in a weight; a flip in the zip's padding changes nothing."""
    here = tmp_path / "weights"
    for part in ("first", "cache", "student"):
        shutil.copytree(whole / part, here / part)
    good = (here / name).read_bytes()
    for _ in range(4):
        with fault(f"{Path(name).name} {how}"):
            damage(here / name, how)
            shutil.rmtree(here / MAKES["sample"], ignore_errors=True)
            code = run(stage, here)
            if code == 2:
                assert "student" in capfd.readouterr().err.splitlines()[-1]
                assert not (here / MAKES["sample"] / "samples.npz").exists()
            else:  # nothing that counts was hit
                assert code == 0 and how == "flipped"
                same_as_whole(whole, here, stage)
        (here / name).write_bytes(good)


def test_a_flipped_bit_in_safetensors_is_never_used(whole, tmp_path):
    path = Path(shutil.copy(whole / "student" / "student.safetensors", tmp_path))
    good, f = path.read_bytes(), ConsistencyFunction.load(path)
    for _ in range(6):
        with fault("student.safetensors flipped"):
            damage(path, "flipped")
            with contextlib.suppress(ValueError):  # unless nothing that counts was hit
                found = ConsistencyFunction.load(path)
                assert found.config == f.config
                assert all(torch.equal(value, f.state_dict()[name]) for name, value in found.state_dict().items())
        path.write_bytes(good)


def test_an_edited_manifest_is_refused(whole, tmp_path, capfd):
    for edit in ('"steps"', '"pairs"', '"seed"', "sigmas", "sha256", "0", "1", ","):
        here = fresh(whole, tmp_path, "cache")
        shutil.copytree(whole / "cache", here / "cache")
        manifest = here / "cache" / "manifest.json"
        with fault("manifest edited"):
            text = manifest.read_text()
            at = RANDOM.choice([k for k in range(len(text)) if text.startswith(edit, k)])
            manifest.write_text(text[:at] + "7" + text[at + 1 :])
            assert run("cache", here) == 2
            assert "is damaged; delete that file and build again" in capfd.readouterr().err.splitlines()[-1]
            manifest.unlink()
            assert run("cache", here) == 0
            same_as_whole(whole, here, "cache")


def test_a_checkpoint_of_another_model_or_with_code_in_it_is_refused(whole, tmp_path, capfd):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.manual_seed(0)
    wide = ConsistencyFunction(UNet(**UNET | {"sample_size": 16}), 0.0, 80.0)
    for kind in ("another model", "code"):
        for stage, name in (("distill", "student/training/checkpoint.pt"), ("evaluate", "student/student.pt")):
            with fault(f"checkpoint: {kind}"):
                here = tmp_path / f"{kind} {stage}"
                for part in ("first", "cache", "student"):
                    shutil.copytree(whole / part, here / part)
                wide.save(here / name) if kind == "another model" else torch.save({"ema": Evil(), "config": {}}, here / name)
                before = (here / name).read_bytes()
                assert run(stage, here) == 2
                assert len([x for x in capfd.readouterr().err.splitlines() if x.startswith("cmlib:")]) == 1
                assert (here / name).read_bytes() == before and not (tmp_path / "executed").exists()


def test_a_teacher_that_gives_nan_stops_a_stage_before_anything_is_kept(whole, tmp_path, capfd):
    for stage in ("teacher", "cache", "distill"):
        with fault("NaN from the teacher"):
            here = tmp_path / stage
            teacher = Teacher.from_pretrained(whole / "first")
            teacher.unet.conv_out.weight.data[0, RANDOM.randrange(8)] = float("nan")
            teacher.save_pretrained(here / "first")
            if stage == "distill":
                STAGES["on the fly"] = "distill --teacher {here}/first --updates 4 --limit 20 --out {here}/student"
            code = run("on the fly" if stage == "distill" else stage, here)
            STAGES.pop("on the fly", None)
            assert code == 2
            line = capfd.readouterr().err.splitlines()[-1]
            assert line.startswith("cmlib: ") and ("NaN" in line or "not finite" in line)
            assert not list(here.rglob("shard-*")) + list(here.rglob("student.pt")) + list(here.rglob("checkpoint.pt"))


# ---- together


def test_two_builds_with_different_keys_in_one_folder(whole, tmp_path):
    """One wins, whole; the other is refused and changes nothing."""
    for _ in range(4):
        here = fresh(whole, tmp_path, "cache")
        with fault("two keys in one folder"):
            command = [part.format(here=here) for part in STAGES["cache"].split()] + ["--profile", "tiny", "--seed"]
            pids = []
            for seed in (0, 1):
                pids.append(start(lambda seed=seed, command=command: os._exit(cli.main([*command, str(seed)]))))
                time.sleep(RANDOM.random() * 0.02)
            assert sorted(map(wait, pids)) == [0, 2]
            cache = PairCache.open(here / "cache")
            assert cache.verify() == []
            if cache.key["seed"] == 0:
                wanted = {k: v for k, v in results(whole / "cache").items() if k != "metrics.json"}
                assert {k: v for k, v in results(here / "cache").items() if k != "metrics.json"} == wanted


def test_a_rank_that_dies_ends_the_run_and_one_process_goes_on_from_there(whole, tmp_path):
    if not Path("/proc").exists():
        pytest.skip("needs /proc")
    here = fresh(whole, tmp_path, "distill")
    command = ["distill", "--objective", "endpoint-regression", "--cache", f"{here}/cache", "--teacher", f"{here}/first"]
    command += ["--updates", "100", "--profile", "ci"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "cmlib"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    assert cli.main([*command, "--out", f"{here}/one"]) == 0
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 2.0, 9.0])
    undisturbed = ConsistencyFunction.load(here / "one" / "student.pt")(x, t)
    for dying in (0, 1):
        out = here / f"without {dying}"
        with fault("a rank that dies"):
            both = subprocess.Popen([*launch, *command, "--out", str(out)], **quiet)
            checkpoint, end = out / "training" / "checkpoint.pt", time.monotonic() + 90
            while not checkpoint.exists() and both.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            assert checkpoint.exists()
            time.sleep(RANDOM.random() * 0.3)
            ranks = Path(f"/proc/{both.pid}/task/{both.pid}/children").read_text().split()
            os.kill(int(ranks[dying]), signal.SIGKILL)
            assert both.wait(60) != 0  # torchrun ends the other one, too
            assert torch.load(checkpoint, weights_only=True)["step"] in (25, 50, 75)
            assert cli.main([*command, "--out", str(out), "--resume"]) == 0
            resumed = ConsistencyFunction.load(out / "student.pt")(x, t)
            torch.testing.assert_close(resumed, undisturbed, rtol=1e-4, atol=1e-4)  # the updates carry the rounding on


# ---- an odd machine


@pytest.mark.parametrize("odd", ["clock", "clock", "tr_TR.ISO-8859-9", "C"])
def test_clock_and_locale_do_not_matter(whole, tmp_path, monkeypatch, odd):
    here = fresh(whole, tmp_path, "cache")
    with fault("clock odd" if odd == "clock" else "locale odd"):
        if odd == "clock":  # jumps about, before 1970 too, and all files are of the future
            monkeypatch.setattr(time, "time", lambda: RANDOM.uniform(-(10**9), 10**10))
            for path in (here / "first").rglob("*"):
                os.utime(path, (4 * 10**9, 4 * 10**9))
            assert run("cache", here) == 0 and run("cache", here) == 0
        else:
            command = [part.format(here=here) for part in STAGES["cache"].split()] + ["--pairs", "200", "--steps", "5"]
            environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": odd, "TZ": "XYZ-13:37"}
            environment |= {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "0", "CMLIB_PROFILE": "ci"}
            done = subprocess.run([sys.executable, "-m", "cmlib", *command], env=environment, capture_output=True)
            assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
        good, made = (results(folder / "cache") for folder in (whole, here))
        assert {k: v for k, v in made.items() if k != "metrics.json"} == {k: v for k, v in good.items() if k != "metrics.json"}
