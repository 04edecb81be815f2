"""Small tensor operations that every other module shares."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Generator, Tensor, nn

Network = Callable[[Tensor, Tensor], Tensor]  # f(x, t)
Distance = Callable[[Tensor, Tensor], Tensor]  # of two batches, [B]
Losses = tuple[Tensor, dict[str, Tensor]]  # per sample [B], and logs


def expand_like(v: Tensor, x: Tensor) -> Tensor:
    """Append axes to `v` [B] until it broadcasts against `x` [B,...]."""
    return v.reshape(v.shape + (1,) * (x.ndim - v.ndim))


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each sample, mean over elements: [B,...] -> [B]."""
    return (a - b).pow(2).flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """√(‖a−b‖² + c²) − c with the norm of the *whole* sample (iCT sec. 3.3): [B,...] -> [B]."""
    return ((a - b).pow(2).flatten(1).sum(1) + c**2).sqrt() - c


def ict_huber(a: Tensor, b: Tensor) -> Tensor:
    """Pseudo-Huber with c = 0.00054·√d for samples of d elements (iCT sec. 3.3)."""
    return pseudo_huber(a, b, 0.00054 * math.sqrt(a[0].numel()))


def norm(a: Tensor, b: Tensor) -> Tensor:
    """‖a − b‖ of each sample, as a pseudo-Huber whose c = 10⁻⁴ keeps the slope finite at 0."""
    return pseudo_huber(a, b, 1e-4)


def randn_like(x: Tensor, generator: Generator) -> Tensor:
    """Standard normal noise of x's shape on x's device, from the caller's CPU generator: on a GPU from one seeded by it, as
    a large draw on the CPU, and its way to the GPU, take longer than a training step."""
    if x.device.type != "cpu":
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
        generator = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, device=x.device, generator=generator)


def _streams(seed: int, indices: Sequence[int] | Tensor, stream: int) -> Iterator[np.random.Generator]:
    """For each index a generator at the start of Philox(key=[seed, index], counter=[0, 0, 0, stream]).

    One object, rewound each time: building a new one takes several times longer than drawing an image from it.
    """
    which = torch.as_tensor(indices).tolist()
    if not (0 <= seed < 2**64 and stream >= 0 and min(which, default=0) >= 0):
        raise ValueError(
            f"noise needs a seed in 0 … 2^64 − 1 and no negative index or stream, got seed {seed}, stream {stream}"
        )
    bits = np.random.Philox(key=[seed, 0], counter=[0, 0, 0, stream])
    generator, state = np.random.Generator(bits), bits.state

    def at(i: int) -> np.random.Generator:
        state["state"]["key"][1] = i
        bits.state = state
        return generator

    return map(at, which)


def indexed_normal(seed: int, indices: Sequence[int] | Tensor, shape: Sequence[int], stream: int = 0) -> Tensor:
    """Standard normal noise [B, *shape] in which row i depends on (seed, indices[i], stream) alone.

    Counter-based (Philox), so that a result does not depend on the batch size, the rank or the order of the work.
    """
    rows = np.empty((len(indices), *shape), dtype=np.float32)
    for row, generator in zip(rows, _streams(seed, indices, stream), strict=True):
        generator.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows)


def indexed_integers(seed: int, indices: Sequence[int] | Tensor, low: int, high: int, stream: int = 0) -> Tensor:
    """Uniform integers in [low, high) [B], row i from (seed, indices[i], stream) alone."""
    return torch.tensor([int(g.integers(low, high)) for g in _streams(seed, indices, stream)], dtype=torch.int64)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and every GPU)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def best_device() -> str:
    """Where networks run: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_of(f: object) -> torch.device:
    """Where a network's weights are; the CPU for a plain function."""
    return next(f.parameters()).device if isinstance(f, nn.Module) else torch.device("cpu")


def rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The random state that dropout on `device` draws from; with `set_rng_state` two branches share one mask."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_rng_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Put back what `rng_state` returned, on the CPU and on the GPU."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
