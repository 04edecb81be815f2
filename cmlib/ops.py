"""Small tensor operations that every other module shares."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def expand_like(v: Tensor, x: Tensor) -> Tensor:
    """Append axes to `v` [B] until it broadcasts against `x` [B,...]."""
    return v.reshape(v.shape + (1,) * (x.ndim - v.ndim))


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each sample, mean over elements: [B,...] -> [B]."""
    return (a - b).pow(2).flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """√(‖a−b‖² + c²) − c with the norm of the *whole* sample (iCT eq. 7): [B,...] -> [B]."""
    return ((a - b).pow(2).flatten(1).sum(1) + c**2).sqrt() - c


def huber_c(x: Tensor) -> float:
    """iCT's c = 0.00054·√d for samples of d elements (iCT sec. 3.3)."""
    return 0.00054 * float(np.sqrt(x[0].numel()))


def indexed_normal(seed: int, indices: Sequence[int] | Tensor, shape: Sequence[int], stream: int = 0) -> Tensor:
    """Standard normal noise [B, *shape] in which row i depends on (seed, indices[i], stream) alone.

    Counter-based (Philox), so that a result does not depend on the batch size, the rank or the order of the work.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, int(i)], counter=[0, 0, 0, stream])).standard_normal(
            tuple(shape), dtype=np.float32
        )
        for i in indices
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)


def indexed_integers(seed: int, indices: Sequence[int] | Tensor, low: int, high: int, stream: int = 0) -> Tensor:
    """Uniform integers in [low, high) [B], row i from (seed, indices[i], stream) alone."""
    rows = [
        int(np.random.Generator(np.random.Philox(key=[seed, int(i)], counter=[0, 0, 0, stream])).integers(low, high))
        for i in indices
    ]
    return torch.tensor(rows, dtype=torch.int64)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and every GPU)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The random state that dropout on `device` draws from; with `set_rng_state` two branches share one mask."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_rng_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Put back what `rng_state` returned, on the CPU and on the GPU."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
