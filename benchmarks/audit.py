"""The brief's promises, one a row, beside what was measured, on what, and the baseline that gives it meaning.

    python -m benchmarks.audit                  # measures what is missing, about an hour on one core, and prints the table
    python -m benchmarks.audit precision        # measures that row again
    python -m benchmarks.audit --readme         # writes the table into README.md

Rows are kept in results/audit.json; "within ±2", the teacher's distance and the demo's seconds come from
demo_seeds.json.
"""

import argparse
import json
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmlib import data, evaluate, export, parity, pipeline, sizing
from cmlib.cache import PairCache
from cmlib.compare import spread
from cmlib.consistency import ConsistencyFunction, PlainFunction
from cmlib.files import write_atomically, write_json
from cmlib.objectives import BootstrapRegression, ConsistencyDistillation, PairRegression
from cmlib.ops import indexed_normal, mse
from cmlib.profiles import CPU, T4
from cmlib.recipes import first_student, largest_sigma, recipe
from cmlib.teacher import Teacher
from cmlib.train import fit
from cmlib.unet import UNet

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "audit.json"
TABLE = re.compile(r"(?<=<!-- audit: written by benchmarks/audit.py -->\n).*?(?=<!-- end of audit -->)", re.S)
UPDATES, DRIFT_UPDATES, POINTS = 500, 10_000, 10


def digits() -> tuple[Teacher, torch.Tensor, pipeline.Features]:
    images, labels = data.load("digits")
    features = pipeline.Features.of("digits", Path(), images, labels, data.load("digits", "test"))
    return pipeline.load_teacher("digits_teacher"), images, features


def shipped_student() -> ConsistencyFunction:
    return ConsistencyFunction.load(pipeline.shipped("digits_student.safetensors"))


@torch.no_grad()
def distance(features: pipeline.Features, f: Any, evaluations: int = 1, seed: int = 0) -> float:
    return features.distance(pipeline.draw(f.eval(), CPU.samples, evaluations, (1, 8, 8), seed))


# ---- one function a row


def regression() -> dict[str, float]:
    """The recipe's step 4 to the letter: δ = 1, uniform timesteps, the posterior mean as the target; a tenth of its updates."""
    teacher, images, features = digits()
    f = first_student("pair-regression", teacher, float(teacher.process.sigma(torch.tensor(999))))
    assert isinstance(f, PlainFunction)
    with tempfile.TemporaryDirectory() as folder:
        cache = PairCache.build(folder, teacher, 20_000, "data", images=images, solver="posterior_mean", delta=1)
        held_out = next(
            PairCache.build(f"{folder}/test", teacher, 1_000, "data", images=data.load("digits", "test")[0]).loader(1_000)
        )
        f, _ = fit(f, PairRegression(), partial(cache.loader, 64, 0), UPDATES, lr=2e-4, name="regression")
    error = evaluate.pair_error(f, held_out)
    noise = indexed_normal(pipeline.SAMPLING_SEED, range(CPU.samples), (1, 8, 8))
    t = teacher.process.sigma(torch.full((CPU.samples,), 999))
    with torch.no_grad():
        jump = f((1 + t**2).sqrt().view(-1, 1, 1, 1) * noise, t)
    return {
        **error,
        "fd": features.distance(data.to_uint8(jump)),
        "fd_noise": features.distance(data.to_uint8(noise)),
        "correlation": float(torch.corrcoef(torch.stack([jump.flatten(), noise.flatten()]))[0, 1]),
    }


def spacing() -> dict[str, float]:
    """Consistency distillation from the teacher's weights between neighbours of 18 levels, of 100, and of the chain, δ = 1."""
    teacher, images, features = digits()
    found = {}
    for n in (18, 100, None):
        f = first_student("consistency-distillation", teacher, largest_sigma(teacher))
        objective, settings = recipe("consistency-distillation", CPU, UPDATES, f, (1, 8, 8), teacher, images)
        last = float(teacher.process.index(torch.tensor(f.sigma_max)))
        levels = teacher.process.sigma(torch.linspace(0, last, n or int(last) + 1))
        objective = ConsistencyDistillation(teacher, levels, distance=objective.distance, mu=objective.mu)
        stream = partial(data.batches, images, 64, 0)
        average, _ = fit(f.requires_grad_(True), objective, stream, name=f"{len(levels)} levels", **settings)
        found[f"fd_{n or 'chain'}"] = distance(features, average)
    return {**found, "chain": len(levels)}


