"""Our ECT and iCT beside published code: one network, batch, start and optimiser; the loss differs, and
for iCT the scaling of the input, which is part of theirs.

    git clone https://github.com/locuslab/ect runs/peers/ect
    git clone https://github.com/Kinyugo/consistency_models runs/peers/kinyugo
    python -m benchmarks.peers           # about 20 minutes on one core; writes benchmarks/results/peers.json

Their code is imported from the clones and called as their own training loops call it; nothing of it is copied here. "ect"
starts from the teacher's weights, as published; "ict" from random ones, with their σ_d = 0.5, 1281 levels, no input scaling
and a Huber distance pixel by pixel. A step is loss, gradient and RAdam; steps of both are timed in turn, and the ratio is the
median of pairs.
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cmlib import data, pipeline
from cmlib.compare import spread
from cmlib.consistency import ConsistencyFunction, c_noise
from cmlib.objectives import ECT, ICT
from cmlib.process import EDM
from cmlib.profiles import CPU
from cmlib.recipes import first_student
from cmlib.train import fit
from cmlib.unet import UNet

UPDATES, BATCH, SEEDS, REPEATS = 500, 64, 2, 40
RESULTS = Path(__file__).parent / "results" / "peers.json"


class PublishedECT:
    """`training/loss.py` of locuslab/ect, its stages as in `training/ct_training_loop.py`."""

    mu = 0.0

    def __init__(self, folder: Path, steps: int, stages: int = 8):
        sys.path.insert(0, str(folder))
        if not torch.cuda.is_available():  # it keeps the dropout mask by CUDA's random state alone
            torch.cuda.get_rng_state, torch.cuda.set_rng_state = torch.get_rng_state, torch.set_rng_state
        self.loss = importlib.import_module("training.loss").ECMLoss()
        self.steps, self.stages = steps, stages

    def __call__(self, f: Any, target: Any, batch: dict, step: int, generator: Any) -> tuple[torch.Tensor, dict]:
        stage = min(step * self.stages // self.steps, self.stages - 1)
        if stage != self.loss.stage or step == 0:
            self.loss.update_schedule(stage)
        return self.loss(lambda x, t, labels, augment_labels: f(x, t.flatten()), batch["x0"]), {}


class Kinyugo:
    """`ImprovedConsistencyTraining` and `pseudo_huber_loss` of Kinyugo/consistency_models, as its iCT notebook calls them."""

    mu = 0.0

    def __init__(self, folder: Path, steps: int):
        sys.path.insert(0, str(folder))
        self.code = importlib.import_module("consistency_models.consistency_models")
        self.training, self.steps = self.code.ImprovedConsistencyTraining(), steps

    def __call__(self, f: Any, target: Any, batch: dict, step: int, generator: Any) -> tuple[torch.Tensor, dict]:
        found = self.training(lambda x, t: f.net(x, c_noise(t)), batch["x0"], step, self.steps)
        loss = self.code.pseudo_huber_loss(found.predicted, found.target) * found.loss_weights
        return loss.flatten(1).mean(1), {}


class KinyugoFunction(ConsistencyFunction):
    """Their f: the same boundary, and a network that sees x unscaled."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        wrapper = importlib.import_module("consistency_models.consistency_models").model_forward_wrapper
        return wrapper(lambda x, t: self.net(x, c_noise(t)), x, t, self.sigma_data, self.sigma_min)


def pairs(peers: Path, images: torch.Tensor) -> dict[str, dict[str, Any]]:
    """For each comparison, (start(seed), objective) of ours and theirs."""
    teacher = pipeline.load_teacher(CPU.teacher, tuple(images.shape[1:]))

    def from_teacher(seed: int) -> Any:
        return first_student("ect", teacher, 80.0)

    def from_nothing(seed: int, kind: Any = ConsistencyFunction) -> Any:
        torch.manual_seed(seed)
        return kind(UNet.from_config(teacher.unet.config), 0.002, 80.0, 0.5)

    return {
        "ect": {"ours": (from_teacher, ECT(UPDATES)), "published": (from_teacher, PublishedECT(peers / "ect", UPDATES))},
        "ict": {
            "ours": (from_nothing, ICT(UPDATES, EDM(0.002, 80.0))),
            "published": (partial(from_nothing, kind=KinyugoFunction), Kinyugo(peers / "kinyugo", UPDATES)),
        },
    }


