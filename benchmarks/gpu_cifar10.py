"""CIFAR-10 on one GPU, from nothing: a teacher, its pair cache, three students, and the distances of them all.

    python -m benchmarks.gpu_cifar10 pack --out runs/gpu      # where the data are: writes what must travel, about 15 MB
    python -m benchmarks.gpu_cifar10 run --data runs/gpu/cifar10.parquet --state /tmp/state --out results
    python -m benchmarks.gpu_cifar10 run --dry-run …          # every stage on a CPU, at sizes that mean nothing

`run` does as many stages as `--minutes` allow, and the same command goes on from there; in their last three minutes no stage
begins. The teacher trains for 8 minutes and each student for 3 (`--teacher-minutes`, `--student-minutes`; a state keeps those
that it began with, and refuses others), 17 in all. Compiling in every call, the cache, the distances and the latencies come on
top: ten minutes, at a guess, as this has never run on a GPU. A stage that fails is named in metrics.json, and the others go
on; where the compiler itself fails, TORCHDYNAMO_DISABLE=1 does without it.

`--state` holds the cache and the checkpoints. As long as it survives, a call that is killed costs what came after the last
checkpoint (one in half a minute), shard or distance; so it must not lie in a folder that is emptied or replaced between calls.
What is worth keeping is copied to `--out`: weights in float16, metrics.json, curves.json, samples.png. Put those into `--state`
on another machine, and no finished stage is repeated there; the cache, which distillation alone reads, is built again if
need be. That machine needs no network, and neither diffusers nor datasets: torch, accelerate, safetensors, pyarrow, pillow,
matplotlib, tqdm and filelock.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_parts import (
    DRY,
    Denoiser,
    Sizes,
    descend,
    distance_to,
    jump,
    kept,
    load_teacher,
    pack,
    providers,
    save_student,
    save_teacher,
    speed,
    table,
    unpack,
    walk,
)
from cmlib import data, export, formats, parity, plots
from cmlib.cache import PairCache
from cmlib.consistency import ConsistencyFunction
from cmlib.files import write_atomically, write_json
from cmlib.objectives import SCT, Denoising
from cmlib.ops import indexed_normal
from cmlib.pipeline import SAMPLING_SEED, resampled
from cmlib.process import DDPM
from cmlib.profiles import T4, small_unet
from cmlib.recipes import LEVELS, first_student, largest_sigma, recipe
from cmlib.train import fit
from cmlib.unet import UNet

Sampler = Callable[[list[Tensor]], Tensor]  # streams of noise -> images in [-1, 1]

SHAPE = (3, 32, 32)
STUDENTS = {"cd": "consistency-distillation", "ect": "ect", "sct": "sct"}
HALVES = ("ect", "sct")  # trained in fp16 with a loss scale: t − r goes down to t/256, and bf16 rounds at 2⁻⁹
EVALUATIONS = (1, 2, 4)
CHECKPOINT, LAST = 30, 180  # seconds between checkpoints; those at a call's end in which no stage begins, as it would compile


class TimeUp(Exception):
    """The minutes ended inside a stage that goes on from there."""


class Run:
    """The stages, and what they share."""

    def __init__(self, path: Path, state: Path, out: Path, minutes: float, sizes: Sizes):
        self.deadline = time.monotonic() + 60 * minutes
        self.stage, self.began = "", 0.0  # the one that runs, and when it would have begun had it run without a break
        self.state, self.out, self.sizes = state, out, sizes
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.compiler = "inductor" if self.device.type == "cuda" else "eager"
        for folder in (state, out):
            folder.mkdir(parents=True, exist_ok=True)
        self.images = unpack(path)
        self.pixels = self.images.to(self.device)
        self.metrics, self.curves = (kept(state / f"{name}.json") for name in ("metrics", "curves"))
        self.features, features = distance_to(self.images, self.device, untrained=sizes.updates > 0)
        fixed = {
            "protocol.sizes": repr(sizes),
            "protocol.reference": f"{len(self.images)} training images, fingerprint {data.fingerprint(self.images)}",
            "protocol.features": features,
        }
        for key, value in fixed.items():
            if self.metrics.get(key, value) != value:
                raise ValueError(f"{state} has another run: {key} was {self.metrics[key]}, is {value}; give another --state")
        self.metrics |= fixed | {
            "protocol.samples": sizes.samples,
            "protocol.noise_seed": SAMPLING_SEED,
            "protocol.rounding": "float [-1, 1] -> uint8, rounded",
            "protocol.weights": "EMA, rounded to float16",
            "protocol.sampling": "bf16 autocast, network compiled",
            "protocol.training": f"bf16 autocast; {' and '.join(HALVES)} fp16 autocast with a loss scale, on a CPU fp32",
            "protocol.teacher": f"fd.teacher: Heun, {sizes.steps} steps, {2 * sizes.steps - 1} evaluations; "
            "fd.teacher_k: DDIM from the students' σ_max, k equal steps of the chain's index",
            "protocol.flops": "torch.utils.flop_counter's of a forward pass, times 3, or 4 with a student's target",
            "protocol.gpu": torch.cuda.get_device_name() if self.device.type == "cuda" else "none",
            "protocol.torch": torch.__version__,
        }

    # ---- measuring

    @cached_property
    def noise(self) -> list[Tensor]:
        """`pipeline.draw`'s streams, for all samples and what fills up the last batch."""
        rows = range(-(-self.sizes.samples // self.sizes.batch) * self.sizes.batch)
        return [indexed_normal(SAMPLING_SEED, rows, SHAPE, k).to(self.device) for k in range(max(EVALUATIONS))]

    @torch.no_grad()
    def draw(self, sampler: Sampler, n: int) -> Tensor:
        """n uint8 images; every batch is as large as in training, so that nothing is compiled for another size."""
        made, size = [], self.sizes.batch
        with torch.autocast(self.device.type, torch.bfloat16):
            for i in range(0, n, size):
                made.append(data.to_uint8(sampler([z[i : i + size] for z in self.noise])).cpu())
        return torch.cat(made)[:n]

    def load(self, name: str) -> Any:
        """The teacher or a student as it was written, on the device and compiled."""
        path = self.state / f"{name}.safetensors"
        found: Any = load_teacher(path) if name == "teacher" else ConsistencyFunction.load(path)
        network = found.unet if name == "teacher" else found.net
        network.requires_grad_(False).to(self.device, memory_format=torch.channels_last).compile(backend=self.compiler)
        return found

    def samplers(self, name: str) -> dict[str, Sampler]:
        """The teacher at few evaluations and at its best, or a student at few."""
        f = self.load(name)
        few: Any = partial(descend if name == "teacher" else jump, f)
        found: dict[str, Sampler] = {f"{name}_{k}": partial(few, k) for k in EVALUATIONS}
        return found | ({"teacher": partial(walk, f, self.sizes.steps)} if name == "teacher" else {})

    def evaluated(self, name: str) -> bool:
        """Each sampler's distance, once, the training images' own beside the teacher's; False where this call ends before."""
        if name == "teacher":
            self.metrics["fd.training_images_drawn_again"] = self.features(resampled(self.images, self.sizes.samples, 0))
        for key, sampler in self.samplers(name).items():
            if f"fd.{key}" not in self.metrics:
                if self.late(LAST):
                    return False
                self.draw(sampler, self.sizes.batch)  # compiles
                began = time.monotonic()
                images = self.draw(sampler, self.sizes.samples)
                self.metrics[f"samples_per_second.{key}"] = round(len(images) / (time.monotonic() - began), 1)
                self.metrics[f"fd.{key}"] = self.features(images)
                self.keep()
        return True

    def keep(self) -> None:
        """Write the numbers, with the seconds of the stage that runs, and copy what is worth keeping."""
        if self.stage:
            self.metrics[f"seconds.{self.stage}"] = round(time.monotonic() - self.began, 1)
        write_json(self.state / "curves.json", self.curves)
        write_json(self.state / "metrics.json", self.metrics)
        for kind in ("safetensors", "json", "png"):
            for path in self.state.glob(f"*.{kind}"):
                write_atomically(self.out / path.name, lambda file, path=path: file.write(path.read_bytes()))

    # ---- training

    def late(self, seconds: float) -> bool:
        """Whether the minutes end before so many seconds have passed."""
        return time.monotonic() + seconds > self.deadline

    def in_time(self, *_: Any) -> None:
        """Before a forward pass: raises TimeUp where the minutes end."""
        if self.late(5):
            raise TimeUp

    def train(self, name: str, model: Any, make: Callable[[int], Any], batches: Any, watch: Any = None) -> bool:
        """Keep the EMA of `model` after as many updates as its minutes hold; False where this call ends before them."""
        passes, minutes, save = 4, self.sizes.student_minutes, save_student  # the backward pass counts two, a target's is one
        if name == "teacher":
            passes, minutes, save = 3, self.sizes.teacher_minutes, save_teacher
        precision = "fp16" if name in HALVES else "bf16"
        common: dict[str, Any] = {"precision": precision, "compiler": self.compiler, "name": name}
        model = model.to(self.device, memory_format=torch.channels_last)
        if f"{name}.updates" not in self.metrics:
            ticks: list[float] = []
            objective, settings = make(2 * self.sizes.probe)
            clock = lambda *_: ticks.append(time.monotonic())  # noqa: E731
            fit(copy.deepcopy(model), objective, batches, every=self.sizes.probe, on_every=clock, **settings, **common)
            pace = (ticks[1] - ticks[0]) / self.sizes.probe
            self.metrics[f"{name}.updates"] = updates = self.sizes.updates or max(1, int(60 * minutes / pace))
            self.metrics[f"{name}.every"] = max(1, min(int(CHECKPOINT / pace), updates // 4))
            self.keep()
        steps, every = self.metrics[f"{name}.updates"], self.metrics[f"{name}.every"]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copy.deepcopy(model.net)(torch.zeros(1, *SHAPE, device=self.device), torch.ones(1, device=self.device))

        def stop(history: list[dict[str, float]]) -> bool:  # after each checkpoint
            self.curves[name] = history
            self.keep()
            return self.late(CHECKPOINT + 5)

        objective, settings = make(steps)
        common |= {"folder": self.state / name, "resume": True, "every": every, "on_every": watch, "stop": stop}
        average, history = fit(model, objective, batches, **settings, **common)
        self.metrics |= speed(name, history, self.sizes.batch, passes * counter.get_total_flops(), self.metrics["protocol.gpu"])
        if done := history[-1]["step"] == steps:
            save(average, self.state / f"{name}.safetensors")
        return done

    def teacher(self) -> bool:
        """A DDPM with the linear chain, from nothing."""
        sizes = self.sizes
        config = small_unet(SHAPE, sizes.widths, 0.0, sizes.layers, attention=1) | {"norm_num_groups": sizes.groups}

        def make(steps: int) -> tuple[Any, dict[str, Any]]:
            return Denoising(DDPM.linear()), {"steps": steps, "lr": 1e-3, "warmup": min(500, steps // 4), "grad_clip": 1.0}

        torch.manual_seed(0)
        batches = partial(data.batches, self.pixels, self.sizes.batch, 0)
        return self.train("teacher", Denoiser(UNet(**config)), make, batches)

    def cache(self) -> PairCache:
        """Training images at a uniform level and one Heun step of the teacher from there; goes on where it stopped."""
        teacher = load_teacher(self.state / "teacher.safetensors").to(self.device)
        teacher.unet.register_forward_pre_hook(self.in_time)
        step: dict[str, Any] = {"solver": "heun", "delta": teacher.process.T // LEVELS}
        return PairCache.build(self.state / "cache", teacher, self.sizes.pairs, images=self.images, batch_size=500, **step)

    def student(self, name: str) -> bool:
        """One objective, from the teacher's weights; its distance at one evaluation is watched."""
        teacher = load_teacher(self.state / "teacher.safetensors").to(self.device)
        f = first_student(STUDENTS[name], teacher, largest_sigma(teacher))
        images = None if name == "cd" else self.images
        stream = self.cache().loader if images is None else partial(data.batches, self.pixels)

        def make(steps: int) -> tuple[Any, dict[str, Any]]:
            chosen, settings = recipe(STUDENTS[name], T4, steps, f, SHAPE, teacher, images)
            if isinstance(chosen, SCT):
                chosen = replace(chosen, reference=data.to_float(self.pixels))  # all of them, the source image among them
            return chosen, settings | {"provenance": {"teacher": teacher.hash()}}

        def watch(step: int, average: Any) -> dict[str, float]:
            average.net.compile(backend=self.compiler)
            return {"fd": self.features(self.draw(partial(jump, average, 1), self.sizes.few))}

        return self.train(name, f, make, partial(stream, self.sizes.batch, 0), watch)

    # ---- the rest

    def latency(self) -> bool:
        """One image in one evaluation, in each engine that is here."""
        f = ConsistencyFunction.load(self.state / "sct.safetensors").to(self.device)
        functions: dict[str, Any] = {name: formats.halved(f) for name in ("eager", "compiled")}
        functions["compiled"].compile(**{"mode": "reduce-overhead"} if self.device.type == "cuda" else {"backend": "eager"})
        functions = {name: export.Exported(g, self.device) for name, g in functions.items()}
        told = "from and to the CPU's memory; eager and compiled (on a GPU with CUDA graphs) in fp16"
        for format, precision in (("tensorrt", "fp16"), ("onnx", "fp32")):
            try:
                export.save(f.to("cpu" if format == "onnx" else self.device), self.state / format, format, precision)
                functions[format] = export.load(self.state / format)
                told += f"; {format} in {precision}" + (f" on {providers(functions[format])}" if format == "onnx" else "")
            except Exception as error:  # an engine that is not here, or fails, costs its own row alone
                told += f"; no {format} ({type(error).__name__}: {error})".splitlines()[0]
        self.metrics |= parity.latency(functions, f, (1,)) | {"protocol.latency": told}
        return True

    def sheet(self) -> bool:
        """The same noise through every sampler whose weights are here."""
        there = [name for name in ("teacher", *STUDENTS) if (self.state / f"{name}.safetensors").exists()]
        few, rows = min(48, self.sizes.samples), dict[str, Tensor]()
        for key, sampler in (pair for name in there for pair in self.samplers(name).items()):
            rows[key.replace("_", ", evaluations: ")] = data.to_float(self.draw(sampler, few))
        plots.save(plots.samples(rows), self.state / "samples.png")
        return len(there) == 1 + len(STUDENTS)

    def go(self) -> bool:
        """Every stage that is not done, until the minutes end; whether all are done."""
        stages: dict[str, Callable[[], Any]] = {"teacher": self.teacher, "cache": self.cache}
        stages["teacher_evaluated"] = partial(self.evaluated, "teacher")
        for name in STUDENTS:
            stages |= {name: partial(self.student, name), f"{name}_evaluated": partial(self.evaluated, name)}
        stages |= {"latency": self.latency, "sheet": self.sheet}
        for name, work in stages.items():
            if self.metrics.get(f"done.{name}"):
                continue
            if self.late(LAST):
                return False
            print(f"{name} …", flush=True)
            done, self.stage, self.began = False, name, time.monotonic() - self.metrics.get(f"seconds.{name}", 0)
            self.metrics.pop(f"error.{name}", None)
            try:
                with suppress(TimeUp):
                    done = bool(work())
            except Exception as raised:  # costs its own stage, and those that need what it makes
                if name == "teacher":
                    raise
                self.metrics[f"error.{name}"] = f"{type(raised).__name__}: {raised}"[:300]
                print(self.metrics[f"error.{name}"], flush=True)
            finally:  # what fails has taken its time, too
                self.metrics[f"done.{name}"] = int(done)
                if self.device.type == "cuda":
                    self.metrics[f"gpu_gb.{name}"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                    torch.cuda.reset_peak_memory_stats()
                self.keep()
            if not done and f"error.{name}" not in self.metrics:
                return False
        return not self.errors()

    def errors(self) -> list[str]:
        """The stages that failed, and have not been tried again."""
        return [key for key in self.metrics if key.startswith("error.")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pack").add_argument("--out", type=Path, required=True)
    p = commands.add_parser("run")
    for name in ("--data", "--state", "--out"):
        p.add_argument(name, type=Path, required=True)
    p.add_argument("--minutes", type=float, default=8)
    p.add_argument("--teacher-minutes", type=float, default=Sizes.teacher_minutes)
    p.add_argument("--student-minutes", type=float, default=Sizes.student_minutes)
    p.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    try:
        if args.command == "pack":
            path = pack(args.out)
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
            return 0
        torch._dynamo.config.recompile_limit = 64  # training, its target and sampling are graphs of one function
        minutes = {"teacher_minutes": args.teacher_minutes, "student_minutes": args.student_minutes}
        run = Run(args.data, args.state, args.out, args.minutes, replace(DRY if args.dry_run else Sizes(), **minutes))
        done = run.go()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    end = "all done" if done else f"{' and '.join(run.errors()) or 'time is up'}; the same command goes on"
    print(table(run.metrics, ("teacher", *STUDENTS), EVALUATIONS), end, sep="\n\n")
    return int(bool(run.errors()))


if __name__ == "__main__":
    sys.exit(main())
