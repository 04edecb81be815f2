"""Images as a VAE's latents, eight bits a number: to the process, the cache and the student a latent is just another image."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

RANGE = 5.0  # −1 … 1 stands for so many standard deviations of the latents; what lies beyond is cut off
BATCH = 16


@lru_cache(1)
def vae(source: str) -> Any:
    """diffusers' `AutoencoderKL` from a hub id or a folder, on the GPU where there is one. Raises ValueError."""
    from diffusers import AutoencoderKL

    try:
        model: Any = AutoencoderKL.from_pretrained(source)
    except Exception as error:  # the hub client raises many unrelated types
        raise ValueError(
            f"cannot load a VAE from {source!r} ({type(error).__name__}). Give a hub id such as stabilityai/sd-vae-ft-mse, or a"
            " folder that AutoencoderKL.save_pretrained wrote."
        ) from error
    return model.requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu")


def digest(source: str) -> str:
    """Twelve hex digits over the VAE's weights: which one latents came from."""
    found = hashlib.sha256()
    for _, weights in sorted(vae(source).state_dict().items()):
        found.update(weights.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


@torch.no_grad()
def encode(source: str, images: Tensor) -> Tensor:
    """uint8 [N,3,H,W] -> uint8 [N,c,h,w]: the posterior's mean, brought to unit variance (Rombach et al. 2022) and to RANGE."""
    model, parts = vae(source), []
    shift, scale = model.config.get("shift_factor") or 0.0, model.config.scaling_factor
    for part in images.split(BATCH):
        mean = model.encode(part.to(model.device) / 127.5 - 1).latent_dist.mode()
        z = (mean - shift) * scale / RANGE
        parts.append(((z.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(parts)


@torch.no_grad()
def decode(source: str, latents: Tensor) -> Tensor:
    """uint8 [N,c,h,w] -> uint8 [N,3,H,W]."""
    model, parts = vae(source), []
    shift, scale = model.config.get("shift_factor") or 0.0, model.config.scaling_factor
    for part in latents.split(BATCH):
        images = model.decode((part.to(model.device) / 127.5 - 1) * RANGE / scale + shift).sample
        parts.append(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(parts)
