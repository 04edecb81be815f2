"""The consistency function f(x, t), its exponential moving average, and sampling from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmlib.files import intact, read_weights, write_atomically, write_weights
from cmlib.ops import device_of, expand_like
from cmlib.process import EDM
from cmlib.unet import UNet, check_images

SIGMAS = ("sigma_min", "sigma_max", "sigma_data", "rho")  # a ConsistencyFunction's settings beside its network


def c_skip(t: Tensor, sigma_min: float, sigma_data: float) -> Tensor:
    """σ_d² / ((t − σ_min)² + σ_d²): 1 at t = σ_min (CM app. C)."""
    return sigma_data**2 / ((t - sigma_min) ** 2 + sigma_data**2)


def c_out(t: Tensor, sigma_min: float, sigma_data: float) -> Tensor:
    """σ_d·(t − σ_min) / √(t² + σ_d²): 0 at t = σ_min (CM app. C)."""
    return sigma_data * (t - sigma_min) / (t**2 + sigma_data**2).sqrt()


def c_in(t: Tensor, sigma_data: float) -> Tensor:
    """1 / √(t² + σ_d²): unit variance at the network's input (EDM table 1)."""
    return (t**2 + sigma_data**2).rsqrt()


def c_noise(t: Tensor) -> Tensor:
    """250·ln(t + 1e-44): the network's time input (CM's released models; diffusers' `sigma_to_t`)."""
    return 250 * (t + 1e-44).log()


