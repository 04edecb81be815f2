"""Exercises of lesson 6: evaluation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cmlib.checks import Exercise


def _set(n: int, seed: int, *mixing: list[float]) -> Tensor:
    """n features [n,3] of correlated units."""
    z = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z @ torch.tensor(mixing, dtype=torch.float64)


_REAL = _set(12, 0, [1.0, 0.5, 0.0], [0.0, 1.0, 0.8], [0.3, 0.0, 0.5])
_FAKE = _set(9, 1, [0.4, -0.7, 0.2], [0.0, 1.5, 0.0], [0.9, 0.0, 1.0]) + 1.5


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """tr (ΣΣ')^½."""
    return torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()


def _root(a: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _frechet(
    real: Tensor,
    fake: Tensor,
    cross: Callable[[Tensor, Tensor], Tensor] = _cross,
    times: float = 2,
    power: float = 2,
    correction: int = 1,
    rows: bool = False,
) -> Tensor:
    a, b = (torch.cov(x if rows else x.T, correction=correction) for x in (real, fake))
    return (real.mean(0) - fake.mean(0)).norm() ** power + a.trace() + b.trace() - times * cross(a, b)


def _fit(n: Tensor, distance: Tensor, of: Callable[[Tensor], Tensor] = torch.reciprocal, row: int = 0) -> Tensor:
    """A coefficient of the line through (of(n), distance): the value at of(n) = 0, or the slope."""
    return torch.linalg.lstsq(torch.stack([torch.ones_like(n), of(n)], 1), distance[:, None]).solution[row, 0]


_N = torch.tensor([250.0, 500.0, 750.0, 1500.0], dtype=torch.float64)
_PIXELS = torch.tensor([-1.0, -0.998, -0.5, -0.003, 0.0, 0.003, 0.501, 0.996, 1.0]).reshape(1, 1, 3, 3)
_OUTSIDE = torch.tensor([-1.02, -0.41, 0.9961, 1.01]).reshape(1, 1, 2, 2)

EXERCISES: dict[str, Exercise] = {
    "frechet": Exercise(
        _frechet,
        [(_REAL[:9], _FAKE), (_FAKE[:6], _REAL[:6]), (_REAL, _REAL + 2.0)],  # equally many: covariances of rows multiply, too
        {
            "two equal sets must be at distance 0; the root is the matrix's, and you took it of each entry": (
                lambda real, fake: _frechet(real, fake, lambda a, b: (a @ b).clamp(min=0).sqrt().trace())
            ),
            "two equal sets must be at distance 0; the cross term stands there twice, as in (s − s')² = s² + s'² − 2ss'": (
                lambda real, fake: _frechet(real, fake, times=1)
            ),
            "the covariances divide by N; the estimate without bias divides by N − 1": (
                lambda real, fake: _frechet(real, fake, correction=0)
            ),
            "a shift of all features by m must add |m|²; you added |m|, the means' distance without its square": (
                lambda real, fake: _frechet(real, fake, power=1)
            ),
            "correlations must count; you compared the variances of single features, the diagonals": (
                lambda real, fake: _frechet(real, fake, lambda a, b: (a.diagonal() * b.diagonal()).sqrt().sum())
            ),
            "a product of roots is not the root of the product where the matrices don't commute": (
                lambda real, fake: _frechet(real, fake, lambda a, b: (_root(a) @ _root(b)).trace())
            ),
            "two equal sets must be at distance 0; the trace of the root sums the *roots* of the eigenvalues": (
                lambda real, fake: _frechet(real, fake, lambda a, b: (a @ b).trace())
            ),
            "a covariance is of the features, [d,d]; torch.cov takes a feature a row, and yours got an image a row: x.T": (
                lambda real, fake: _frechet(real, fake, rows=True)
            ),
            "the distance is already squared, a squared length in the features; you took its root": (
                lambda real, fake: _frechet(real, fake).clamp(min=0).sqrt()
            ),
        },
    ),
    "limit": Exercise(
        _fit,
        [
            (_N, 3 + 6000 / _N),
            (_N, torch.tensor([26.1, 15.4, 10.2, 7.3], dtype=torch.float64)),
        ],
        {
            "more images must still lower it; you fitted a line in N, and the distance is one in 1/N": (
                lambda n, distance: _fit(n, distance, lambda n: n)
            ),
            "the limit is where 1/N = 0; you returned the line's slope": lambda n, distance: _fit(n, distance, row=1),
            "the largest N is not an infinite one; its bias is still there": lambda n, distance: distance[n.argmax()],
            "an average over N has the bias of all of them": lambda n, distance: distance.mean(),
            "the bias falls as 1/N; you fitted a line in 1/√N, as the scatter of a mean falls": (
                lambda n, distance: _fit(n, distance, torch.rsqrt)
            ),
            "the bias falls as 1/N; you fitted a line in log N": lambda n, distance: _fit(n, distance, torch.log),
        },
    ),
    "to_uint8": Exercise(
        lambda x: ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8),
        [(_PIXELS,), (_OUTSIDE,)],
        {
            "−0.5 must become 64, the grey level nearest to 63.75; a conversion to integers cuts off what follows the point": (
                lambda x: ((x.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
            ),
            "1.01 must become 255; a byte has no 256, it starts again at 0 and white turns black: clamp first": (
                lambda x: ((x + 1) * 127.5).round().long().remainder(256).to(torch.uint8)
            ),
            "−1 must become 0 and 0 grey; your images ran from 0 to 1, these run from −1 to 1": (
                lambda x: (x.clamp(0, 1) * 255).round().to(torch.uint8)
            ),
            "0 must become grey whatever else is in the batch; you stretched each batch from its darkest to its brightest": (
                lambda x: ((x - x.min()) / (x.max() - x.min()) * 255).round().to(torch.uint8)
            ),
            "the levels 0 … 255 are 255 apart, half of it is 127.5; you scaled by 128": (
                lambda x: ((x.clamp(-1, 1) + 1) * 128).round().clamp(max=255).to(torch.uint8)
            ),
            "a byte is missing: these are still floats": lambda x: ((x.clamp(-1, 1) + 1) * 127.5).round(),
        },
    ),
}
