"""Exercises of lesson 1: the forward process."""

from __future__ import annotations

import torch

from cmlib.checks import Exercise

_X = torch.linspace(-1, 1, 8).reshape(2, 1, 2, 2)
_EPS = torch.tensor([0.3, -1.2, 0.8, 2.1, -0.4, 0.1, -1.7, 0.6]).reshape(2, 1, 2, 2)
_LEVELS = [torch.tensor(v) for v in (0.9, 0.5, 0.02)]

EXERCISES = {
    "alpha_bar": Exercise(
        lambda betas: torch.cumprod(1 - betas, dim=0),
        [(torch.linspace(1e-4, 0.02, 50),), (torch.tensor([0.1, 0.5, 0.9]),)],
        {
            "ᾱ must multiply what is kept, 1 − β; you multiplied what is added, β": lambda betas: torch.cumprod(betas, dim=0),
            "ᾱ must stay positive; scalings of successive steps multiply, they don't add up": lambda betas: (
                1 - torch.cumsum(betas, dim=0)
            ),
            "ᾱ needs a value for every step; you returned only the product of all of them": lambda betas: torch.prod(1 - betas),
            "ᾱ_n must contain step n itself; yours is one step late": lambda betas: torch.cat(
                [torch.ones(1), torch.cumprod(1 - betas, dim=0)[:-1]]
            ),
            "ᾱ is a product of 1 − β; you took √(1 − β), which is the scaling of x, hence the root of ᾱ": lambda betas: (
                torch.cumprod((1 - betas).sqrt(), dim=0)
            ),
        },
    ),
    "marginal": Exercise(
        lambda x0, eps, alpha_bar: alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps,
        [(_X, _EPS, a) for a in _LEVELS],
        {
            "the variance is not 1 − ᾱ; you multiplied by ᾱ and 1 − ᾱ, but variance scales with the square: both need a root": (
                lambda x0, eps, alpha_bar: alpha_bar * x0 + (1 - alpha_bar) * eps
            ),
            "the variance is not 1 − ᾱ; 1 − ᾱ is the variance, and noise is multiplied by the standard deviation, its root": (
                lambda x0, eps, alpha_bar: alpha_bar.sqrt() * x0 + (1 - alpha_bar) * eps
            ),
            "the mean is not √ᾱ·x0; you scaled the image by ᾱ, without the root": (
                lambda x0, eps, alpha_bar: alpha_bar * x0 + (1 - alpha_bar).sqrt() * eps
            ),
            "the mean is not √ᾱ·x0; you kept the whole image and only added noise; the chain also shrinks it": (
                lambda x0, eps, alpha_bar: x0 + (1 - alpha_bar).sqrt() * eps
            ),
            "at ᾱ near 1 the image must remain; you exchanged image and noise": (
                lambda x0, eps, alpha_bar: (1 - alpha_bar).sqrt() * x0 + alpha_bar.sqrt() * eps
            ),
        },
    ),
    "sigma": Exercise(
        lambda alpha_bar: ((1 - alpha_bar) / alpha_bar).sqrt(),
        [(a,) for a in _LEVELS],
        {
            "σ must grow beyond 1; √(1 − ᾱ) is the noise in the chain's units, σ is relative to the image: divide by √ᾱ": (
                lambda alpha_bar: (1 - alpha_bar).sqrt()
            ),
            "σ is a standard deviation; you returned σ², the variance": lambda alpha_bar: (1 - alpha_bar) / alpha_bar,
            "σ must grow as ᾱ falls; you returned signal over noise, which is 1/σ": (
                lambda alpha_bar: (alpha_bar / (1 - alpha_bar)).sqrt()
            ),
            "σ is a standard deviation; you returned the signal-to-noise ratio 1/σ²": lambda alpha_bar: (
                alpha_bar / (1 - alpha_bar)
            ),
        },
    ),
    "score": Exercise(
        lambda x, mean, std, sigma: (mean - x) / (std**2 + sigma**2),
        [(_X, 0.5, 0.3, 1.0), (_X, -1.0, 2.0, 0.1), (_X, 0.0, 0.5, 5.0)],
        {
            "the score must point uphill, towards the mean; yours has the opposite sign": (
                lambda x, mean, std, sigma: (x - mean) / (std**2 + sigma**2)
            ),
            "the variance of x is not σ² alone; the data's own variance std² adds to it": (
                lambda x, mean, std, sigma: (mean - x) / sigma**2
            ),
            "the variance of x is not std² alone; the added noise's σ² belongs to it": (
                lambda x, mean, std, sigma: (mean - x) / std**2
            ),
            "the variance of a sum is the sum of the variances; you added standard deviations": (
                lambda x, mean, std, sigma: (mean - x) / (std + sigma) ** 2
            ),
            "the score divides by the variance; you divided by the standard deviation": (
                lambda x, mean, std, sigma: (mean - x) / (std**2 + sigma**2) ** 0.5
            ),
        },
    ),
    "velocity": Exercise(
        lambda x, score, sigma: -sigma * score,
        [(_X, _EPS, 0.1), (_X, _EPS, 1.0), (_X, _EPS, 7.0)],
        {
            "with more noise, points must move away from the data; the score points to it, so the sign is wrong": (
                lambda x, score, sigma: sigma * score
            ),
            "the variance grows twice too fast; −2σ·score is the drift of the reverse SDE, the ODE has half of it": (
                lambda x, score, sigma: -2 * sigma * score
            ),
            "the factor is half of d(σ²)/dσ = 2σ; you wrote σ² for σ": lambda x, score, sigma: -(sigma**2) * score,
            "the factor σ is missing; the score alone has the units of 1/x": lambda x, score, sigma: -score,
            "(x − D)/σ has the denoised D in it, not the score; you put the score in its place": (
                lambda x, score, sigma: (x - score) / sigma
            ),
        },
    ),
}