def sampling_levels(process: EDM, n: int) -> list[float]:
    """n descending noise levels from σ_max: every ⌊40/n⌋-th of a 40-level Karras grid, which is what
    `ConsistencyModelPipeline(num_inference_steps=n)` uses."""
    if not 1 <= n <= 40:
        raise ValueError(f"evaluations must lie in 1 … 40, got {n}")
    ascending = process.grid(40)
    return [float(ascending[39 - i * (40 // n)]) for i in range(n)]


class ConsistencyFunction(nn.Module):
    """f(x, t) = c_skip(t)·x + c_out(t)·F(c_in(t)·x, c_noise(t)), so that f(x, σ_min) = x by construction (CM eq. 5).

    `x` [B,C,H,W] in EDM coordinates (x = x0 + t·ε), `t` [B] in σ. `net` is any module F(x, t) of the image's
    shape; `rho` shapes the grid that `levels` samples on.
    """

    def __init__(
        self,
        net: nn.Module,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
    ):
        super().__init__()
        if not 0 <= sigma_min < sigma_max or sigma_data <= 0:
            raise ValueError(f"need 0 <= sigma_min < sigma_max and sigma_data > 0, got {sigma_min}, {sigma_max}, {sigma_data}")
        self.net = net
        self.sigma_min, self.sigma_max, self.sigma_data = float(sigma_min), float(sigma_max), float(sigma_data)
        self.rho = float(rho)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.clamp(min=self.sigma_min)  # below the boundary, too, f is the identity
        raw = self.net(expand_like(c_in(t, self.sigma_data), x) * x, c_noise(t))
        skip = expand_like(c_skip(t, self.sigma_min, self.sigma_data), x)
        out = expand_like(c_out(t, self.sigma_min, self.sigma_data), x)
        return skip * x + out * raw

    @property
    def config(self) -> dict[str, Any]:
        """What `load` needs beside the weights: the U-Net's configuration (None for another network) and SIGMAS."""
        return {"unet": getattr(self.net, "config", None), **{k: getattr(self, k) for k in SIGMAS}}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C,H,W] of the images it makes."""
        unet = self.config["unet"]
        return unet["in_channels"], unet["sample_size"], unet["sample_size"]

    def levels(self, n: int) -> list[float]:
        """The n descending noise levels of n-evaluation sampling (see `sampling_levels`)."""
        return sampling_levels(EDM(self.sigma_min, self.sigma_max, self.rho), n)

    def save(self, path: str | Path) -> None:
        """Write weights and configuration, as a torch file where `path` ends in .pt, else as safetensors."""
        path = Path(path)
        if self.config["unet"] is None:
            raise TypeError("only a ConsistencyFunction over cmlib.unet.UNet can be saved with its configuration")
        if path.suffix == ".pt":
            state = {"config": self.config, "ema": self.state_dict()}
            write_atomically(path, lambda file: torch.save(state, file))
            return
        write_weights(path, self.net.state_dict(), "consistency_function", self.config)

    @classmethod
    def load(cls, path: str | Path) -> ConsistencyFunction:
        """Read what `save` or `train.fit` wrote (`.safetensors` or `.pt`); never unpickles code. Returns it in eval mode."""
        from safetensors import SafetensorError

        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no checkpoint at {path}")
        try:
            if path.suffix == ".pt":
                if not intact(path):
                    raise ValueError("a checksum differs")
                saved = torch.load(path, map_location="cpu", weights_only=True)
                config = saved["config"]
                weights = {k.removeprefix("net."): v for k, v in saved["ema"].items() if k.startswith("net.")}
            else:
                config, weights = read_weights(path, "consistency_function")
            f = cls(UNet.from_config(config["unet"]), **{k: config[k] for k in SIGMAS})
            f.net.load_state_dict(weights)
        except (SafetensorError, KeyError, RuntimeError, OSError, EOFError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a consistency model this version can read ({type(error).__name__})") from error
        except Exception as error:
            if type(error).__name__ != "UnpicklingError":
                raise
            raise ValueError(f"{path} is damaged, or a pickle with code in it, which is not run; refused") from error
        return f.eval()


class PlainFunction(nn.Module):
    """The brief's student: the U-Net's own output, in the chain's units (x/√(1+t²)), with no boundary built in.

    `x` [B,C,H,W] in EDM coordinates, `t` [B] in σ, like `ConsistencyFunction`, with σ_d = 1.
    """

    sigma_min, sigma_max = 0.0, 100.0  # one evaluation starts at σ_max, from noise alone

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def levels(self, n: int) -> list[float]:
        """σ_max: it jumps once, so n = 1."""
        if n != 1:
            raise ValueError(f"the brief's student makes images in one evaluation, not {n}")
        return [self.sigma_max]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(expand_like(c_in(t, 1.0), x) * x, c_noise(t))


class EMA:
    """θ⁻ ← μ·θ⁻ + (1 − μ)·θ after every step (CM eq. 8); the average starts at θ and lives in `self.model`.

    `decay` is μ, a number or a function of the step. `warmup` uses min(μ, (1 + k)/(10 + k)) at step k, so that a short
    run is not an average over its own start.
    """

    def __init__(self, model: nn.Module, decay: float | Callable[[int], float], warmup: bool = False):
        if not callable(decay) and not 0 <= decay < 1:
            raise ValueError(f"an EMA decay lies in [0, 1), got {decay}")
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.warmup = decay, warmup

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """One step of the average, `step` counted from 0."""
        mu = self.decay(step) if callable(self.decay) else self.decay
        mu = min(mu, (1 + step) / (10 + step)) if self.warmup else mu
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - mu)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


@torch.no_grad()
def sample(
    f: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor | Sequence[Tensor],
    sigmas: Sequence[float],
    sigma_min: float = 0.0,
    clip: bool = True,
) -> Tensor:
    """Multistep consistency sampling (CM Alg. 1): x ← f(x̂ + √(σ² − σ_min²)·z, σ) over descending `sigmas`.

    `noise` is one standard normal batch a level (a single tensor serves one level); the first starts from σ_1·z.
    `len(sigmas)` is the number of network evaluations. Returns images in [-1, 1] when `clip`.
    """
    draws = [noise] if isinstance(noise, Tensor) else list(noise)
    if len(draws) != len(sigmas):
        raise ValueError(f"{len(sigmas)} levels need as many noise batches, got {len(draws)}")
    if (
        not sigmas
        or not all(0 < s < float("inf") for s in sigmas)
        or any(b >= a for a, b in zip(sigmas, sigmas[1:], strict=False))
    ):
        raise ValueError(f"sigmas must descend and be positive numbers, got {list(sigmas)}")
    for z in draws:
        check_images(getattr(f, "net", None), z)
    device = device_of(f)
    x = draws[0].to(device) * sigmas[0]
    for k, (z, sigma) in enumerate(zip(draws, sigmas, strict=True)):
        if k > 0:
            x = x + max(sigma**2 - sigma_min**2, 0) ** 0.5 * z.to(device)
        x = f(x, torch.full((len(x),), float(sigma), device=x.device))
        x = x.clamp(-1, 1) if clip else x
    return x
