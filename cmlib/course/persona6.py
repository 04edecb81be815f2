"""Graded exercise 6, the frontier researcher: faces of 64×64, a network for them, and drawn ones where no real ones are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from cmlib.checks import Exercise
from cmlib.consistency import ConsistencyFunction
from cmlib.data import to_float
from cmlib.ops import Network, expand_like, indexed_normal
from cmlib.profiles import small_unet
from cmlib.stable import stable_denoised
from cmlib.unet import UNet


def drawn(n: int, seed: int) -> Tensor:
    """n drawn faces of 256×256, uint8 [n,3,256,256]: hair, a face, two eyes and a mouth of random size, place and colour."""
    from PIL import Image, ImageDraw

    rng, faces = np.random.Generator(np.random.Philox(seed)), []
    for _ in range(n):
        picture = Image.new("RGB", (256, 256), tuple(rng.integers(60, 220, 3).tolist()))
        pen, hair = ImageDraw.Draw(picture), tuple(rng.integers(10, 140, 3).tolist())
        x, y, w, h = (int(v) for v in rng.integers((115, 130, 55, 75), (141, 150, 80, 105)))
        skin = tuple(int(v) for v in rng.uniform(0.4, 1) * np.array([245, 205, 170]))
        pen.ellipse((x - w - 15, y - h - 25, x + w + 15, y + h - 10), fill=hair)
        pen.ellipse((x - w, y - h, x + w, y + h), fill=skin)
        for side in (-1, 1):
            pen.ellipse((x + side * w // 2 - 12, y - 30, x + side * w // 2 + 12, y - 12), fill="white")
            pen.ellipse((x + side * w // 2 - 6, y - 28, x + side * w // 2 + 6, y - 14), fill=hair)
        pen.chord((x - 28, y + 15, x + 28, y + 50), 0, 180, fill=(170, 40, 50))
        faces.append(np.asarray(picture).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(faces))


def draw_into(folder: Path, n: int, seed: int) -> str:
    """Write `drawn` faces as the hub keeps CelebA-HQ, a parquet file with a column of images; returns the folder."""
    import datasets
    from PIL import Image

    datasets.disable_progress_bars()
    faces = [Image.fromarray(face.permute(1, 2, 0).numpy()) for face in drawn(n, seed)]
    table = datasets.Dataset.from_dict({"image": faces}, features=datasets.Features({"image": datasets.Image()}))
    table.to_parquet(str(folder / "train-00000-of-00001.parquet"))
    return str(folder)


def student(seed: int, widths: tuple[int, ...] = (8, 8, 16, 16)) -> ConsistencyFunction:
    """An untrained f for 3×64×64, with its boundary at 0; it jumps from 160, the papers' 80 in proportion to the side."""
    torch.manual_seed(seed)
    return ConsistencyFunction(UNet.from_config(small_unet((3, 64, 64), widths, 0.0)), 0.0, 160.0)


def states(faces: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sixteen uint8 faces [16,3,64,64] as references in [−1, 1], noisy ones x_t at levels t from 0.5 to 150, and r = t/2."""
    x0, t = to_float(faces[:16]), torch.logspace(-0.3, 2.17, 16)
    return x0, x0 + expand_like(t, x0) * indexed_normal(seed, range(16), x0.shape[1:]), t, t / 2


def curve(seed: int, n: int = 20) -> tuple[Tensor, Tensor]:
    """A made-up record of a run: updates [n], unevenly spaced, and a gap [n] that falls first and then drifts."""
    generator = torch.Generator().manual_seed(seed)
    updates = (torch.rand(n, generator=generator) + torch.arange(n)) * 500
    drift, noise = torch.rand((), generator=generator) - 0.5, torch.randn(n, generator=generator)
    return updates, (3 * (-updates / 800).exp() + 0.2) * (drift * updates / 5000 + 0.03 * noise).exp()


def _shrink(images: Tensor, side: int) -> Tensor:
    return avg_pool2d(images.float(), images.shape[-1] // side).round().to(torch.uint8)


def _stable_step(x_t: Tensor, t: Tensor, r: Tensor, reference: Tensor) -> Tensor:
    return x_t + expand_like((r - t) / t, x_t) * (x_t - stable_denoised(x_t, t, reference))


def _towards(x_t: Tensor, t: Tensor, r: Tensor, x0_hat: Tensor) -> Tensor:
    return x_t + expand_like((r - t) / t, x_t) * (x_t - x0_hat)


def _gap(f: Network, x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor) -> Tensor:
    return (f(x_t, t) - f(x_r, r)).pow(2).mean().sqrt()


def _slope(x: Tensor, y: Tensor) -> Tensor:
    x = (x - x.mean()) / 1000
    return (x * y).sum() / (x * x).sum()


def _half(v: Tensor) -> Tensor:
    return v[len(v) // 2 :]


def _toy(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) / expand_like(1 + t, x)


_IMAGES = (torch.arange(2 * 3 * 64) * 37 % 256).reshape(2, 3, 8, 8).to(torch.uint8)
_REFERENCE, _X = torch.linspace(-1, 1, 20).sin().reshape(5, 1, 2, 2), torch.linspace(-2, 1.5, 12).reshape(3, 1, 2, 2)
_T, _R = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([0.4, 0.3, 3.0])

EXERCISES = {
    "shrink": Exercise(
        _shrink,
        [(_IMAGES, 2), (_IMAGES, 4)],
        {
            "single pixels make false patterns of fine detail; average over blocks": lambda v, side: v[
                ..., :: v.shape[-1] // side, :: v.shape[-1] // side
            ],
            "truncation darkens by half a level; round": lambda v, side: avg_pool2d(v.float(), v.shape[-1] // side).to(
                torch.uint8
            ),
        },
    ),
    "stable_step": Exercise(
        _stable_step,
        [(_X, _T, _R, _REFERENCE)],
        {
            "all references count alike; weigh them by how near they are": lambda x, t, r, refs: _towards(
                x, t, r, refs.mean(0, keepdim=True)
            ),
            "the exponent is −‖x_t − x_i‖²/2t²; the 2 is missing": lambda x, t, r, refs: _towards(
                x, t, r, stable_denoised(x, t / 2**0.5, refs)
            ),
            "the exponent has t², not t": lambda x, t, r, refs: _towards(x, t, r, stable_denoised(x, t.sqrt(), refs)),
            "from t down to r; you went up, away from the data": lambda x, t, r, refs: 2 * x - _stable_step(x, t, r, refs),
        },
    ),
    "gap": Exercise(
        _gap,
        [(_toy, _X, _T, _X.cos(), _R)],
        {
            "both are f's answers; you compared the states": lambda f, x_t, t, x_r, r: (x_t - x_r).pow(2).mean().sqrt(),
            "f must be told the level r of the earlier state": lambda f, x_t, t, x_r, r: _gap(f, x_t, t, x_r, t),
            "the root is missing": lambda *a: _gap(*a) ** 2,
        },
    ),
    "drift": Exercise(
        lambda updates, gap: _slope(_half(updates), _half(gap).log()),
        [curve(1), curve(2, 9)],
        {
            "the first half is learning, not drift; leave it out": lambda k, g: _slope(k, g.log()),
            "the slope is that of ln gap": lambda k, g: _slope(_half(k), _half(g)),
            "per 1,000 updates, not per update": lambda k, g: _slope(_half(k), _half(g).log()) / 1000,
            "two ends are two noisy numbers; fit a line through all": lambda k, g: (
                1000 * (_half(g)[-1] / _half(g)[0]).log() / (_half(k)[-1] - _half(k)[0])
            ),
        },
    ),
}
