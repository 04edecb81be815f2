"""`cmlib demo`: teacher -> pair cache -> students -> one table that sets each beside its baselines."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmlib import data, evaluate, plots, report
from cmlib.cache import PairCache
from cmlib.consistency import ConsistencyFunction, PlainFunction
from cmlib.ops import expand_like, indexed_normal, seed_everything
from cmlib.pipeline import (
    SAMPLING_SEED,
    Features,
    distill,
    draw,
    draw_teacher,
    load_teacher,
    resampled,
    shipped_student,
    train_teacher,
)
from cmlib.process import DDPM
from cmlib.profiles import Profile, small_unet
from cmlib.recipes import first_student
from cmlib.teacher import Teacher
from cmlib.unet import UNet

JUMP_SIGMAS = (0.3, 1.0, 3.0, 10.0, 80.0)
WALK_STEPS = 50


class Clock:
    """Seconds since the last lap, by name; says each."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[f"seconds.{name}"] = round(now - self.last, 1)
        print(f"{name}: {now - self.last:.0f} s", flush=True)
        self.last = now

    def total(self) -> float:
        return round(time.monotonic() - self.start, 1)


def run(profile: Profile, out: Path, seed: int = 0, full: bool = False, from_nothing: bool = False) -> dict[str, Any]:
    """Run the pipeline on `profile`'s data set, write students, figures and `report.html` into `out`, return the metrics.

    Interrupted, the same call goes on where it stopped; repeated, it reuses the cache and the trained students.
    """
    seed_everything(seed)
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    images, labels = data.load(profile.dataset)
    held_out, held_out_labels = data.load(profile.dataset, "test")
    shape = tuple(images.shape[1:])
    if from_nothing:
        start = Teacher(UNet(**small_unet(shape, profile.widths, dropout=0.1)), DDPM.linear())
        sizes = profile.teacher_updates, profile.teacher_lr, profile.batch_size
        teacher, _ = train_teacher(start, images, held_out, *sizes, out / "teacher", seed)
        teacher.save_pretrained(out / "teacher" / "pipeline")
    else:
        teacher = load_teacher(profile.teacher, shape)
    clock.lap("teacher")

    how: dict[str, Any] = {"source": "rollout", "solver": "ddim", "steps": profile.rollout_steps, "shape": shape}
    cache = PairCache.build(out / "cache", teacher, profile.pairs, **how, seed=seed, batch_size=500)
    fresh = PairCache.build(out / "held-out-pairs", teacher, 20 * profile.rollout_steps, **how, seed=seed + 1, batch_size=500)
    clock.lap("cache")

    sigma_max = float(teacher.process.sigma(teacher.process.grid(profile.rollout_steps)[-1:]))

    def train(objective: str, start: Any, **pairs: Any) -> Any:
        student, history = distill(objective, start, profile, out / objective, seed, resume=True, **pairs)
        clock.laps[f"seconds.{objective}"] = history[-1]["seconds"]
        return student

    regression = train("pair-regression", first_student("pair-regression", teacher, sigma_max), cache=cache)
    endpoint = train("endpoint-regression", first_student("endpoint-regression", teacher, sigma_max), cache=cache)
    student = train("consistency-distillation", endpoint, teacher=teacher, images=images)
    student.save(out / "student.pt")
    student.save(out / "student.safetensors")
    clock.lap("students")

    features = Features.of(profile.dataset, out, images, labels, (held_out, held_out_labels))
    sets = draw_sets(profile, teacher, regression, student, images, held_out, seed, full)
    metrics = {"protocol.n": min(profile.samples, len(images)), "protocol.teacher": teacher.hash(), **features.protocol}
    for key, drawn in sets.items():
        metrics |= features.compare(key, drawn)
    batch = next(fresh.loader(len(fresh)))
    error = evaluate.pair_error(regression, batch)
    metrics |= {"mse.regression": error["model"], "mse.regression_skill": error["skill"], "mse.identity": error["identity"]}
    metrics |= one_step_identity(teacher, held_out, seed)
    figures = draw_figures(profile, teacher, regression, student, held_out, sets, metrics, seed)
    clock.lap("evaluation")
    metrics |= clock.laps
    metrics |= {"updates.regression": profile.regression_updates, "updates.endpoint": profile.endpoint_updates}
    metrics |= {"updates.distillation": profile.distill_updates, **peak_memory_mb()}
    metrics |= {"seconds.total": clock.total(), "profile.minutes": profile.minutes}
    for name, (figure, _) in figures.items():
        plots.save(figure, out / f"{name}.png")
    report.write(out, profile, metrics, {name: text for name, (_, text) in figures.items()})
    return metrics


