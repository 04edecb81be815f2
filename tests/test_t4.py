"""Profile t4 before there is a T4: float16 with a loss scale, the whole architecture at random weights, on the CPU.

8×8 images instead of 32×32, as a CPU's float16 is slow; the weights, 35.7 million, are as many.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from cmlib import data, pipeline, train
from cmlib.cache import PairCache
from cmlib.consistency import PlainFunction
from cmlib.objectives import Denoising
from cmlib.process import DDPM
from cmlib.profiles import T4
from cmlib.recipes import first_student
from cmlib.teacher import Teacher
from cmlib.train import fit, read_checkpoint
from cmlib.unet import UNet
from tests.small import UNET, seeded
from tests.test_unet import CIFAR10

IMAGES = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=seeded())


@pytest.fixture
def scaled(monkeypatch):
    """`fit` as on a GPU: accelerate itself leaves float16 and the loss scale out on a CPU. Returns the scaler's arguments."""
    plain, arguments = train._accelerator, {}

    def accelerator(precision):
        made = plain("no")
        if precision == "fp16":
            made.state._mixed_precision, made.native_amp = "fp16", True
            made.scaler = torch.amp.GradScaler("cpu", **arguments)
        return made

    monkeypatch.setattr(train, "_accelerator", accelerator)
    return arguments


def test_the_whole_architecture_trains_in_fp16_as_in_fp32(tmp_path, monkeypatch, scaled):
    config = {**CIFAR10, "sample_size": 8}
    assert config["block_out_channels"] == T4.widths and T4.precision == "fp16"
    monkeypatch.setattr(pipeline, "draw", lambda f, n, *rest: torch.zeros(n, 3, 8, 8))
    torch.manual_seed(0)
    teacher = Teacher(UNet(**config), DDPM.linear())
    cache = PairCache.build(tmp_path / "cache", teacher, 4, T4.source, IMAGES, T4.solver, batch_size=2)
    losses, dtypes = {}, []
    for precision in ("no", "fp16"):
        student = PlainFunction(UNet(**config))
        student.net.load_state_dict(teacher.unet.state_dict())
        student.net.conv_in.register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
        profile, out = replace(T4, batch_size=2, precision=precision), tmp_path / precision
        average, history = pipeline.distill("pair-regression", student, profile, out, updates=2, cache=cache, every=2)
        losses[precision] = history[0]["loss"]
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in average.state_dict().values())
    assert dtypes == [torch.float32] * 2 + [torch.float16] * 2
    assert losses["fp16"] == pytest.approx(losses["no"], rel=0.01) and losses["fp16"] != losses["no"]


def test_consistency_distillation_trains_the_whole_architecture_in_fp16(tmp_path, monkeypatch, scaled):
    monkeypatch.setattr(pipeline, "draw", lambda f, n, *rest: torch.zeros(n, 3, 8, 8))
    torch.manual_seed(0)
    teacher = Teacher(UNet(**{**CIFAR10, "sample_size": 8}), DDPM.linear())
    student = first_student("consistency-distillation", teacher, 20.0)
    dtypes = []
    for net in (student.net, teacher.unet):
        net.conv_in.register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    profile = replace(T4, batch_size=2)
    pairs = {"teacher": teacher, "images": IMAGES}
    average, history = pipeline.distill("consistency-distillation", student, profile, tmp_path, updates=2, every=2, **pairs)
    assert history[-1]["step"] == 2 and set(dtypes) == {torch.float16}
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in average.state_dict().values())


def test_too_large_a_loss_scale_halves_and_a_resumed_run_remembers_it(tmp_path, scaled):
    scaled["init_scale"] = 2.0**24

    def run(folder, stop_at):
        torch.manual_seed(0)
        unet = UNet(**{**UNET, "in_channels": 3, "out_channels": 3})
        settings = {"folder": tmp_path / folder, "every": 2, "precision": "fp16", "resume": True}
        settings["stop"] = lambda history: history[-1]["step"] == stop_at
        fit(unet, Denoising(DDPM.linear()), partial(data.batches, IMAGES, 8, 0), 20, **settings)
        return read_checkpoint(tmp_path / folder / "checkpoint.pt")

    first = run("cut", 2)
    assert first["scaler"]["scale"] == 2.0**22 and not first["optimizer"]["state"], "two steps too large, neither taken"
    run("cut", 10)
    resumed, whole = run("cut", 20), run("whole", 20)
    assert 2.0**10 < whole["scaler"]["scale"] < 2.0**22 and resumed["scaler"] == whole["scaler"]
    assert all(torch.equal(v, resumed["model"][k]) for k, v in whole["model"].items())
    assert any(not torch.equal(v, first["model"][k]) for k, v in whole["model"].items()), "and later ones are taken"
