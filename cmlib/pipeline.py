"""The whole pipeline: teacher, pair cache, two students on it, and the comparison that says what each is worth."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cmlib import data, evaluate, plots, ranks
from cmlib.cache import PairCache
from cmlib.consistency import ConsistencyFunction, PlainFunction, sample
from cmlib.files import sha256
from cmlib.objectives import Denoising
from cmlib.ops import best_device, device_of, indexed_normal
from cmlib.process import DDPM
from cmlib.profiles import Profile
from cmlib.recipes import CACHED, recipe
from cmlib.teacher import Teacher
from cmlib.train import Batches, fit, plateaued
from cmlib.unet import UNet, balanced, classes, given

SAMPLING_SEED = 10_000  # sampling noise never coincides with a rollout's


def shipped(name: str) -> Path:
    """A file or folder that comes with the course: `data/` in a checkout, `cmlib/shipped/` in an installed wheel."""
    here = Path(__file__).resolve().parent
    return next((p for p in (here.parent / "data" / name, here / "shipped" / name) if p.exists()), Path(name))


def load_teacher(source: str, shape: tuple[int, ...] | None = None) -> Teacher:
    """A shipped teacher by name, else a folder or hub id; refused where its images are not of `shape`."""
    from diffusers.utils import logging

    logging.disable_progress_bar()  # two files are no wait
    teacher = Teacher.from_pretrained(shipped(source) if shipped(source).exists() else source, best_device())
    if shape is not None and shape != teacher.image_shape:
        raise ValueError(
            f"teacher {source!r} makes images {teacher.image_shape}, the data set's are {shape}; give another --teacher,"
            " or train one with `cmlib teacher train`"
        )
    return teacher


def shipped_student(dataset: str, teacher: Teacher) -> ConsistencyFunction | None:
    """The student of `teacher` that comes with the course, on its device; None where there is none of this teacher's."""
    weights = shipped(f"{dataset}_student.safetensors")
    its = weights.exists() and json.loads(weights.with_suffix(".json").read_text())["teacher"] == teacher.hash()
    return ConsistencyFunction.load(weights).to(teacher.device) if its else None


def turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images four ways up, and which: labels that every set has (Gidaris et al. 2018)."""
    return torch.cat([images.rot90(k, (2, 3)) for k in range(4)]), torch.arange(4).repeat_interleave(len(images))


@dataclass(frozen=True)
class Features:
    """A classifier and the reference images' features: what a Fréchet distance `fd_<dataset>` is measured with."""

    dataset: str
    classifier: evaluate.Classifier
    reference: Tensor  # [N,d]
    n_real: int
    protocol: dict[str, Any]

    @classmethod
    def of(
        cls, dataset: str, out: Path, images: Tensor, labels: Tensor | None, held_out: tuple[Tensor, Tensor | None]
    ) -> Features:
        """The shipped classifier of `dataset`, else one trained for a few minutes on its labels, or without labels on which way
        up an image is, and kept in `out`."""
        path = shipped(f"{dataset}_classifier.safetensors")
        if not path.exists():
            path = out / f"classifier-{data.fingerprint(images)}.safetensors"
        if not path.exists():
            known = (images, labels) if labels is not None else turned(images[:5_000])
            new = evaluate.Classifier(images.shape[1], images.shape[2], int(known[1].max()) + 1)
            trained, _ = fit(
                new,
                evaluate.Classification(known[1]),
                partial(data.batches, known[0], 64, 0),
                max(1, min(700, 5 * len(known[0]) // 64)),
                lr=2e-3,
                warmup=50,
                weight_decay=1e-2,
                ema=0.99,
                name="features",
            )
            trained.save(path)  # type: ignore[operator]
        classifier = evaluate.Classifier.load(path).to(best_device())
        checked = turned(held_out[0]) if labels is None else held_out
        right = float("nan") if checked[1] is None else evaluate.accuracy(classifier, checked[0], checked[1])
        protocol = {
            "protocol.reference": f"{dataset} train split, {len(images)} images",
            "protocol.reference_sha256": data.fingerprint(images),
            "protocol.features": f"{path.name}, sha256 {sha256(path)[:12]}, accuracy {right:.3f}"
            + (" at telling four ways up apart" if labels is None else ""),
            "protocol.rounding": "float [-1, 1] -> uint8, rounded",
            "protocol.weights": "EMA",
            "protocol.n_real": len(held_out[0]),
        }
        return cls(
            re.sub(r"[^A-Za-z0-9]+", "_", Path(dataset).name),
            classifier,
            evaluate.features(classifier, images),
            len(held_out[0]),
            protocol,
        )

    def distance(self, fakes: Tensor) -> float:
        """fd_<dataset> of uint8 images to the reference."""
        return evaluate.frechet_distance(self.reference, evaluate.features(self.classifier, fakes))

    def see(self, images: Tensor) -> Tensor:
        """The features of one batch: what `draw` is told to keep, so that memory does not grow by whole images."""
        return evaluate.seen(self.classifier, images)

    def compare(self, name: str, *sets: Tensor) -> dict[str, float]:
        """fd_<dataset>, KID, precision and recall of a set of images, or of features that `see` kept; and the distance of as
        many of them as there are held-out real images, which is what compares with `real`.

        Of several sets, a seed each: the means, and of the distance also `_spread`, half its range.
        """
        rows = []
        for fakes in sets:
            drawn = fakes if fakes.ndim == 2 else evaluate.features(self.classifier, fakes)
            precision, recall = evaluate.precision_recall(self.reference, drawn)
            row = {
                f"fd_{self.dataset}.{name}": evaluate.frechet_distance(self.reference, drawn),
                f"kid.{name}": evaluate.kernel_distance(self.reference, drawn),
                f"precision.{name}": precision,
                f"recall.{name}": recall,
            }
            if len(drawn) > self.n_real:
                row[f"fd_{self.dataset}.{name}_at_n_real"] = evaluate.frechet_distance(self.reference, drawn[: self.n_real])
            rows.append(row)
        fd = [row[f"fd_{self.dataset}.{name}"] for row in rows]
        spread = {f"fd_{self.dataset}.{name}_spread": (max(fd) - min(fd)) / 2} if len(fd) > 1 else {}
        return {key: statistics.mean(row[key] for row in rows) for key in rows[0]} | spread


# ---- teacher


@torch.no_grad()
def epsilon_error(process: DDPM, unet: Any, images: Tensor, labels: Tensor | None = None) -> float:
    """L_DDPM on uint8 images with noise and indices that never change, so that epochs compare; a small set serves for 1,000
    draws or more."""
    index = torch.arange(len(images)).repeat(-(-1_000 // len(images)))
    generator = torch.Generator().manual_seed(1)
    objective, losses = Denoising(process), []
    for part in index.split(500):
        with given(None if labels is None else labels[part]):
            x0 = data.to_float(images[part]).to(device_of(unet))
            losses.append(objective(unet, unet, {"x0": x0}, 0, generator)[0])
    return float(torch.cat(losses).mean())


def stream(profile: Profile, images: Tensor, labels: Tensor | None, seed: int, net: nn.Module) -> Batches:
    """Batches of the training images, with labels where `net` takes them; from the files of a set that memory does not hold."""
    if classes(net) and labels is None:
        raise ValueError(f"a class-conditional network needs labels, and data set {profile.dataset!r} has none")
    if profile.in_memory:
        return partial(data.stream, profile.dataset, profile.batch_size, seed)
    return partial(data.batches, images, profile.batch_size, seed, labels=labels if classes(net) else None)


def train_teacher(
    teacher: Teacher,
    images: Tensor,
    held_out: Tensor | tuple[Tensor, Tensor | None],
    updates: int,
    lr: float,
    batch_size: int,
    out: Path,
    seed: int = 0,
    resume: bool = True,
    schedule: str = "cosine",
    patience: int = 0,
    refresh: PairCache | None = None,
    batches: Batches | None = None,
    precision: str = "no",
    every: int | None = None,
) -> tuple[Teacher, list[dict[str, float]]]:
    """Train or fine-tune a DDPM: ε-MSE, warm-up over 1,000 steps (a quarter of a shorter run), EMA 0.999, held-out error
    after every epoch.

    `patience` epochs without progress end the run (0: never). With `refresh`, the cache's targets are recomputed by the
    EMA teacher after every epoch (the brief's step 3). `batches` are those of `images` unless given; `held_out` are images, or
    images and labels. Where `images` are but some of a streamed set, `every` says how many updates stand for an epoch.
    """
    shown = (held_out, None) if isinstance(held_out, Tensor) else held_out

    def on_epoch(step: int, average: Any) -> dict[str, float]:
        if refresh is not None:
            refresh.refresh(replace(teacher, unet=average))
        return {"held_out": epsilon_error(teacher.process, average, *shown)}

    def at_plateau(history: list[dict[str, float]]) -> bool:
        return patience > 0 and plateaued([row["held_out"] for row in history], patience)

    average, history = fit(
        teacher.unet.requires_grad_(True),
        Denoising(teacher.process),
        batches or partial(data.batches, images, batch_size, seed),
        updates,
        lr=lr,
        warmup=min(1_000, updates // 4),
        seed=seed,
        folder=out,
        resume=resume,
        schedule=schedule,
        provenance={"chain": teacher.process.name, "images": data.fingerprint(images), "batch_size": batch_size},
        every=every or max(1, len(images) // batch_size),
        on_every=on_epoch,
        stop=at_plateau,
        precision=precision,
        name="teacher",
    )
    return replace(teacher, unet=average).to(device_of(average)), history


# ---- students

Student = TypeVar("Student", bound=nn.Module)


def distill(
    objective: str,
    student: Student,
    profile: Profile,
    out: Path,
    seed: int = 0,
    updates: int | None = None,
    resume: bool = False,
    cache: PairCache | None = None,
    teacher: Teacher | None = None,
    images: Tensor | None = None,
    every: int | None = None,
    measure: Callable[[Any], dict[str, float]] | None = None,
    labels: Tensor | None = None,
) -> tuple[Student, list[dict[str, float]]]:
    """Train `student` by one of OBJECTIVES on a pair cache, or on uint8 `images`; consistency distillation takes either,
    and with images makes its pairs on the fly, by Heun steps of `teacher` between LEVELS levels evenly spaced in the
    chain's index. Every `every` updates (500, or a quarter of a short run) a sheet of samples is written, and
    `measure(average)` goes into the history."""
    unet = cast(UNet, student.net).config
    shape = (unet["out_channels"], unet["sample_size"], unet["sample_size"])
    if cache is not None:
        images = None
        batches: Batches = partial(cache.loader, profile.batch_size, seed)
        provenance: dict[str, Any] = {"cache": cache.key}
    elif teacher is not None and images is not None and not isinstance(student, PlainFunction):
        batches = stream(profile, images, labels, seed, student)
        provenance = {"teacher": teacher.hash(), "images": data.fingerprint(images)}
    else:
        raise ValueError(f"{objective} needs a pair cache; build one with `cmlib cache build`")
    cached = objective in CACHED
    if cache is not None and not cached:
        raise ValueError(f"{objective} trains on images, not on a pair cache; leave --cache out")
    if cache is not None and objective == "consistency-distillation" and cache.key["solver"] not in ("ddim", "heun"):
        raise ValueError(f"consistency distillation needs ODE steps; this cache's solver is {cache.key['solver']}")
    if objective == "endpoint-regression" and (cache is None or cache.key["source"] != "rollout"):
        raise ValueError("endpoint-regression needs a cache of source rollout, which keeps where each path ends")
    if objective == "sct" and classes(student):
        raise ValueError("sct's reference does not know classes; take ect for a class-conditional student")
    chosen, settings = recipe(objective, profile, updates, student, shape, teacher, images)
    settings["provenance"] = {**provenance, "batch_size": profile.batch_size}

    def on_every(step: int, average: Any) -> dict[str, float]:
        grid = data.to_float(data.pictures(profile.dataset, draw(average, 48, 1, shape, seed)))
        plots.save(plots.samples({f"{objective}, {step} updates, one evaluation": grid}), out / f"samples-{step:05d}.png")
        return {"contrast": float(grid.std())} | (measure(average) if measure else {})

    every = every or min(500, max(1, settings["steps"] // 4))
    common: dict[str, Any] = {"seed": seed, "folder": out, "resume": resume, "precision": profile.precision, "ema": 0.999}
    average, history = fit(
        student.requires_grad_(True), chosen, batches, name=objective, every=every, on_every=on_every, **settings, **common
    )
    return cast(Student, average.eval()), history


Keep = Callable[[Tensor], Tensor]  # what is kept of a batch of images: themselves, or a row of features each


def _themselves(images: Tensor) -> Tensor:
    return images


def draw(
    f: Any, n: int, evaluations: int, shape: tuple[int, ...], seed: int, batch: int = 500, keep: Keep = _themselves
) -> Tensor:
    """n uint8 images from f, or what `keep` makes of them; image i depends on (seed, i) alone, its class on i. Several ranks
    share the batches."""

    def part(index: Tensor) -> Tensor:
        noise = [indexed_normal(SAMPLING_SEED + seed, index, shape, k) for k in range(evaluations)]
        with balanced(f, index):
            return keep(data.to_uint8(sample(f, noise, f.levels(evaluations), f.sigma_min)).cpu())

    return ranks.dealt(torch.arange(n).split(batch), part)


def resampled(images: Tensor, n: int, seed: int) -> Tensor:
    """n of `images`, drawn with repetition: what a memoriser of the data would make."""
    return images[torch.randint(len(images), (n,), generator=torch.Generator().manual_seed(seed))]


def _step_noise(seed: int, index: Tensor, shape: tuple[int, ...], k: int) -> Tensor:
    return indexed_normal(seed, index, shape, 1 + k)


def draw_teacher(
    teacher: Teacher,
    n: int,
    steps: int,
    solver: str,
    shape: tuple[int, ...],
    seed: int,
    batch: int = 100,
    keep: Keep = _themselves,
) -> Tensor:
    """n uint8 images from the teacher, or what `keep` makes of them, from the same noise as `draw`. Several ranks share the
    batches."""
    quiet = None if ranks.is_first() else True
    with tqdm(desc=f"{n} images, {steps} {solver} steps", unit="batch", leave=False, disable=quiet) as bar:

        def part(index: Tensor) -> Tensor:
            noise = indexed_normal(SAMPLING_SEED + seed, index, shape)
            fresh = partial(_step_noise, SAMPLING_SEED + seed, index, shape) if solver == "ancestral" else None
            with balanced(teacher.unet, index):
                images = data.to_uint8(teacher.sample(noise, steps, solver, draw=fresh)).cpu()
            bar.update()
            return keep(images)

        return ranks.dealt(torch.arange(n).split(batch), part)
