"""Data whose score, denoiser and consistency function are known: ground truth for tests and lessons, in EDM coordinates."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from cmlib.ops import expand_like
from cmlib.process import ode_step

_STEPS = 256  # Runge–Kutta steps of `consistency`


class GaussianMixture:
    """x0 ~ Σ_k w_k·N(μ_k, s_k²·I), hence x = x0 + t·ε ~ Σ_k w_k·N(μ_k, (s_k² + t²)·I) at every noise level t.

    `means` [K,*shape], `std` one positive number or [K], `weights` [K] (equal by default; normalised). States `x` are
    [B,*shape], noise levels `t` [B]. Its `ode_step` makes it an exact teacher. Raises ValueError on other arguments.
    """

    def __init__(self, means: Tensor, std: float | Tensor, weights: Tensor | None = None):
        K = len(means)
        self.means = means
        self.std = torch.as_tensor(std, dtype=means.dtype, device=means.device).expand(K)
        self.weights = means.new_ones(K) / K if weights is None else weights / weights.sum()
        if self.weights.shape != (K,) or not bool((self.weights > 0).all() and (self.std > 0).all()):
            raise ValueError(f"{K} components need {K} positive weights and positive standard deviations")

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """n clean samples x0 [n,*shape]."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        eps = torch.randn(n, *self.means.shape[1:], generator=generator, dtype=self.means.dtype, device=self.means.device)
        return self.means[k] + expand_like(self.std[k], eps) * eps

    def _components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """μ_k − x [B,K,d], the variances s_k² + t² [B,K], and ln w_k·N(x; μ_k, s_k² + t²) [B,K]."""
        away = self.means.to(x).flatten(1) - x.flatten(1)[:, None]
        variance = self.std.to(x) ** 2 + t.to(x)[:, None] ** 2
        log_normal = -0.5 * (away.pow(2).sum(-1) / variance + away.shape[-1] * (2 * torch.pi * variance).log())
        return away, variance, self.weights.to(x).log() + log_normal

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """ln p_t(x) [B], in nats."""
        return self._components(x, t)[2].logsumexp(1)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """∇ln p_t(x) = Σ_k γ_k·(μ_k − x)/(s_k² + t²) with γ_k the posterior weight of component k: [B,*shape]."""
        away, variance, log_joint = self._components(x, t)
        return (log_joint.softmax(1) / variance).unsqueeze(1).bmm(away).view_as(x)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """D(x, t) = E[x0 | x] = x + t²·∇ln p_t(x) (Tweedie; Efron 2011): [B,*shape]."""
        return x + expand_like(t, x) ** 2 * self.score(x, t)

    def ode_step(self, x: Tensor, t: Tensor, r: Tensor, solver: str = "ddim") -> Tensor:
        """One step of the probability-flow ODE from t to r < t, `ddim` or `heun`, as `Teacher.ode_step` takes it."""
        return ode_step(self.denoise, x, t, r, solver)

    def consistency(self, x: Tensor, t: Tensor, sigma_min: float = 0.0) -> Tensor:
        """f(x, t): where the probability-flow ODE dx/dt = −t·∇ln p_t(x) from (x, t) is at `sigma_min` [B,*shape].

        Classical Runge–Kutta in float64, error far below 1e-6, in u = asinh(t/s) with s the smallest s_k: there
        dx/du = −t·√(s² + t²)·∇ln p_t(x), which is smooth down to t = 0 and takes equal steps in ln t far above s.
        """
        s = self.std.min().to(x.device).double()
        u, y = (t.double() / s).asinh(), x.double()
        h = ((sigma_min / s).asinh() - u) / _STEPS

        def slope(y: Tensor, u: Tensor) -> Tensor:
            return -expand_like(s**2 * u.sinh() * u.cosh(), y) * self.score(y, s * u.sinh())

        wide = expand_like(h, y)
        for _ in range(_STEPS):
            k1 = slope(y, u)
            k2 = slope(y + wide / 2 * k1, u + h / 2)
            k3 = slope(y + wide / 2 * k2, u + h / 2)
            k4 = slope(y + wide * k3, u + h)
            y, u = y + wide / 6 * (k1 + 2 * k2 + 2 * k3 + k4), u + h
        return y.to(x)


class Gaussian(GaussianMixture):
    """x0 ~ N(μ, s²·I): the mixture of one component, whose consistency function is a formula. `mean` [*shape]."""

    def __init__(self, mean: Tensor, std: float):
        super().__init__(mean[None], std)

    def consistency(self, x: Tensor, t: Tensor, sigma_min: float = 0.0) -> Tensor:
        """f(x, t) = μ + √((s² + σ_min²)/(s² + t²))·(x − μ): the ODE keeps a sample's standardised position (EDM app. B)."""
        mean, variance = self.means[0].to(x), self.std[0].to(x) ** 2
        return mean + expand_like(((variance + sigma_min**2) / (variance + t.to(x) ** 2)).sqrt(), x) * (x - mean)
