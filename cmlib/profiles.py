"""What a run costs on each kind of machine: sizes, steps and precision as plain data."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Profile:
    """One machine's recipe; updates are optimiser steps, `pairs` the size of the cache."""

    name: str
    minutes: float  # budget of the whole pipeline; NaN: nobody has run it
    dataset: str
    teacher: str  # a hub id, a folder, or a name under data/
    widths: tuple[int, ...]  # channels of the U-Net of a teacher that is trained from nothing
    teacher_updates: int
    teacher_lr: float
    source: str
    solver: str
    rollout_steps: int
    pairs: int
    batch_size: int
    regression_updates: int
    endpoint_updates: int
    distill_updates: int
    samples: int  # images on the generated side of a Fréchet distance
    timesteps: int  # random noise levels an image in the reconstruction error
    precision: str = "no"
    layers: int = 1  # residual blocks a level, in the U-Net that is trained from nothing
    attention: int = -1  # the level that has it
    classes: int = 0  # labels that it is conditional on
    in_memory: int | None = None  # images that are held; training streams the set from its files (None: all are held)
    rough: bool = False  # for a look or a test, not for figures


CPU = Profile(
    name="cpu",
    minutes=8,
    dataset="digits",
    teacher="digits_teacher",
    widths=(32, 64),
    teacher_updates=12_000,
    teacher_lr=1e-3,
    source="rollout",
    solver="ddim",
    rollout_steps=30,
    pairs=360_000,
    batch_size=64,
    regression_updates=450,
    endpoint_updates=1_000,
    distill_updates=300,
    samples=1_500,
    timesteps=256,
)
QUICK = replace(
    CPU,
    name="quick",
    rough=True,
    minutes=1.5,
    teacher_updates=1_000,
    rollout_steps=20,
    pairs=12_000,
    regression_updates=100,
    endpoint_updates=100,
    distill_updates=80,
    samples=500,
    timesteps=16,
)
CI = replace(
    QUICK,
    name="ci",
    minutes=0.5,
    teacher_updates=60,
    rollout_steps=10,
    pairs=4_000,
    regression_updates=60,
    endpoint_updates=100,
    distill_updates=40,
    samples=300,
    timesteps=8,
)
LAPTOP = replace(  # images of 32×32 on two cores: hours, not minutes
    CPU,
    name="laptop",
    minutes=float("nan"),
    dataset="fashion_mnist",
    teacher="fashion_mnist_teacher",
    widths=(16, 32, 64, 96),  # narrow where the pixels are many
    teacher_updates=5_000,
    solver="heun",
    rollout_steps=10,
    pairs=60_000,
    endpoint_updates=1_500,
    distill_updates=300,
    samples=1_000,
)
T4 = Profile(
    name="t4",
    minutes=40,
    dataset="cifar10",
    teacher="google/ddpm-cifar10-32",
    widths=(128, 256, 256, 256),
    teacher_updates=50 * (50_000 // 64),
    teacher_lr=2e-4,
    source="data",
    solver="posterior_mean",
    rollout_steps=50,
    pairs=200_000,
    batch_size=64,
    regression_updates=5_000,
    endpoint_updates=5_000,
    distill_updates=5_000,
    samples=10_000,
    timesteps=256,
    precision="fp16",
    layers=2,
    attention=1,
)
RTX4070 = replace(  # the CS student's: nobody has timed it on that card yet
    T4, name="rtx4070", minutes=60, source="rollout", solver="ddim", rollout_steps=500, batch_size=32
)
CELEBA64 = replace(  # what comes after the course: for GPUs, and not run in full yet
    T4,
    name="celeba64",
    minutes=float("nan"),
    dataset="celebahq64",
    teacher="runs/celeba64/teacher/pipeline",
    attention=2,
    teacher_updates=200_000,
    source="rollout",
    solver="ddim",
    batch_size=128,
    endpoint_updates=50_000,
    distill_updates=100_000,
)
FFHQ_LATENT = replace(
    CELEBA64,
    name="ffhq-latent",
    dataset="ffhq-latents",
    teacher="runs/ffhq-latent/teacher/pipeline",
    widths=(192, 384, 384, 384),
    attention=1,
    pairs=500_000,
)
IMAGENET128 = replace(
    CELEBA64,
    name="imagenet128",
    dataset="imagenet128",
    teacher="runs/imagenet128/teacher/pipeline",
    widths=(128, 256, 384, 512),
    attention=3,
    classes=1_000,
    in_memory=10_000,
    teacher_updates=500_000,
    pairs=2_000_000,
    batch_size=512,
    distill_updates=400_000,
    samples=50_000,
)
PROFILES = {p.name: p for p in (CI, QUICK, CPU, LAPTOP, T4, RTX4070, CELEBA64, FFHQ_LATENT, IMAGENET128)}


def select(name: str | None = None) -> Profile:
    """The profile `name`, else that of CMLIB_PROFILE, else `cpu`, or `t4` where there is a GPU. Raises ValueError."""
    name = name or os.environ.get("CMLIB_PROFILE") or ("t4" if torch.cuda.is_available() else "cpu")
    if name not in PROFILES:
        raise ValueError(f"no profile {name!r}; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


def small_unet(
    shape: tuple[int, ...], widths: tuple[int, ...], dropout: float, layers: int = 1, attention: int = -1, classes: int = 0
) -> dict[str, Any]:
    """Configuration of a U-Net for images [C,H,W]: a level a width, attention at one of them (the lowest), conditional on
    `classes` labels if there are any."""
    halvings = len(widths) - 1
    if shape[1] % 2**halvings:
        raise ValueError(
            f"images of {shape[1]}×{shape[1]} pixels cannot be halved {halvings} times, as the U-Net does; pad them"
        )
    down = ["DownBlock2D"] * len(widths)
    down[attention] = "AttnDownBlock2D"
    return {
        "sample_size": shape[1],
        "in_channels": shape[0],
        "out_channels": shape[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": tuple(down),
        "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        "norm_num_groups": 8,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "dropout": dropout,
    } | ({"num_class_embeds": classes} if classes else {})