def bootstrap() -> dict[str, float]:
    """‖f(x_t, t) − f(x_{t−1}, t−1)‖² a pixel on held-out digits: distilled, learned from its own outputs, the identity map."""
    teacher, images, features = digits()
    own = first_student("bootstrap", teacher, largest_sigma(teacher)).requires_grad_(True)
    stream, settings = partial(data.batches, images, 64, 0), {"lr": 2e-4, "grad_clip": 1.0, "name": "bootstrap"}
    own, _ = fit(own, BootstrapRegression(teacher.process), stream, UPDATES, **settings)
    x0, generator = data.to_float(data.load("digits", "test")[0]), torch.Generator().manual_seed(0)
    top = int(teacher.process.index(torch.tensor(largest_sigma(teacher))))
    n = torch.randint(1, top, (len(x0),), generator=generator)
    t, r = teacher.process.sigma(n), teacher.process.sigma(n - 1)
    x_t = x0 + t.view(-1, 1, 1, 1) * torch.randn(x0.shape, generator=generator)
    x_r = teacher.ode_step(x_t, t, r)
    found = {}
    with torch.no_grad():
        for name, f in {"distilled": shipped_student(), "bootstrapped": own.eval()}.items():
            found |= {f"mse_{name}": float(mse(f(x_t, t), f(x_r, r)).mean()), f"fd_{name}": distance(features, f)}
    scale = (1 + t**2).sqrt().view(-1, 1, 1, 1)  # the identity map in the chain's units, where noise has variance 1
    return {**found, "mse_identity": float(mse(x_t / scale, x_r / scale).mean()), "mse_constant": 0.0}


def precision() -> dict[str, float]:
    """The shipped student in ONNX Runtime at fp16 and int8: reconstruction error over eager's, difference, and latency."""
    images, held_out = data.load("digits", limit=256)[0], data.load("digits", "test", limit=64)[0]
    found: dict[str, Any] = {}
    for kind in ("fp32", "fp16", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            f = shipped_student()
            export.save(f, Path(folder), "onnx", kind, images if kind == "int8" else None)
            report = parity.measure(f, export.load(Path(folder)), held_out)
        found |= {f"ratio_{kind}": report["reconstruction.ratio"], f"relative_{kind}": report["parity.relative"]}
        found[f"ms_{kind}"] = report["latency_ms.export.batch_1.p95"]
    return {**found, "ms_eager": report["latency_ms.eager.batch_1.p95"], "threads": torch.get_num_threads()}


def halved() -> dict[str, float]:
    """Rollouts of 1000, 500 and 50 DDIM steps from the same noise: RMS difference of their ends, beside that of two noises."""
    teacher = digits()[0]
    noise = indexed_normal(pipeline.SAMPLING_SEED, range(200), (1, 8, 8))
    ends, seconds = {}, {}
    for steps in (1000, 500, 50):
        begin = time.perf_counter()
        ends[steps] = teacher.sample(noise, steps)
        seconds[steps] = time.perf_counter() - begin

    def rms(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).pow(2).mean().sqrt())

    found = {f"rms_{steps}": rms(ends[steps], ends[1000]) for steps in (500, 50)}
    return {**found, "rms_other": rms(ends[1000], ends[1000].roll(1, 0)), "speedup": seconds[1000] / seconds[500]}


def budget() -> dict[str, float]:
    """The recipe's arithmetic on the real architecture: floating-point operations of each stage."""
    forward = sizing.forward_flops(T4)
    work = {
        "cache": T4.pairs,
        "student": 3 * T4.regression_updates * T4.batch_size,
        "finetune": 3 * T4.teacher_updates * T4.batch_size + 50 * T4.pairs,  # 50 epochs, the cache refreshed after each
    }
    return {"gflop": forward / 1e9} | {
        f"minutes_{name}": n * forward / sizing.PEAK["T4, fp16"] / 60 for name, n in work.items()
    }


