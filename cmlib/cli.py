"""`cmlib …`: every command takes --profile, --dataset, --seed, --out, writes metrics.json and exits 2 on bad input."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from cmlib import __version__, commands, ranks
from cmlib.demo import peak_memory_mb
from cmlib.export import FORMATS
from cmlib.files import write_json
from cmlib.ops import seed_everything
from cmlib.pipeline import shipped
from cmlib.profiles import PROFILES, Profile, select
from cmlib.recipes import OBJECTIVES
from cmlib.sizing import PLANS
from cmlib.teacher import SOLVERS

SOLUTIONS = Path(__file__).resolve().parent.parent / "notebooks" / "solutions"
SCHEDULES = ["linear", "cosine", "cosine-linear"]
TEACHER = "hub id or folder (default: the profile's)"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for all bad input."""
        self.exit(2, f"cmlib: {message}\n")


def _command(parent: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    p = parent.add_parser(name, help=text, description=text)
    p.set_defaults(function=function, folder=p.prog.removeprefix("cmlib ").replace(" ", "-"))
    p.add_argument("--profile", help=f"one of {', '.join(PROFILES)} (default: CMLIB_PROFILE, else what fits the machine)")
    p.add_argument("--dataset", help="digits, cifar10, fashion_mnist, a hub id or a folder (default: the profile's)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="folder for the results (default: runs/COMMAND)")
    return p


def _add_teacher(actions: Any) -> None:
    for name, text in (("train", "train one from nothing"), ("finetune", "fine-tune one")):
        p = _command(actions, name, commands.teacher_train, text)
        p.add_argument("--updates", type=int, help="optimiser steps (default: the profile's)")
        p.add_argument("--lr", type=float, help="peak learning rate (default: the profile's; finetune 2e-4)")
        p.add_argument("--schedule", choices=SCHEDULES, help="of β (default: the teacher's own, else linear)")
        p.add_argument("--patience", type=int, default=0, help="stop after this many epochs without progress (0: never)")
        p.add_argument("--limit", type=int, help="use this many images")
        p.add_argument("--resume", action="store_true", help="go on exactly where a run in --out stopped")
        if name == "finetune":
            p.add_argument("--teacher", help=TEACHER)
            p.add_argument("--refresh", type=Path, help="pair cache whose targets follow the teacher after every epoch")
    p = _command(actions, "eval", commands.teacher_eval, "held-out error, and distances of its samples")
    p.add_argument("--teacher", help=TEACHER)
    p.add_argument("--steps", type=int, default=50, help="DDIM steps")
    p.add_argument("--samples", type=int, help="number of samples (default: the profile's)")


def _add_cache(actions: Any) -> None:
    p = _command(actions, "build", commands.cache_build, "build, resume or repair one")
    p.add_argument("--teacher", help=TEACHER)
    p.add_argument("--source", choices=["data", "rollout"], help="default: the profile's")
    p.add_argument("--solver", choices=SOLVERS, help="default: the profile's")
    p.add_argument("--schedule", choices=SCHEDULES, help="of β, if the teacher is to be fine-tuned to it (default: its own)")
    p.add_argument("--pairs", type=int, help="default: the profile's")
    p.add_argument("--delta", type=int, default=1, help="chain steps between x_t and the target, for source data")
    p.add_argument("--steps", type=int, help="steps of a trajectory, for source rollout (default: the profile's)")
    p.add_argument("--batch-size", type=int, default=250)
    _command(actions, "verify", commands.cache_verify, "check every shard against its checksum").add_argument(
        "cache", type=Path
    )
    p = _command(actions, "refresh", commands.cache_refresh, "recompute the targets with another teacher")
    p.add_argument("cache", type=Path)
    p.add_argument("--teacher", required=True, help="hub id or folder")
    _command(actions, "info", commands.cache_info, "what a cache holds").add_argument("cache", type=Path)


def _add_students(top: Any) -> None:
    p = _command(top, "distill", commands.distill, "train a student")
    p.add_argument("--objective", choices=OBJECTIVES, default="consistency-distillation")
    p.add_argument("--cache", type=Path, help="pair cache (consistency-distillation without one makes its pairs on the fly)")
    p.add_argument("--teacher", help=TEACHER)
    p.add_argument("--student", type=Path, help="start from this checkpoint instead of the teacher's weights")
    p.add_argument("--updates", type=int, help="optimiser steps (default: the profile's)")
    p.add_argument("--resume", action="store_true", help="go on exactly where a run in --out stopped")
    p.add_argument("--limit", type=int, help="use this many images")

    p = _command(top, "sample", commands.sample, "images from a student")
    p.add_argument("--checkpoint", type=Path, required=True)
    p.add_argument("--evaluations", type=int, default=1, help="network evaluations an image")
    p.add_argument("--n", type=int, default=48)

    p = _command(
        top, "evaluate", commands.evaluate_student, "reconstruction error, self-consistency gap, distances between sets"
    )
    p.add_argument("--checkpoint", type=Path, required=True)
    p.add_argument("--teacher", help=TEACHER)
    p.add_argument("--samples", type=int, help="number of samples (default: the profile's)")
    p.add_argument("--seeds", type=int, help="how many, from --seed on, with half the range (default: 3; 1 at a rough profile)")
    p.add_argument("--against", type=Path, help="metrics.json of another evaluation; refused if its protocol differs")
    p.add_argument("--fid", action="store_true", help="also FID on Inception features, where its weights are there")
    p.add_argument("--limit", type=int, help="use this many reference images")

    p = _command(top, "compare", commands.compare, "objectives side by side, from one start, under one budget of images")
    p.add_argument("--objectives", default=",".join(OBJECTIVES[1:]), help="comma-separated (default: all)")
    p.add_argument("--budget-images", type=int, help="training images for each (default: the profile's)")
    p.add_argument("--seeds", type=int, default=3, help="how many, from --seed on")
    p.add_argument("--from-nothing", action="store_true", help="start from random weights instead of the teacher's")
    p.add_argument("--teacher", help=TEACHER)

    p = _command(top, "export", commands.export, "a student in another format, with its parity against eager PyTorch")
    p.add_argument("--format", choices=[*FORMATS], default="diffusers")
    p.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="fp32", help="of the network; scalings stay fp32")
    p.add_argument("--checkpoint", type=Path, required=True)


def _add_serving(top: Any) -> None:
    for name, function, text in (
        ("serve", commands.serve, "a student behind HTTP, with its page at /"),
        ("site", commands.site, "that page as static files: the student runs in the visitor's browser"),
    ):
        p = _command(top, name, function, text)
        student = p.add_mutually_exclusive_group(required=True)
        student.add_argument("--checkpoint", type=Path, help="a student, exported to ONNX first")
        student.add_argument("--onnx", type=Path, help="the folder of a `cmlib export --format onnx`")
        p.add_argument("--teacher", help="whose walks the page shows: hub id or folder (default: the shipped one, if any)")
        p.add_argument("--assets", type=Path, help="folder with onnxruntime-web's dist/, for a page without the CDN")
        if name == "serve":
            p.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be seen from other machines")
            p.add_argument("--port", type=int, default=3000)
            p.add_argument("--workers", type=int, default=1, help="processes, each with its own queue")
            p.add_argument("--timeout", type=float, default=30.0, help="seconds that a request may take")
            p.add_argument("--queue", type=int, default=256, help="images that may wait in a worker before it answers 429")
            p.add_argument("--tensorrt", action="store_true", help="ONNX Runtime's TensorRT provider, where there is one")


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    root = _Parser(prog="cmlib", description="Learn, reproduce and ship consistency models.")
    root.add_argument("--version", action="version", version=f"cmlib {__version__}")
    top = root.add_subparsers(required=True, metavar="command")
    p = _command(top, "demo", commands.demo, "the whole pipeline on small images, with its baselines")
    p.add_argument("--quick", action="store_true", help="the `quick` profile: 90 seconds, lower quality")
    p.add_argument("--full", action="store_true", help="add DDIM-200 and DDPM-1000 to the comparison")
    p.add_argument("--train-teacher", action="store_true", help="train the teacher from nothing instead of loading it")
    for name, text, add in (("teacher", "the DDPM teacher", _add_teacher), ("cache", "the pair cache", _add_cache)):
        add(top.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="action"))
    _add_students(top)
    _add_serving(top)
    p = _command(top, "grade", commands.grade, "grade a folder or zip of submissions (needs nbgrader; for instructors)")
    p.add_argument("folder", type=Path, help="<learner>/<exercise>.ipynb, or what Moodle or Canvas exported")
    p.add_argument("--exercises", type=Path, default=SOLUTIONS, help="folder of solved exercises (default: the course's)")
    p = _command(top, "doctor", commands.doctor, "what this machine has and lacks, and which profile fits")
    p.add_argument("--plan", choices=[*PLANS], help="instead: pairs, bytes, operations and hours of a run on this data set")
    return root