def step_ratio(sides: dict[str, Any], x0: torch.Tensor) -> dict[str, float]:
    """Milliseconds a training step of each, and the quartiles of ours/published."""
    steps = {}
    for name, (start, objective) in sides.items():
        f = start(0).train().requires_grad_(True)
        optimizer = torch.optim.RAdam(f.parameters(), lr=1e-4)

        def step(f: Any = f, objective: Any = objective, optimizer: Any = optimizer) -> float:
            begin = time.perf_counter()
            objective(f, f, {"x0": x0}, UPDATES // 2, torch.Generator().manual_seed(0))[0].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - begin

        steps[name] = step
        step()
    timed = [{name: steps[name]() for name in sorted(steps, reverse=bool(k % 2))} for k in range(REPEATS)]
    low, middle, high = statistics.quantiles([t["ours"] / t["published"] for t in timed], n=4)
    found = {f"ms_{name}": 1000 * statistics.median(t[name] for t in timed) for name in steps}
    return {**found, "ratio": middle, "ratio_low": low, "ratio_high": high}


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "| loss | code | `fd_digits`, 1 evaluation | 2 evaluations | ms a step | ours / theirs |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results["losses"].items():
        speed = found["step"]
        for side in ("ours", "published"):
            fd = [spread([run[side][k] for run in found["runs"]]) for k in ("fd_1", "fd_2")]
            ratio = f"{speed['ratio']:.2f} ({speed['ratio_low']:.2f}–{speed['ratio_high']:.2f})" if side == "ours" else ""
            lines.append(f"| {name} | {side} | {' | '.join(fd)} | {speed['ms_' + side]:.0f} | {ratio} |")
    updates, batch, threads = (results[k] for k in ("updates", "batch", "threads"))
    note = f"{updates:,} updates of {batch} images, {results['seeds']} seeds, mean ± half the range; {threads} thread(s)."
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("runs/peers"), help="the folder with both clones")
    peers = parser.parse_args().peers
    for name in ("ect", "kinyugo"):
        if not (peers / name).is_dir():
            parser.error(f"no {peers / name}; clone it as the text above says")
    images, labels = data.load("digits")
    held_out = data.load("digits", "test")
    results: dict[str, Any] = {
        "updates": UPDATES,
        "batch": BATCH,
        "seeds": SEEDS,
        "threads": torch.get_num_threads(),
        "losses": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        features = pipeline.Features.of("digits", Path(folder), images, labels, held_out)
    results |= {"n": CPU.samples, "losses": {}}
    shape = tuple(images.shape[1:])
    for name, sides in pairs(peers, images).items():
        step = step_ratio(sides, data.to_float(images[:BATCH]))
        runs = []
        for seed in range(SEEDS):
            run = {}
            for side, (start, objective) in sides.items():
                stream = partial(data.batches, images, BATCH, seed)
                settings: dict[str, Any] = {"lr": 6e-4, "optimizer": "radam", "warmup": UPDATES // 20, "seed": seed}
                f, _ = fit(start(seed).requires_grad_(True), objective, stream, UPDATES, name=f"{name}, {side}", **settings)
                with torch.no_grad():
                    drawn = {k: pipeline.draw(f.eval(), CPU.samples, k, shape, seed) for k in (1, 2)}
                run[side] = {f"fd_{k}": features.distance(made) for k, made in drawn.items()}
            runs.append(run)
        results["losses"][name] = {"step": step, "runs": runs}
        print(markdown({**results, "losses": {name: results["losses"][name]}}), flush=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
