"""Exercises of lesson 2: the teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cmlib.checks import Exercise
from cmlib.course.lesson1 import _EPS, _LEVELS, _X
from cmlib.ops import expand_like

Network = Callable[[Tensor, Tensor], Tensor]

_TABLE = torch.cumprod(1 - torch.linspace(0.02, 0.5, 10), dim=0)


def _half(x: Tensor, n: Tensor) -> Tensor:
    """A network for the cases: it depends on both inputs, the index included."""
    return 0.5 * x + expand_like(n, x) / 10


def _noisy(x0: Tensor, eps: Tensor, n: Tensor, alpha_bar: Tensor) -> Tensor:
    ab = expand_like(alpha_bar[n], x0)
    return ab.sqrt() * x0 + (1 - ab).sqrt() * eps


def _loss(network: Network, x0: Tensor, eps: Tensor, n: Tensor, alpha_bar: Tensor) -> Tensor:
    return (network(_noisy(x0, eps, n, alpha_bar), n) - eps).pow(2).mean()


def _loss_without_roots(network: Network, x0: Tensor, eps: Tensor, n: Tensor, alpha_bar: Tensor) -> Tensor:
    ab = expand_like(alpha_bar[n], x0)
    return (network(ab * x0 + (1 - ab) * eps, n) - eps).pow(2).mean()


def _loss_along_rows(network: Network, x0: Tensor, eps: Tensor, n: Tensor, alpha_bar: Tensor) -> Tensor:
    ab = alpha_bar[n]
    return (network(ab.sqrt() * x0 + (1 - ab).sqrt() * eps, n) - eps).pow(2).mean()


EXERCISES = {
    "denoised": Exercise(
        lambda x, eps, alpha_bar: (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt(),
        [(_X, _EPS, a) for a in _LEVELS],
        {
            "the image must have its full size again; you removed the noise but left the image multiplied by √ᾱ": (
                lambda x, eps, alpha_bar: x - (1 - alpha_bar).sqrt() * eps
            ),
            "the noise must be taken away; you added it once more": (
                lambda x, eps, alpha_bar: (x + (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
            ),
            "noise enters with its standard deviation √(1 − ᾱ), the image with √ᾱ; you left both roots out": (
                lambda x, eps, alpha_bar: (x - (1 - alpha_bar) * eps) / alpha_bar
            ),
            "the noise in x is √(1 − ᾱ)·ε; you took away the whole ε": (lambda x, eps, alpha_bar: (x - eps) / alpha_bar.sqrt()),
            "x is in the chain's coordinates; x − σ·ε is right for x0 + σ·ε, so divide x by √ᾱ, too": (
                lambda x, eps, alpha_bar: x - ((1 - alpha_bar) / alpha_bar).sqrt() * eps
            ),
        },
    ),
    "score": Exercise(
        lambda eps, sigma: -eps / sigma,
        [(_EPS, 0.1), (_EPS, 2.0), (_EPS, 7.0)],
        {
            "the score points towards the data; the noise points away from it, so the sign is wrong": (
                lambda eps, sigma: eps / sigma
            ),
            "the score divides the noise σ·ε by the variance σ²; you divided the unit noise ε by σ²": (
                lambda eps, sigma: -eps / sigma**2
            ),
            "the score has the units of 1/x; −σ·ε is the way from x to the average image, which is σ² times the score": (
                lambda eps, sigma: -sigma * eps
            ),
            "the score has the units of 1/x, and ε has none; the factor 1/σ is missing": lambda eps, sigma: -eps,
        },
    ),
    "loss": Exercise(
        _loss,
        [(_half, _X, _EPS, n, _TABLE) for n in (torch.tensor([0, 7]), torch.tensor([9, 3]))],
        {
            "the network must see the noisy image; you showed it the clean one": (
                lambda network, x0, eps, n, alpha_bar: (network(x0, n) - eps).pow(2).mean()
            ),
            "the network's answer is a guess of the noise; you compared it with the image": (
                lambda network, x0, eps, n, alpha_bar: (network(_noisy(x0, eps, n, alpha_bar), n) - x0).pow(2).mean()
            ),
            "the noisy image is √ᾱ·x0 + √(1 − ᾱ)·ε; you left the roots out": _loss_without_roots,
            "every image has its own ᾱ; yours is spread along the pixels of a row: make [B] into [B,1,1,1]": _loss_along_rows,
            "the loss is a mean over images and pixels; your sum grows with their number, and the step size with it": (
                lambda network, x0, eps, n, alpha_bar: (network(_noisy(x0, eps, n, alpha_bar), n) - eps).pow(2).sum()
            ),
            "the loss is a mean over pixels, too; you summed the pixels of each image": (
                lambda network, x0, eps, n, alpha_bar: (
                    (network(_noisy(x0, eps, n, alpha_bar), n) - eps).pow(2).flatten(1).sum(1).mean()
                )
            ),
        },
    ),
}