def drift() -> dict[str, list[float]]:
    """The self-consistency gap of SCT from random weights, no teacher in the loss, along 10,000 updates of 16 digits."""
    teacher, images, features = digits()
    f = first_student("sct", teacher, largest_sigma(teacher))
    torch.manual_seed(0)
    f = ConsistencyFunction(UNet.from_config(f.net.config), 0.0, f.sigma_max, f.sigma_data, f.rho).requires_grad_(True)
    objective, settings = recipe("sct", CPU, DRIFT_UPDATES, f, (1, 8, 8), teacher, images)
    noise = indexed_normal(pipeline.SAMPLING_SEED, range(64), (1, 8, 8), 7)

    def measure(step: int, average: Any) -> dict[str, float]:
        gap = evaluate.self_consistency_gap(average.eval(), teacher, noise, 30, f.sigma_max)[1]
        return {"gap": float(gap.mean()), "fd": distance(features, average)}

    stream = partial(data.batches, images, 16, 0)
    kept = {"folder": ROOT / "runs" / "audit" / "drift", "resume": True}
    _, history = fit(f, objective, stream, every=DRIFT_UPDATES // POINTS, on_every=measure, name="drift", **settings, **kept)
    return {key: [row[key] for row in history] for key in ("gap", "fd")}


MEASURED = {f.__name__: f for f in (regression, spacing, bootstrap, precision, halved, budget, drift)}


# ---- the table


def rows(found: dict[str, Any], seeds: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(promise, measured, on what, beside it) of each row that has been measured, "not measured yet" for the rest."""

    def of(name: str, text: Any) -> str:
        return text(found[name]) if name in found else "not measured yet"

    teacher, student = (np.array([run[f"fd_digits.{key}"] for run in seeds]) for key in ("teacher_ddim50", "student_1"))
    again = spread([run["fd_digits.resampled"] for run in seeds])
    seconds = spread([run["seconds.total"] for run in seeds], 0)
    regression_updates = f"digits, {UPDATES} of the recipe's {T4.regression_updates:,} updates of 64"
    return [
        (
            "validation MSE below 0.01",
            of("regression", lambda m: f"{m['model']:.2g}"),
            f"{regression_updates}, δ = 1",
            of("regression", lambda m: f"identity map: {m['identity']:.2g}, so skill {m['skill']:.2f}"),
        ),
        (
            "that regression samples in one evaluation",
            of(
                "regression",
                lambda m: f"`fd_digits` {m['fd']:.0f}; the answer correlates {m['correlation']:.2f} with its noise",
            ),
            f"{regression_updates}, δ = 1",
            of("regression", lambda m: f"noise itself: {m['fd_noise']:.0f}; teacher: {spread(list(teacher))}"),
        ),
        (
            "FID within ±2 of the teacher's in one evaluation",
            f"`fd_digits` {spread(list(student - teacher))} above (not FID), by endpoint regression and CD",
            f"digits, {len(seeds)} seeds, N = {seeds[0]['protocol.n']}",
            f"teacher: {spread(list(teacher))}; training images drawn again: {again}",
        ),
        (
            "rollouts and student in 40 minutes on a T4",
            of(
                "budget",
                lambda m: (
                    f"at a T4's peak at least {m['minutes_cache'] + m['minutes_student']:.1f} minutes; on a T4 not measured yet"
                ),
            ),
            "counted: fp16 at 65 TFLOP/s, google/ddpm-cifar10-32's U-Net, "
            + of("budget", lambda m: f"{m['gflop']:.1f} GFLOP an image"),
            f"digits: {seconds} s on two cores",
        ),
        (
            "… with 50 epochs of fine-tuning before, the cache refreshed after each",
            of("budget", lambda m: f"at a T4's peak at least {m['minutes_finetune']:.0f} minutes more"),
            "counted",
            of("budget", lambda m: f"rollouts and student: {m['minutes_cache'] + m['minutes_student']:.1f}"),
        ),
        (
            "δ = 1 suffices",
            of("spacing", lambda m: f"`fd_digits` {m['fd_chain']:.0f} after {UPDATES} updates of CD"),
            "digits, from the teacher's weights",
            of(
                "spacing",
                lambda m: f"18 levels: {m['fd_18']:.0f}; 100: {m['fd_100']:.0f}; δ = 1: the chain's {m['chain']} up to σ = 20",
            ),
        ),
        (
            "a bootstrap's MSE within 0.02 of CD's",
            of(
                "bootstrap",
                lambda m: (
                    f"{abs(m['mse_bootstrapped'] - m['mse_distilled']):.1g} apart,"
                    f" yet `fd_digits` {m['fd_bootstrapped']:.0f} against {m['fd_distilled']:.1f}"
                ),
            ),
            f"digits, {UPDATES} updates of 64 against the shipped student, neighbours in the chain",
            of("bootstrap", lambda m: f"identity map: {m['mse_identity']:.1g}; a constant answer: 0"),
        ),
        (
            "halved rollouts (500 steps) lose nothing to see",
            of("halved", lambda m: f"ends move by {m['rms_500']:.4f} RMS, in {1 / m['speedup']:.2f} of the time"),
            "digits, DDIM, 200 noises",
            of("halved", lambda m: f"50 steps: {m['rms_50']:.4f}; another noise: {m['rms_other']:.2f}"),
        ),
        (
            "FP16's reconstruction error within 5 %",
            of("precision", lambda m: f"{100 * (m['ratio_fp16'] - 1):+.2f} %, ‖Δ‖/‖f‖ at most {m['relative_fp16']:.2g}"),
            "digits, ONNX Runtime on a CPU; TensorRT not measured yet",
            of("precision", lambda m: f"INT8: {100 * (m['ratio_int8'] - 1):+.2f} %, yet ‖Δ‖/‖f‖ {m['relative_int8']:.2g}"),
        ),
        (
            "under 5 ms an inference on an A10",
            of("precision", lambda m: f"p95 {m['ms_fp32']:.2f} ms at batch 1; on an A10 not measured yet"),
            of("precision", lambda m: f"digits, ONNX Runtime, {m['threads']} CPU thread(s)"),
            of("precision", lambda m: f"eager PyTorch: {m['ms_eager']:.2f} ms"),
        ),
        (
            "CT stable without a teacher over 10,000 updates",
            of(
                "drift",
                lambda m: f"gap {m['gap'][0]:.3f} after 1,000, {min(m['gap']):.3f} at best, {m['gap'][-1]:.3f} at the end",
            ),
            "digits, SCT from random weights, batches of 16; faces at 64×64 not measured yet",
            of("drift", lambda m: f"`fd_digits` {m['fd'][0]:.0f}, {min(m['fd']):.0f}, {m['fd'][-1]:.0f}"),
        ),
    ]


def markdown(found: dict[str, Any], seeds: list[dict[str, Any]]) -> str:
    lines = ["| the brief promises | measured | on | beside it |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows(found, seeds))])


def results() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    seeds = json.loads(RESULTS.with_name("demo_seeds.json").read_text())
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}, seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"measure these again: {', '.join(MEASURED)}")
    parser.add_argument("--readme", action="store_true", help="measure nothing, write the table into README.md")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(MEASURED):
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(MEASURED)}")
    found, seeds = results()
    for name, measure in MEASURED.items():
        if not args.readme and (name in args.rows or (not args.rows and name not in found)):
            found[name] = measure()
            write_json(RESULTS, found)
    table = markdown(found, seeds)
    if args.readme:
        path = ROOT / "README.md"
        text = TABLE.sub(lambda _: table + "\n", path.read_text(encoding="utf-8"))
        write_atomically(path, lambda file: file.write(text.encode()))
    print(table)


if __name__ == "__main__":
    main()
