"""A teacher and a one-step student of 32×32 images, small enough for a laptop: trained, measured, shipped.

    python -m benchmarks.small_models fashion_mnist    # three hours on one core; resumes
    python -m benchmarks.small_models cifar10 --keep-teacher

A DDPM at profile `laptop`, and SCT from its weights at `ten_minutes`'s noise levels and stages. Writes data/NAME_teacher/,
data/NAME_student.safetensors, their provenance, benchmarks/results/small_NAME.json, and a picture.
"""

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo_seeds import RESULTS
from benchmarks.ten_minutes import LAW, STAGES
from cmlib import data, pipeline, plots, protocol
from cmlib.consistency import ConsistencyFunction
from cmlib.files import sha256, write_json
from cmlib.process import DDPM
from cmlib.profiles import LAPTOP, small_unet
from cmlib.recipes import first_student, largest_sigma, recipe
from cmlib.teacher import Teacher
from cmlib.train import fit
from cmlib.unet import UNet

ROOT = Path(__file__).resolve().parent.parent
SEEDS = range(2)
UPDATES, BATCH = 4_500, LAPTOP.batch_size
FAST = getattr(torch.cpu, "get_capabilities", dict)()
PRECISION = "bf16" if FAST.get("avx512_bf16") else "no"  # emulated, it is ten times slower


def train_teacher(name: str, images: torch.Tensor, out: Path) -> tuple[Teacher, float]:
    """A DDPM from nothing, and the minutes it took. Killed, the same call goes on."""
    torch.manual_seed(0)
    net = UNet(**small_unet(tuple(images.shape[1:]), LAPTOP.widths, 0.0, LAPTOP.layers, LAPTOP.attention))
    held_out, start = data.load(name, "test", limit=500)[0], Teacher(net, DDPM.linear())
    sizes = LAPTOP.teacher_updates, LAPTOP.teacher_lr, BATCH
    teacher, history = pipeline.train_teacher(start, images, held_out, *sizes, out / "teacher", precision=PRECISION)
    teacher.unet.eval().requires_grad_(False)
    return teacher, round(history[-1]["seconds"] / 60, 1)


def train_student(teacher: Teacher, images: torch.Tensor, out: Path) -> tuple[ConsistencyFunction, float]:
    """SCT from the teacher's weights, and the minutes it took. Killed, the same call goes on."""
    first = first_student("sct", teacher, largest_sigma(teacher)).requires_grad_(True)
    objective, settings = recipe("sct", LAPTOP, UPDATES, first, teacher.image_shape, teacher, images)
    student, history = fit(
        first,
        replace(objective, stages=STAGES, law=LAW),
        partial(data.batches, images, BATCH, 0),
        **settings,
        folder=out / "student",
        resume=True,
        every=250,
        precision=PRECISION,
        provenance={"teacher": teacher.hash(), "images": data.fingerprint(images), "batch_size": BATCH},
        name="SCT",
    )
    return student.eval(), round(history[-1]["seconds"] / 60, 1)


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
    found["protocol.threads"] = torch.get_num_threads()
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
    n = f"N = {found['protocol.n']}, {found['protocol.seeds']} seeds, mean ± half the range"
    ms = f"ms: batches of 48, {found['protocol.threads']} thread(s)"
    return "\n".join([*lines, "", f"{n}; {ms}. Training: {found['protocol.training']}. All on shared machines."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["fashion_mnist", "cifar10"])
    parser.add_argument("--keep-teacher", action="store_true", help="take the one in data/ as it is, and train a student alone")
    args = parser.parse_args()
    name = args.dataset
    out, command = ROOT / "runs" / f"small_{name}", f"python -m benchmarks.small_models {name}"
    folder, weights = ROOT / "data" / f"{name}_teacher", ROOT / "data" / f"{name}_student.safetensors"
    images, labels = data.load(name)
    common = {"images": f"{len(images)} of the train split; fingerprint {data.fingerprint(images)}", "batch_size": BATCH}
    common |= {"precision": PRECISION, "threads": torch.get_num_threads(), "seed": 0, "licence": "Apache-2.0"}

    if args.keep_teacher:
        teacher = pipeline.load_teacher(str(folder))
    else:
        teacher, minutes = train_teacher(name, images, out)
        teacher.save_pretrained(folder)
        told = {"what": f"DDPM of {name}, ε-prediction, linear schedule, T = 1000", "updates": LAPTOP.teacher_updates}
        write_json(
            folder / "provenance.json", {**told, "hash": teacher.hash(), "command": command, "minutes": minutes, **common}
        )

    student, minutes = train_student(teacher, images, out)
    student.save(weights)
    told = {"what": f"consistency model of {name}, by SCT from the weights of {name}_teacher", "teacher": teacher.hash()}
    told |= {"command": command + " --keep-teacher" * args.keep_teacher, "sha256": sha256(weights), "minutes": minutes}
    sizes = {"updates": UPDATES, "stages": STAGES, "law": LAW, "reference": "batch"}
    write_json(weights.with_suffix(".json"), {**told, **sizes, **common})
    found = measure(name, images, labels, teacher, student, out)
    its = json.loads((folder / "provenance.json").read_text())
    rows, bits = {"teacher": its, "student": {"minutes": minutes, **common}}, {"no": "fp32", "bf16": "bf16"}
    found["protocol.training"] = ", ".join(
        f"{who} {t['minutes']:.0f} minutes ({bits[t['precision']]}, {t['threads']} thread(s))" for who, t in rows.items()
    )
    write_json(RESULTS.parent / f"small_{name}.json", found)
    print(markdown(name, found))


if __name__ == "__main__":
    main()
