"""Forward processes: how a clean image becomes noise, and the exact maps between the three ways of writing it.

Every process has the same five methods. `t` is its noise level, one number a sample.

| process    | x_t                                  | t                           |
|------------|--------------------------------------|-----------------------------|
| `DDPM`     | √ᾱ_n·x0 + √(1−ᾱ_n)·ε                 | chain index n in 0 … T−1    |
| `EDM`      | x0 + σ·ε                             | standard deviation σ        |
| `TrigFlow` | cos t·x0 + sin t·z,  z ~ N(0, σ_d²)  | angle in [0, π/2]           |

EDM is the common language: `to_edm` and `from_edm` convert a state exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cmlib.ops import expand_like


def ode_step(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, r: Tensor, solver: str = "ddim") -> Tensor:
    """One step of dx/dσ = (x − D(x, σ))/σ from t to r < t [B], EDM coordinates: Euler (which is DDIM) or Heun (EDM Alg. 1).

    Heun falls back to Euler where r = 0, as there the slope is not defined. Raises ValueError on another solver.
    """
    if solver not in ("ddim", "heun"):
        raise ValueError(f"an ODE step is 'ddim' or 'heun', got {solver!r}")
    h = expand_like(r - t, x)
    first = (x - denoise(x, t)) / expand_like(t, x)
    x_r = x + h * first
    if solver == "ddim":
        return x_r
    safe = torch.where(r > 0, r, t)
    second = (x_r - denoise(x_r, safe)) / expand_like(safe, x)
    return x + h * (first + torch.where(expand_like(r > 0, x), second, first)) / 2


@dataclass(frozen=True)
class EDM:
    """x_t = x0 + σ·ε (Karras et al. 2022), noise levels in the units of the pixels."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not (0 <= self.sigma_min < self.sigma_max < math.inf and self.rho > 0):
            raise ValueError(f"need 0 <= sigma_min < sigma_max < ∞ and rho > 0, got {self}")

    def perturb(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = x0 + t·ε; `eps` is unit normal."""
        return x0 + expand_like(t, x0) * eps

    def velocity(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """dx/dt = (x − D)/t, the probability-flow ODE (EDM eq. 1 and 3)."""
        return (x - denoised) / expand_like(t, x)

    def grid(self, n: int) -> Tensor:
        """n ascending levels t_i = (σ_min^{1/ρ} + i/(n−1)·(σ_max^{1/ρ} − σ_min^{1/ρ}))^ρ (CM sec. 4, EDM eq. 5)."""
        if n < 1:
            raise ValueError(f"a grid has at least one level, got {n}")
        lo, hi = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.linspace(lo, hi, n, dtype=torch.float64).pow(self.rho).float()

    def to_edm(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The state itself, and σ = t."""
        return x, t

    def from_edm(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The state itself, and t = σ."""
        return x, sigma


@dataclass(frozen=True)
class TrigFlow:
    """x_t = cos(t)·x0 + sin(t)·z with z = σ_d·ε (sCM sec. 3)."""

    sigma_data: float = 0.5

    def perturb(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = cos t·x0 + sin t·σ_d·ε; `eps` is unit normal."""
        t = expand_like(t, x0)
        return t.cos() * x0 + t.sin() * self.sigma_data * eps

    def velocity(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """dx/dt = cos t·z − sin t·x0 with x0 = D and z = (x − cos t·D)/sin t (sCM sec. 3)."""
        t = expand_like(t, x)
        z = (x - t.cos() * denoised) / t.sin()
        return t.cos() * z - t.sin() * denoised

    def to_edm(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x/cos t at σ = σ_d·tan t."""
        return x / expand_like(t, x).cos(), self.sigma_data * t.tan()

    def from_edm(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """cos t·x at t = atan(σ/σ_d)."""
        t = torch.atan(sigma / self.sigma_data)
        return expand_like(t, x).cos() * x, t


@dataclass(frozen=True)
class DDPM:
    """x_n = √ᾱ_n·x0 + √(1−ᾱ_n)·ε (Ho et al. 2020, eq. 4), chain index n in 0 … T−1 as diffusers counts it.

    The papers' t in 1 … T is n+1; n = −1 is the clean image (ᾱ = 1, σ = 0). Between indices ln σ is interpolated
    linearly, so that every noise level has a fractional n.
    """

    betas: Tensor
    name: str = "trained_betas"
    alpha_bar: Tensor = field(init=False)
    _log_sigma: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or len(self.betas) < 2 or not bool(((self.betas > 0) & (self.betas < 1)).all()):
            raise ValueError("betas must be two or more numbers strictly between 0 and 1")
        alpha_bar = torch.cumprod(1.0 - self.betas, dim=0)
        object.__setattr__(self, "alpha_bar", alpha_bar)
        ab = alpha_bar.double()
        object.__setattr__(self, "_log_sigma", (0.5 * ((1 - ab) / ab).log()).float())

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DDPM:
        """β from 1e-4 to 0.02 in equal steps (Ho et al. 2020, sec. 4)."""
        return cls(torch.linspace(beta_start, beta_end, T, dtype=torch.float32), "linear")

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008) -> DDPM:
        """ᾱ(u) = cos²((u+s)/(1+s)·π/2), β clipped at 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
        u = torch.arange(T + 1, dtype=torch.float64) / T
        ab = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
        return cls((1 - ab[1:] / ab[:-1]).clamp(max=0.999).float(), "cosine")

    @classmethod
    def cosine_linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DDPM:
        """β_n = β_start + (β_end − β_start)·(1 − cos(π·n/(T−1)))/2: the linear schedule's ends, a cosine ramp between.

        The brief asks for a "cosine-linear" schedule without defining it. This one adds the same total noise Σβ as the
        linear chain, so a teacher of the linear chain can be fine-tuned to it.
        """
        ramp = (1 - torch.cos(math.pi * torch.arange(T, dtype=torch.float64) / (T - 1))) / 2
        return cls((beta_start + (beta_end - beta_start) * ramp).float(), "cosine-linear")

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> DDPM:
        """The chain of a diffusers `DDPMScheduler` (or any scheduler with `betas`)."""
        return cls(scheduler.betas.detach().float().cpu().clone(), str(scheduler.config.beta_schedule))

    @property
    def T(self) -> int:
        """Number of steps in the chain."""
        return len(self.betas)

    @property
    def sigma_min(self) -> float:
        """σ of index 0."""
        return float(self._log_sigma[0].exp())

    @property
    def sigma_max(self) -> float:
        """σ of index T−1."""
        return float(self._log_sigma[-1].exp())

    def _slope(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """ln σ and its derivative in n, at fractional n in [0, T−1]."""
        table = self._log_sigma.to(n.device)
        lo = n.detach().floor().clamp(0, self.T - 2).long()
        slope = table[lo + 1] - table[lo]
        return table[lo] + (n - lo) * slope, slope

    def sigma(self, n: Tensor) -> Tensor:
        """σ(n) = √((1−ᾱ_n)/ᾱ_n); n may be fractional; n = −1 gives 0."""
        n = n.float() if not n.is_floating_point() else n
        return torch.where(n < 0, torch.zeros_like(n), self._slope(n.clamp(min=0))[0].exp())

    def index(self, sigma: Tensor) -> Tensor:
        """The fractional n with σ(n) = sigma, interpolated in ln σ and clamped to [0, T−1]."""
        table = self._log_sigma.to(sigma.device)
        log_s = sigma.log().clamp(table[0], table[-1])
        lo = (torch.searchsorted(table, log_s, right=True) - 1).clamp(0, self.T - 2)
        return lo + (log_s - table[lo]) / (table[lo + 1] - table[lo])

    def perturb(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """q(x_n | x0): √ᾱ_n·x0 + √(1−ᾱ_n)·ε; `eps` is unit normal."""
        s = expand_like(self.sigma(t), x0)
        return (x0 + s * eps) / (1 + s**2).sqrt()

    def velocity(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """dx/dn along the probability-flow ODE: a'(n)·D + b'(n)·ε with a = (1+σ²)^{−½}, b = σ·a."""
        s, slope = expand_like(self.sigma(t), x), expand_like(self._slope(t.float())[1], x)
        a = (1 + s**2).rsqrt()
        eps = (x - a * denoised) / (s * a)
        return a**3 * s * slope * (eps - s * denoised)

    def grid(self, n: int) -> Tensor:
        """n ascending chain indices ⌊T/n⌋·i, the "leading" spacing that diffusers' DDIM uses by default."""
        if not 1 <= n <= self.T:
            raise ValueError(f"steps must lie in 1 … {self.T}, got {n}")
        return torch.arange(n) * (self.T // n)

    def to_edm(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x·√(1+σ²) at σ(n)."""
        s = self.sigma(t)
        return x * expand_like((1 + s**2).sqrt(), x), s

    def from_edm(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x/√(1+σ²) at n(σ)."""
        return x / expand_like((1 + sigma**2).sqrt(), x), self.index(sigma)
