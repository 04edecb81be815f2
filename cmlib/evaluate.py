"""Honest evaluation: errors as functions of the noise level, and distances between sets of images with their protocol.

A Fréchet distance is named after its features: `fd_digits` uses a classifier of digits that ships with the course, and
only Inception's is called FID. Numbers are comparable at equal features, reference and N alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from cmlib import ranks
from cmlib.data import to_float, to_uint8
from cmlib.files import read_weights, write_weights
from cmlib.ops import Network, best_device, device_of, expand_like, mse
from cmlib.process import DDPM
from cmlib.teacher import Teacher

BLOCK = 2_000  # rows and columns of a distance matrix held at once
NEEDS = (
    "FID needs torchmetrics, torch-fidelity and its Inception weights: pip install --no-deps torchmetrics"
    " lightning-utilities torch-fidelity, and a first run with network"
)


class Classifier(nn.Module):
    """A small convolutional classifier whose last hidden layer [B,dim] serves as features for distances between sets.

    The last feature map (4×4) is flattened, not pooled: pooled features hardly see a blurred or shifted digit.
    """

    def __init__(self, channels: int = 1, size: int = 8, classes: int = 10, width: int = 32, dim: int = 64, norm: bool = False):
        super().__init__()
        self.config = {"channels": channels, "size": size, "classes": classes, "width": width, "dim": dim, "norm": norm}

        def convolution(before: int, after: int) -> list[nn.Module]:
            normed = [nn.BatchNorm2d(after)] if norm else []
            return [nn.Conv2d(before, after, 3, padding=1), *normed, nn.ReLU()]

        layers = convolution(channels, width)
        while size > 4:
            layers += [*convolution(width, width), nn.MaxPool2d(2), *convolution(width, 2 * width)]
            width, size = 2 * width, size // 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size**2, dim), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(dim, classes))

    def features(self, x: Tensor) -> Tensor:
        """Last hidden layer of images in [-1, 1]: [B,C,H,W] -> [B,dim]."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def save(self, path: Path) -> None:
        """Write weights as safetensors with the configuration in the header."""
        write_weights(path, self.state_dict(), "classifier", self.config)

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Read what `save` wrote, in eval mode."""
        from safetensors import SafetensorError

        try:
            config, weights = read_weights(Path(path), "classifier")
            model = cls(**config)
            model.load_state_dict(weights)
        except (SafetensorError, KeyError, OSError, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a classifier that cmlib wrote ({type(error).__name__})") from error
        return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of each image with σ = `noise` added, as an objective for `train.fit`."""

    labels: Tensor
    noise: float = 0.1
    mu: float = 0.0

    def __call__(self, f: nn.Module, target: nn.Module, batch: dict, step: int, generator: Generator) -> tuple[Tensor, dict]:
        x = batch["x0"] + self.noise * torch.randn(batch["x0"].shape, generator=generator).to(batch["x0"].device)
        return F.cross_entropy(f(x), self.labels.to(x.device)[batch["index"]], reduction="none"), {}


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images that the classifier gets right."""
    guesses = torch.cat([classifier(to_float(part).to(device_of(classifier))).argmax(1).cpu() for part in images.split(500)])
    return float((guesses == labels).float().mean())


# ---- distances between sets of images


@torch.no_grad()
def seen(classifier: Classifier, images: Tensor) -> Tensor:
    """Features [B,dim] of one batch of uint8 images, or of float images after the same rounding that saving them would do."""
    rounded = images if images.dtype == torch.uint8 else to_uint8(images)
    return classifier.features(to_float(rounded).to(device_of(classifier), memory_format=torch.channels_last)).cpu()


def features(classifier: Classifier, images: Tensor, batch_size: int = 100) -> Tensor:
    """Features [N,dim] of images. Several ranks share the batches."""
    return ranks.dealt(images.split(batch_size), partial(seen, classifier))


def _two_sets(real: Tensor, fake: Tensor, least: int, what: str) -> tuple[Tensor, Tensor]:
    """Both in float64. Raises ValueError unless they are finite features [N,d] of one d, `least` or more of each."""
    if not (real.ndim == fake.ndim == 2 and real.shape[1] == fake.shape[1] > 0):
        raise ValueError(f"{what} compares features [N,d] of one d, got {list(real.shape)} and {list(fake.shape)}")
    if min(len(real), len(fake)) < least:
        raise ValueError(f"{what} needs at least {least} images on each side")
    if not bool(real.isfinite().all() and fake.isfinite().all()):
        raise ValueError(f"{what} got features that are not finite; look at the images and at the network that made them")
    return real.double(), fake.double()


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """‖μ−μ'‖² + tr(Σ + Σ' − 2(ΣΣ')^½) of two feature sets [N,d] (Heusel et al. 2017, eq. 6).

    Biased upwards by about c/N, c of the order of tr Σ to d·tr Σ/4: compare at equal N only.
    """
    real, fake = _two_sets(real, fake, 2, "a Fréchet distance")
    a, b = real.T.cov(), fake.T.cov()
    root = torch.linalg.eigvals(a @ b).sqrt().real.sum()  # the trace of the matrix root
    return float((real.mean(0) - fake.mean(0)).pow(2).sum() + a.trace() + b.trace() - 2 * root)


def frechet_against_n(real: Tensor, fake: Tensor, parts: Sequence[int] = (1, 2, 3, 4, 6)) -> tuple[Tensor, Tensor]:
    """(N, mean distance) with `fake` cut into 1, 2, … parts: how much of a distance is owed to few images."""
    means = [torch.tensor([frechet_distance(real, part) for part in fake.tensor_split(k)]).mean() for k in parts]
    return len(fake) / torch.tensor(parts), torch.stack(means)


def frechet_limit(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """What the distance tends to with more fakes, and the slope c: the line limit + c/N through `frechet_against_n`
    (Chong & Forsyth 2020). The bias that comes from the number of `real` stays in the limit."""
    n, means = frechet_against_n(real, fake)
    slope, limit = np.polyfit(1 / n, means, 1)
    return float(limit), float(slope)


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    """Of KID's kernel over all pairs, in blocks; none of their tensors is kept, as small ones split the room of large ones."""
    return sum(float(((p @ q.T / a.shape[1] + 1) ** 3).sum()) for p in a.split(BLOCK) for q in b.split(BLOCK))


@lru_cache(maxsize=2)  # a reference's is asked for again and again
def _within(features: Tensor) -> Tensor:
    a = features.double()
    diagonal = ((a.pow(2).sum(1) / a.shape[1] + 1) ** 3).sum()
    return (_kernel_sum(a, a) - diagonal) / (len(a) * (len(a) - 1))


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """KID: the unbiased MMD² with the kernel (x·y/d + 1)³ (Bińkowski et al. 2018, eq. 4), over the whole sets."""
    a, b = _two_sets(real, fake, 2, "a kernel distance")
    return float(_within(real) + _within(fake) - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


@lru_cache(maxsize=2)
def _balls(features: Tensor, k: int) -> list[tuple[Tensor, Tensor]]:
    """Parts of a set, and the distance of each point to its k-th neighbour beside itself."""
    parts, radii = features.float().split(BLOCK), []
    for p in parts:
        near = p[:, :0]
        for q in parts:
            near = torch.cat([near, torch.cdist(p, q).topk(min(k + 1, len(q)), largest=False).values], dim=1)
        radii.append(near.kthvalue(k + 1, dim=1).values)
    return list(zip(parts, radii, strict=True))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fakes inside the real manifold, and of reals inside the fake one; manifold = balls to the k-th neighbour
    (Kynkäänniemi et al. 2019, eq. 1–2)."""
    _two_sets(real, fake, k + 1, "precision and recall")

    def covered(points: Tensor, balls: list[tuple[Tensor, Tensor]]) -> float:
        inside = [torch.stack([(torch.cdist(p, q) <= r).any(1) for q, r in balls]).any(0) for p in points.float().split(BLOCK)]
        return float(torch.cat(inside).float().mean())

    return covered(fake, _balls(real, k)), covered(real, _balls(fake, k))


class FID:
    """FID to uint8 images `real`, by torchmetrics on `feature` (2048: torch-fidelity's Inception). It keeps sums alone, so
    memory does not grow with N; under torchrun each rank adds its own images, and the distance is of all. `decode` makes RGB
    pictures of latents, real ones and others alike."""

    def __init__(
        self, real: Tensor, feature: int | nn.Module = 2048, decode: Callable[[Tensor], Tensor] = lambda images: images
    ):
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance

            self.metric = FrechetInceptionDistance(feature=feature, reset_real_features=False)
        except (ImportError, OSError, RuntimeError) as error:
            raise ValueError(NEEDS) from error
        self.metric.to(best_device())
        self.decode = decode
        rank, world = ranks.here()
        for part in real.split(100)[rank::world]:
            self._update(part, real=True)

    @staticmethod
    def protocol(n_reference: int) -> str:
        """Whose Inception, and to how many real images. Raises ValueError where it is missing."""
        try:
            versions = [f"{package} {metadata.version(package)}" for package in ("torch-fidelity", "torchmetrics")]
        except metadata.PackageNotFoundError as error:
            raise ValueError(NEEDS) from error
        return f"Inception's 2048 features in float32 by {' and '.join(versions)}, to {n_reference} images"

    def _update(self, images: Tensor, real: bool) -> None:
        if images.dtype != torch.uint8:
            raise ValueError("FID takes uint8 images; round them with cmlib.data.to_uint8")
        self.metric.update(self.decode(images).expand(-1, 3, -1, -1).to(self.metric.device), real=real)

    def add(self, images: Tensor) -> None:
        """Count uint8 images [B,C,H,W] among the fakes."""
        self._update(images, real=False)

    def distance(self) -> float:
        """The distance of the fakes added so far; the next `add` begins anew."""
        self.metric.orig_dtype = torch.float64  # which `update` sets to the features', and a rank may get no images
        found = float(self.metric.compute())
        self.metric.reset()
        return found


# ---- errors as functions of the noise level


@torch.no_grad()
def reconstruction_error(
    f: Network, images: Tensor, process: DDPM, per_image: int = 256, seed: int = 0, sigma_max: float = math.inf
) -> tuple[Tensor, Tensor]:
    """‖f(x_t, t) − x0‖₂ for `per_image` random chain indices of every uint8 image (the brief's step 5).

    Returns (n, distance), both [len(images)·per_image]. Levels above `sigma_max` are evaluated at `sigma_max`.
    """
    generator, device = torch.Generator().manual_seed(seed), device_of(f)
    x0, indices, distances = to_float(images).to(device), [], []
    for _ in range(per_image):
        n = torch.randint(process.T, (len(x0),), generator=generator)
        t = process.sigma(n).clamp(max=sigma_max).to(device)
        x_t = x0 + expand_like(t, x0) * torch.randn(x0.shape, generator=generator).to(device)
        distances.append((f(x_t, t) - x0).flatten(1).norm(dim=1).cpu())
        indices.append(n)
    return torch.cat(indices), torch.cat(distances)


@torch.no_grad()
def self_consistency_gap(
    f: Network, teacher: Teacher, noise: Tensor, steps: int = 40, sigma_max: float = math.inf
) -> tuple[Tensor, Tensor]:
    """RMS over pixels and paths of f(x_t, t) − x_end along the teacher's DDIM paths from `noise`, at σ <= `sigma_max`: σ, gap.

    At the path's end f is the identity, so this is f(x_t, t) against f at the other end of its own path: zero at every t
    for the exact consistency function (CM sec. 3).
    """
    path = teacher.sample(noise, steps, "ddim", path=True).to(device_of(f))
    sigmas = teacher.process.sigma(teacher.process.grid(steps).flip(0)).to(path.device)
    points = [(x, sigma) for x, sigma in zip(path, sigmas, strict=False) if sigma <= sigma_max]
    gaps = [mse(f(x, sigma.expand(len(x))), path[-1]).mean().sqrt() for x, sigma in points]
    return torch.stack([sigma for _, sigma in points]).cpu(), torch.stack(gaps).cpu()


@torch.no_grad()
def pair_error(f: Network, batch: dict[str, Tensor]) -> dict[str, float]:
    """MSE of f(x_t, t) against x̂_r, both in the chain's units, the identity map's, and skill = 1 − MSE/MSE_identity.

    The identity baseline is what makes the figure mean something: neighbours in a 1000-step chain hardly differ.
    """
    batch = {k: v.to(device_of(f)) for k, v in batch.items()}
    x_t, x_r = (batch[x] / expand_like((1 + batch[t] ** 2).sqrt(), batch[x]) for x, t in (("x_t", "t"), ("x_r", "r")))
    model, identity = float(mse(f(batch["x_t"], batch["t"]), x_r).mean()), float(mse(x_t, x_r).mean())
    return {"model": model, "identity": identity, "skill": 1 - model / identity}
