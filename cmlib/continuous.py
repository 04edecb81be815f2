"""Objectives in continuous time, r -> t, where the difference of two outputs becomes a derivative along the ODE.

The derivative is a Jacobian-vector product in forward mode (`torch.func.jvp`) of the target network, without gradient.
The gradient flows through f alone, called as any module is, so that distributed training sees it and averages it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from cmlib.consistency import c_noise, sampling_levels
from cmlib.ops import Losses, Network, expand_like, randn_like, rng_state, set_rng_state
from cmlib.process import EDM, TrigFlow


def jvp(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """f(inputs) and its derivative along `tangents`, without gradient and in float32, as forward mode and autocast do not mix;
    attention takes the one kernel that has the rule."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # torch >= 2.3

    with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(f, inputs, tangents)  # type: ignore[misc, return-value]


def squared_norm(x: Tensor) -> Tensor:
    """‖x‖² of each sample [B]."""
    return x.pow(2).flatten(1).sum(1)


def normalised(g: Tensor, c: float = 0.1) -> Tensor:
    """g/(‖g‖ + c): tangent normalisation (sCM sec. 4.2), the norm divided by √D so that c does not depend on the size."""
    return g / expand_like((squared_norm(g) / g[0].numel()).sqrt() + c, g)


def student_f(x: Tensor, t: Tensor, x0_hat: Tensor, sigma_data: float) -> Tensor:
    """sCM's F from an output x0_hat = f(x, σ): f = cos t·x_t − sin t·σ_d·F (sCM eq. 5) is CM's c_skip·x + c_out·(−F) at
    σ_min = 0, with tan t = σ/σ_d. `x` in TrigFlow coordinates."""
    t = expand_like(t, x)
    return (t.cos() * x - x0_hat) / (t.sin() * sigma_data)


@dataclass(frozen=True)
class SCM:
    """e^w/D·‖F_θ − F_θ⁻ − g‖² − w in TrigFlow (sCM alg. 1): sCT from data, sCD with a `teacher`.

    g = −cos²t·(σ_d·F⁻ − dx/dt) − ρ·cos t·sin t·(x_t + σ_d·dF⁻/dt), normalised; dx/dt = cos t·z − sin t·x0 from data, or
    the teacher's ODE. ρ warms up from 0 to 1 over `warmup` steps; t = atan(e^τ/σ_d), τ ~ N(mean, std²). The weight w(t)
    is the student's `log_weight` where it has one (see `AdaptiveWeight`), else 0. f is a `ConsistencyFunction` with σ_min = 0.
    Of the paper's network changes we have none: f's time input is 250·ln σ, and its layers are normalised as CM's are.
    """

    teacher: Any = None
    mean: float = -1.0
    std: float = 1.4
    warmup: int = 10_000
    normalise: bool = True
    mu: float = 0.0

    def velocity(self, x0: Tensor, z: Tensor, x: Tensor, t: Tensor, process: TrigFlow) -> Tensor:
        """dx/dt of the conditional path, or of the teacher's probability-flow ODE."""
        if self.teacher is None:
            return expand_like(t.cos(), x) * z - expand_like(t.sin(), x) * x0
        return process.velocity(x, self.teacher.denoise(*process.to_edm(x, t)), t)

    def tangent(self, target: Any, x: Tensor, t: Tensor, velocity: Tensor, warm: float) -> tuple[Tensor, Tensor]:
        """F⁻ and g [B,…]; the derivative is taken with cos t·sin t inside, which tames it at both ends (sCM sec. 5.1)."""
        sigma_data = target.sigma_data
        cos, sin = expand_like(t.cos(), x), expand_like(t.sin(), x)

        def F(x: Tensor, t: Tensor) -> Tensor:
            sigma = sigma_data * t.tan()
            return student_f(x, t, target(x / expand_like(t.cos(), x), sigma), sigma_data)

        F_minus, dF = jvp(F, (x, t), (cos * sin * velocity, t.cos() * t.sin()))
        g = -(cos**2) * (sigma_data * F_minus - velocity) - warm * (cos * sin * x + sigma_data * dF)
        return F_minus, normalised(g) if self.normalise else g

    def __call__(self, f: Network, target: Any, batch: dict, step: int, generator: Generator) -> Losses:
        if target.sigma_min != 0:
            raise ValueError("sCM's f = cos t·x − sin t·σ_d·F is a ConsistencyFunction with sigma_min=0")
        process = TrigFlow(target.sigma_data)
        x0 = batch["x0"]
        tau = self.mean + self.std * torch.randn(len(x0), generator=generator).to(x0.device)
        t = (tau.exp() / target.sigma_data).atan()
        eps = randn_like(x0, generator)
        x = process.perturb(x0, eps, t)
        velocity = self.velocity(x0, target.sigma_data * eps, x, t, process)
        state = rng_state(x.device)
        F_minus, g = self.tangent(target, x, t, velocity, min(1.0, step / self.warmup) if self.warmup else 1.0)
        set_rng_state(state, x.device)
        x_edm, sigma = process.to_edm(x, t)
        F = student_f(x, t, f(x_edm, sigma), target.sigma_data)
        error = squared_norm(F - F_minus - g) / x0[0].numel()
        weight = getattr(getattr(f, "module", f), "log_weight", None)
        w = weight(t) if weight is not None else torch.zeros_like(t)
        return w.exp() * error - w, {"t": sigma, "error": error.detach()}


