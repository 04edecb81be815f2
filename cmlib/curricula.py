"""How training gets finer: the papers' schedules, pure functions of the step k of K, and their laws of the noise level."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor


def ct_levels(k: int, K: int, s0: int = 2, s1: int = 150) -> int:
    """N(k) = ⌈√(k/K·((s1 + 1)² − s0²) + s0²) − 1⌉ + 1 levels: from s0 at k = 0 to s1 + 1 at k = K (CM app. C)."""
    return math.ceil(math.sqrt(k / K * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1


def ct_mu(k: int, K: int, s0: int = 2, s1: int = 150, mu0: float = 0.9) -> float:
    """μ(k) = exp(s0·ln μ0 / N(k)): the target's decay, from μ0 towards 1 as the levels multiply (CM app. C)."""
    return math.exp(s0 * math.log(mu0) / ct_levels(k, K, s0, s1))


def ict_levels(k: int, K: int, s0: int = 10, s1: int = 1280) -> int:
    """N(k) = min(s0·2^⌊k/K'⌋, s1) + 1 with K' = ⌊K/(log2⌊s1/s0⌋ + 1)⌋: 11, 21, 41, … 1281 (iCT sec. 3.4)."""
    stage = max(1, math.floor(K / (math.log2(s1 // s0) + 1)))
    return int(min(s0 * 2 ** (k // stage), s1)) + 1


def lognormal_bins(levels: Tensor, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """p(i) ∝ erf(z_{i+1}) − erf(z_i) [N−1], z = (ln σ − mean)/(√2·std), for ascending `levels` [N] (iCT sec. 3.5)."""
    z = ((levels.log() - mean) / (math.sqrt(2) * std)).erf()
    return z.diff() / (z[-1] - z[0])


def lognormal(n: int, generator: Generator, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """n noise levels with ln t ~ N(mean, std²) (iCT sec. 3.5)."""
    return (mean + std * torch.randn(n, generator=generator)).exp()


def ect_r(t: Tensor, stage: float, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """r = max(0, t·(1 − q^{−(a+1)}·(1 + k·sigmoid(−b·t)))) at stage a: the pair closes as a grows (ECT, its mapping function).

    A whole number of stages is ECT's; a fractional one closes the gap smoothly (SCT).
    """
    return (t * (1 - q ** -(stage + 1) * (1 + k * torch.sigmoid(-b * t)))).clamp(min=0)
