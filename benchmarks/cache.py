"""Pair cache: building against the bare U-Net's forward rate, and reading. `python benchmarks/cache.py`

Building should run at 0.9 or more of the rate at which the same network alone, at the same batch size, maps tensors that are
already there. Both are timed in turns on one thread; "build/net" is the median of the turns' ratios. On a machine that others
use too it scatters by ±0.1 and more, so "in net" gives the share of the build's own time that was spent inside the network:
numerator and denominator come from one run. Reading is the loader's rate over one epoch, shards read, checked and
shuffled, at batch 64.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from cmlib.cache import PairCache
from cmlib.process import DDPM
from cmlib.teacher import Teacher
from cmlib.unet import UNet

BATCH = 250
UNET = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 8, "attention_head_dim": None,
}  # fmt: skip


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(shape: tuple[int, int, int], source: str, pairs: int, turns: int) -> str:
    """One row of the table: the best rates of all turns, and the median of the turns' ratios."""
    torch.manual_seed(0)
    unet = UNet(sample_size=shape[1], in_channels=shape[0], out_channels=shape[0], **UNET)
    teacher = Teacher(unet.to(memory_format=torch.channels_last), DDPM.linear()).to("cpu")
    images = torch.randint(0, 256, (1000, *shape), dtype=torch.uint8)
    args = (
        {"images": images}
        if source == "data"
        else {"source": source, "shape": shape, "solver": "ddim", "steps": pairs // BATCH}
    )
    x, n = torch.randn(BATCH, *shape), torch.randint(0, 1000, (BATCH,))
    folder, clock = Path(tempfile.mkdtemp()), [0.0]

    def forward() -> None:
        for _ in range(pairs // BATCH):
            teacher.eps(x, n)

    def build() -> None:
        shutil.rmtree(folder)
        PairCache.build(folder, teacher, pairs, batch_size=BATCH, **args)

    def count(sign: int) -> None:
        clock[0] += sign * time.perf_counter()

    teacher.unet.register_forward_pre_hook(lambda *_: count(-1))
    teacher.unet.register_forward_hook(lambda *_: count(1))
    times, shares = [], []
    try:
        teacher.eps(x, n)
        for _ in range(turns):
            bare, clock[0] = timed(forward), 0.0
            times.append((bare, timed(build)))
            shares.append(clock[0] / times[-1][1])
        bare, built = (pairs / min(column) for column in zip(*times, strict=True))
        cache = PairCache.open(folder)
        batches = cache.loader(64)
        read = pairs // 64 * 64 / timed(lambda: [next(batches) for _ in range(pairs // 64)])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ratio, share = statistics.median(a / b for a, b in times), statistics.median(shares)
    size = "×".join(map(str, shape))
    return f"| {size:7} | {source:7} | {bare:10,.0f} | {built:10,.0f} | {ratio:9.3f} | {share:6.3f} | {read:11,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print("| images  | source  | U-Net, 1/s | build, 1/s | build/net | in net | read, 1/s   |")
    print("|---------|---------|-----------:|-----------:|----------:|-------:|------------:|")
    for shape, pairs in (((1, 8, 8), 5000), ((3, 32, 32), 1000)):
        for source in ("data", "rollout"):
            print(measure(shape, source, pairs, turns), flush=True)


if __name__ == "__main__":
    main()
