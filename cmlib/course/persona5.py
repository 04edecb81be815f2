"""Graded exercise 5, the theory student: the score out of cached pairs, γ_t, and how smooth a self-consistency gap is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cmlib import data
from cmlib.checks import Exercise
from cmlib.ops import expand_like, indexed_integers, indexed_normal, mse
from cmlib.oracle import Gaussian
from cmlib.stable import gamma
from cmlib.teacher import Teacher


def pairs(teacher: Teacher, seed: int, n: int = 32) -> dict[str, Tensor]:
    """x_t, t [n] of digits at σ from 0.1 to 5, and the teacher's DDIM step to half that level, x_r, r."""
    images = data.load("digits")[0]
    x0 = data.to_float(images[indexed_integers(seed, range(n), 0, len(images), 2)])
    t = torch.logspace(-1, 0.7, n)
    x_t = x0 + expand_like(t, x0) * indexed_normal(seed, range(n), x0.shape[1:], 3)
    return {"x_t": x_t, "t": t, "x_r": teacher.ode_step(x_t, t, t / 2), "r": t / 2}


def gaussian(seed: int, n: int = 64) -> tuple[Gaussian, Tensor, Tensor, float]:
    """Gaussian data with a standard deviation of the learner's own, states x [n,3], their levels t [n], and that deviation."""
    generator = torch.Generator().manual_seed(seed)
    std = float(0.2 + 1.3 * torch.rand((), generator=generator))
    t = torch.logspace(-2, 1.5, n)
    data = Gaussian(torch.randn(3, generator=generator), std)
    return data, data.sample(n, generator) + t[:, None] * torch.randn(n, 3, generator=generator), t, std


def rollouts(teacher: Teacher, seed: int, n: int = 100, steps: int = 20) -> dict[str, Tensor]:
    """The pairs of n DDIM rollouts [steps·n,…], which is what a rollout cache holds."""
    path = teacher.sample(indexed_normal(seed, range(n), teacher.image_shape), steps, "ddim", path=True)
    levels = teacher.process.sigma(torch.tensor([*teacher.process.grid(steps).flip(0).tolist(), -1]))
    found = {"x_t": path[:-1], "t": levels[:-1, None].expand(-1, n), "x_r": path[1:], "r": levels[1:, None].expand(-1, n)}
    return {name: v.flatten(0, 1) for name, v in found.items()}


def batches(cache: dict[str, Tensor], seed: int, start: int, size: int = 32) -> Iterator[dict[str, Tensor]]:
    """Endless random batches, from batch `start` on."""
    for k in range(start, 10**9):
        rows = indexed_integers(seed, range(k * size, (k + 1) * size), 0, len(cache["t"]))
        yield {name: v[rows] for name, v in cache.items()}


def _score(x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor) -> Tensor:
    return (x_r - x_t) / expand_like(t * (t - r), x_t)


def _gamma(t: Tensor, s: float) -> Tensor:
    return gamma(t, s)


def _correction(x0_hat: Tensor, x_t: Tensor, t: Tensor, score: Tensor, s: float) -> Tensor:
    guess = x_t + expand_like(gamma(t, s), x_t) * score
    return s**2 / (t**2 + s**2) * mse(x0_hat, guess)


def _slopes(t: Tensor, gap: Tensor) -> Tensor:
    return gap.log().diff() / t.log().diff()


def _roughness(t: Tensor, gap: Tensor) -> Tensor:
    return _slopes(t, gap).diff().abs().mean()


_X, _Y = torch.linspace(-1, 2, 12).reshape(3, 2, 2), torch.linspace(3, -1, 12).sin().reshape(3, 2, 2)
_T, _R = torch.tensor([0.3, 2.0, 9.0]), torch.tensor([0.2, 0.5, 8.0])
_LEVELS, _GAP = torch.tensor([8.0, 3.0, 1.0, 0.4, 0.1]), torch.tensor([0.5, 0.6, 0.3, 0.1, 0.02])

EXERCISES = {
    "score": Exercise(
        _score,
        [(_X, _T, _Y, _R)],
        {
            "the score points to the data, as x_r − x_t does; your sign is reversed": lambda *a: -_score(*a),
            "t² − r² belongs to a posterior mean; a DDIM step is t·(t − r) times the score": lambda x_t, t, x_r, r: (
                (x_r - x_t) / expand_like(t**2 - r**2, x_t)
            ),
            "x_r is one step, not the clean image; you divided by t²": lambda x_t, t, x_r, r: (
                (x_r - x_t) / expand_like(t**2, x_t)
            ),
            "a factor t is missing: dx/dt = −t·∇log p": lambda x_t, t, x_r, r: (x_r - x_t) / expand_like(t - r, x_t),
            "the slope belongs to x_t, at level t; you used r": lambda x_t, t, x_r, r: (
                (x_r - x_t) / expand_like(r * (t - r), x_t)
            ),
        },
    ),
    "gamma": Exercise(
        _gamma,
        [(_T, 0.5), (_T, 1.3)],
        {
            "t² is Tweedie's and gives the mean of x0, not the end of the path": lambda t, s: t**2,
            "t²/2 is the limit for small t; at large t it is far too large": lambda t, s: t**2 / 2,
            "the score divides by s² + t², and you by its root: multiply by √(t² + s²)": lambda t, s: (
                gamma(t, s) / (t**2 + s**2) ** 0.5
            ),
            "the sign: γ is positive where the score is added": lambda t, s: -gamma(t, s),
            "f at t lands on the data's own spread s, not on 0; that is t² + s²": lambda t, s: t**2 + s**2,
        },
    ),
    "correction": Exercise(
        _correction,
        [(_Y, _X, _T, _X.cos(), 0.5), (_X, _Y, _T, _Y.sin(), 1.3)],
        {
            "the score is added: x + γ·∇log p; you subtracted it": lambda a, x, t, score, s: _correction(a, x, t, -score, s),
            "the end of the path needs your γ; t² is Tweedie's": lambda a, x, t, score, s: (
                s**2 / (t**2 + s**2) * mse(a, x + expand_like(t**2, x) * score)
            ),
            "the weight s²/(t² + s²) is missing": lambda a, x, t, score, s: (
                _correction(a, x, t, score, s) * (t**2 + s**2) / s**2
            ),
            "one number an image; you averaged over the batch": lambda *a: _correction(*a).mean(),
        },
    ),
    "roughness": Exercise(
        _roughness,
        [(_LEVELS, _GAP), (_LEVELS, _GAP**2)],
        {
            "that is how steep ln gap is; smooth means that the slope changes little": lambda t, g: _slopes(t, g).abs().mean(),
            "changes of opposite sign must not cancel; take absolute values": lambda t, g: _slopes(t, g).diff().mean(),
            "the slope is that of ln gap: half the gap at every t is no smoother": lambda t, g: (
                (g.diff() / t.log().diff()).diff().abs().mean()
            ),
            "the slope is over ln t, as the levels are not evenly spaced": lambda t, g: g.log().diff().diff().abs().mean(),
        },
    ),
}
