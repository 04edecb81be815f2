"""The script for a machine with a GPU, dry-run on the CPU: killed on the way, resumed, and without diffusers or datasets."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_cifar10 as script  # noqa: E402
from benchmarks import gpu_parts  # noqa: E402
from cmlib import recipes  # noqa: E402
from cmlib.consistency import ConsistencyFunction  # noqa: E402
from cmlib.train import read_checkpoint  # noqa: E402
from cmlib.unet import UNet  # noqa: E402

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


ABSENT = ("diffusers", "datasets", "sklearn", "IPython")  # from the machine with the GPU, or of no use there


def at_once(teacher, sigma_max):
    """`warm_start` without its fit of the time embedding, which takes half of a dry run."""
    net = UNet.from_config(teacher.unet.config)
    net.load_state_dict(teacher.unet.state_dict())
    return ConsistencyFunction(net, teacher.process.sigma_min, sigma_max, 1.0, 100.0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_dry_run_killed_in_a_student_goes_on_from_there(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.parity, "RUNS", 1)
    monkeypatch.setattr(recipes, "warm_start", at_once)
    monkeypatch.setattr(script.export, "save", lambda *_: (_ for _ in ()).throw(ValueError("no engine")))
    for name in (*ABSENT, *sys.modules):
        if name.split(".")[0] in ABSENT:
            monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
    monkeypatch.setattr(torch._dynamo.config, "disable", True)  # compiling takes most of a dry run; test_train.py has it
    state, out = tmp_path / "state", tmp_path / "out"
    run = ["run", "--dry-run", "--data", str(packed), "--state", str(state), "--out", str(out), "--minutes"]

    pid = os.fork()
    if pid == 0:  # dies by SIGKILL in ECT's sixth update of eight
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
    assert before["done.cd_evaluated"] == 1 and "done.ect" not in before
    assert read_checkpoint(state / "ect" / "checkpoint.pt")["step"] == 4

    assert script.main([*run, "0.5"]) == 0 and "time is up" in capsys.readouterr().out, "no stage begins in the last minute"
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
    run.sizes, made = script.Sizes(), []
    run.train = lambda name, model, *rest: made.append(model)
    run.teacher()
    gpu_parts.save_teacher(made[0], tmp_path / "teacher.safetensors")
    assert (tmp_path / "teacher.safetensors").stat().st_size < 16e6
    teacher = gpu_parts.load_teacher(tmp_path / "teacher.safetensors")
    weights = made[0].net.state_dict()
    assert all(torch.equal(v, weights[k].half().float()) for k, v in teacher.unet.state_dict().items())
