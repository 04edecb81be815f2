"""`cmlib compare`: objectives side by side, from one start and under one budget of images, with the spread between seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from cmlib import __version__, data, evaluate, plots
from cmlib.cache import PairCache
from cmlib.files import write_json
from cmlib.ops import indexed_normal
from cmlib.pipeline import SAMPLING_SEED, Features, distill, draw, draw_teacher, resampled
from cmlib.profiles import Profile
from cmlib.recipes import OBJECTIVES, first_student, largest_sigma, recipe
from cmlib.teacher import Teacher
from cmlib.train import options
from cmlib.unet import UNet

POINTS = 8  # of the curve of a run
MEASURES = ("fd_1", "fd_2", "gap", "distance", "images", "evaluations", "seconds")


def evaluations(objective: Any, f: Any, teacher: Teacher, batch: dict[str, Tensor]) -> float:
    """Forward passes of student, target and teacher that one call of the objective makes, for each image of the batch."""
    passes = []

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        passes.append(len(output))

    hooks = [net.register_forward_hook(count) for net in (f.net, teacher.unet)]
    objective(f, f, batch, 0, torch.Generator().manual_seed(0))
    for hook in hooks:
        hook.remove()
    return sum(passes) / len(batch["t" if "t" in batch else "x0"])


@dataclass(frozen=True)
class Comparison:
    """What all objectives share: data, teacher, features, and `budget` images from the teacher's weights or from nothing."""

    profile: Profile
    teacher: Teacher
    images: Tensor
    held_out: Tensor
    features: Features
    budget: int
    from_nothing: bool = False

    @property
    def protocol(self) -> dict[str, Any]:
        """What a row must have in common with another to stand beside it."""
        profile = self.profile
        found = {"dataset": profile.dataset, "profile": profile.name, "n": profile.samples, "batch_size": profile.batch_size}
        start = "nothing" if self.from_nothing else "teacher"
        return {**found, "teacher": self.teacher.hash(), "budget": self.budget, "start": start, **self.features.protocol}

    def baselines(self, seed: int) -> dict[str, float]:
        """The teacher's fifty steps, and the training images drawn again."""
        n = self.profile.samples
        drawn = draw_teacher(self.teacher, n, 50, "ddim", self.teacher.image_shape, seed)
        sets = {"teacher_ddim50": drawn, "resampled": resampled(self.images, n, seed)}
        return {"seed": seed, **{name: self.features.distance(made) for name, made in sets.items()}}

    def start(self, objective: str, seed: int) -> Any:
        """The student before training."""
        teacher = self.teacher
        if self.from_nothing:
            torch.manual_seed(seed)
            teacher = replace(teacher, unet=UNet.from_config(cast(UNet, teacher.unet).config).to(teacher.device))
        return first_student(objective, teacher, largest_sigma(teacher))

    def row(self, objective: str, seed: int, out: Path) -> dict[str, Any]:
        """Train by `objective` and measure what came of it; what `out` already holds is reused if it was made the same way."""
        profile, teacher, shape = self.profile, self.teacher, self.teacher.image_shape
        updates, cache, spent = self.budget // profile.batch_size, None, 0.0
        student, images = self.start(objective, seed), None if objective == "endpoint-regression" else self.images
        chosen, settings = recipe(objective, profile, updates, student, shape, teacher, images)
        told = {"protocol": self.protocol, "recipe": f"{options(chosen)}, {settings}"}
        begun, kept = out / "told.json", out / "row.json"
        if not begun.exists() or json.loads(begun.read_text()) != told:
            for made_otherwise in (kept, out / "checkpoint.pt"):
                made_otherwise.unlink(missing_ok=True)
            out.mkdir(parents=True, exist_ok=True)
            write_json(begun, told)
        if kept.exists():
            return json.loads(kept.read_text())
        batch = {"x0": data.to_float(self.images[:4]).to(teacher.device)}
        if objective == "endpoint-regression":
            pairs, steps = self.budget // profile.rollout_steps * profile.rollout_steps, profile.rollout_steps
            how: dict[str, Any] = {"source": "rollout", "solver": "ddim", "steps": steps, "shape": shape, "batch_size": 500}
            cache = PairCache.build(out.parent / "cache", teacher, pairs, **how)
            spent, batch = float(pairs), {k: v.to(teacher.device) for k, v in next(cache.loader(4, seed)).items()}
        spent += self.budget * evaluations(chosen, student.to(teacher.device), teacher, batch)

        def measure(f: Any) -> dict[str, float]:
            return {f"fd_{k}": self.features.distance(draw(f, profile.samples, k, shape, seed)) for k in (1, 2)}

        every: dict[str, Any] = {"every": -(-updates // POINTS), "measure": measure, "resume": True}
        f, history = distill(
            objective, student, profile, out, seed, updates, cache=cache, teacher=teacher, images=images, **every
        )
        noise = indexed_normal(SAMPLING_SEED + seed, range(64), shape, 7)
        gap = evaluate.self_consistency_gap(f, teacher, noise, profile.rollout_steps, f.sigma_max)[1]
        error = evaluate.reconstruction_error(f, self.held_out[:64], teacher.process, profile.timesteps, seed, f.sigma_max)[1]
        row = {
            "objective": objective,
            "seed": seed,
            "fd_1": history[-1]["fd_1"],
            "fd_2": history[-1]["fd_2"],
            "gap": float(gap.mean()),
            "distance": float(error.mean()),
            "images": updates * profile.batch_size,
            "evaluations": spent,
            "seconds": history[-1]["seconds"],
            "curve": [[row["step"] * profile.batch_size, row["fd_1"]] for row in history],
            "recipe": told["recipe"],
            "made_with": {"cmlib": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()},
        }
        write_json(kept, row)
        return row


def run(
    objectives: Sequence[str],
    seeds: Sequence[int],
    budget: int,
    from_nothing: bool,
    profile: Profile,
    teacher: Teacher,
    out: Path,
) -> dict[str, Any]:
    """Every objective under every seed: {"protocol", "baselines", "rows"}. Finished rows are kept in `out`, so the same
    call goes on where it was stopped."""
    unknown = set(objectives) - set(OBJECTIVES[1:])  # pair regression jumps from noise to noise
    if unknown:
        raise ValueError(f"cannot compare {', '.join(sorted(unknown))}; choose among {', '.join(OBJECTIVES[1:])}")
    if budget < POINTS * profile.batch_size:
        raise ValueError(f"a budget of {budget} images is less than {POINTS} batches of {profile.batch_size}")
    images, labels = data.load(profile.dataset)
    held_out = data.load(profile.dataset, "test")
    features = Features.of(profile.dataset, out, images, labels, held_out)
    profile = replace(profile, samples=min(profile.samples, len(images)))
    comparison = Comparison(profile, teacher, images, held_out[0], features, budget, from_nothing)
    rows, baselines = [], []
    for seed in seeds:
        baselines.append(comparison.baselines(seed))
        for objective in objectives:
            row = comparison.row(objective, seed, out / f"{objective}-{seed}")
            rows.append(row)
            print(f"{objective}, seed {seed}: fd {row['fd_1']:.1f} at 1 evaluation, {row['fd_2']:.1f} at 2", flush=True)
    return {"protocol": comparison.protocol, "baselines": baselines, "rows": rows}


def spread(values: Sequence[float], digits: int = 1) -> str:
    """mean ± half the range; one value stands alone."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def markdown(found: dict[str, Any]) -> str:
    """The table as Markdown, baselines above, best objective first."""
    protocol, fd = found["protocol"], "fd_" + found["protocol"]["dataset"]
    head = ["objective", f"`{fd}`, 1 evaluation", "2 evaluations", "self-consistency gap", "distance to x0"]
    lines = ["| " + " | ".join([*head, "forward passes, millions", "seconds"]) + " |", "|---" * (len(head) + 2) + "|"]
    for name, key in (("training images drawn again", "resampled"), ("teacher, DDIM-50", "teacher_ddim50")):
        lines.append(f"| *{name}* | {spread([b[key] for b in found['baselines']])} | | | | | |")
    for name, rows in by_objective(found).items():
        cells = [spread([r[k] for r in rows], d) for k, d in (("fd_1", 1), ("fd_2", 1), ("gap", 3), ("distance", 2))]
        cost = [f"{rows[0]['evaluations'] / 1e6:.2f}", spread([r["seconds"] for r in rows], 0)]
        lines.append(f"| {name} | {' | '.join(cells + cost)} |")
    start = "the teacher's weights" if protocol["start"] == "teacher" else "random weights"
    n = f"{len(found['baselines'])} seed(s), mean ± half the range"
    return "\n".join([*lines, "", f"{n}; {protocol['budget']:,} images from {start}; N={protocol['n']}."])


def by_objective(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each objective, the smallest mean distance at one evaluation first."""
    names = dict.fromkeys(row["objective"] for row in found["rows"])
    groups = {name: [r for r in found["rows"] if r["objective"] == name] for name in names}
    return dict(sorted(groups.items(), key=lambda item: statistics.mean(r["fd_1"] for r in item[1])))


def figure(found: dict[str, Any]) -> Figure:
    """Distance at one evaluation against images seen, a panel an objective."""
    groups = by_objective(found)
    curves = {n: [(torch.tensor(r["curve"])[:, 0], torch.tensor(r["curve"])[:, 1]) for r in g] for n, g in groups.items()}
    teacher = statistics.mean(b["teacher_ddim50"] for b in found["baselines"])
    name = f"fd_{found['protocol']['dataset']}, 1 evaluation"
    return plots.small_multiples(curves, teacher, "teacher, DDIM-50", "images seen", name, "Best first; grey: all the others")
