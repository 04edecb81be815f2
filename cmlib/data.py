"""Image sets as uint8 tensors: scikit-learn's digits out of the wheel, anything else through `datasets`."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from cmlib import latents, ranks

DIGITS_TRAIN = 1500
BUFFER = 2_000  # images that a stream shuffles at once


@dataclass(frozen=True)
class Source:
    """A named image set on the hub, and what is done to its pictures."""

    hub: str
    shape: tuple[int, int, int] = (3, 32, 32)  # of what comes out
    border: int = 0  # pixels of black that bring it to a power of two
    side: int = 0  # crop square and shrink to this; 0 leaves them as they are
    held_out: str = "test"  # the split of its kind; "" where the hub has one split alone, whose last seventh it is
    vae: str = ""  # the images are this VAE's latents


SETS = {
    "cifar10": Source("uoft-cs/cifar10"),
    "fashion_mnist": Source("zalando-datasets/fashion_mnist", (1, 32, 32), border=2),
    "celebahq64": Source("jxie/celeba-hq", (3, 64, 64), side=64, held_out="validation"),
    "ffhq-latents": Source("merkol/ffhq-256", (4, 32, 32), side=256, held_out="", vae="stabilityai/sd-vae-ft-mse"),
    "imagenet128": Source("benjamin-paine/imagenet-1k-128x128", (3, 128, 128), side=128, held_out="validation"),
}


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

    `name` is `digits`, one of SETS, a hub id, or a folder that `datasets.load_dataset` reads; the
    environment variable CMLIB_DATASETS names a folder that is looked in before the hub. Raises ValueError with one
    line that says what to do.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
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
    return name if Path(name).is_dir() else SETS.get(name, Source(name)).hub


@dataclass(frozen=True)
class _Opened:
    """A split as `datasets` reads it, and what its columns and its pictures are."""

    name: str
    part: Any
    column: str
    label: str | None

    @property
    def source(self) -> Source:
        return SETS.get(self.name, Source(self.name))

    def labels(self, rows: dict[str, list[Any]]) -> Tensor | None:
        """[N], where the set has a whole number for each picture."""
        values = rows[self.label][:] if self.label else [None]  # all at once: one by one a column is slow
        return torch.tensor(values) if all(isinstance(value, int) for value in values) else None

    def decoded(self, pictures: Iterable[Any]) -> Tensor:
        """uint8 [N,C,H,W], cropped square and made smaller where the set's `side` says so."""
        mode, size, rows = None, None, []
        for picture in pictures:
            mode = mode or ("L" if picture.mode in ("1", "L", "I;16") else "RGB")
            if self.source.side:
                mode, side = "RGB", (self.source.side, self.source.side)
                picture = ImageOps.fit(picture.convert(mode), side, Image.Resampling.BOX)
            size = size or picture.size
            if picture.size != size:
                raise ValueError(f"data set {self.name!r} mixes image sizes {size} and {picture.size}; resize them to one size")
            if size[0] != size[1]:
                raise ValueError(f"data set {self.name!r} has images of {size[0]}×{size[1]} pixels; crop them square")
            pixels = np.asarray(picture.convert(mode))
            rows.append(pixels[None] if mode == "L" else pixels.transpose(2, 0, 1))
        return F.pad(torch.from_numpy(np.stack(rows)), (self.source.border,) * 4)


def _encode(rows: dict[str, list[Any]], found: tuple[str, str], vae: str, weights: str) -> dict[str, Any]:
    name, column = found
    return {"latent": latents.encode(vae, _Opened(name, None, column, None).decoded(rows[column])).numpy()}


def _latents(found: _Opened) -> Tensor:
    """Of all pictures, uint8 [N,c,h,w]; `datasets` keeps them on disk, for these pictures and the VAE's weights."""
    vae = resolve(found.source.vae)
    settings = {"found": (found.name, found.column), "vae": vae, "weights": latents.digest(vae)}
    kept = found.part.map(_encode, batched=True, batch_size=64, remove_columns=found.part.column_names, fn_kwargs=settings)
    return torch.from_numpy(np.stack(kept.with_format("numpy")["latent"])).to(torch.uint8)


