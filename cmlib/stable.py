"""SCT's parts: scores without a network, the segments of a phased path and its sampler, guidance by an earlier self."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmlib.ops import Network, expand_like


def stable_denoised(x_t: Tensor, t: Tensor, reference: Tensor) -> Tensor:
    """x̂0 = Σ_i w_i·x_i, w = softmax_i(−‖x_t − x_i‖²/2t²): E[x0 | x_t] if the data were `reference` [M,…] alone.

    The stable target field (Xu et al. 2023) as SCT uses it. With x_t's own source among the references, more of them
    bring it closer to the true denoiser and let it vary less. In full precision whatever the autocast, since what is
    made of it is divided by t.
    """
    with torch.autocast(x_t.device.type, enabled=False):
        points = reference.to(x_t).flatten(1)
        away = torch.cdist(x_t.flatten(1), points).pow(2)
        return ((-away / (2 * t[:, None] ** 2)).softmax(1) @ points).view_as(x_t)


def stable_score(reference: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, t) -> (x̂0 − x)/t², the score of the noised empirical distribution of `reference` (Tweedie)."""
    return lambda x, t: (stable_denoised(x, t, reference) - x) / expand_like(t, x) ** 2


def cached_score(batch: dict[str, Tensor]) -> Tensor:
    """∇log p_t(x_t) = (x̂_r − x_t)/(t·(t − r)) from a cached DDIM pair, as x̂_r = x_t + (t − r)·t·∇log p_t(x_t)."""
    t, r, x_t = batch["t"], batch["r"], batch["x_t"]
    return (batch["x_r"] - x_t) / expand_like(t * (t - r), x_t)


def gamma(t: Tensor, sigma_data: float) -> Tensor:
    """γ_t = √(t² + σ_d²)·(√(t² + σ_d²) − σ_d), which makes f(x, t) = x + γ_t·∇log p_t(x) exact for data N(μ, σ_d²·I).

    It tends to t²/2 as t -> 0, for any data, since dx/dt = −t·∇log p_t(x). With t² instead it would be Tweedie's
    denoiser E[x0 | x], which is not the consistency function.
    """
    s = (t**2 + sigma_data**2).sqrt()
    return s * t**2 / (s + sigma_data)  # s − σ_d without its cancellation


def lower_edge(t: Tensor, edges: tuple[float, ...]) -> Tensor:
    """The largest of the ascending `edges` below each t, else 0."""
    marks = torch.tensor([0.0, *edges], device=t.device)
    return marks[(torch.searchsorted(marks, t) - 1).clamp(min=0)]


def to_edge(x: Tensor, t: Tensor, s: Tensor, x0_hat: Tensor) -> Tensor:
    """x0_hat + (s/t)·(x − x0_hat): where the straight line from (x, t) to x0_hat passes s; x itself at t = s."""
    return x0_hat + expand_like(torch.where(s > 0, s / t, 0.0), x) * (x - x0_hat)


@torch.no_grad()
def sample_phased(f: Network, x: Tensor, sigma_max: float, edges: Sequence[float], eta: float = 1.0) -> Tensor:
    """From (x, σ_max) segment by segment down to t = 0, one evaluation each: x <- to_edge(x, t, η·s, f(x, t)), t <- η·s.

    `edges` ascend, as `SCT(edges=…)` had them. At an edge f has just changed its aim, and is at its worst; η < 1 skips
    edges, landing a little below each (SCT sec. 4, edge-skipping multistep sampling).
    """
    if not 0 < eta <= 1:
        raise ValueError(f"eta lies in (0, 1], got {eta}")
    t = torch.full((len(x),), float(sigma_max), device=x.device)
    for edge in (*sorted(edges, reverse=True), 0.0):
        s = torch.full_like(t, eta * edge)
        x, t = to_edge(x, t, s, f(x, t)), s
    return x


def guided(f: Network, earlier: Network, strength: float) -> Network:
    """(x, t) -> f + ω·(f − f_earlier): away from what a worse version of itself, an earlier EMA, would say (SCT sec. 4)."""

    def jump(x: Tensor, t: Tensor) -> Tensor:
        out = f(x, t)
        return out + strength * (out - earlier(x, t))

    return jump
