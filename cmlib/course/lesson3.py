"""Exercises of lesson 3: the pair cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cmlib.checks import Exercise
from cmlib.course.lesson1 import _EPS, _X

_PAIRS = [(torch.tensor(a), torch.tensor(b)) for a, b in ((0.5, 0.9), (0.02, 0.03), (0.9, 0.999))]  # ᾱ_n, ᾱ_r


def _posterior(x: Tensor, x0: Tensor, ab_n: Tensor, ab_r: Tensor) -> Tensor:
    alpha = ab_n / ab_r
    return (ab_r.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - ab_r) * x) / (1 - ab_n)


def _prior_is_the_image(x: Tensor, x0: Tensor, ab_n: Tensor, ab_r: Tensor) -> Tensor:
    alpha = ab_n / ab_r
    return (x0 * (1 - alpha) + alpha.sqrt() * (1 - ab_r) * x) / (1 - ab_n)


def _no_roots(x: Tensor, x0: Tensor, ab_n: Tensor, ab_r: Tensor) -> Tensor:
    alpha = ab_n / ab_r
    return (ab_r * (1 - alpha) * x0 + alpha * (1 - ab_r) * x) / (1 - ab_n)


def _exchanged(x: Tensor, x0: Tensor, ab_n: Tensor, ab_r: Tensor) -> Tensor:
    alpha = ab_n / ab_r
    return (ab_r.sqrt() * (1 - ab_r) * x0 + alpha.sqrt() * (1 - alpha) * x) / (1 - ab_n)


def _weighed_by_variances(x: Tensor, x0: Tensor, ab_n: Tensor, ab_r: Tensor) -> Tensor:
    alpha = ab_n / ab_r
    from_image, from_x = 1 - ab_r, (1 - alpha) / alpha
    return (ab_r.sqrt() * x0 * from_image + x / alpha.sqrt() * from_x) / (from_image + from_x)


def _not_divided(x: Tensor, x0: Tensor, ab_n: Tensor, ab_r: Tensor) -> Tensor:
    alpha = ab_n / ab_r
    return ab_r.sqrt() * x0 / (1 - ab_r) + alpha.sqrt() * x / (1 - alpha)


def _whole_chain(x: Tensor, x0: Tensor, ab_n: Tensor, ab_r: Tensor) -> Tensor:
    return (ab_r.sqrt() * (1 - ab_n) * x0 + ab_n.sqrt() * (1 - ab_r) * x) / (1 - ab_n)


def _guess(x: Tensor, eps: Tensor, ab_n: Tensor) -> Tensor:
    return (x - (1 - ab_n).sqrt() * eps) / ab_n.sqrt()


def _ddim(x: Tensor, x0: Tensor, ab_n: Tensor, ab_r: Tensor) -> Tensor:
    eps = (x - ab_n.sqrt() * x0) / (1 - ab_n).sqrt()
    return ab_r.sqrt() * x0 + (1 - ab_r).sqrt() * eps


def _bytes(shape: Sequence[int]) -> int:
    return 2 * 2 * math.prod(shape) + 2 + 2 + 8


EXERCISES = {
    "posterior_mean": Exercise(
        _posterior,
        [(_X, _EPS, a, b) for a, b in _PAIRS],
        {
            "the mean over all ways back has less noise than x_r itself; yours has all of it: that is the DDIM step": (_ddim),
            "at level r the image stands with the factor √ᾱ_r; you used x0 in full": _prior_is_the_image,
            "means are scaled with roots, √ᾱ_r and √α; you scaled with ᾱ_r and α": _no_roots,
            "the *smaller* variance must get the larger weight; you exchanged 1 − ᾱ_r and 1 − α": _exchanged,
            "x_n tells something about x_r, too; you returned only the image, noised to no level": (
                lambda x, x0, ab_n, ab_r: ab_r.sqrt() * x0 + 0 * x
            ),
            "the *smaller* variance must get the larger weight; you weighed with the variances, not with their inverses": (
                _weighed_by_variances
            ),
            "an average's weights must sum to 1; you left the denominator out": _not_divided,
            "an average's weights must sum to 1; the division by 1 − ᾱ_n is missing": (
                lambda x, x0, ab_n, ab_r: _posterior(x, x0, ab_n, ab_r) * (1 - ab_n)
            ),
            "α is the way from r to n alone, ᾱ_n/ᾱ_r; you took ᾱ_n, the way from the clean image": _whole_chain,
        },
    ),
    "ddim": Exercise(
        lambda x, eps, ab_n, ab_r: ab_r.sqrt() * _guess(x, eps, ab_n) + (1 - ab_r).sqrt() * eps,
        [(_X, _EPS, a, b) for a, b in _PAIRS],
        {
            "the noise must fall to level r; you put back as much as level n had": (
                lambda x, eps, ab_n, ab_r: ab_r.sqrt() * _guess(x, eps, ab_n) + (1 - ab_n).sqrt() * eps
            ),
            "no noise comes back; you jumped to the average image, scaled to level r, and stayed there": (
                lambda x, eps, ab_n, ab_r: ab_r.sqrt() * _guess(x, eps, ab_n)
            ),
            "the image must be scaled to level r by √ᾱ_r; you used it in full": (
                lambda x, eps, ab_n, ab_r: _guess(x, eps, ab_n) + (1 - ab_r).sqrt() * eps
            ),
            "1 − ᾱ is a variance; noise is multiplied by its root": (
                lambda x, eps, ab_n, ab_r: ab_r.sqrt() * (x - (1 - ab_n) * eps) / ab_n.sqrt() + (1 - ab_r) * eps
            ),
            "DDIM puts the *same* noise back; you averaged over all ways back, which removes some: the posterior mean": (
                lambda x, eps, ab_n, ab_r: _posterior(x, _guess(x, eps, ab_n), ab_n, ab_r)
            ),
        },
    ),
    "bytes": Exercise(
        _bytes,
        [((3, 32, 32),), ((1, 8, 8),), ((3, 64, 64),)],
        {
            "a pair is two images; you counted one": lambda shape: 2 * math.prod(shape) + 12,
            "float16 takes 2 bytes a number; you counted 4, which is float32": lambda shape: 2 * 4 * math.prod(shape) + 12,
            "the two levels and the index are stored, too: 2 + 2 + 8 bytes": lambda shape: 2 * 2 * math.prod(shape),
            "each of the two images has a level of its own; you counted one": lambda shape: 2 * 2 * math.prod(shape) + 2 + 8,
            "bytes are asked for; you returned bits": lambda shape: 8 * _bytes(shape),
        },
    ),
}
