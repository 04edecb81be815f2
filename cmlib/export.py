"""Students in the formats that others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmlib.consistency import ConsistencyFunction
from cmlib.unet import UNet


def diffusers_pipeline(f: ConsistencyFunction) -> Any:
    """A `ConsistencyModelPipeline` that computes f and samples the same images from the same noise."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    if not isinstance(f.net, UNet):
        raise TypeError("only a ConsistencyFunction over cmlib.unet.UNet has a diffusers twin")
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=40, sigma_min=f.sigma_min, sigma_max=f.sigma_max, sigma_data=f.sigma_data, rho=f.rho
    )
    return ConsistencyModelPipeline(unet=f.net.to_diffusers(), scheduler=scheduler)


def export_diffusers(f: ConsistencyFunction, folder: str | Path) -> None:
    """Write `folder` so that `ConsistencyModelPipeline.from_pretrained(folder)` loads the student (safetensors)."""
    diffusers_pipeline(f).save_pretrained(str(folder))


def load_diffusers(folder: str | Path) -> ConsistencyFunction:
    """The ConsistencyFunction of a folder or hub id that holds a `ConsistencyModelPipeline`, in eval mode."""
    from diffusers import ConsistencyModelPipeline

    pipe = ConsistencyModelPipeline.from_pretrained(str(folder))
    config = pipe.scheduler.config
    sigmas = {k: config[k] for k in ("sigma_min", "sigma_max", "sigma_data", "rho")}
    return ConsistencyFunction(UNet.from_diffusers(pipe.unet), **sigmas).eval()


def save_npz(path: Path, images: torch.Tensor) -> None:
    """uint8 images as `samples` [N,H,W,C], the layout that published FID tools read."""
    np.savez_compressed(path, samples=images.permute(0, 2, 3, 1).contiguous().numpy())
