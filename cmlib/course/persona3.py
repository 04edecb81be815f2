"""Graded exercise 3, the applied engineer: a student exported, timed, and held against its unquantised self."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cmlib import data
from cmlib.checks import Exercise
from cmlib.consistency import ConsistencyFunction
from cmlib.formats import MULTIPLICATIONS
from cmlib.ops import expand_like, indexed_normal
from cmlib.pipeline import shipped

FORMATS = (("torchscript", "fp32"), ("torchscript", "fp16"), ("onnx", "fp32"))
INT8 = {"INT8, multiplications alone": MULTIPLICATIONS, "INT8, the scalings, too": (*MULTIPLICATIONS, "Mul", "Add")}
WARM_UP, TARGET, BAR = 5, 5.0, 1.05  # calls; milliseconds; the largest ratio of reconstruction errors


def student() -> ConsistencyFunction:
    """The student that comes with the course, on the CPU."""
    return ConsistencyFunction.load(shipped("digits_student.safetensors"))


def start(seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Held-out pictures x0 [5,16,1,8,8], the same at five levels; noisy x_t; levels t [5,16]; how many calls to time."""
    generator = torch.Generator().manual_seed(seed)
    held_out = data.to_float(data.load("digits", "test")[0])
    x0 = held_out[torch.randperm(len(held_out), generator=generator)[:16]].expand(5, -1, -1, -1, -1)
    t = torch.tensor([0.03, 0.2, 1.0, 4.0, 15.0]) * (1 + 0.2 * torch.rand(5, generator=generator))
    x_t = x0 + expand_like(t, x0) * indexed_normal(seed, range(80), (1, 8, 8)).reshape(x0.shape)
    return x0, x_t, t[:, None].repeat(1, 16), 50 + seed % 50


@torch.no_grad()
def outputs(g: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor) -> Tensor:
    """g at one noise level after the other: [5,16,1,8,8]."""
    return torch.stack([g(x, level) for x, level in zip(x_t, t, strict=True)])


def pretend(seconds: Tensor) -> tuple[Callable[[], None], Callable[[], None], Callable[[], float]]:
    """A GPU whose k-th call takes seconds[k]: `call` returns at once, `wait` when all is done, `clock` tells the time."""
    durations, pending, now = iter(seconds.tolist()), [0.0], [0.0]

    def call() -> None:
        pending[0] += next(durations)

    def wait() -> None:
        now[0] += pending[0]
        pending[0] = 0.0

    return call, wait, lambda: now[0]


def _ratio(theirs: Tensor, ours: Tensor, x0: Tensor) -> Tensor:
    return _distance(theirs, x0).mean(-1) / _distance(ours, x0).mean(-1)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).flatten(-3).norm(dim=-1)


def _percentiles(seconds: Tensor, warm_up: int) -> tuple[float, float]:
    p50, p95 = 1e3 * np.percentile(seconds[warm_up:].numpy(), (50, 95))
    return float(p50), float(p95)


_G = torch.Generator().manual_seed(0)
_X0, _OURS = torch.randn(2, 2, 3, 1, 2, 2, generator=_G)
_THEIRS = _OURS + 0.3 * torch.randn(_OURS.shape, generator=_G)
_SECONDS = torch.cat([torch.tensor([0.9, 0.08, 0.05]), 0.002 + 0.001 * torch.rand(40, generator=_G) ** 4])

EXERCISES = {
    "error_ratio": Exercise(
        _ratio,
        [(_THEIRS, _OURS, _X0), (_OURS, _THEIRS, _X0)],
        {
            "the error is the distance to x0; you measured from the baseline's output": lambda theirs, ours, x0: (
                _distance(theirs, ours).mean(-1) / _distance(ours, x0).mean(-1)
            ),
            "the Euclidean distance; you took its square": lambda theirs, ours, x0: (
                _distance(theirs, x0).pow(2).mean(-1) / _distance(ours, x0).pow(2).mean(-1)
            ),
            "the export's error over the baseline's; yours is upside down": lambda theirs, ours, x0: _ratio(ours, theirs, x0),
            "average the errors before you divide; a mean of ratios hangs on the pictures with a small error": (
                lambda theirs, ours, x0: (_distance(theirs, x0) / _distance(ours, x0)).mean(-1)
            ),
            "one number for each noise level; an average over levels hides the one that fails": lambda theirs, ours, x0: (
                _distance(theirs, x0).mean() / _distance(ours, x0).mean()
            ),
        },
    ),
    "timed": Exercise(
        lambda seconds: seconds,
        [(torch.tensor([0.5, 0.25, 1.0, 0.125]),)],
        {
            "call() only hands the work to the GPU: wait() for it before you stop the clock": lambda s: torch.zeros_like(s),
            "start the clock anew for each call; yours runs on": lambda s: s.cumsum(0),
            "one number for each call; from a mean no percentile can be had": lambda s: s.mean(),
            "one call a number; you divided the total by the number of calls": lambda s: s.mean().expand(len(s)),
        },
    ),
    "percentiles": Exercise(
        _percentiles,
        [(_SECONDS, 3), (_SECONDS[3:], 5)],
        {
            "the first calls are for warming up; leave them out": lambda s, warm_up: _percentiles(s, 0),
            "in milliseconds; yours are seconds": lambda s, warm_up: tuple(v / 1e3 for v in _percentiles(s, warm_up)),
            "the median is the 50th percentile; you took the mean": lambda s, warm_up: (
                1e3 * float(s[warm_up:].mean()),
                _percentiles(s, warm_up)[1],
            ),
            "a single slow call is the maximum; 95 of 100 are below p95": lambda s, warm_up: (
                _percentiles(s, warm_up)[0],
                1e3 * float(s[warm_up:].max()),
            ),
        },
    ),
}
