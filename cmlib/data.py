"""Image sets as uint8 tensors: scikit-learn's digits out of the wheel, anything else through `datasets`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# name -> (hub id, pixels of black border that bring it to a power of two)
HUB = {"cifar10": ("uoft-cs/cifar10", 0), "fashion_mnist": ("zalando-datasets/fashion_mnist", 2)}
DIGITS_TRAIN = 1500


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255], rounded (truncation would darken every image by half a level)."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def fingerprint(images: Tensor) -> str:
    """Twelve hex digits that say which images these are."""
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:12]


def load(name: str, split: str = "train", limit: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Images uint8 [N,C,H,W] and labels [N] (None where the set has none).

    `name` is `digits`, `cifar10`, `fashion_mnist`, a hub id, or a folder that `datasets.load_dataset` reads; the
    environment variable CMLIB_DATASETS names a folder that is looked in before the hub. Raises ValueError with one
    line that says what to do.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    images, labels = _digits(split) if name == "digits" else _from_datasets(name, split, limit)
    return images[:limit], labels if labels is None else labels[:limit]


def _digits(split: str) -> tuple[Tensor, Tensor]:
    """1,797 images of 8×8, grey levels 0 … 16; a fixed shuffle, since the file is sorted by writer."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.Generator(np.random.Philox(0)).permutation(len(raw.target))
    order = order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:]
    images = torch.from_numpy(np.round(raw.images[order] * (255 / 16)).astype(np.uint8))
    return images[:, None], torch.from_numpy(raw.target[order].astype(np.int64))


def resolve(name: str) -> str:
    """Where `name` is: an existing folder, a folder under CMLIB_DATASETS, or else a hub id."""
    root = os.environ.get("CMLIB_DATASETS")
    if root and (Path(root) / name).is_dir():
        return str(Path(root) / name)
    return name if Path(name).is_dir() else HUB.get(name, (name, 0))[0]


def _from_datasets(name: str, split: str, limit: int | None) -> tuple[Tensor, Tensor | None]:
    import datasets

    source = resolve(name)
    try:
        parts = datasets.load_dataset(source)
    except Exception as error:  # the hub client raises many unrelated types
        raise ValueError(
            f"cannot load data set {name!r} from {source!r} ({type(error).__name__}). Give 'digits', a hub id or a folder,"
            " or set CMLIB_DATASETS to the folder that holds it."
        ) from error
    part = parts.get(split, parts.get("validation")) if split == "test" else parts.get(split)
    if part is None:
        raise ValueError(f"data set {name!r} has no split {split!r}; it has {', '.join(parts)}")
    column = next((k for k, v in part.features.items() if isinstance(v, datasets.Image)), None)
    if column is None:
        raise ValueError(f"data set {name!r} has no image column; its columns are {', '.join(part.features)}")
    part = part.select(range(min(limit or len(part), len(part))))
    if len(part) == 0:
        raise ValueError(f"data set {name!r} is empty in split {split!r}")
    label = next((k for k in ("label", "labels", "fine_label") if k in part.features), None)
    images = _stack(name, part[column])
    border = HUB[name][1] if name in HUB else 0
    images = torch.nn.functional.pad(images, (border,) * 4)
    return images, torch.tensor(part[label]) if label else None


def _stack(name: str, pictures: Any) -> Tensor:
    mode, size, rows = None, None, []
    for picture in pictures:
        mode = mode or ("L" if picture.mode in ("1", "L", "I;16") else "RGB")
        size = size or picture.size
        if picture.size != size:
            raise ValueError(f"data set {name!r} mixes image sizes {size} and {picture.size}; resize them to one size")
        if size[0] != size[1]:
            raise ValueError(f"data set {name!r} has images of {size[0]}×{size[1]} pixels; crop them square")
        pixels = np.asarray(picture.convert(mode))
        rows.append(pixels[None] if mode == "L" else pixels.transpose(2, 0, 1))
    return torch.from_numpy(np.stack(rows))


def batches(images: Tensor, batch_size: int, seed: int = 0, start: int = 0) -> Iterator[dict]:
    """Endless shuffled batches {"x0": float [B,C,H,W], "index": [B]}; the stream from `start` on is what a run that
    was stopped there would have seen next."""
    per_epoch = max(1, len(images) // batch_size)
    for epoch in range(start // per_epoch, 10**9):
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        order = torch.from_numpy(rng.permutation(len(images)))
        for b in range(start % per_epoch if epoch == start // per_epoch else 0, per_epoch):
            index = order[b * batch_size : (b + 1) * batch_size]
            yield {"x0": to_float(images[index]), "index": index}
