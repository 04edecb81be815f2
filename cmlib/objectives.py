"""The training objectives, each a choice of five things: pair source, (t, r) sampler, target, distance, weight.

| objective                 | pair source            | (t, r)                    | target             | distance     | weight |
|---------------------------|------------------------|---------------------------|--------------------|--------------|--------|
| `Denoising`               | data + noise           | n uniform                 | ε                  | MSE          | 1      |
| `PairRegression`          | cache                  | the cache's               | x̂_r                | MSE          | 1      |
| `EndpointRegression`      | rollout cache          | the cache's               | x_end              | any          | 1      |
| `ConsistencyDistillation` | cache, or data + ODE   | the cache's, or N levels  | f⁻(x̂_r, r)         | any          | 1      |
| `ConsistencyTraining`     | data, shared ε         | neighbours of N(k) levels | f⁻(x_r, r), μ(k)   | any          | 1      |
| `ICT`                     | data, shared ε         | the same, t log-normal    | f⁻(x_r, r)         | pseudo-Huber | 1/(t−r)|
| `ECT`                     | data, shared ε         | t log-normal, r(t, stage) | f⁻(x_r, r)         | norm         | 1/(t−r)|
| `SCT`                     | data + stable target   | ECT's, closing smoothly   | f⁻(x_r, r)         | norm         | 1/(t−r)|
| `BootstrapRegression`     | data, shared ε         | n and n − 2 of the chain  | f⁻, renewed rarely | MSE          | 1      |

`ScoreCorrected` adds the brief's score term to any of the last six. `cmlib.continuous` has the limit r -> t: `SCM`, `MeanFlow`.

An objective is called as `objective(f, target, batch, step, generator)` and returns the loss of each sample [B] and a
dict of per-sample logs that has the noise level `t` (`Denoising`: the index). It holds no state; `mu` is the decay of the
target network that `train.fit` keeps for it (a number, or a function of the step); 0 stops the live weights' gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from cmlib import ranks
from cmlib.continuous import SCM as SCM
from cmlib.continuous import MeanFlow as MeanFlow
from cmlib.curricula import ct_levels, ct_mu, ect_r, ict_levels, lognormal, lognormal_bins
from cmlib.ops import Distance, Losses, Network, expand_like, ict_huber, mse, norm, randn_like, rng_state, set_rng_state
from cmlib.process import DDPM, EDM
from cmlib.stable import cached_score, gamma, lower_edge, stable_denoised, to_edge
from cmlib.teacher import Teacher

KARRAS = EDM()
Pairs = tuple[Tensor, Tensor, Tensor, Tensor]  # x_t, t, x_r, r


def both_branches(f: Network, target: Network, x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """f(x_t, t) and sg f⁻(x_r, r) under the same dropout mask, on the CPU and on the GPU (iCT sec. 3.1).

    At r = 0 the target is x_r itself (ECT's and SCT's clean image): the boundary condition, the bootstrap's terminal reward.
    """
    state = rng_state(x_t.device)
    with torch.no_grad():
        goal = torch.where(expand_like(r > 0, x_r), target(x_r, r), x_r)
    set_rng_state(state, x_t.device)
    torch.clear_autocast_cache()  # it may hold weights cast without their gradient
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


class Bootstrapped(ABC):
    """w(t, r)·d(f(x_t, t), sg f⁻(x_r, r)): what all discrete-time consistency losses share; a row says what (x_t, x_r) is."""

    distance: Distance

    @abstractmethod
    def pairs(self, batch: dict, step: int, generator: Generator) -> Pairs:
        """x_t, t, x_r, r: two points of one (estimated) ODE path, r < t."""

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        """w(t, r) [B]"""
        return torch.ones_like(t)

    def compare(self, x_t: Tensor, t: Tensor, x0_hat: Tensor, x_r: Tensor, r: Tensor, goal: Tensor) -> Tensor:
        """The loss [B] of a prediction at (x_t, t) and a target at (x_r, r)."""
        return self.weight(t, r) * self.distance(x0_hat, goal)

    def __call__(self, f: Network, target: Network, batch: dict, step: int, generator: Generator) -> Losses:
        x_t, t, x_r, r = self.pairs(batch, step, generator)
        x0_hat, goal = both_branches(f, target, x_t, t, x_r, r)
        return self.compare(x_t, t, x0_hat, x_r, r, goal), {"t": t}


class InverseGap(Bootstrapped):
    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        """1/(t − r), so that closer pairs, whose error is smaller, count as much (iCT sec. 3.1)."""
        return 1 / (t - r)


@dataclass(frozen=True)
class ConsistencyDistillation(Bootstrapped):
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

    def pairs(self, batch: dict, step: int, generator: Generator) -> Pairs:
        """The cache's, or x_t = x0 + t·ε and the teacher's step from it."""
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


def coupled(x0: Tensor, t: Tensor, r: Tensor, generator: Generator, coupling: str = "shared") -> Pairs:
    """x_t, t, x_r = x0 + r·ε and r of one image: x_t = x0 + t·ε with the `shared` ε of the papers, or x_r plus an independent
    `chunk` √(t² − r²)·ε′ as the brief says, which has the same marginals and a noisier target."""
    eps = randn_like(x0, generator)
    x_r = x0 + expand_like(r, x0) * eps
    if coupling == "shared":
        return x0 + expand_like(t, x0) * eps, t, x_r, r
    if coupling != "chunk":
        raise ValueError(f"coupling must be 'shared' or 'chunk', got {coupling!r}")
    return x_r + expand_like((t**2 - r**2).sqrt(), x0) * randn_like(x0, generator), t, x_r, r


@dataclass(frozen=True)
class ConsistencyTraining(Bootstrapped):
    """d(f(x0 + t·ε, t), sg f⁻(x0 + r·ε, r)), t and r neighbours of N(k) Karras levels, target EMA μ(k) (CM Alg. 3, eq. 10).

    N grows from `s0` to `s1` + 1; a short run wants a smaller s1, as its target lags by 1/(1 − μ(k)) ≈ 5·N(k) steps.
    """

    steps: int
    s0: int = 2
    s1: int = 150
    process: EDM = KARRAS
    distance: Distance = mse
    coupling: str = "shared"

    def mu(self, step: int) -> float:
        """μ(k)"""
        return ct_mu(step, self.steps, self.s0, self.s1)

    def pairs(self, batch: dict, step: int, generator: Generator) -> Pairs:
        """i uniform among the N(k) − 1 neighbours."""
        x0 = batch["x0"]
        levels = self.process.grid(ct_levels(step, self.steps, self.s0, self.s1)).to(x0.device)
        i = torch.randint(len(levels) - 1, (len(x0),), generator=generator).to(x0.device)
        return coupled(x0, levels[i + 1], levels[i], generator, self.coupling)


@dataclass(frozen=True)
class ICT(InverseGap):
    """d_PH(f(x0 + t·ε, t), sg f(x0 + r·ε, r))/(t − r), neighbours of N(k) = 11, 21, … 1281 levels, i ~ p(i) (iCT sec. 3)."""

    steps: int
    process: EDM = KARRAS
    distance: Distance = ict_huber
    mu: float = 0.0

    def pairs(self, batch: dict, step: int, generator: Generator) -> Pairs:
        """i from the log-normal law in `curricula.lognormal_bins`."""
        x0 = batch["x0"]
        levels = self.process.grid(ict_levels(step, self.steps))
        i = torch.multinomial(lognormal_bins(levels), len(x0), replacement=True, generator=generator)
        t, r = levels[i + 1].to(x0.device), levels[i].to(x0.device)
        return coupled(x0, t, r, generator)


@dataclass(frozen=True)
class ECT(InverseGap):
    """‖f(x0 + t·ε, t) − sg f(x0 + r·ε, r)‖/(t − r), ln t ~ N(−1.1, 2²) or another `law` (mean, std), r = r(t, stage) (ECT).

    `stages` of equal length over `steps`; the first is diffusion training below t ≈ 2 (r = 0, where f⁻ is x0), the last nearly
    continuous time. `q` = 2 with 8 stages is the paper's long run, 256 with 1 its one-hour run. f needs σ_min = 0.
    """

    steps: int
    stages: int = 8
    q: float = 2.0
    distance: Distance = norm
    mu: float = 0.0
    law: tuple[float, float] = (-1.1, 2.0)

    def __post_init__(self) -> None:
        if self.q**-self.stages < 1e-6:
            raise ValueError(f"q = {self.q} and {self.stages} stages bring r to t within float32's rounding; lower one of them")

    def stage(self, step: int) -> float:
        """a = ⌊k·stages/K⌋"""
        return min(step * self.stages // self.steps, self.stages - 1)

    def times(self, n: int, step: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """t and r."""
        t = lognormal(n, generator, *self.law)
        return t, ect_r(t, self.stage(step), self.q)

    def pairs(self, batch: dict, step: int, generator: Generator) -> Pairs:
        """Both points with one ε."""
        x0 = batch["x0"]
        t, r = (v.to(x0.device) for v in self.times(len(x0), step, generator))
        return coupled(x0, t, r, generator)


@dataclass(frozen=True)
class SCT(ECT):
    """ECT with x_r = x_t + (r − t)·(x_t − x̂0)/t, x̂0 the stable target over a reference batch (SCT sec. 4).

    Each ingredient switches off alone, and with all off this is ECT: `reference` is "batch" (the training batch, which
    holds the source image), a tensor of images in [−1, 1] (the whole set), or None; `smooth` closes the gap a little every step
    instead of by stages; `edges` are ascending noise levels that cut the path into segments, r never below its own. f(x, t)
    is then where a straight line to the segment's lower edge s aims: sample it with `stable.sample_phased`.
    """

    reference: str | Tensor | None = "batch"
    smooth: bool = True
    edges: tuple[float, ...] = ()

    def stage(self, step: int) -> float:
        """a = k·(stages − 1)/(K − 1), a real number, where `smooth`: from ECT's first stage to its last."""
        return step * (self.stages - 1) / max(1, self.steps - 1) if self.smooth else super().stage(step)

    def times(self, n: int, step: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """t and r, r not below the edge under t."""
        t, r = super().times(n, step, generator)
        return t, torch.maximum(r, lower_edge(t, self.edges))

    def pairs(self, batch: dict, step: int, generator: Generator) -> Pairs:
        """x_r from the stable target's ODE step."""
        x_t, t, x_r, r = super().pairs(batch, step, generator)
        if self.reference is None:
            return x_t, t, x_r, r
        images = ranks.gathered(batch["x0"]) if isinstance(self.reference, str) else self.reference
        step_to_r = expand_like((r - t) / t, x_t) * (x_t - stable_denoised(x_t, t, images))
        return x_t, t, x_t + step_to_r, r

    def compare(self, x_t: Tensor, t: Tensor, x0_hat: Tensor, x_r: Tensor, r: Tensor, goal: Tensor) -> Tensor:
        """Where both lead at the segment's lower edge; with no edges that is t = 0, the images themselves."""
        s = lower_edge(t, self.edges)
        return self.weight(t, r) * self.distance(to_edge(x_t, t, s, x0_hat), to_edge(x_r, r, s, goal))


@dataclass(frozen=True)
class BootstrapRegression(Bootstrapped):
    """‖f(x_n, n) − f⁻(x_{n−gap}, n − gap)‖²: the cached target replaced by the student's own output `gap` steps earlier.

    The frozen copy f⁻ is renewed every `reset` steps (the TD target's periodic reset). Where the chain has ended, the
    target is the clean image, the terminal reward. Train with `grad_clip=1.0` on the norm; the brief clamps gradients.
    """

    process: DDPM
    gap: int = 2
    reset: int = 100
    distance: Distance = mse

    def mu(self, step: int) -> float:
        """1 keeps the copy, 0 renews it."""
        return float((step + 1) % self.reset > 0)

    def pairs(self, batch: dict, step: int, generator: Generator) -> Pairs:
        """n uniform, both points with one ε; index −1 is the clean image."""
        x0 = batch["x0"]
        n = torch.randint(self.process.T, (len(x0),), generator=generator)
        t, r = (self.process.sigma(v).to(x0.device) for v in (n, (n - self.gap).clamp(min=-1)))
        return coupled(x0, t, r, generator)


@dataclass(frozen=True)
class ScoreCorrected:
    """base + λ·w(t)·‖f(x_t, t) − (x_t + γ_t·∇log p_t(x_t))‖²/d: the brief's score term, its sign put right (see `gamma`).

    w(t) = σ_d²/(t² + σ_d²), as the term is exact near t = 0 only, unless the data are Gaussian. `score(x, t)` is a
    `Teacher`'s, an oracle's, `stable_score` of references, or None: from the cached DDIM pair.
    """

    base: Bootstrapped
    score: Callable[[Tensor, Tensor], Tensor] | None = None
    strength: float = 1.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if getattr(self.base, "edges", ()):
            raise ValueError("the score term aims at the image, a base with edges at a segment's edge; leave one out")

    @property
    def mu(self) -> Any:
        """The base's."""
        return self.base.mu  # type: ignore[attr-defined]

    @property
    def steps(self) -> int:
        """The base's, where it has a curriculum."""
        return self.base.steps  # type: ignore[attr-defined]

    def __call__(self, f: Network, target: Network, batch: dict, step: int, generator: Generator) -> Losses:
        x_t, t, x_r, r = self.base.pairs(batch, step, generator)
        x0_hat, goal = both_branches(f, target, x_t, t, x_r, r)
        with torch.no_grad():
            score = cached_score(batch) if self.score is None else self.score(x_t, t)
        guess = x_t + expand_like(gamma(t, self.sigma_data), x_t) * score
        correction = self.strength * self.sigma_data**2 / (t**2 + self.sigma_data**2) * mse(x0_hat, guess)
        return self.base.compare(x_t, t, x0_hat, x_r, r, goal) + correction, {"t": t, "correction": correction}