COUNTS = (
    *("updates", "limit", "samples", "pairs", "steps", "evaluations", "n", "delta", "batch_size", "seeds"),
    *("budget_images", "workers", "timeout", "queue"),
)


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError naming the option that is out of its range."""
    for name in COUNTS:
        if (value := getattr(args, name, None)) is not None and not 1 <= value <= 10**9:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1 and at most 10^9, got {value}")
    if not 1 <= getattr(args, "port", 1) <= 65535:
        raise ValueError(f"--port must lie in 1 … 65535, got {args.port}")
    if not 0 <= getattr(args, "patience", 0) <= 10**9:
        raise ValueError(f"--patience must lie in 0 … 10^9, got {args.patience}")
    if (lr := getattr(args, "lr", None)) is not None and not 0 < lr < float("inf"):
        raise ValueError(f"--lr must be a positive number, got {lr}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must lie in 0 … 2^63 − 1, got {args.seed}")
    if args.profile and getattr(args, "quick", False):
        raise ValueError("--quick is a profile of its own; give --quick or --profile, not both")


def _prepare(args: argparse.Namespace) -> Profile:
    """The profile with the data set asked for; `args.out` is settled and made."""
    quick = "quick" if getattr(args, "quick", False) else None
    default = "cpu" if args.function is commands.demo and "CMLIB_PROFILE" not in os.environ else None
    profile = select(args.profile or quick or default)  # the demo is about embedded data on any machine
    if args.out is None:
        parts = [args.folder, quick, args.dataset and Path(args.dataset).name]
        parts += ["own-teacher" if getattr(args, "train_teacher", False) else None, f"seed{args.seed}" if args.seed else None]
        args.out = Path("runs") / "-".join(filter(None, parts))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder --out {args.out} ({error.strerror}); give another") from error
    if args.dataset is None or args.dataset == profile.dataset:
        return profile
    own = f"{Path(args.dataset).name}_teacher"  # where one is shipped
    return replace(profile, dataset=args.dataset, teacher=own if shipped(own).exists() else profile.teacher)


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 on success, 2 with one line on bad input, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no σ shall not end a run
    args = parser().parse_args(argv)
    try:
        _check(args)
        profile = _prepare(args)
        with ranks.joined():
            seed_everything(args.seed)
            begin = time.monotonic()
            metrics = {**args.function(args, profile), "seconds.command": time.monotonic() - begin, **peak_memory_mb()}
            gpu = f", {metrics['memory.gpu_peak_mb']:.0f} MB on the GPU" if "memory.gpu_peak_mb" in metrics else ""
            print(f"{metrics['seconds.command']:.0f} s, at most {metrics.get('memory.peak_mb', float('nan')):.0f} MB{gpu}")
            if ranks.is_first():
                told = {"protocol.seed": args.seed, "protocol.profile": profile.name}
                write_json(args.out / "metrics.json", {**told, **metrics})
        return 0
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"cmlib: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Exception as error:  # nobody foresaw it
        where = (args.out or Path()) / "traceback.txt"
        with suppress(OSError):
            where.write_text(traceback.format_exc(), encoding="utf-8")
        print(f"cmlib: unforeseen {type(error).__name__}: {' '.join(str(error).split())[:300]} (see {where})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        more = "" if getattr(args, "resume", True) else " with --resume"
        print(f"cmlib: interrupted; the same command{more} goes on from here", file=sys.stderr)
        return 130
