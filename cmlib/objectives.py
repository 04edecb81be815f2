"""The training objectives, each a choice of five things: pair source, (t, r) sampler, target, distance, weight.

| objective                 | pair source           | (t, r)                    | target          | distance | weight   |
|---------------------------|-----------------------|---------------------------|-----------------|----------|----------|
| `Denoising`               | data + noise          | n uniform                 | ε               | MSE      | 1        |
| `PairRegression`          | cache                 | the cache's               | x̂_r             | MSE      | 1        |
| `EndpointRegression`      | rollout cache         | the cache's               | x_end           | any      | 1        |
| `ConsistencyDistillation` | cache, or data + ODE  | the cache's, or N levels  | sg f⁻(x̂_r, r)   | any      | 1        |

An objective is called as `objective(f, target, batch, step, generator)` and returns the loss of each sample [B] and a
dict of per-sample logs that has the noise level `t`. It holds no state; `mu` is the decay of the target network that
`train.fit` keeps for it, 0 meaning the stop-gradient of the live weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from cmlib.ops import expand_like, mse, rng_state, set_rng_state
from cmlib.process import DDPM
from cmlib.teacher import Teacher

Distance = Callable[[Tensor, Tensor], Tensor]
Network = Callable[[Tensor, Tensor], Tensor]
Losses = tuple[Tensor, dict[str, Tensor]]


def randn_like(x: Tensor, generator: Generator) -> Tensor:
    """Standard normal noise of x's shape from the caller's CPU generator, on x's device."""
    return torch.randn(x.shape, generator=generator).to(x.device)


def feature_distance(features: nn.Module) -> Distance:
    """‖φ(a) − φ(b)‖²/d over a frozen network's features: an LPIPS-like distance (Zhang et al. 2018)."""
    features.requires_grad_(False).eval()
    return lambda a, b: mse(features(a), features(b))


def both_branches(f: Network, target: Network, x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """f(x_t, t) and sg f⁻(x_r, r) under the same dropout mask, on the CPU and on the GPU (iCT sec. 3.1)."""
    state = rng_state(x_t.device)
    with torch.no_grad():
        goal = target(x_r, r)
    set_rng_state(state, x_t.device)
    return f(x_t, t), goal


@dataclass(frozen=True)
class Denoising:
    """L_DDPM = ‖ε − ε_θ(√ᾱ_n·x0 + √(1−ᾱ_n)·ε, n)‖² (Ho et al. 2020, eq. 14); mean over pixels."""

    process: DDPM
    mu: float = 0.0

    def __call__(self, f: Network, target: Network, batch: dict, step: int, generator: Generator) -> Losses:
        x0 = batch["x0"]
        n = torch.randint(self.process.T, (len(x0),), generator=generator).to(x0.device)
        eps = randn_like(x0, generator)
        return mse(f(self.process.perturb(x0, eps, n), n), eps), {"t": n}


@dataclass(frozen=True)
class PairRegression:
    """The brief's L_CD = ‖x̂_r − f(x_t, t)‖², f's output and x̂_r in the chain's own units; mean over pixels.

    This is *not* consistency distillation: its minimiser is one reverse step, E[x̂_r | x_t], so from pure noise one
    evaluation gives x_{T−δ}, which is noise. Kept as the brief states it, for the comparison.
    """

    mu: float = 0.0

    def __call__(self, f: Network, target: Network, batch: dict, step: int, generator: Generator) -> Losses:
        goal = batch["x_r"] / expand_like((1 + batch["r"] ** 2).sqrt(), batch["x_r"])
        return mse(f(batch["x_t"], batch["t"]), goal), {"t": batch["t"]}


@dataclass(frozen=True)
class EndpointRegression:
    """d(f(x_t, t), x_end): regress each state of a teacher's ODE path onto where the path ends.

    From t = σ_max alone this is Luhman & Luhman 2021 (2101.02388); from all levels, CMT's mid-training (2509.24526).
    """

    distance: Distance = mse
    mu: float = 0.0

    def __call__(self, f: Network, target: Network, batch: dict, step: int, generator: Generator) -> Losses:
        return self.distance(f(batch["x_t"], batch["t"]), batch["x_end"]), {"t": batch["t"]}


@dataclass(frozen=True)
class ConsistencyDistillation:
    """d(f(x_t, t), sg f⁻(x̂_r, r)) with x̂_r one ODE step of the teacher from x_t (CM Alg. 2, eq. 7).

    With a `teacher`, x_t = x0 + t·ε and (t, r) are neighbours t_{i+1}, t_i of `levels` ascending noise levels, i uniform;
    a `Teacher` or anything with its `ode_step`. Without one, pairs come from the cache.
    """

    teacher: Teacher | None = None
    levels: Tensor | None = None
    solver: str = "heun"
    distance: Distance = mse
    mu: float = 0.0

    def __post_init__(self) -> None:
        if self.teacher is not None and self.levels is None:
            raise ValueError("distillation on the fly needs the ascending noise levels between which the teacher steps")

    def pairs(self, batch: dict, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_t, t, x̂_r, r."""
        if self.teacher is None:
            return batch["x_t"], batch["t"], batch["x_r"], batch["r"]
        x0 = batch["x0"]
        assert self.levels is not None
        levels = self.levels.to(x0.device)
        i = torch.randint(len(levels) - 1, (len(x0),), generator=generator).to(x0.device)
        t, r = levels[i + 1], levels[i]
        x_t = x0 + expand_like(t, x0) * randn_like(x0, generator)
        with torch.no_grad():
            return x_t, t, self.teacher.ode_step(x_t, t, r, self.solver), r

    def __call__(self, f: Network, target: Network, batch: dict, step: int, generator: Generator) -> Losses:
        x_t, t, x_r, r = self.pairs(batch, generator)
        prediction, goal = both_branches(f, target, x_t, t, x_r, r)
        return self.distance(prediction, goal), {"t": t}
