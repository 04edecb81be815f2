"""A teacher and a one-step student of 32×32 images, small enough for a laptop: trained, measured, shipped.

    python -m benchmarks.small_models fashion_mnist    # an hour and a half on one core; resumes
    python -m benchmarks.small_models cifar10

The demo's steps at profile `laptop`: a DDPM, rollouts of Heun steps, regression onto their ends, consistency distillation.
Writes data/NAME_teacher/, data/NAME_student.safetensors, their provenance, benchmarks/results/small_NAME.json, and a picture.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo_seeds import RESULTS
from cmlib import data, pipeline, plots, protocol
from cmlib.consistency import ConsistencyFunction
from cmlib.files import sha256, write_json
from cmlib.objectives import SCT
from cmlib.process import DDPM
from cmlib.profiles import LAPTOP, small_unet
from cmlib.recipes import first_student, largest_sigma
from cmlib.teacher import Teacher
from cmlib.train import fit
from cmlib.unet import UNet

ROOT = Path(__file__).resolve().parent.parent
SEEDS = range(3)
UPDATES, STAGES, BATCH = 4_500, 6, LAPTOP.batch_size
LAW = (0.0, 1.6)  # mean and standard deviation of ln t: more of the noise that one evaluation starts from than in the paper
PRECISION = "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "no"  # emulated, it is ten times slower


def train(
    name: str, images: torch.Tensor, teacher: Teacher | None, out: Path
) -> tuple[Teacher, ConsistencyFunction, dict[str, float]]:
    """Teacher, unless one is given, and student, and the minutes that each took. Killed, the same call goes on."""
    torch.manual_seed(0)
    minutes = {}
    if teacher is None:
        net = small_unet(tuple(images.shape[1:]), LAPTOP.widths, 0.0, LAPTOP.layers, LAPTOP.attention)
        held_out = data.load(name, "test", limit=500)[0]
        sizes = LAPTOP.teacher_updates, LAPTOP.teacher_lr, BATCH
        start = Teacher(UNet(**net), DDPM.linear())
        teacher, history = pipeline.train_teacher(start, images, held_out, *sizes, out / "teacher", precision=PRECISION)
        minutes["teacher"] = history[-1]["seconds"] / 60
    teacher.unet.eval().requires_grad_(False)
    settings: dict[str, Any] = {"lr": 1e-3, "optimizer": "radam", "warmup": UPDATES // 20, "precision": PRECISION}
    settings |= {"provenance": {"teacher": teacher.hash(), "images": data.fingerprint(images), "batch_size": BATCH}}
    student, history = fit(
        first_student("sct", teacher, largest_sigma(teacher)).requires_grad_(True),
        SCT(UPDATES, STAGES, law=LAW),
        partial(data.batches, images, BATCH, 0),
        UPDATES,
        folder=out / "student",
        resume=True,
        every=250,
        name="SCT",
        **settings,
    )
    minutes["SCT"] = history[-1]["seconds"] / 60
    return teacher, student.eval(), {k: round(v, 1) for k, v in minutes.items()}


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
    parser.add_argument("--teacher", help="a trained one, such as data/cifar10_teacher; else one is trained first")
    args = parser.parse_args()
    name = args.dataset
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
