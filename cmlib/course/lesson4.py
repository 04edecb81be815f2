"""Exercises of lesson 4: the consistency student."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlib.checks import Exercise
from cmlib.consistency import c_in, c_out, c_skip
from cmlib.ops import expand_like, pseudo_huber

_T = torch.tensor([0.1, 0.5, 2.0, 30.0])
_A = torch.tensor([0.9, -0.4, 0.1, 0.3, -0.8, 0.5, 0.2, -0.1]).reshape(2, 1, 2, 2)
_B = torch.tensor([0.8, 0.7, 0.1, -0.6, -0.7, 0.5, -0.9, 0.0]).reshape(2, 1, 2, 2)
_R = torch.tensor([0.4, 1.5])


def _boundary(t: Tensor, sigma_min: float, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    return c_skip(t, sigma_min, sigma_data), c_out(t, sigma_min, sigma_data), c_in(t, sigma_data)


def _f(x: Tensor, t: Tensor) -> Tensor:
    """A target network for the exercise: some smooth function of both arguments."""
    return x / expand_like((1 + t**2).sqrt(), x) + 0.1 * expand_like(t, x)


def _denoise(x: Tensor, t: Tensor) -> Tensor:
    """A teacher for the exercise: the denoiser of data N(0.2, 0.5²)."""
    return 0.2 + (x - 0.2) / expand_like(1 + 4 * t**2, x)


def _step(x_t, t, r, denoised):
    return x_t + expand_like((r - t) / t, x_t) * (x_t - denoised)


EXERCISES: dict[str, Exercise] = {
    "boundary": Exercise(
        _boundary,
        [(_T, 0.1, 0.5), (_T, 0.02, 1.0)],
        {
            "c_in must give the network unit variance; t² + σ_d² is the variance of x, you divided by it without its root": (
                lambda t, sigma_min, sigma_data: (*_boundary(t, sigma_min, sigma_data)[:2], 1 / (t**2 + sigma_data**2))
            ),
            "c_out must grow to σ_d at large t; you returned c_out², the variance that is left to the network": (
                lambda t, sigma_min, sigma_data: (
                    c_skip(t, sigma_min, sigma_data),
                    c_out(t, sigma_min, sigma_data) ** 2,
                    c_in(t, sigma_data),
                )
            ),
            "f(x, σ_min) is not x; at t = σ_min you leave c_out > 0 and c_skip < 1, as EDM does whose boundary is at 0: "
            "shift t by σ_min": lambda t, sigma_min, sigma_data: _boundary(t, 0.0, sigma_data),
            "f(x, σ_min) is not x; c_out must be 0 at t = σ_min, you shifted only c_skip": (
                lambda t, sigma_min, sigma_data: (
                    c_skip(t, sigma_min, sigma_data),
                    c_out(t, 0.0, sigma_data),
                    c_in(t, sigma_data),
                )
            ),
            "c_out's denominator is the deviation of x, √(t² + σ_d²), boundary or not; shift t in its numerator only": (
                lambda t, sigma_min, sigma_data: (
                    c_skip(t, sigma_min, sigma_data),
                    c_out(t - sigma_min, 0.0, sigma_data),
                    c_in(t, sigma_data),
                )
            ),
            "c_in must give the network unit variance, and x has t² + σ_d² whatever the boundary; don't shift t there": (
                lambda t, sigma_min, sigma_data: (
                    *_boundary(t, sigma_min, sigma_data)[:2],
                    c_in(t - sigma_min, sigma_data),
                )
            ),
            "only c_skip and the numerator of c_out decide about the boundary; you shifted t wherever it stands": (
                lambda t, sigma_min, sigma_data: _boundary(t - sigma_min, 0.0, sigma_data)
            ),
            "f(x, σ_min) is not x but the network's output; you exchanged c_skip and c_out": (
                lambda t, sigma_min, sigma_data: (
                    c_out(t, sigma_min, sigma_data),
                    c_skip(t, sigma_min, sigma_data),
                    c_in(t, sigma_data),
                )
            ),
            "all three depend on the size of the data; you forgot σ_d, as if it were always 1": (
                lambda t, sigma_min, sigma_data: _boundary(t, sigma_min, 1.0)
            ),
            "c_out must grow to σ_d at large t; yours grows to 1: its factor σ_d is missing": (
                lambda t, sigma_min, sigma_data: (
                    c_skip(t, sigma_min, sigma_data),
                    c_out(t, sigma_min, sigma_data) / sigma_data,
                    c_in(t, sigma_data),
                )
            ),
            "c_skip weighs variances; you wrote σ_d/(t − σ_min + σ_d), with standard deviations instead of their squares": (
                lambda t, sigma_min, sigma_data: (
                    sigma_data / (t - sigma_min + sigma_data),
                    c_out(t, sigma_min, sigma_data),
                    c_in(t, sigma_data),
                )
            ),
        },
    ),
    "huber": Exercise(
        lambda a, b, c: pseudo_huber(a, b, c),
        [(_A, _B, 0.1), (_A, _B, 1.0)],
        {
            "it depends on how an error is spread over the pixels; you took the root of each pixel and then summed, "
            "the norm of the whole image comes first": (lambda a, b, c: (((a - b) ** 2 + c**2).sqrt() - c).flatten(1).sum(1)),
            "it depends on how an error is spread over the pixels; you averaged a Huber of each pixel, "
            "but the root is of the whole image": lambda a, b, c: (((a - b) ** 2 + c**2).sqrt() - c).flatten(1).mean(1),
            "‖a − b‖² is a sum over pixels; you put their mean under the root, which shrinks with the image's size": (
                lambda a, b, c: ((a - b).pow(2).flatten(1).mean(1) + c**2).sqrt() - c
            ),
            "equal images must have distance 0; you forgot to subtract c": (
                lambda a, b, c: ((a - b).pow(2).flatten(1).sum(1) + c**2).sqrt()
            ),
            "c is a length, like ‖a − b‖; under the root it stands squared": (
                lambda a, b, c: ((a - b).pow(2).flatten(1).sum(1) + c).sqrt() - c
            ),
            "every image has its own distance, [B]; you took one norm of the whole batch": (
                lambda a, b, c: ((a - b).pow(2).sum() + c**2).sqrt() - c
            ),
        },
    ),
    "target": Exercise(
        lambda f_ema, denoise, x_t, t, r: f_ema(_step(x_t, t, r, denoise(x_t, t)), r),
        [(_f, _denoise, _A, torch.tensor([0.9, 3.0]), _R), (_f, _denoise, _B, torch.tensor([0.6, 2.0]), _R)],
        {
            "the target must be a clean image; you returned the teacher's next state itself, which is still noisy: "
            "that is the regression onto the next state": (lambda f_ema, denoise, x_t, t, r: _step(x_t, t, r, denoise(x_t, t))),
            "the state is at r now; you told the network that it is still at t": (
                lambda f_ema, denoise, x_t, t, r: f_ema(_step(x_t, t, r, denoise(x_t, t)), t)
            ),
            "x_t is a state at t; you told the network r, but did not take the teacher's step": (
                lambda f_ema, denoise, x_t, t, r: f_ema(x_t, r)
            ),
            "the target must be an end of the path; you returned the teacher's denoised image, the average of all ends": (
                lambda f_ema, denoise, x_t, t, r: denoise(x_t, t)
            ),
            "the step must go down, by r − t < 0; yours has the opposite sign and adds noise": (
                lambda f_ema, denoise, x_t, t, r: f_ema(_step(x_t, t, 2 * t - r, denoise(x_t, t)), r)
            ),
            "the slope dx/dt is (x − D)/t; you forgot to divide by t": (
                lambda f_ema, denoise, x_t, t, r: f_ema(x_t + expand_like(r - t, x_t) * (x_t - denoise(x_t, t)), r)
            ),
            "every image has its own levels; yours are spread along the pixels of a row: use expand_like": (
                lambda f_ema, denoise, x_t, t, r: f_ema(x_t + (r - t) * (x_t - denoise(x_t, t)) / t, r)
            ),
            "x̂_r is a point of the path at r; you gave f the denoised image instead, the average of all ends": (
                lambda f_ema, denoise, x_t, t, r: f_ema(denoise(x_t, t), r)
            ),
            "the step is the teacher's; you took its slope from the student's own answer instead of D": (
                lambda f_ema, denoise, x_t, t, r: f_ema(_step(x_t, t, r, f_ema(x_t, t)), r)
            ),
            "the target is the student's answer at x̂_r; you took the teacher's denoised image there": (
                lambda f_ema, denoise, x_t, t, r: denoise(_step(x_t, t, r, denoise(x_t, t)), r)
            ),
        },
    ),
}