class AdaptiveWeight(nn.Module):
    """w(t) [B], learnt with the student (sCM sec. 4.2; EDM2): a linear layer on sinusoids of ln tan t, 0 at the start.

    Set it as the student's attribute `log_weight`; at its optimum e^w is one over the expected error at t.
    """

    frequencies: Tensor

    def __init__(self, frequencies: int = 8):
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** (torch.arange(frequencies) - 4))
        self.linear = nn.Linear(2 * frequencies, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.tan().log()[:, None] * self.frequencies
        return self.linear(torch.cat([angles.sin(), angles.cos()], dim=1))[:, 0]


class MeanFlowFunction(nn.Module):
    """u(z, r, t) = ∫_r^t v(z_τ, τ)dτ/(t − r) along the ODE, v the marginal velocity of (1 − t)·x0 + t·ε (MeanFlow eq. 3).

    `net` takes z with one more channel, which holds t − r, and 1000·t. Called with `r`, z and times in [0, 1], it is u.
    Called as f(x, σ) it is the consistency function x̂0 = z − t·u(z, 0, t) in EDM coordinates (eq. 12): z is
    x/(1 + σ) at t = σ/(1 + σ), so `consistency.sample` takes it as it is.
    """

    def __init__(self, net: nn.Module, sigma_max: float = 80.0, rho: float = 7.0):
        super().__init__()
        self.net, self.sigma_min, self.sigma_max, self.rho = net, 0.0, sigma_max, rho

    def levels(self, n: int) -> list[float]:
        """The n descending noise levels σ of n-evaluation sampling."""
        return sampling_levels(EDM(self.sigma_min, self.sigma_max, self.rho), n)

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        if r is None:
            z, t = x / expand_like(1 + t, x), t / (1 + t)
            return z - expand_like(t, z) * self(z, t, torch.zeros_like(t))
        gap = expand_like(t - r, x).expand_as(x[:, :1])
        return self.net(torch.cat([x, gap], dim=1), 1000 * t)


class FlowNetwork(nn.Module):
    """The `net` of a `MeanFlowFunction` over a consistency function's F with one more input channel:

    v = (2t − 1)/s²·z − F([z/s, t − r], c_noise(σ))/s, s² = t² + (1 − t)², σ = t/(1 − t), which is (z − D)/t for the
    denoiser D = c_skip·x + c_out·F at σ_d = 1 and σ_min = 0 (EDM table 1). So a teacher's weights start it off at the flow.
    """

    def __init__(self, net: nn.Module, sigma_max: float = 80.0):
        super().__init__()
        self.net, self.sigma_max = net, sigma_max

    @property
    def config(self) -> dict[str, Any]:
        """F's."""
        return self.net.config  # type: ignore[return-value]

    def forward(self, z_and_gap: Tensor, t: Tensor) -> Tensor:
        t = t / 1000
        z, gap = z_and_gap[:, :-1], z_and_gap[:, -1:]
        s = expand_like((t**2 + (1 - t) ** 2).sqrt(), z)
        sigma = t / (1 - t).clamp(min=1 / (1 + self.sigma_max))
        return expand_like(2 * t - 1, z) / s**2 * z - self.net(torch.cat([z / s, gap], dim=1), c_noise(sigma)) / s


@dataclass(frozen=True)
class MeanFlow:
    """w·‖u(z, r, t) − sg(v − (t − r)·du/dt)‖², v = ε − x0, du/dt along the tangent (v, 0, 1) (MeanFlow eq. 6, 8–11).

    t and r are the larger and the smaller of two logit-normal draws; r = t, plain flow matching, with probability
    `instant`. w = 1/(‖·‖² + 10⁻³)^power without gradient. f is a `MeanFlowFunction`. The numbers are the paper's for CIFAR-10.
    """

    mean: float = -2.0
    std: float = 2.0
    instant: float = 0.25
    power: float = 0.75
    mu: float = 0.0

    def times(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """t and r [n]."""
        low, high = torch.sigmoid(self.mean + self.std * torch.randn(n, 2, generator=generator)).sort(dim=1).values.unbind(1)
        return high, torch.where(torch.rand(n, generator=generator) < self.instant, high, low)

    def target(self, u: Network, z: Tensor, t: Tensor, r: Tensor, v: Tensor) -> Tensor:
        """v − (t − r)·du/dt."""
        tangents = (v, torch.ones_like(t), torch.zeros_like(r))
        return v - expand_like(t - r, z) * jvp(u, (z, t, r), tangents)[1]

    def __call__(self, f: Any, target: Network, batch: dict, step: int, generator: Generator) -> Losses:
        x0 = batch["x0"]
        t, r = (v.to(x0.device) for v in self.times(len(x0), generator))
        eps = randn_like(x0, generator)
        z = x0 + expand_like(t, x0) * (eps - x0)
        state = rng_state(x0.device)
        goal = self.target(target, z, t, r, eps - x0)
        set_rng_state(state, x0.device)
        error = squared_norm(f(z, t, r) - goal)
        return error / (error.detach() + 1e-3) ** self.power, {"t": t / (1 - t), "error": error.detach()}
