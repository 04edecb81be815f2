"""Graded exercise 4, the applied researcher: a student that learns from itself beside one that distils."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cmlib import data
from cmlib.checks import Exercise
from cmlib.consistency import ConsistencyFunction
from cmlib.ops import Network, expand_like, indexed_integers, indexed_normal, mse
from cmlib.pipeline import Features, load_teacher, shipped
from cmlib.process import DDPM
from cmlib.teacher import Teacher, warm_start

Levels = Callable[[Tensor], Tensor]
SIGMA = 20.0  # the chain is cut here: above, an 8×8 digit has drowned
BAR = 0.02  # the brief's


def world() -> tuple[Teacher, ConsistencyFunction]:
    """The teacher on the chain up to σ = SIGMA, and the student of the course, which jumps from there; both on the CPU."""
    teacher = load_teacher("digits_teacher").to("cpu")
    teacher.process = DDPM(teacher.process.betas[: int(teacher.process.index(torch.tensor(SIGMA))) + 1])
    student = ConsistencyFunction.load(shipped("digits_student.safetensors"))
    student.sigma_max = SIGMA
    return teacher, student


def beginner(teacher: Teacher) -> ConsistencyFunction:
    """A student with the teacher's weights that has not been trained to jump."""
    return warm_start(teacher, SIGMA)


def held_out(teacher: Teacher, seed: int, n: int = 300) -> dict[str, Tensor]:
    """x_t, t [n] of held-out digits at random timesteps above 0, and the teacher's DDIM step to the timestep before: x_r, r."""
    images = data.load("digits", "test")[0]
    x0 = data.to_float(images[indexed_integers(seed, range(n), 0, len(images), 2)])
    k = indexed_integers(seed, range(n), 1, teacher.process.T, 3)
    t, r = teacher.process.sigma(k), teacher.process.sigma(k - 1)
    x_t = x0 + expand_like(t, x0) * indexed_normal(seed, range(n), x0.shape[1:], 4)
    return {"x_t": x_t, "t": t, "x_r": teacher.ode_step(x_t, t, r), "r": r}


def features() -> Features:
    """What fd_digits is measured with."""
    (images, labels), test = data.load("digits"), data.load("digits", "test")
    return Features.of("digits", Path(), images, labels, test)


class _Toy(nn.Module):
    """f(x, t) = w·x/√(1 + t²), one weight, and equal where the weight is."""

    def __init__(self, w: float):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w]))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.w * x / expand_like((1 + t**2).sqrt(), x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Toy) and torch.equal(self.w, other.w)

    __hash__ = nn.Module.__hash__


def _sigma(n: Tensor) -> Tensor:
    return (n + 1) / 8


def _earlier(x0: Tensor, eps: Tensor, n: Tensor, sigma: Levels, *, back: int = 2, end: int = -1) -> tuple[Tensor, ...]:
    t, r = sigma(n), sigma((n - back).clamp(min=end))
    return x0 + expand_like(t, x0) * eps, t, x0 + expand_like(r, x0) * eps, r


def _gradient(
    f: nn.Module, frozen: nn.Module, x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor, **off: bool
) -> tuple[Tensor, ...]:
    goal = frozen(x_r, r) if "end" in off else torch.where(expand_like(r > 0, x_r), frozen(x_r, r), x_r)
    return torch.autograd.grad(mse(f(x_t, t), goal if "stop" in off else goal.detach()).mean(), list(f.parameters()))


def _norm(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([g.norm() for g in gradients]).norm()


def _clipped(gradients: tuple[Tensor, ...], limit: float) -> tuple[Tensor, ...]:
    return tuple(g * (limit / _norm(gradients)).clamp(max=1) for g in gradients)


def _validation(f: Network, x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor) -> Tensor:
    return mse(f(x_t, t), f(x_r, r)).mean()


_X, _EPS = torch.linspace(-1, 1, 12).reshape(3, 1, 2, 2), torch.linspace(-2, 1.5, 12).sin().reshape(3, 1, 2, 2)
_N = torch.tensor([0, 7, 31])
_PAIR = _earlier(_X, _EPS, _N, _sigma)
_TOY, _GRADIENTS = _Toy(0.7), (torch.tensor([3.0, -4.0]), torch.tensor([[0.5], [12.0]]))

EXERCISES = {
    "earlier": Exercise(
        lambda x0, eps, n, sigma: _earlier(x0, eps, n, sigma),
        [(_X, _EPS, _N, _sigma), (_EPS, _X, _N.flip(0), _sigma)],
        {
            "both states share one ε; you gave the earlier one other noise": lambda x0, eps, n, sigma: (
                *_earlier(x0, eps, n, sigma)[:2],
                *_earlier(x0, eps.flip(0), n, sigma)[2:],
            ),
            "two timesteps earlier is n − 2; you went one back": lambda *a: _earlier(*a, back=1),
            "the target has less noise, n − 2; you went up to n + 2": lambda *a: _earlier(*a, back=-2),
            "the chain ends at n = −1, the clean image with r = 0; you stopped at 0": lambda *a: _earlier(*a, end=0),
        },
    ),
    "gradient": Exercise(
        lambda f, frozen, x_t, t, x_r, r: _gradient(f, frozen, x_t, t, x_r, r),
        [(_TOY, _TOY, *_PAIR), (_TOY, _Toy(1.3), *_PAIR)],
        {
            "where r = 0 the target is x_r, the clean image; you asked the network": lambda *a: _gradient(*a, end=True),
            "the target must be constant; a gradient flows through it": lambda *a: _gradient(*a, stop=True),
            "the target is the frozen copy's answer; you asked f, which moves": lambda f, g, *pair: _gradient(f, f, *pair),
            "the later state learns from the earlier; you had it the other way round": lambda f, g, x_t, t, x_r, r: _gradient(
                f, g, x_r, r, x_t, t
            ),
        },
    ),
    "clipped": Exercise(
        _clipped,
        [(_GRADIENTS, 1.0), (_GRADIENTS, 20.0)],
        {
            "the direction must stay; you clamped each number on its own": lambda g, limit: tuple(
                v.clamp(-limit, limit) for v in g
            ),
            "one norm over all tensors; you gave each its own": lambda g, limit: tuple(_clipped((v,), limit)[0] for v in g),
            "a gradient below the limit stays as it is; you stretched it": lambda g, limit: tuple(
                v * limit / _norm(g) for v in g
            ),
        },
    ),
    "validation": Exercise(
        _validation,
        [(_TOY, *_PAIR)],
        {
            "the target is f's answer at the earlier state; you took the state": lambda f, x_t, t, x_r, r: mse(
                f(x_t, t), x_r
            ).mean(),
            "the earlier state has the level r; you gave it t": lambda f, x_t, t, x_r, r: _validation(f, x_t, t, x_r, t),
            "squared; you took the root": lambda *a: _validation(*a) ** 0.5,
        },
    ),
}
