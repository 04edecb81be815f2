"""What this machine has, and how large a run is before it starts: pairs, bytes, floating-point operations, hours."""

from __future__ import annotations

import math
import os
import platform
import shutil
import time
from importlib import metadata
from typing import Any

import torch

from cmlib.data import SETS
from cmlib.ops import best_device
from cmlib.pipeline import shipped
from cmlib.profiles import CELEBA64, FFHQ_LATENT, IMAGENET128, T4, Profile, select, small_unet
from cmlib.unet import UNet, given

UPDATE, TARGET = 3, 1  # forward passes that an update costs (the backward pass counts as two), and a consistency target
EVALUATION = 3 * (50 + 1 + 2)  # passes for a sample: three seeds of the teacher's DDIM-50, the student at one and at two
PEAK = {"T4, fp16": 65e12, "A100, bf16": 312e12, "H100 SXM, bf16": 989e12}  # dense, from the makers' data sheets
SHARE = 0.2  # of the peak that a U-Net reaches: assumed, not measured
PLANS = {profile.dataset: profile for profile in (T4, CELEBA64, FFHQ_LATENT, IMAGENET128)}


def machine() -> dict[str, Any]:
    """Versions, processor, disk, and the profile that fits."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
    packages = ["torch", "diffusers", "datasets", "accelerate", "torchmetrics", "ipywidgets", "jupyterlab", "torch-fidelity"]
    for package in [*packages, "onnxruntime", "tensorrt", "bentoml"]:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found["free_disk_gb"] = round(shutil.disk_usage(".").free / 1e9, 1)
    found["shipped_teachers"] = " ".join(p.name for p in shipped("digits_teacher").parent.glob("*_teacher")) or "missing"
    found["datasets_folder"] = os.environ.get("CMLIB_DATASETS", "not set: data sets other than digits come from the hub")
    found["profile"] = select().name
    return found


def network(profile: Profile) -> UNet:
    """The teacher's and the student's U-Net."""
    return UNet.from_config(
        small_unet(SETS[profile.dataset].shape, profile.widths, 0.0, profile.layers, profile.attention, profile.classes)
    )


def forward_flops(profile: Profile) -> float:
    """Of one pass for one image, counted in the network (a multiplication and an addition are two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), given(torch.zeros(1, dtype=torch.int64)):
        net = network(profile)
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, *SETS[profile.dataset].shape), torch.empty(1))
    return float(counter.get_total_flops())


@torch.no_grad()
def measured_rate(seconds: float = 2.0) -> float:
    """FLOP/s of CIFAR-10's U-Net on this machine, measured now: forward passes for about `seconds`, after one to warm up."""
    device = best_device()
    n = 64 if device == "cuda" else 1
    net, x, t = network(T4).to(device), torch.randn(n, *SETS["cifar10"].shape, device=device), torch.ones(n, device=device)
    float(net(x, t).sum())  # waits for the GPU
    passes, began = 0, time.perf_counter()
    while passes < 1 or time.perf_counter() - began < seconds:
        float(net(x, t).sum())
        passes += 1
    return passes * n * forward_flops(T4) / (time.perf_counter() - began)


def table(name: str, rate: float) -> dict[str, Any]:
    """What training a teacher, rolling out its cache, distilling without a teacher (ECT) and the evaluation's
    samples cost, and how many hours that is at `rate` FLOP/s, and on PEAK's devices at SHARE of their peak."""
    profile = PLANS[name]
    flops, size = forward_flops(profile), math.prod(SETS[name].shape)
    passes = {
        "teacher": profile.teacher_updates * profile.batch_size * UPDATE,
        "cache": profile.pairs,
        "distil": profile.distill_updates * profile.batch_size * (UPDATE + TARGET),
        "evaluate": profile.samples * EVALUATION,
    }
    found: dict[str, Any] = {"protocol.plan": profile.name, "pairs": profile.pairs}
    ends = 2 * size / profile.rollout_steps if profile.source == "rollout" else 0  # a trajectory's, shared by its pairs
    found["gigabytes.cache"] = profile.pairs * (4 * size + 12 + ends) / 1e9
    with torch.device("meta"):
        found["parameters.millions"] = sum(p.numel() for p in network(profile).parameters()) / 1e6
    found["gigaflops.forward"] = flops / 1e9
    for device, speed in {"this machine": rate, **{k: v * SHARE for k, v in PEAK.items()}}.items():
        found |= {f"hours.{stage}.{device}": n * flops / speed / 3600 for stage, n in passes.items()}
    return found | {"protocol.rate_this_machine": f"{rate / 1e12:.3f} TFLOP/s, measured now on CIFAR-10's U-Net, float32"}
