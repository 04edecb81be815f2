"""Any diffusers DDPM as a teacher: noise, denoiser, score, and one step between any two noise levels."""

from __future__ import annotations

import hashlib
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmlib.consistency import ConsistencyFunction, c_noise
from cmlib.files import move_in
from cmlib.ops import expand_like
from cmlib.process import DDPM, EDM, ode_step
from cmlib.unet import UNet, check_images

RHO = 100.0  # of a student's sampling grid; on digits the second of two evaluations works best near σ = 1, not at ρ = 7's 4.4
SOLVERS = ("posterior_mean", "ancestral", "ddim", "heun")


@dataclass(eq=False)
class Teacher:
    """A DDPM ε_θ(x_n, n) and its chain.

    `eps` and the chain steps take states in the chain's own coordinates and indices n in 0 … T−1; `denoise`, `score`
    and `ode_step` take EDM coordinates x = x0 + σ·ε and noise levels σ.
    """

    unet: nn.Module
    process: DDPM
    clip: float | None = 1.0  # the range of x̂0 in its own sampler
    variance_type: str = "fixed_large"

    def __post_init__(self) -> None:
        if self.variance_type not in ("fixed_small", "fixed_large"):
            raise ValueError(f"variance_type must be fixed_small or fixed_large, got {self.variance_type!r}")
        self.unet.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "cpu") -> Teacher:
        """Load a `DDPMPipeline` from a hub id or folder (for example google/ddpm-cifar10-32)."""
        from diffusers import DDPMPipeline

        try:
            pipe = DDPMPipeline.from_pretrained(str(source))
        except Exception as error:  # the hub client raises many unrelated types
            raise ValueError(
                f"cannot load a DDPM teacher from {source!r} ({type(error).__name__}). Give a hub id such as"
                " google/ddpm-cifar10-32, or a folder that DDPMPipeline.save_pretrained wrote."
            ) from error
        config = pipe.scheduler.config
        if config.prediction_type != "epsilon":
            raise ValueError(f"the teacher must predict epsilon, {source!r} predicts {config.prediction_type!r}")
        unet = UNet.from_diffusers(pipe.unet)
        clip = float(config.get("clip_sample_range", 1.0)) if config.clip_sample else None
        teacher = cls(unet, DDPM.from_scheduler(pipe.scheduler), clip, config.variance_type)
        return teacher.to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `DDPMPipeline.from_pretrained` and `from_pretrained` load, each file whole and the index last."""
        from diffusers import DDPMPipeline

        assert isinstance(self.unet, UNet)
        pipe: Any = DDPMPipeline(unet=self.unet.to_diffusers(), scheduler=self.scheduler())
        with tempfile.TemporaryDirectory() as made:
            pipe.save_pretrained(made)
            move_in(Path(made), Path(folder), last="model_index.json")

    def scheduler(self) -> Any:
        """diffusers' `DDPMScheduler` of this chain."""
        from diffusers import DDPMScheduler

        return DDPMScheduler(
            num_train_timesteps=self.process.T,
            beta_schedule=self.process.name,  # only the name: diffusers takes the betas from the next line
            trained_betas=self.process.betas.tolist(),
            variance_type=self.variance_type,
            clip_sample=self.clip is not None,
            clip_sample_range=self.clip or 1.0,
        )

    def to(self, device: str | torch.device) -> Teacher:
        """Move the network."""
        self.unet = self.unet.to(device)
        return self

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C,H,W] of the images it makes."""
        assert isinstance(self.unet, UNet)
        return self.unet.config["in_channels"], self.unet.config["sample_size"], self.unet.config["sample_size"]

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.unet.parameters()).device

    def hash(self) -> str:
        """Twelve hex digits over weights, architecture, schedule and clipping: which teacher a cache came from."""
        config = getattr(self.unet, "config", {})
        digest = hashlib.sha256(repr((self.clip, self.variance_type, sorted(config.items()))).encode())
        for tensor in [self.process.betas, *(v for _, v in sorted(self.unet.state_dict().items()))]:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def _clip(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    @torch.no_grad()
    def eps(self, x: Tensor, n: Tensor) -> Tensor:
        """ε_θ(x_n, n), chain coordinates; n [B] may be fractional."""
        return self.unet(x, n)

    @torch.no_grad()
    def denoise(self, x: Tensor, t: Tensor, clip: bool = True) -> Tensor:
        """D(x, σ) = x − σ·ε_θ(x/√(1+σ²), n(σ)) ≈ E[x0 | x], EDM coordinates; clipped to the image range as the teacher's
        own sampler does unless `clip` is off."""
        chain_x, n = self.process.from_edm(x, t)
        denoised = x - expand_like(t, x) * self.eps(chain_x, n)
        return self._clip(denoised) if clip else denoised

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """∇log p_σ(x) = (D(x, σ) − x)/σ² (Tweedie), EDM coordinates."""
        return (self.denoise(x, t, clip=False) - x) / expand_like(t, x) ** 2

    def ode_step(self, x: Tensor, t: Tensor, r: Tensor, solver: str = "ddim") -> Tensor:
        """One step of the probability-flow ODE from t to r < t, EDM coordinates, `ddim` or `heun` (see `process.ode_step`)."""
        return ode_step(self.denoise, x, t, r, solver)

    def walk(self, x: Tensor, sigma: float, steps: int) -> Tensor:
        """The ODE from (x, σ) down to the image in `steps` DDIM steps on a Karras grid, EDM coordinates."""
        levels = EDM(self.process.sigma_min, sigma).grid(steps)
        levels[-1] = sigma
        for t, r in zip(levels.flip(0), [*levels.flip(0)[1:], torch.zeros(())], strict=True):
            x = self.ode_step(x, t.expand(len(x)).to(x.device), r.expand(len(x)).to(x.device))
        return x

    def posterior(self, x: Tensor, eps: Tensor, n: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(x_r | x_n, x̂0), DDPM eq. 6–7, for a *vector* of indices n and r < n (r = −1 is
        the clean image). Bit-exact to diffusers' `DDPMScheduler.step`, which takes one scalar."""
        table = self.process.alpha_bar.to(x.device)
        one = torch.ones((), device=x.device)
        ab_t, ab_r = table[n], torch.where(r >= 0, table[r.clamp(min=0)], one)
        alpha = ab_t / ab_r
        beta = 1 - alpha
        variance = ((1 - ab_r) / (1 - ab_t) * beta).clamp(min=1e-20) if self.variance_type == "fixed_small" else beta
        ab_t, ab_r, alpha, beta = (expand_like(v, x) for v in (ab_t, ab_r, alpha, beta))
        x0 = self._clip((x - (1 - ab_t) ** 0.5 * eps) / ab_t**0.5)
        mean = (ab_r**0.5 * beta) / (1 - ab_t) * x0 + alpha**0.5 * (1 - ab_r) / (1 - ab_t) * x
        return mean, torch.where(expand_like(n > 0, x), expand_like(variance, x) ** 0.5, 0.0)

    def step(self, x: Tensor, n: Tensor, r: Tensor, solver: str = "posterior_mean", noise: Tensor | None = None) -> Tensor:
        """x_n -> x_r in chain coordinates for vectors n, r [B] of indices, r < n, r = −1 the clean image.

        `posterior_mean` and `ancestral` (adds `noise`) are the DDPM's own reverse step, `ddim` and `heun` follow its ODE.
        """
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if bool((r >= n).any()) or bool((n >= self.process.T).any()) or bool((r < -1).any()):
            raise ValueError(f"a step goes from n to r with -1 <= r < n < {self.process.T}")
        if solver in ("ddim", "heun"):
            edm_x, t = self.process.to_edm(x, n)
            s = self.process.sigma(r)
            return self.ode_step(edm_x, t, s, solver) / expand_like((1 + s**2).sqrt(), x)
        mean, std = self.posterior(x, self.eps(x, n), n, r)
        if solver == "posterior_mean":
            return mean
        if noise is None:
            raise ValueError("an ancestral step needs noise: one standard normal tensor of x's shape")
        return mean + std * noise

    @torch.no_grad()
    def sample(self, noise: Tensor, steps: int, solver: str = "ddim", path: bool = False, draw: Any = None) -> Tensor:
        """Images [B,C,H,W] from standard normal `noise` in `steps` steps over the chain's "leading" indices.

        `ddim` with k steps is DDIM-k; `ancestral` with T steps is DDPM-T and takes its noise from `draw(k)`, k = 0 … With
        `path`, all states [steps+1,B,C,H,W] in EDM coordinates, first the noise and last the image.
        """
        check_images(self.unet, noise)
        levels = [*self.process.grid(steps).flip(0).tolist(), -1]
        x, states = noise.to(self.device), []
        for k, (n, r) in enumerate(zip(levels, levels[1:], strict=False)):
            at, to = torch.full((len(x),), n, device=x.device), torch.full((len(x),), r, device=x.device)
            if path:
                states.append(self.process.to_edm(x, at)[0])
            x = self.step(x, at, to, solver, draw(k).to(x.device) if draw else None)
        return torch.stack([*states, x]) if path else self._clip(x)


