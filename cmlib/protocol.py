"""Numbers that belong to a protocol: of several seeds, with their bias, and refused beside numbers of another protocol."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from cmlib import data, evaluate, plots, ranks
from cmlib.cache import PairCache
from cmlib.consistency import ConsistencyFunction
from cmlib.files import intact, write_atomically
from cmlib.pipeline import Features, Keep, draw, draw_teacher
from cmlib.profiles import Profile
from cmlib.teacher import Teacher
from cmlib.unet import given

Labelled = tuple[Tensor, Tensor | None]  # uint8 images, and labels where the set has some
Generator = Callable[[int, Keep], Tensor]  # (seed, what to keep of a batch) -> what was kept of n images
COMPARABLE = ("reference_sha256", "features", "rounding", "weights", "n")  # what two distances must have in common


def generators(f: ConsistencyFunction, teacher: Teacher, n: int) -> dict[str, Generator]:
    """The student at one and two evaluations, and the teacher at fifty."""

    def student(evaluations: int) -> Generator:
        return lambda seed, keep: draw(f, n, evaluations, f.image_shape, seed, keep=keep)

    def walk(seed: int, keep: Keep) -> Tensor:
        return draw_teacher(teacher, n, 50, "ddim", f.image_shape, seed, keep=keep)

    return {"student_1": student(1), "student_2": student(2), "teacher_ddim50": walk}


def measured(
    generators: Mapping[str, Generator], seeds: Sequence[int], features: Features, fid: evaluate.FID | None, key: Any, out: Path
) -> tuple[dict[str, float], Figure]:
    """Every distance of every generator over `seeds`, and the figure of the distances against N.

    Each batch of images becomes features, which are kept in `out/features` under a name that follows from `key` (what the
    generators are and how they are measured), so that a killed run goes on with the next seed; no image is kept.
    """
    found: dict[str, float] = {}
    lines = {}
    for name, generator in generators.items():
        drawn, fids = zip(*(_drawn(generator, name, seed, features, fid, key, out) for seed in seeds), strict=True)
        found |= features.compare(name, *drawn)
        found[f"fd_{features.dataset}.{name}_limit"] = statistics.mean(
            evaluate.frechet_limit(features.reference, v)[0] for v in drawn
        )
        lines[name] = evaluate.frechet_against_n(features.reference, drawn[0])
        if fid:
            found |= {f"fid.{name}": statistics.mean(fids), f"fid.{name}_spread": (max(fids) - min(fids)) / 2}
    title = "A distance falls with N: compare at equal N"
    return found, plots.curves(lines, "N, generated images", f"fd_{features.dataset}", title)


def _drawn(
    generator: Generator, name: str, seed: int, features: Features, fid: evaluate.FID | None, key: Any, out: Path
) -> tuple[Tensor, float]:
    """Features of one seed's images and their FID (NaN without), from `out/features` where they are there already."""
    digest = hashlib.sha256(json.dumps([key, features.protocol, fid is not None], sort_keys=True).encode()).hexdigest()
    path = out / "features" / f"{name}-seed{seed}-{digest[:12]}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if ranks.told(path.exists()):
        try:
            if not intact(path):
                raise ValueError("a checksum differs")
            kept = torch.load(path, weights_only=True)
            return kept["features"], kept["fid"]
        except Exception as error:  # torch.load raises many types on what is not its own
            raise ValueError(f"{path} is damaged; delete it and run the same command again") from error

    def keep(images: Tensor) -> Tensor:
        if fid:
            fid.add(images)
        return features.see(images)

    drawn = generator(seed, keep)
    found = fid.distance() if fid else float("nan")
    if ranks.is_first():
        write_atomically(path, lambda file: torch.save({"features": drawn.clone(), "fid": found}, file))
    return drawn, found


def validation(f: Any, cache: PairCache, teacher: Teacher, held_out: Tensor, out: Path) -> dict[str, float]:
    """`pair_error` on pairs that the training never saw: of held-out uint8 images, or of rollouts from other noise."""
    key = cache.key
    how = {name: key[name] for name in ("source", "solver", "delta", "steps", "batch_size") if name in key}
    pairs = -(-1_000 // key.get("steps", 1)) * key.get("steps", 1)
    how |= {"images": held_out if key["source"] == "data" else None, "shape": tuple(key["shape"]), "seed": key["seed"] + 1}
    batch = next(PairCache.build(out / f"validation-{key['teacher']}", teacher, pairs, **how).loader(pairs))
    with given(batch.get("label")):
        return evaluate.pair_error(f, batch)


def reconstruction(f: Any, held_out: Labelled, teacher: Teacher, per_image: int, seed: int) -> tuple[Tensor, Tensor]:
    """(n, ‖f(x_t, t) − x0‖) of the first 64 held-out images (`evaluate.reconstruction_error`)."""
    images, labels = held_out
    with given(labels if labels is None else labels[:64]):
        return evaluate.reconstruction_error(f, images[:64], teacher.process, per_image, seed, f.sigma_max)


def regression(f: Any, cache: PairCache, teacher: Teacher, profile: Profile, seed: int, out: Path) -> dict[str, Any]:
    """What the brief's own student reaches: its error on pairs beside the identity map's, the distance of its images in one
    evaluation, and its distance to x0 at random noise levels."""
    images, labels = data.load(profile.dataset, limit=profile.in_memory)
    held_out = data.load(profile.dataset, "test", limit=1_000)
    features, n = Features.of(profile.dataset, out, images, labels, held_out), min(profile.samples, len(images))
    error = validation(f, cache, teacher, held_out[0], out)
    seen = draw(f, n, 1, teacher.image_shape, seed, keep=features.see)
    return {
        "mse.regression": error["model"],
        "mse.identity": error["identity"],
        "mse.skill": error["skill"],
        f"fd_{features.dataset}.regression_1": evaluate.frechet_distance(features.reference, seen),
        "distance.regression": float(reconstruction(f, held_out, teacher, profile.timesteps, seed)[1].mean()),
        "protocol.n": n,
        **features.protocol,
    }


def comparable(other: Path, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of another `cmlib evaluate`. Raises ValueError where its protocol differs: a difference would say nothing."""
    try:
        theirs = json.loads(other.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {other} ({error}); give the metrics.json of another `cmlib evaluate`") from error
    names = [*COMPARABLE, *(["fid"] if "protocol.fid" in theirs and "protocol.fid" in protocol else [])]
    pairs = {key: (theirs.get(f"protocol.{key}"), protocol[f"protocol.{key}"]) for key in names}
    if differs := [f"{key} is {a!r} there, {b!r} here" for key, (a, b) in pairs.items() if a != b]:
        raise ValueError(f"{other} was measured by another protocol: {'; '.join(differs)}")
    return theirs


def beside(metrics: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The distances of two runs of one protocol as a table."""

    def cell(run: Mapping[str, Any], key: str) -> str:
        return f"{run[key]:.4g}" + (f" ± {run[f'{key}_spread']:.2g}" if f"{key}_spread" in run else "")

    both = [k for k in metrics if k in theirs and k.startswith(("fd_", "fid.", "kid.")) and not k.endswith("_spread")]
    rows = [f"{key:40} {cell(metrics, key):>18} {cell(theirs, key):>18}" for key in both]
    return "\n".join([f"{'':40} {'here':>18} {'there':>18}", *rows])
