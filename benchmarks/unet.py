"""Time our U-Net against diffusers' `UNet2DModel` on the CPU: forward and training step, interleaved in pairs.

    python benchmarks/unet.py --threads 1

A ratio below 1 means that ours is faster. Each repeat times both networks back to back, in alternating order, and gives one
ratio; the table shows the median ratio and the quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from cmlib.unet import UNet

COMMON = {"norm_eps": 1e-6, "downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False, "attention_head_dim": None}
CONFIGS = {
    "digits 8x8, batch 64": (
        64,
        {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64), "layers_per_block": 1,
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
         "norm_num_groups": 8},
    ),
    "small 32x32, batch 8": (
        8,
        {"sample_size": 32, "block_out_channels": (32, 64, 64, 64), "layers_per_block": 1},
    ),
}  # fmt: skip


def passes(net: nn.Module, x: Tensor, t: Tensor, train: bool) -> Callable[[], None]:
    """One forward pass, or one training step, of `net` as a function without arguments."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def forward() -> Tensor:
        y = net(x, t)
        return y if isinstance(y, Tensor) else y.sample

    def infer() -> None:
        with torch.no_grad():
            forward()

    def step() -> None:
        forward().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step if train else infer


def seconds(run: Callable[[], None], count: int) -> float:
    """Wall-clock seconds of one of `count` runs."""
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} thread(s), {args.repeats} pairs; ratio = ours / diffusers")
    print(f"{'':32}{'diffusers':>12}{'ours':>12}{'ratio':>9}  quartiles")
    for name, (batch, config) in CONFIGS.items():
        torch.manual_seed(0)
        theirs = UNet2DModel(**config, **COMMON)
        ours = UNet.from_diffusers(theirs)
        x = torch.randn(batch, ours.config["in_channels"], config["sample_size"], config["sample_size"])
        t = torch.linspace(0, 999, batch)
        for kind in ("forward", "training step"):
            runs = [passes(net.train(kind != "forward"), x, t, kind != "forward") for net in (theirs, ours)]
            count = max(1, round(0.1 / max(seconds(run, 2) for run in runs)))
            pairs = []
            for repeat in range(args.repeats):
                order = (0, 1) if repeat % 2 else (1, 0)
                timed = {which: seconds(runs[which], count) for which in order}
                pairs.append((timed[0], timed[1]))
            ratios = statistics.quantiles([b / a for a, b in pairs], n=4)
            a, b = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
            label = f"{name}, {kind}"
            print(f"{label:36}{a:8.1f} ms{b:9.1f} ms{ratios[1]:9.3f}  {ratios[0]:.3f}–{ratios[2]:.3f}", flush=True)


if __name__ == "__main__":
    main()