def _open(name: str, split: str, streaming: bool = False) -> _Opened:
    import datasets

    place, held_out = resolve(name), SETS.get(name, Source(name)).held_out
    try:
        parts = datasets.load_dataset(place, streaming=streaming)
    except Exception as error:  # the hub client raises many unrelated types
        raise ValueError(
            f"cannot load data set {name!r} from {place!r} ({type(error).__name__}). Give 'digits', a hub id or a folder,"
            " or set CMLIB_DATASETS to the folder that holds it."
        ) from error
    part = parts.get(held_out, parts.get("validation")) if split == "test" and held_out else parts.get("train")
    if part is None:
        raise ValueError(f"data set {name!r} has no split {split!r}; it has {', '.join(parts)}")
    if not held_out:
        cut = len(part) * 6 // 7
        part = part.select(range(cut) if split == "train" else range(cut, len(part)))
    features = part.features or {}
    column = next((k for k, v in features.items() if isinstance(v, datasets.Image)), None)
    if column is None:
        raise ValueError(f"data set {name!r} has no image column; its columns are {', '.join(features)}")
    return _Opened(name, part, column, next((k for k in ("label", "labels", "fine_label") if k in features), None))


def _from_datasets(name: str, split: str, limit: int | None) -> tuple[Tensor, Tensor | None]:
    found = _open(name, split)
    found = replace(found, part=found.part.select(range(min(limit or len(found.part), len(found.part)))))
    if len(found.part) == 0:
        raise ValueError(f"data set {name!r} is empty in split {split!r}")
    images = _latents(found) if found.source.vae else found.decoded(found.part[found.column])
    return images, found.labels({found.label: found.part[found.label]} if found.label else {})


def pictures(name: str, images: Tensor) -> Tensor:
    """What to look at: `images` themselves, or what the data set's VAE decodes from them."""
    source = SETS.get(name, Source(name))
    return latents.decode(resolve(source.vae), images) if source.vae else images


def batches(
    images: Tensor, batch_size: int, seed: int = 0, start: int = 0, labels: Tensor | None = None
) -> Iterator[dict[str, Tensor]]:
    """Endless shuffled batches {"x0": float [B,C,H,W], "index": [B]} and, with `labels`, "label"; the stream from `start` on
    is what a run that was stopped there would have seen next."""
    if min(batch_size, len(images)) < 1 or start < 0:
        raise ValueError(f"{len(images)} images make no batches of {batch_size} from batch {start} on")
    per_epoch = max(1, len(images) // batch_size)
    for epoch in range(start // per_epoch, 10**9):
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        order = torch.from_numpy(rng.permutation(len(images)))
        for b in range(start % per_epoch if epoch == start // per_epoch else 0, per_epoch):
            index = order[b * batch_size : (b + 1) * batch_size]
            yield {"x0": to_float(images[index]), "index": index} | ({} if labels is None else {"label": labels[index]})


def stream(name: str, batch_size: int, seed: int = 0, start: int = 0) -> Iterator[dict[str, Any]]:
    """Endless batches of a set that does not fit in memory: this rank's rows {"x0", "label" where there is one} of a batch of
    `batch_size`, which "whole" names.

    Each rank reads files of its own (or, where the ranks don't divide the files, every world-th image), in an order that is
    new in each epoch, and shuffles within BUFFER images. What lies before `start` is read, not decoded, and left out.
    """
    import datasets
    from datasets.distributed import split_dataset_by_node

    rank, world = ranks.here()
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"a streamed batch of {batch_size} cannot be shared equally by {world} processes")
    found = _open(name, "train", streaming=True)
    undecoded = found.part.cast_column(found.column, datasets.Image(decode=False))
    known = inspect.signature(undecoded.shuffle).parameters
    alone = {"max_buffer_input_shards": 1} if "max_buffer_input_shards" in known else {}  # else every rank reads every file
    shuffled = undecoded.shuffle(seed=seed, buffer_size=BUFFER, **alone)  # (huggingface/datasets#8669)
    mine, image = split_dataset_by_node(shuffled, rank, world), datasets.Image()

    def rows() -> Iterator[dict[str, Any]]:
        for epoch in itertools.count():
            mine.set_epoch(epoch)
            yield from mine

    each = batch_size // world
    left = itertools.islice(rows(), start * each, None)
    while True:
        some = list(itertools.islice(left, each))
        batch = {"x0": to_float(found.decoded(image.decode_example(row[found.column]) for row in some)), "whole": batch_size}
        labels = found.labels({k: [row[k] for row in some] for k in some[0]})
        yield batch if labels is None else batch | {"label": labels}