def draw_sets(
    profile: Profile,
    teacher: Teacher,
    regression: PlainFunction,
    student: ConsistencyFunction,
    images: Tensor,
    held_out: Tensor,
    seed: int,
    full: bool,
) -> dict[str, Tensor]:
    """uint8 images of every generator and of its baselines, n each."""
    n, shape = min(profile.samples, len(images)), student.image_shape
    sets = {"real": held_out, "resampled": resampled(images, n, seed)}
    sets[f"teacher_ddim{WALK_STEPS}"] = draw_teacher(teacher, n, WALK_STEPS, "ddim", shape, seed)
    if full:
        sets["teacher_ddim200"] = draw_teacher(teacher, n, 200, "ddim", shape, seed)
        sets["teacher_ddpm1000"] = draw_teacher(teacher, n, 1000, "ancestral", shape, seed)
    sets["identity_1"] = data.to_uint8(student.sigma_max * indexed_normal(SAMPLING_SEED + seed, range(n), shape))
    sets["regression_1"] = draw(regression, n, 1, shape, seed)
    sets |= {f"student_{k}": draw(student, n, k, shape, seed) for k in (1, 2)}
    if longer := shipped_student(profile.dataset, teacher):
        sets |= {f"shipped_student_{k}": draw(longer, n, k, shape, seed) for k in (1, 2)}
    return sets


@torch.no_grad()
def one_step_identity(teacher: Teacher, held_out: Tensor, seed: int) -> dict[str, float]:
    """What the identity map scores against x̂_{t−1} at δ = 1, the brief's own pairs: its bar of 0.01 beside nothing."""
    x0 = data.to_float(held_out)
    generator = torch.Generator().manual_seed(seed)
    n = torch.randint(teacher.process.T, (len(x0),), generator=generator)
    x_t = teacher.process.perturb(x0, torch.randn(x0.shape, generator=generator), n).to(teacher.device)
    noise, n = torch.randn(x0.shape, generator=generator).to(teacher.device), n.to(teacher.device)
    return {
        f"mse.identity_delta1_{solver}": float((teacher.step(x_t, n, n - 1, solver, noise) - x_t).pow(2).mean())
        for solver in ("posterior_mean", "ancestral")
    }


@torch.no_grad()
def draw_figures(
    profile: Profile,
    teacher: Teacher,
    regression: PlainFunction,
    student: ConsistencyFunction,
    held_out: Tensor,
    sets: dict[str, Tensor],
    metrics: dict[str, Any],
    seed: int,
) -> dict[str, tuple[Any, str]]:
    """Name -> (figure, description for those who cannot see it)."""
    shape = tuple(held_out.shape[1:])
    sigmas = [s for s in JUMP_SIGMAS if s <= student.sigma_max]
    x0 = data.to_float(held_out[seed % len(held_out)][None])
    eps = indexed_normal(SAMPLING_SEED + seed, [0], shape)
    t = torch.tensor(sigmas)
    x_t = x0 + expand_like(t, x0) * eps
    device = teacher.device
    with torch.no_grad():
        rows = {
            "noisy": x_t / expand_like((1 + t**2).sqrt(), x_t),
            "one jump\n(student, 1 evaluation)": student(x_t.to(device), t.to(device)),
            f"teacher's walk\n({WALK_STEPS} evaluations)": torch.cat(
                [teacher.walk(x[None].to(device), s, WALK_STEPS) for x, s in zip(x_t, sigmas, strict=True)]
            ),
            "brief's regression\n(1 evaluation)": regression(x_t.to(device), t.to(device)),
        }
    error, gap = {}, {}
    noise = indexed_normal(SAMPLING_SEED + seed, range(64), shape, 7)
    for label, f in (("student", student), ("brief's regression", regression), ("identity map", lambda x, t: x)):
        n, distance = evaluate.reconstruction_error(
            f, held_out[:64], teacher.process, profile.timesteps, seed, student.sigma_max
        )
        error[label] = plots.binned(teacher.process.sigma(n).clamp(max=student.sigma_max), distance)
        gap[label] = evaluate.self_consistency_gap(f, teacher, noise, profile.rollout_steps)
        if label != "identity map":
            key = "student" if label == "student" else "regression"
            metrics |= {f"distance.{key}": float(distance.mean()), f"gap.{key}": float(gap[label][1].mean())}
    names = {k: report.label(k) for k in sets}
    name, n_real = f"fd_{profile.dataset}", metrics["protocol.n_real"]
    fd = {names[k]: metrics.get(f"{name}.{k}_at_n_real", metrics[f"{name}.{k}"]) for k in sets}
    panels = {names[k]: data.to_float(v) for k, v in sets.items() if k != "resampled"}
    return {
        "samples": (plots.samples(panels), "Samples of the real data, the teacher, the baselines and the students."),
        "jump": (plots.jump(sigmas, rows), "One image at five noise levels: noisy, one jump, the teacher's walk, regression."),
        "distances": (
            plots.bars(fd, f"{name} at N={n_real}, lower is better", "Distance to the training images"),
            "Bar chart of the Fréchet distance of every generator to the training images; the table has the numbers.",
        ),
        "reconstruction": (
            plots.curves(error, "noise level σ", "‖f(x_t, t) − x0‖", "Distance to the clean image", log_y=True),
            "Distance of one jump to the clean image as a function of the noise level.",
        ),
        "gap": (
            plots.curves(
                gap, "noise level σ", "RMS of f(x_t, t) − x_end", "Self-consistency gap along the teacher's paths", log_y=True
            ),
            "Self-consistency gap as a function of the noise level.",
        ),
    }


def peak_memory_mb() -> dict[str, float]:
    """Largest resident size of this process so far, in MiB, where the system says it; and of its tensors on a GPU."""
    try:
        import resource
    except ImportError:
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"memory.peak_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)}
    return found | ({"memory.gpu_peak_mb": torch.cuda.max_memory_allocated() / 2**20} if torch.cuda.is_available() else {})