def warm_start(teacher: Teacher, sigma_max: float, sigma_data: float = 1.0) -> ConsistencyFunction:
    """A student that starts from the teacher's weights: same body, its meaning of time and of the output translated.

    With σ_d = 1 the input scaling 1/√(1+σ²) is the teacher's own. The time embedding is refitted, so that 250·ln σ gives
    the features that n(σ) gave. As σ -> 0, c_out·F must be −σ·ε, hence the last layer's sign. The sampling grid is nearly
    geometric (ρ = RHO), so that two evaluations meet in the middle of ln σ.
    """
    if not isinstance(teacher.unet, UNet):
        raise TypeError("only a teacher over cmlib.unet.UNet can lend its weights")
    net = UNet.from_config({**teacher.unet.config, "dropout": 0.0}).to(teacher.device)
    net.load_state_dict(teacher.unet.state_dict())
    net.conv_out.load_state_dict({k: -v for k, v in net.conv_out.state_dict().items()})
    sigma_min = teacher.process.sigma_min
    sigma = torch.logspace(math.log10(sigma_min), math.log10(sigma_max), 512, device=teacher.device)
    with torch.no_grad():
        goal = teacher.unet.time_features(teacher.process.index(sigma))
    steps, optimizer = 400, torch.optim.Adam(net.time_embedding.parameters())
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - k / steps)
        optimizer.zero_grad()
        (net.time_features(c_noise(sigma)) - goal).pow(2).mean().backward()
        optimizer.step()
    return ConsistencyFunction(net, sigma_min, sigma_max, sigma_data, RHO)
