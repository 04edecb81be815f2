"""What the failure clinic shows on purpose, the library does not do; and each test that the clinic names is there."""

import copy
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cmlib import data
from cmlib.consistency import ConsistencyFunction
from cmlib.continuous import MeanFlowFunction
from cmlib.objectives import (
    ECT,
    ICT,
    SCM,
    SCT,
    BootstrapRegression,
    ConsistencyDistillation,
    ConsistencyTraining,
    EndpointRegression,
    MeanFlow,
    PairRegression,
    ScoreCorrected,
)
from cmlib.ops import expand_like, indexed_normal, mse
from cmlib.pipeline import load_teacher, shipped
from cmlib.process import DDPM
from cmlib.profiles import select
from cmlib.recipes import recipe
from cmlib.stable import stable_denoised, stable_score
from cmlib.train import fit
from cmlib.unet import UNet
from tests.small import UNET, seeded

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("digits_teacher").to("cpu")


@pytest.fixture(scope="module")
def held_out():
    return data.to_float(data.load("digits", "test")[0])


def test_the_clinics_tests_exist():
    named = re.findall(r"(tests/\w+\.py)::(\w+)", (ROOT / "notebooks/source/07_failure_clinic.py").read_text(encoding="utf-8"))
    assert len(named) >= 12
    assert not [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    "objective",
    [
        PairRegression(), EndpointRegression(), ConsistencyDistillation(), ConsistencyTraining(10), ICT(10), ECT(10), SCT(10),
        SCT(10, reference=torch.zeros(3, *SHAPE)), ScoreCorrected(ECT(10), stable_score(torch.zeros(3, *SHAPE))),
        BootstrapRegression(DDPM.linear()), SCM(warmup=0), MeanFlow(),
    ],
    ids=lambda o: type(o).__name__,
)  # fmt: skip
def test_under_fp16_autocast_losses_are_finite_and_in_float32(objective):
    """At σ = 80 too, where the squares of 64 pixels are beyond float16; the network's own layers are in float16."""
    torch.manual_seed(0)
    flow = isinstance(objective, MeanFlow)
    f: Any = ConsistencyFunction(UNet(**UNET), 0.0, 157.0, 1.0).train()
    f = MeanFlowFunction(UNet(**UNET | {"in_channels": 2})).train() if flow else f
    t, x_end = torch.tensor([0.01, 1.0, 80.0, 157.0]), 0.1 * torch.randn(4, *SHAPE)
    x_t = x_end + expand_like(t, x_end) * torch.randn(4, *SHAPE)
    batch = {"x0": x_end, "x_end": x_end, "x_t": x_t, "x_r": 0.9 * x_t, "t": t, "r": 0.9 * t}
    with torch.autocast("cpu", torch.float16):
        assert f.net(torch.cat([x_end, x_end], 1) if flow else x_end, t).dtype == torch.float16
        assert f(x_t, t).dtype == torch.float32
        loss, _ = objective(f, f, batch, 9, seeded())
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    loss.mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in f.parameters())


def test_stable_targets_far_out_are_those_of_full_precision():
    references, t = torch.randn(50, *SHAPE), torch.full((4,), 80.0)
    x = references[:4] + 80 * torch.randn(4, *SHAPE)
    with torch.autocast("cpu", torch.float16):
        inside = stable_denoised(x, t, references)
    torch.testing.assert_close(inside, stable_denoised(x, t, references))
    assert x.half().flatten(1).pow(2).sum(1).isinf().all(), "in float16 the distances would be infinite"


def test_the_recipe_keeps_a_good_student_good(teacher):
    """24 updates of consistency distillation from the shipped student, small batches and a constant step; without the
    recipe's EMA target, and with a larger step, the same updates take it far from the teacher's ends."""
    images, _ = data.load("digits")
    good = ConsistencyFunction.load(shipped("digits_student.safetensors"))
    noise = indexed_normal(7, range(32), SHAPE)
    ends = teacher.sample(noise, 15)

    @torch.no_grad()
    def gap(f):
        return float(mse(f(f.sigma_max * noise, torch.full((32,), f.sigma_max)).clamp(-1, 1), ends).mean().sqrt())

    chosen, settings = recipe("consistency-distillation", select("ci"), 24, good, SHAPE, teacher, images)
    chosen = replace(chosen, solver="ddim")

    def after(objective, **settings):
        f = copy.deepcopy(good).requires_grad_(True)
        fit(f, objective, partial(data.batches, images, 8, 0), **{"steps": 24, "schedule": "constant", **settings})
        return gap(f.eval())

    before = gap(good)
    assert after(chosen, **settings) < 1.1 * before
    assert after(replace(chosen, mu=0.0), lr=4e-4) > 1.4 * before


@pytest.mark.parametrize("gap", [1000, 5000])
def test_a_gap_over_the_whole_chain_trains_a_denoiser(gap):
    """The target is the clean image itself, whatever the frozen copy says."""
    objective, x0 = BootstrapRegression(DDPM.linear(), gap=gap), torch.randn(50, 2, generator=seeded())
    _, t, x_r, r = objective.pairs({"x0": x0}, 0, seeded(1))
    assert torch.equal(x_r, x0) and not r.any() and t.max() > 50
    loss, _ = objective(lambda x, t: 0 * x, lambda x, t: x + 7, {"x0": x0}, 0, seeded(1))
    torch.testing.assert_close(loss, x0.pow(2).mean(1))


def test_the_shipped_teacher_is_calibrated(teacher, held_out):
    """E[ε·ε̂]/E‖ε̂‖² is 1 for a posterior mean; an ε̂ five per cent off, or a wrong schedule, is out of the band."""
    eps = indexed_normal(9, range(100), SHAPE)

    def quotients(teacher, factor=1.0):
        for sigma in (0.05, 0.2, 0.5, 1.0, 3.0, 10.0, 80.0):
            t = torch.full((100,), sigma)
            x = held_out[:100] + sigma * eps
            predicted = factor * (x - teacher.denoise(x, t, clip=False)) / sigma
            yield float((eps * predicted).sum() / predicted.pow(2).sum())

    assert all(abs(q - 1) < 0.05 for q in quotients(teacher))
    assert any(abs(q - 1) > 0.05 for q in quotients(teacher, 1.05))
    assert max(quotients(replace(teacher, process=DDPM.cosine()))) > 1.2
