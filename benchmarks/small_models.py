"""A teacher and a one-step student of 32×32 images, small enough for a laptop: trained, measured, shipped.

    python -m benchmarks.small_models fashion_mnist    # an hour and a half on one core; resumes
    python -m benchmarks.small_models cifar10

The demo's steps at profile `laptop`: a DDPM, rollouts of Heun steps, regression onto their ends, consistency distillation.
Writes data/NAME_teacher/, data/NAME_student.safetensors, their provenance, benchmarks/results/small_NAME.json, and a picture.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo_seeds import RESULTS
from cmlib import data, pipeline, plots, protocol
from cmlib.cache import PairCache
from cmlib.consistency import ConsistencyFunction
from cmlib.files import sha256, write_json
from cmlib.process import DDPM
from cmlib.profiles import LAPTOP, small_unet
from cmlib.recipes import first_student
from cmlib.teacher import Teacher
from cmlib.unet import UNet

ROOT = Path(__file__).resolve().parent.parent
SEEDS = range(2)


def train(name: str, images: torch.Tensor, out: Path) -> tuple[Teacher, ConsistencyFunction, dict[str, float]]:
    """Teacher, student, and the minutes that each stage took. Killed, the same call goes on."""
    held_out = data.load(name, "test", limit=500)[0]
    profile, shape = replace(LAPTOP, dataset=name, precision="bf16"), tuple(images.shape[1:])
    torch.manual_seed(0)
    start = Teacher(UNet(**small_unet(shape, profile.widths, 0.0, profile.layers, profile.attention)), DDPM.linear())
    sizes = profile.teacher_updates, profile.teacher_lr, profile.batch_size
    teacher, history = pipeline.train_teacher(start, images, held_out, *sizes, out / "teacher", precision=profile.precision)
    minutes = {"teacher": history[-1]["seconds"] / 60}
    teacher.unet.eval().requires_grad_(False)

    how: dict[str, Any] = {"source": "rollout", "solver": profile.solver, "steps": profile.rollout_steps, "shape": shape}
    cache = PairCache.build(out / "cache", teacher, profile.pairs, **how, batch_size=100)
    top = teacher.process.sigma(teacher.process.grid(profile.rollout_steps)[-1:])  # where the rollouts start
    student: Any = first_student("endpoint-regression", teacher, float(top))
    for objective, pairs in (
        ("endpoint-regression", {"cache": cache}),
        ("consistency-distillation", {"teacher": teacher, "images": images}),
    ):
        student, history = pipeline.distill(objective, student, profile, out / objective, resume=True, **pairs)
        minutes[objective] = history[-1]["seconds"] / 60
    return teacher, student, {k: round(v, 1) for k, v in minutes.items()}


def measure(
    name: str, images: torch.Tensor, labels: torch.Tensor | None, teacher: Teacher, student: ConsistencyFunction, out: Path
) -> dict[str, Any]:
    """Distances over the seeds beside their floor, what an image takes, and sheets of samples."""
    features = pipeline.Features.of(name, out, images, labels, data.load(name, "test"))
    n = LAPTOP.samples

    def again(seed: int, keep: Any) -> torch.Tensor:
        return keep(pipeline.resampled(images, n, seed))

    made = {"training_images": again, **protocol.generators(student, teacher, n)}
    key = [teacher.hash(), sha256(ROOT / "data" / f"{name}_student.safetensors"), n]
    found, _ = protocol.measured(made, SEEDS, features, None, key, out)
    ways = {
        "teacher_ddim50": ("teacher, DDIM-50", lambda: pipeline.draw_teacher(teacher, 48, 50, "ddim", student.image_shape, 0)),
        "student_1": ("student, 1 evaluation", lambda: pipeline.draw(student, 48, 1, student.image_shape, 0)),
        "student_2": ("student, 2 evaluations", lambda: pipeline.draw(student, 48, 2, student.image_shape, 0)),
    }
    sheets = {"training images": images[:48]}
    for generator, (label, draw) in ways.items():
        draw()  # untimed
        began = time.monotonic()
        sheets[label] = draw()
        found[f"ms_an_image.{generator}"] = 1000 * (time.monotonic() - began) / 48
    plots.save(plots.samples({k: data.to_float(v) for k, v in sheets.items()}), RESULTS.parent / f"small_{name}.png")
    return {**found, **features.protocol, "protocol.n": n, "protocol.seeds": len(SEEDS)}


def markdown(name: str, found: dict[str, Any]) -> str:
    """The distances as a table, and what a batch of 48 takes."""
    fd = f"fd_{name}"
    lines = [f"| generator | evaluations | `{fd}` | precision | recall | ms an image |", "|---|---|---|---|---|---|"]
    rows = {
        "training_images": ("training images drawn again", ""),
        "teacher_ddim50": ("teacher, DDIM-50", 50),
        "student_1": ("student", 1),
        "student_2": ("student", 2),
    }
    for key, (label, evaluations) in rows.items():
        distance = f"{found[f'{fd}.{key}']:.1f} ± {found[f'{fd}.{key}_spread']:.1f}"
        quality = " | ".join(f"{found[f'{metric}.{key}']:.2f}" for metric in ("precision", "recall"))
        ms = f"{found[f'ms_an_image.{key}']:.1f}" if evaluations else ""
        lines.append(f"| {label} | {evaluations} | {distance} | {quality} | {ms} |")
    minutes = ", ".join(f"{stage} {m:.0f}" for stage, m in found["protocol.minutes"].items())
    n = f"N = {found['protocol.n']}, {found['protocol.seeds']} seeds, mean ± half the range"
    shared = f"{found['protocol.threads']} thread(s) of a shared machine"
    return "\n".join([*lines, "", f"{n}; {shared}. Minutes of training, without the rollouts: {minutes}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["fashion_mnist", "cifar10"])
    name = parser.parse_args().dataset
    out, command = ROOT / "runs" / f"small_{name}", f"python -m benchmarks.small_models {name}"
    images, labels = data.load(name)
    teacher, student, minutes = train(name, images, out)
    threads = torch.get_num_threads()
    folder, weights = ROOT / "data" / f"{name}_teacher", ROOT / "data" / f"{name}_student.safetensors"
    teacher.save_pretrained(folder)
    student.save(weights)
    common = {"command": command, "images": f"{len(images)} of the train split; fingerprint {data.fingerprint(images)}"}
    common |= {
        "minutes_of_training": minutes,
        "threads": threads,
        "batch_size": LAPTOP.batch_size,
        "precision": "bf16",
        "seed": 0,
        "licence": "Apache-2.0",
    }
    told = {"what": f"DDPM of {name}, ε-prediction, linear schedule, T = 1000", "updates": LAPTOP.teacher_updates}
    write_json(folder / "provenance.json", {**told, "hash": teacher.hash(), **common})
    sizes = {key: getattr(LAPTOP, key) for key in ("solver", "rollout_steps", "pairs", "endpoint_updates", "distill_updates")}
    told = {"what": f"consistency model of {name}, distilled from {name}_teacher", "teacher": teacher.hash(), **sizes}
    write_json(weights.with_suffix(".json"), {**told, "sha256": sha256(weights), **common})
    found = measure(name, images, labels, teacher, student, out) | {"protocol.minutes": minutes, "protocol.threads": threads}
    write_json(RESULTS.parent / f"small_{name}.json", found)
    print(markdown(name, found))


if __name__ == "__main__":
    main()
