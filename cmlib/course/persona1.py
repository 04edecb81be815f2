"""Graded exercise 1, the curious generalist: one jump from five noise levels, with a picture and noise of one's own."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlib import data
from cmlib.checks import Exercise
from cmlib.consistency import ConsistencyFunction
from cmlib.ops import Network, expand_like, indexed_normal
from cmlib.pipeline import load_teacher, shipped

BANDS = [(20, 60), (140, 200), (300, 360), (480, 560), (850, 950)]  # a timestep is drawn from each


def start(seed: int) -> tuple[Tensor, Tensor, list[int], list[float]]:
    """A learner's picture [1,1,8,8] (held out), nine draws of noise [9,5,1,8,8], five timesteps, and their noise levels σ."""
    generator = torch.Generator().manual_seed(seed)
    held_out = data.load("digits", "test")[0]
    k = int(torch.randint(len(held_out), (), generator=generator))
    steps = [int(torch.randint(low, high, (), generator=generator)) for low, high in BANDS]
    noise = indexed_normal(seed, range(45), (1, 8, 8)).reshape(9, 5, 1, 8, 8)
    levels = load_teacher("digits_teacher").process.sigma(torch.tensor(steps)).tolist()
    return data.to_float(held_out[k : k + 1]), noise, steps, levels


def student() -> ConsistencyFunction:
    """The student that comes with the course."""
    return ConsistencyFunction.load(shipped("digits_student.safetensors"))


def others(x0: Tensor) -> float:
    """Mean distance of a picture [1,1,8,8] to the other held-out ones: how far apart any two digits are."""
    held_out = data.to_float(data.load("digits", "test")[0])
    return float(_rms(held_out, x0).sum() / (len(held_out) - 1))


def _network(x: Tensor, t: Tensor) -> Tensor:
    """A stand-in for the student, and strict about its input."""
    if not isinstance(t, Tensor) or t.shape != (len(x),):
        got = list(t.shape) if isinstance(t, Tensor) else f"the {type(t).__name__} {t}"
        raise ValueError(f"t must hold one noise level an image, shape [{len(x)}], got {got}")
    return torch.tanh(x / expand_like((1 + t**2).sqrt(), x))


_X = torch.linspace(-1, 1, 8).reshape(2, 1, 2, 2)
_EPS = torch.tensor([0.3, -1.2, 0.8, 2.1, -0.4, 0.1, -1.7, 0.6]).reshape(2, 1, 2, 2)
_LEVELS = (0.1, 1.0, 30.0)


def _levels(x: Tensor, sigma: float) -> Tensor:
    return torch.full((len(x),), sigma)


def _rms(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).pow(2).flatten(1).mean(1).sqrt()


def _spread(f: Network, x0: Tensor, sigma: float, first: Tensor, second: Tensor) -> Tensor:
    a, b = (f(x0 + sigma * eps, _levels(x0, sigma)) for eps in (first, second))
    return _rms(a, b)


EXERCISES = {
    "noisy": Exercise(
        lambda x0, eps, sigma: x0 + sigma * eps,
        [(_X, _EPS, sigma) for sigma in _LEVELS],
        {
            "noise is multiplied by its standard deviation σ; you used the variance σ²": lambda x0, eps, sigma: (
                x0 + sigma**2 * eps
            ),
            "noise is multiplied by σ; you used its root, as if σ were a variance": lambda x0, eps, sigma: (
                x0 + sigma**0.5 * eps
            ),
            "every level must differ; you added the noise without σ": lambda x0, eps, sigma: x0 + eps,
            "the picture must stay as it is; you shrank the sum, as the chain of lesson 1 does": lambda x0, eps, sigma: (
                (x0 + sigma * eps) / (1 + sigma**2) ** 0.5
            ),
            "the picture is missing; you returned noise alone": lambda x0, eps, sigma: sigma * eps,
        },
    ),
    "jump": Exercise(
        lambda f, x, sigma: f(x, _levels(x, sigma)),
        [(_network, _X + sigma * _EPS, sigma) for sigma in _LEVELS],
        {
            "f scales its input itself; you divided x by √(1 + σ²) before": lambda f, x, sigma: f(
                x / (1 + sigma**2) ** 0.5, _levels(x, sigma)
            ),
            "f must be told the level of x, σ; you told it σ²": lambda f, x, sigma: f(x, _levels(x, sigma**2)),
            "f must be told the level of x; you told it 1 whatever σ is": lambda f, x, sigma: f(x, _levels(x, 1.0)),
            "f returns the picture; you took it for the noise and subtracted it": lambda f, x, sigma: (
                x - f(x, _levels(x, sigma))
            ),
            "one jump is one evaluation; you evaluated f on its own result": lambda f, x, sigma: f(
                f(x, _levels(x, sigma)), _levels(x, sigma)
            ),
        },
    ),
    "distance": Exercise(
        _rms,
        [(_X, _EPS), (_EPS, 3 * _X)],
        {
            "the root is missing; you returned the mean square": lambda a, b: _rms(a, b) ** 2,
            "one number a picture; you averaged over all of them together": lambda a, b: (a - b).pow(2).mean().sqrt(),
            "the mean is missing; you returned the length of the difference": lambda a, b: (a - b).flatten(1).norm(dim=1),
            "the mean of the squares, not of the absolute values": lambda a, b: (a - b).abs().flatten(1).mean(1),
            "errors of opposite sign must not cancel; square before you average": lambda a, b: (a - b).flatten(1).mean(1),
        },
    ),
    "spread": Exercise(
        _spread,
        [(_network, _X[:1], sigma, _EPS[:1], _EPS[1:]) for sigma in _LEVELS],
        {
            "compare the reconstructions; you compared the noisy pictures": lambda f, x0, sigma, a, b: _rms(
                x0 + sigma * a, x0 + sigma * b
            ),
            "compare the two with each other; you measured how far the first is from x0": lambda f, x0, sigma, a, b: _rms(
                f(x0 + sigma * a, _levels(x0, sigma)), x0
            ),
            "both reconstructions come from the first draw; use the second, too": lambda f, x0, sigma, a, b: _spread(
                f, x0, sigma, a, a
            ),
        },
    ),
}
