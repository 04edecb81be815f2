"""Graded exercise 2, the CS student: rollouts of half as many steps, batches of 32, and whether anything converged."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cmlib import data
from cmlib.checks import Exercise
from cmlib.objectives import Denoising
from cmlib.ops import Network, expand_like, indexed_normal, mse
from cmlib.pipeline import load_teacher
from cmlib.process import DDPM
from cmlib.teacher import Teacher
from cmlib.train import plateaued

STEPS = (1000, 500, 100, 50)  # of the rollouts that are compared
CURVES = 24  # learning curves to judge


def start(seed: int) -> tuple[Teacher, Tensor]:
    """The teacher that comes with the course, on the CPU, and a learner's noise [2,1,8,8]."""
    return load_teacher("digits_teacher").to("cpu"), indexed_normal(seed, range(2), (1, 8, 8))


def pairs(teacher: Teacher, noise: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """All states x_t of the rollouts from `noise`, their levels t, and their ends x_end, in EDM coordinates."""
    path = teacher.sample(noise, steps, path=True)
    t = teacher.process.sigma(teacher.process.grid(steps).flip(0)).repeat_interleave(len(noise)).to(path.device)
    return path[:-1].flatten(0, 1), t, path[-1].repeat(steps, 1, 1, 1)


def fault(teacher: Teacher, noise: Tensor, paths: Tensor, numbers: Sequence[int]) -> str:
    """What is wrong with rollouts of `numbers` steps, one after the other, empty if nothing: a path is right if every step of
    it is, and some thirty of each are looked at."""
    sizes, T = [k + 1 for k in numbers], teacher.process.T
    if paths.shape != (sum(sizes), *noise.shape):
        return f"expected rollouts of {sizes} states of shape {list(noise.shape)}, got {list(paths.shape)}"
    for k, path in zip(numbers, paths.split(sizes), strict=True):
        if not torch.allclose(path[0], noise, atol=1e-5):
            return f"the rollout of {k} steps does not start from the noise"
        some = torch.cat([torch.arange(0, k, k // 25), torch.tensor([k - 1])])
        n = _visited(T, k)[some].repeat_interleave(len(noise))
        r = torch.where(n > 0, n - T // k, -1)
        wrong = (teacher.step(path[some].flatten(0, 1), n, r, "ddim") - path[some + 1].flatten(0, 1)).abs().flatten(1).amax(1)
        if not bool((wrong < 1e-4).all()):
            return f"the rollout of {k} steps: what follows timestep {int(n[wrong.argmax()])} is not one DDIM step"
    return ""


@torch.no_grad()
def teacher_error(process: DDPM, unet: torch.nn.Module) -> float:
    """The teacher's MSE, ‖ε − ε_θ‖² a pixel, on held-out digits with noise and timesteps that never change."""
    device = next(unet.parameters()).device
    x0 = data.to_float(data.load("digits", "test")[0]).to(device)
    return float(Denoising(process)(unet, unet, {"x0": x0}, 0, torch.Generator().manual_seed(0))[0].mean())


def learning_curves(seed: int) -> list[list[float]]:
    """Curves of 20 values that fall at different speeds to different floors, with noise: some are still falling."""
    generator = torch.Generator().manual_seed(seed)
    speed, floor, noise = torch.rand(3, CURVES, 1, generator=generator)
    exact = 0.002 + 0.2 * floor + torch.exp(-torch.arange(20) * (0.05 + speed))
    return (exact * (1 + 0.03 * noise * torch.randn(CURVES, 20, generator=generator))).tolist()


def _visited(T: int, steps: int) -> Tensor:
    return torch.arange(steps).flip(0) * (T // steps)


def _f(x: Tensor, t: Tensor) -> Tensor:
    """A stand-in for the student."""
    return torch.tanh(x / expand_like(1 + t, x))


def _differences(ends: Sequence[Tensor]) -> Tensor:
    return torch.stack([(end - ends[0]).pow(2).mean().sqrt() for end in ends[1:]])


def _validation(f: Network, x_t: Tensor, t: Tensor, x_end: Tensor) -> Tensor:
    return mse(f(x_t, t), x_end).mean()


_LEVELS = torch.tensor([9.0, 3.0, 1.0])
_END = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2).repeat(3, 1, 1, 1)
_X = _END + _LEVELS.reshape(3, 1, 1, 1) * torch.tensor([[[[0.3, -1.2], [0.8, 2.1]]]])
_CURVES = [
    [1.0 / k for k in range(1, 13)],
    [0.5, 0.4, 0.3, 0.3, 0.31, 0.3, 0.31, 0.3, 0.32],
    [0.002 * 0.9**k for k in range(12)],  # small, and still a tenth better each time
    [0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.3, 0.55],  # the last values are bad ones
    [0.9, 0.2, 0.5, 0.31, 0.3, 0.29, 0.28, 0.27],  # falling again, and not yet as good as once before
]

EXERCISES = {
    "visited": Exercise(
        _visited,
        [(1000, 500), (1000, 250), (1000, 1000), (12, 3)],
        {
            "half as many steps are twice as long; you took the first half of the chain and stop in mid-noise": lambda T, k: (
                torch.arange(T - k, T).flip(0)
            ),
            "a rollout starts in pure noise; you took the quiet half of the chain, where it does not belong": lambda T, k: (
                torch.arange(k).flip(0)
            ),
            "a rollout goes from the noisiest timestep down; yours goes up": lambda T, k: _visited(T, k).flip(0),
        },
    ),
    "differences": Exercise(
        _differences,
        [(tuple(_X),), (tuple(_X.flip(0)),)],
        {
            "each from the first, the finest; you compared neighbours": lambda ends: torch.stack(
                [_differences(pair)[0] for pair in pairwise(ends)]
            ),
            "leave the first out; its distance to itself is 0": lambda ends: _differences([ends[0], *ends]),
            "the root is missing; you returned the mean square": lambda ends: _differences(ends) ** 2,
            "the mean is missing; you returned the length of the difference": lambda ends: (
                _differences(ends) * ends[0].numel() ** 0.5
            ),
        },
    ),
    "cost": Exercise(
        lambda pairs, steps: (pairs // steps, pairs),
        [(200_000, 500), (200_000, 1000), (4_000, 50)],
        {
            "a step costs one evaluation and gives one pair; you paid a whole rollout for every pair": lambda n, steps: (
                n,
                n * steps,
            ),
            "the trajectories are right, but each of their steps is an evaluation": lambda n, steps: (n // steps, n // steps),
        },
    ),
    "validation": Exercise(
        _validation,
        [(_f, _X, _LEVELS, _END)],
        {
            "the student has to jump; you compared the noisy x_t itself with x_end": lambda f, x, t, end: mse(x, end).mean(),
            "a mean over the pairs, or it grows with their number; you took a sum": lambda f, x, t, end: (
                3 * _validation(f, x, t, end)
            ),
            "the mean square itself; you took its root": lambda f, x, t, end: _validation(f, x, t, end).sqrt(),
            "squares, not absolute values": lambda f, x, t, end: (f(x, t) - end).abs().mean(),
            "one number for all pairs; you returned one a pair": lambda f, x, t, end: mse(f(x, t), end),
        },
    ),
    "converged": Exercise(
        plateaued,
        [(values[:k], 5, 1e-3) for values in _CURVES for k in (4, 7, len(values))],
        {
            "two values are noise; look for progress over the last `patience` of them": lambda v, p, tolerance: (
                len(v) > p and v[-1] > v[-2] * (1 - tolerance)
            ),
            "no value alone says that a curve is flat; you asked whether the last one is below 0.01": lambda v, *_: (
                v[-1] < 0.01
            ),
            "progress is a fraction, as a small curve may still fall; you compared differences": lambda v, p, tolerance: (
                len(v) > p and min(v[-p:]) > min(v[:-p]) - tolerance
            ),
            "take the best of the last `patience` values; the very last may be a bad one": lambda v, p, tolerance: (
                len(v) > p and v[-1] > min(v[:-p]) * (1 - tolerance)
            ),
            "compare with the best of all values before, not with the one just before": lambda v, p, tolerance: (
                len(v) > p and min(v[-p:]) > v[-p - 1] * (1 - tolerance)
            ),
        },
    ),
}
