"""SCT from the teacher's weights, with no teacher call in its loss, for ten minutes: how near it comes to the teacher.

    python -m benchmarks.ten_minutes    # on two quiet cores; writes benchmarks/results/ten_minutes.json

The recipe of `cmlib distill --objective sct` but for the number of stages, and for the law of noise levels, ln t ~ N(0, 1.6²)
in place of the paper's N(−1.1, 2²); both were chosen by trial. How many updates ten minutes hold is measured first.
Distances stand beside the teacher's DDIM-50 over the same three seeds of noise.
"""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cmlib import data, pipeline
from cmlib.compare import spread
from cmlib.files import write_json
from cmlib.profiles import CPU
from cmlib.recipes import first_student, largest_sigma, recipe
from cmlib.train import fit

RESULTS = Path(__file__).parent / "results" / "ten_minutes.json"
SECONDS, STAGES, BATCH, SEEDS, PROBE = 600, 6, 64, 3, 60
LAW = (0.0, 1.6)  # mean and standard deviation of ln t


def markdown(found: dict[str, Any]) -> str:
    """One row a generator."""
    lines = ["| generator | evaluations | `fd_digits` | ÷ DDIM-50 |", "|---|---|---|---|"]
    rows = (("teacher, DDIM-50", 50, "teacher_ddim50"), ("SCT", 1, "sct_1"), ("SCT", 2, "sct_2"))
    for label, evaluations, key in rows:
        ratio = [a / b for a, b in zip(found[key], found["teacher_ddim50"], strict=True)]
        lines.append(f"| {label} | {evaluations} | {spread(found[key])} | {spread(ratio, 2)} |")
    took = f"{found['updates']:,} updates of {BATCH} in {found['seconds'] / 60:.1f} minutes on {found['threads']} thread(s)"
    return "\n".join([*lines, "", f"{took}; one training, {SEEDS} seeds of noise, mean ± half the range; N={CPU.samples}."])


def main() -> None:
    images, labels = data.load("digits")
    features = pipeline.Features.of("digits", Path(), images, labels, data.load("digits", "test"))
    teacher = pipeline.load_teacher(CPU.teacher)
    stream = partial(data.batches, images, BATCH, 0)

    def trained(updates: int) -> tuple[Any, float]:
        f = first_student("sct", teacher, largest_sigma(teacher)).requires_grad_(True)
        objective, settings = recipe("sct", CPU, updates, f, teacher.image_shape, teacher, images)
        began = time.monotonic()
        f, _ = fit(f, replace(objective, stages=STAGES, law=LAW), stream, name="SCT", **settings)
        return f.eval(), time.monotonic() - began

    trained(PROBE // 4)
    updates = int(SECONDS / trained(PROBE)[1] * PROBE)
    f, seconds = trained(updates)
    found: dict[str, Any] = {"updates": updates, "seconds": seconds, "threads": torch.get_num_threads(), "stages": STAGES}
    drawn = {"sct_1": partial(pipeline.draw, f, CPU.samples, 1), "sct_2": partial(pipeline.draw, f, CPU.samples, 2)}
    drawn["teacher_ddim50"] = partial(pipeline.draw_teacher, teacher, CPU.samples, 50, "ddim")
    with torch.no_grad():
        for name, way in drawn.items():
            found[name] = [features.distance(way(teacher.image_shape, seed)) for seed in range(SEEDS)]
    write_json(RESULTS, found)
    print(markdown(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
