"""The script for a machine with a GPU, dry-run on the CPU: killed on the way, resumed, and without diffusers or datasets."""

import io
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_cifar10 as script  # noqa: E402
from benchmarks import gpu_parts  # noqa: E402
from cmlib import cache, formats, recipes  # noqa: E402
from cmlib.consistency import ConsistencyFunction  # noqa: E402
from cmlib.export import Exported  # noqa: E402
from cmlib.train import read_checkpoint  # noqa: E402
from cmlib.unet import UNet  # noqa: E402
from tests.small import UNET  # noqa: E402

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def packed(tmp_path, monkeypatch):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")

    def png(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    folder = tmp_path / "sets" / "cifar10" / "plain_text"
    folder.mkdir(parents=True)
    table = pyarrow.table({"img": [png(p) for p in PIXELS], "label": [0] * len(PIXELS)})
    parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    monkeypatch.setenv("CMLIB_DATASETS", str(tmp_path / "sets"))
    assert script.main(["pack", "--out", str(tmp_path)]) == 0
    return tmp_path / "cifar10.parquet"


@pytest.fixture
def uncompiled():
    """Compiling takes most of a dry run; test_train.py has it. After `monkeypatch` torch's configuration would lack the key."""
    with torch._dynamo.config.patch(disable=True):
        yield


ABSENT = ("diffusers", "datasets", "sklearn", "IPython")  # from the machine with the GPU, or of no use there


def at_once(teacher, sigma_max):
    """`warm_start` without its fit of the time embedding, which takes half of a dry run."""
    net = UNet.from_config(teacher.unet.config)
    net.load_state_dict(teacher.unet.state_dict())
    return ConsistencyFunction(net, teacher.process.sigma_min, sigma_max, 1.0, 100.0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_dry_run_killed_in_a_student_goes_on_from_there(packed, uncompiled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.parity, "RUNS", 1)
    monkeypatch.setattr(recipes, "warm_start", at_once)
    monkeypatch.setattr(script.export, "save", lambda *_: (_ for _ in ()).throw(ValueError("no engine")))
    for name in (*ABSENT, *sys.modules):
        if name.split(".")[0] in ABSENT:
            monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
    state, out = tmp_path / "state", tmp_path / "out"
    run = ["run", "--dry-run", "--data", str(packed), "--state", str(state), "--out", str(out), "--minutes"]

    pid = os.fork()
    if pid == 0:  # dies by SIGKILL in ECT's sixth update of eight
        torch.set_num_threads(1)  # a forked process must not wait for the threads of its parent
        stream = script.data.batches

        def dying(images, batch_size, seed=0, start=0):
            for step, batch in enumerate(stream(images, batch_size, seed, start), start):
                if step == 5 and (state / "ect" / "checkpoint.pt").exists():
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        script.data.batches = dying
        script.main([*run, "60"])
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    before = json.loads((out / "metrics.json").read_text())
    assert before["done.cd_evaluated"] == 1 and "done.ect" not in before and before["seconds.ect"] >= 0
    assert [row["step"] for row in json.loads((out / "curves.json").read_text())["ect"]] == [2, 4]
    assert read_checkpoint(state / "ect" / "checkpoint.pt")["step"] == 4

    assert script.main([*run, "2"]) == 0 and "time is up" in capsys.readouterr().out, "no stage begins at the end"
    built = {p.name: p.stat().st_mtime_ns for p in (*(state / "cache").iterdir(), state / "cd.safetensors")}
    assert script.main([*run, "60"]) == 0 and "all done" in capsys.readouterr().out
    assert built == {p.name: p.stat().st_mtime_ns for p in (*(state / "cache").iterdir(), state / "cd.safetensors")}

    metrics, curves = (json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "curves"))
    assert [row["step"] for row in curves["ect"]] == [2, 4, 6, 8] and all(row["fd"] > 0 for row in curves["ect"])
    wanted = {f"fd.{name}_{k}" for name in ("teacher", "cd", "ect", "sct") for k in (1, 2, 4)} | {"fd.teacher"}
    assert wanted <= {k for k, v in metrics.items() if isinstance(v, float) and np.isfinite(v)}
    assert all(metrics[k] == v for k, v in before.items() if k.startswith("fd.")), "nothing is measured twice"
    assert metrics["latency_ms.compiled.batch_1.p50"] > 0 and "no onnx (ValueError: no engine)" in metrics["protocol.latency"]
    assert metrics["protocol.features"].startswith("fd_random")
    assert {p.name for p in out.iterdir()} == {
        "metrics.json", "curves.json", "samples.png", *(f"{n}.safetensors" for n in ("teacher", "cd", "ect", "sct"))
    }  # fmt: skip
    assert ConsistencyFunction.load(out / "ect.safetensors").image_shape == (3, 32, 32)
    assert torch.equal(gpu_parts.unpack(packed), torch.from_numpy(PIXELS).permute(0, 3, 1, 2))


def test_the_full_size_fits_in_a_file_and_other_sizes_are_refused(tmp_path, packed, capsys):
    run = script.Run(packed, tmp_path, tmp_path / "out", 9, script.DRY)
    run.keep()
    arguments = ["run", "--data", str(packed), "--state", str(tmp_path), "--out", str(tmp_path / "out")]
    assert script.main(arguments) == 2 and capsys.readouterr().err.startswith("error: ")
    for option in ("--teacher-minutes", "--student-minutes"):
        assert script.main([*arguments, "--dry-run", option, "5"]) == 2
        told = capsys.readouterr().err
        assert "teacher_minutes=8.0, student_minutes=3.0" in told and f"{option[2:].replace('-', '_')}=5.0" in told
    run.sizes, made = script.Sizes(), []
    run.train = lambda name, model, *rest: made.append(model)
    run.teacher()
    gpu_parts.save_teacher(made[0], tmp_path / "teacher.safetensors")
    assert (tmp_path / "teacher.safetensors").stat().st_size < 16e6
    teacher = gpu_parts.load_teacher(tmp_path / "teacher.safetensors")
    weights = made[0].net.state_dict()
    assert all(torch.equal(v, weights[k].half().float()) for k, v in teacher.unet.state_dict().items())


@pytest.fixture
def started(packed, uncompiled, tmp_path, monkeypatch):
    """`started(minutes)` is a dry run whose teacher is there, untrained."""
    monkeypatch.setattr(recipes, "warm_start", at_once)

    def start(minutes=60.0):
        run, made = script.Run(packed, tmp_path / "state", tmp_path / "out", minutes, script.DRY), []
        run.train = lambda name, model, *rest: made.append(model)
        run.teacher()
        del run.train
        if not (run.state / "teacher.safetensors").exists():
            gpu_parts.save_teacher(made[0], run.state / "teacher.safetensors")
        run.metrics["done.teacher"] = 1
        return run

    return start


def test_the_minutes_say_how_many_updates(started, monkeypatch):
    run, clock, asked = started(), [0.0], {}

    def fit(model, objective, batches, steps, *, on_every, every, **settings):
        if settings.get("folder"):
            asked[settings["name"]] = steps
            return model, [{"step": 0, "seconds": 0.0}]
        for step in (every, 2 * every):  # the probe: half a second an update
            clock[0] += every / 2
            on_every(step, model)
        return model, []

    monkeypatch.setattr(script, "fit", fit)
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    run.sizes = script.replace(script.DRY, updates=0, teacher_minutes=2.0, student_minutes=0.5)
    run.teacher()
    run.student("ect")
    assert asked == {"teacher": 240, "ect": 60}


def test_ect_and_sct_whose_pairs_lie_close_train_in_fp16_with_the_loss_scale(started, monkeypatch):
    class Asked(Exception):
        pass

    def fit(*args, precision, **settings):
        raise Asked(precision)

    monkeypatch.setattr(script, "fit", fit)
    run, found = started(), {}
    for name, work in {"teacher": run.teacher, **{n: script.partial(run.student, n) for n in script.STUDENTS}}.items():
        with pytest.raises(Asked) as asked:
            work()
        found[name] = str(asked.value)
    assert found == {"teacher": "bf16", "cd": "bf16", "ect": "fp16", "sct": "fp16"}


def test_the_teacher_of_few_evaluations_begins_in_noise_and_ends_at_the_image(started, monkeypatch):
    seen, load = [], script.load_teacher

    def watched(path):
        teacher = load(path)
        teacher.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
        return teacher

    monkeypatch.setattr(script, "load_teacher", watched)
    run = started()
    samplers = run.samplers("teacher")
    for k in script.EVALUATIONS:
        seen.clear()
        images = samplers[f"teacher_{k}"](run.noise)
        x, n = seen[0]
        assert len(seen) == k and 900 <= float(n.min()) <= 999 and x.std() == pytest.approx(1, rel=0.05)
        assert all(float(b.max()) < float(a.min()) - 200 for (_, a), (_, b) in zip(seen, seen[1:], strict=False))
        assert images.abs().max() <= 1 + 1e-3
    assert "from the students' σ_max" in run.metrics["protocol.teacher"]


def test_what_the_minutes_cut_off_goes_on_and_its_seconds_add_up(started, monkeypatch):
    clock = [0.0]

    def monotonic():
        clock[0] += 1
        return clock[0]

    monkeypatch.setattr(cache, "SHARD", 4)  # of 16 pairs
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(script, "LAST", 8)

    def told(run):
        return json.loads((run.out / "metrics.json").read_text())

    first = started(13 / 60)  # from second 1 to 14
    assert not first.go()
    built = {p: p.stat().st_mtime_ns for p in (first.state / "cache").glob("shard-*.pt")}
    assert 0 < len(built) < 4 and told(first)["done.cache"] == 0
    seconds = told(first)["seconds.cache"]
    assert 5 <= seconds <= 13
    second = started()
    second.evaluated = lambda name: False
    assert not second.go() and told(second)["done.cache"] == 1
    assert len(list((first.state / "cache").glob("shard-*.pt"))) == 4
    assert all(p.stat().st_mtime_ns == v for p, v in built.items())
    assert told(second)["seconds.cache"] > seconds

    del second.evaluated
    late = iter([False, False, True])
    second.late = lambda seconds: next(late)
    assert not second.go() and {k for k in told(second) if k.startswith("fd.teacher")} == {"fd.teacher_1"}
    spent = told(second)["seconds.teacher_evaluated"]

    def broken(*_):
        raise RuntimeError("the GPU is gone")

    second.late, second.draw = lambda seconds: False, broken
    assert not second.go()
    assert told(second)["seconds.teacher_evaluated"] > spent > 0 and told(second)["done.teacher_evaluated"] == 0
    assert told(second)["error.teacher_evaluated"] == "RuntimeError: the GPU is gone"
    assert told(second)["done.latency"] == 0, "what comes after was tried, too"


def test_the_latency_stage_says_what_onnx_runtime_runs_on(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_: session)
    loaded = Exported(formats.read_onnx(tmp_path / "model.onnx"), "cpu")
    assert gpu_parts.providers(loaded) == "CUDAExecutionProvider, CPUExecutionProvider"

    run = SimpleNamespace(state=tmp_path, device=torch.device("cpu"), metrics={})
    ConsistencyFunction(UNet(**UNET)).save(tmp_path / "sct.safetensors")
    monkeypatch.setattr(script.export, "save", lambda *_: None)
    monkeypatch.setattr(script.export, "load", lambda *_: loaded)
    monkeypatch.setattr(script.parity, "latency", lambda functions, *_: dict.fromkeys(functions, 1.0))
    assert script.Run.latency(run) and run.metrics["onnx"] == 1.0
    assert "onnx in fp32 on CUDAExecutionProvider, CPUExecutionProvider" in run.metrics["protocol.latency"]
