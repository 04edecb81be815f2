"""How large a run is before it starts: pairs, bytes, floating-point operations, hours."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from cmlib.unet import UNet

UPDATE, TARGET = 3, 1  # forward passes that an update costs (the backward pass counts as two), and a consistency target
PEAK = {"T4, fp16": 65e12, "A100, bf16": 312e12, "H100 SXM, bf16": 989e12}  # dense, from the makers' data sheets
SHARE = 0.2  # of the peak that a U-Net reaches: assumed, not measured


@dataclass(frozen=True)
class Plan:
    """A data set and the run that we would start with; the U-Net's widths are a choice of ours, but for CIFAR-10's teacher."""

    shape: tuple[int, int, int]
    pairs: int
    updates: int
    batch_size: int
    samples: int
    widths: tuple[int, ...] = (128, 256, 256, 256)
    attention: int = 1  # the level that has it

    def network(self) -> UNet:
        """The teacher's and the student's U-Net."""
        kinds = ["AttnDownBlock2D" if i == self.attention else "DownBlock2D" for i in range(len(self.widths))]
        up = tuple(kind.replace("Down", "Up") for kind in reversed(kinds))
        c, size, _ = self.shape
        return UNet(size, c, c, self.widths, 2, tuple(kinds), up, attention_head_dim=None)

    def flops(self) -> float:
        """Of one forward pass for one image, counted in the network (a multiplication and an addition are two)."""
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.network()(torch.empty(1, *self.shape), torch.empty(1))
        return float(counter.get_total_flops())


PLANS = {
    "cifar10": Plan((3, 32, 32), 200_000, 5_000, 64, 10_000),
    "celebahq64": Plan((3, 64, 64), 200_000, 100_000, 128, 10_000, attention=2),
    "ffhq-latents": Plan((4, 32, 32), 500_000, 100_000, 128, 10_000, widths=(192, 384, 384, 384)),
    "imagenet128": Plan((3, 128, 128), 2_000_000, 400_000, 512, 50_000, widths=(128, 256, 384, 512), attention=3),
}


@torch.no_grad()
def measured_rate(seconds: float = 2.0) -> float:
    """FLOP/s of CIFAR-10's U-Net on this machine, measured now: forward passes for about `seconds`, after one to warm up."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan, n = PLANS["cifar10"], 64 if device == "cuda" else 1
    net, x, t = plan.network().to(device), torch.randn(n, *plan.shape, device=device), torch.ones(n, device=device)
    passes, began = -1, 0.0
    while passes < 1 or time.perf_counter() - began < seconds:
        began = time.perf_counter() if passes == -1 else began
        float(net(x, t).sum())  # waits for the GPU
        passes += 1
        began = time.perf_counter() if passes == 0 else began
    return passes * n * plan.flops() / (time.perf_counter() - began)


def table(name: str, rate: float) -> dict[str, Any]:
    """What building the cache, distilling without a teacher (ECT) and sampling the teacher for the evaluation costs, and how
    many hours that is at `rate` FLOP/s, and on PEAK's devices at SHARE of their peak."""
    plan = PLANS[name]
    flops = plan.flops()
    passes = {
        "cache": plan.pairs,
        "distil": plan.updates * plan.batch_size * (UPDATE + TARGET),
        "evaluate": plan.samples * 50,
    }
    found: dict[str, Any] = {"pairs": plan.pairs, "gigabytes.cache": plan.pairs * (4 * math.prod(plan.shape) + 12) / 1e9}
    found |= {
        "parameters.millions": sum(p.numel() for p in plan.network().parameters()) / 1e6,
        "gigaflops.forward": flops / 1e9,
    }
    for device, speed in {"this machine": rate, **{k: v * SHARE for k, v in PEAK.items()}}.items():
        found |= {f"hours.{stage}.{device}": n * flops / speed / 3600 for stage, n in passes.items()}
    return found | {"protocol.rate_this_machine": f"{rate / 1e12:.3f} TFLOP/s, measured now on CIFAR-10's U-Net, float32"}
