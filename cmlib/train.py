"""One training loop for teachers and students: the ten lines of the lessons plus what a long run needs."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cmlib import ranks
from cmlib.consistency import EMA
from cmlib.data import fingerprint
from cmlib.files import intact, write_atomically
from cmlib.unet import given

Batches = Callable[[int], Iterator[dict[str, Any]]]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, schedule: str = "cosine") -> float:
    """Linear warm-up over `warmup` steps to `peak`, then `constant` or `cosine` annealing to 0 at `steps`."""
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule must be 'cosine' or 'constant', got {schedule!r}")
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def plateaued(history: list[float], patience: int = 5, tolerance: float = 1e-3) -> bool:
    """True once the last `patience` values brought no relative improvement above `tolerance` over the best before."""
    if len(history) <= patience:
        return False
    return min(history[-patience:]) > min(history[:-patience]) * (1 - tolerance)


def step_seed(seed: int, step: int, rank: int) -> int:
    """An even 62-bit seed for the random draws of one step, made for the whole batch (rank 0's seed, on every rank); the odd
    one after a rank's own is its dropout's."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2 << 1


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `fit` saved; weights and numbers only, a pickle with code in it is refused."""
    try:
        if not intact(path):
            raise ValueError("a checksum differs")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint this version can read; move it away to start anew") from error


def options(objective: Any) -> str:
    """The objective's name and those of its options that can be compared: numbers, strings, tuples, tensors by their digest,
    functions by their names, an inner objective."""
    parts = []
    for field in fields(objective) if is_dataclass(objective) else ():
        value = getattr(objective, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            parts.append(f"{field.name}={options(value)}")
        elif callable(value):  # a function, or a partial of one
            named = getattr(value, "func", value)
            told = getattr(named, "__qualname__", type(named).__name__)
            parts.append(f"{field.name}={told}{getattr(value, 'args', '')}{getattr(value, 'keywords', '')}")
        elif isinstance(value, (bool, int, float, str, tuple)):
            parts.append(f"{field.name}={value!r}")
        elif isinstance(value, Tensor):
            parts.append(f"{field.name}={fingerprint(value.detach().cpu())}")
    return f"{type(objective).__name__}({', '.join(parts)})"


class _Run:
    """What training changes, and its checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        mu: Any,
        ema: float,
        optimizer: str,
        lr: float,
        weight_decay: float,
        settings: dict[str, Any],
        scaler: Any,
    ):
        optimizers = {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
        if optimizer not in optimizers:
            raise ValueError(f"optimizer must be one of {', '.join(optimizers)}, got {optimizer!r}")
        self.model, self.settings = model, settings
        self.optimizer: Any = optimizers[optimizer](model.parameters(), lr=lr, weight_decay=weight_decay)
        self.average = EMA(model, ema, warmup=True)
        self.target = EMA(model, mu) if mu else None
        if self.target:
            self.target.model.train()  # the same dropout mask in both branches
        self.scaler = scaler  # fp16's loss scale
        self.step = 0
        self.history: list[dict[str, float]] = []

    def finish_step(self, rate: float) -> None:
        """Move the weights by a step of size `rate`, then both averages."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.model, self.step)
        if self.target:
            self.target.update(self.model, self.step)
        self.step += 1

    def save(self, path: Path) -> None:
        """Replace the checkpoint atomically; the random state is (seed, step)."""
        state = {
            "config": getattr(self.model, "config", {}),
            "model": self.model.state_dict(),
            "ema": self.average.model.state_dict(),
            "target": self.target.model.state_dict() if self.target else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "settings": self.settings,
            "step": self.step,
            "history": self.history,
        }
        write_atomically(path, lambda file: torch.save(state, file))

    def restore(self, path: Path) -> None:
        """Go back to a checkpoint of the same run. Raises ValueError naming what differs."""
        state = read_checkpoint(path)
        was = state.get("settings", {})
        differs = [f"{k} was {was.get(k)!r}, is {v!r}" for k, v in self.settings.items() if was.get(k) != v]
        if differs:
            raise ValueError(
                f"{path} belongs to another run ({'; '.join(differs)}); delete it or give another --out to start anew"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.average.model.load_state_dict(state["ema"])
            if self.target:
                self.target.model.load_state_dict(state["target"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler:
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{path} belongs to another model or objective; delete it or give another --out to start anew"
            ) from error
        self.step, self.history = state["step"], state["history"]


def _share(batch: dict[str, Any], device: torch.device) -> tuple[dict[str, Tensor], Any, float]:
    """This rank's rows of a batch on its device, the context in which its draws are theirs (`ranks.rows`), and the weight
    with which the mean over its rows enters the mean over ranks, so that this is the mean of the whole batch. What was
    streamed is this rank's already, and names the whole batch's size."""
    (rank, world), streamed = ranks.here(), batch.get("whole")
    if streamed:
        batch = {k: v.to(device) for k, v in batch.items() if k != "whole"}
        return batch, ranks.rows(streamed // world, streamed), 1.0
    whole = len(next(iter(batch.values())))
    if whole < world:
        raise ValueError(f"a batch of {whole} cannot be shared by {world} processes; start fewer")
    mine = len(range(rank, whole, world))
    return {k: v[rank::world].to(device) for k, v in batch.items()}, ranks.rows(mine, whole), mine * world / whole


def _accelerator(precision: str) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # it is global, and refuses a second precision in one process
    # `fit` places the model; a restored optimiser's step counts stay on the CPU, where reading them waits for no GPU
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), device_placement=False)


def _check_finite(values: list[Tensor], step: int, checkpoint: Path | None) -> None:
    """Raises FloatingPointError unless the loss, which comes first, and the weights are finite."""
    if not all(bool(v.isfinite().all()) for v in values):
        kept = f"; the last good checkpoint is {checkpoint}" if checkpoint and checkpoint.exists() else ""
        why = f"loss {values[0].item()} or a weight is not finite at step {step}"
        raise FloatingPointError(f"{why}{kept}. Lower the learning rate or check the data.")


def fit(
    model: nn.Module,
    objective: Any,
    batches: Batches,
    steps: int,
    *,
    lr: float = 2e-4,
    weight_decay: float = 1e-4,
    optimizer: str = "adamw",
    warmup: int = 0,
    schedule: str = "cosine",
    ema: float = 0.999,
    grad_clip: float | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
    every: int = 500,
    on_every: Callable[[int, nn.Module], dict[str, float] | None] | None = None,
    stop: Callable[[list[dict[str, float]]], bool] | None = None,
    precision: str = "no",
    compiler: str | Callable[..., Any] | None = None,
    provenance: dict[str, Any] | None = None,
    name: str = "train",
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Minimise the mean of `objective` over `steps` batches; returns the EMA of `model` and the history.

    `batches(k)` is the stream of batches from step k on. Everything random at step k follows from (seed, k), so a run
    that was killed and resumed equals one that was not, bit for bit on the CPU. Every `every` steps, `on_every(step,
    ema_model)` may add metrics to the history, `stop(history)` may end the run, and `folder/checkpoint.pt` is replaced
    atomically; `resume` goes on from it and refuses one whose settings or `provenance` (data, teacher) differ.
    Under torchrun each rank takes every world-th image of a batch, with the noise that it would have in one process, and
    the gradient is the whole batch's. All ranks call `on_every`, and the first one's metrics count. `compiler`, a backend of
    `torch.compile` such as "inductor", compiles the network in place; what is saved and what is returned is as without.
    Raises FloatingPointError with the step at the first non-finite loss; the last good checkpoint stays.
    """
    if min(steps, every) < 1 or not 0 <= lr < float("inf"):
        raise ValueError(f"steps and every must be at least 1 and lr finite, got {steps}, {every} and {lr}")
    if getattr(objective, "steps", steps) != steps:
        raise ValueError(f"the objective's curriculum is {objective.steps} steps long, the run {steps}; give both the same")
    settings = {"objective": options(objective), "steps": steps, "lr": lr, "optimizer": optimizer}
    settings |= {"weight_decay": weight_decay, "warmup": warmup, "schedule": schedule, "ema": ema, "grad_clip": grad_clip}
    settings |= {"seed": seed, "precision": precision, **(provenance or {})}
    accelerator = _accelerator(precision)
    ranks.alike(model.to(accelerator.device))  # before the averages copy it
    run = _Run(model, objective.mu, ema, optimizer, lr, weight_decay, settings, accelerator.scaler)
    checkpoint = Path(folder) / "checkpoint.pt" if folder else None
    if checkpoint:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if resume and checkpoint.exists():
            run.restore(checkpoint)
    if stop and run.history and stop(run.history):
        return run.average.model, run.history
    model.zero_grad()  # whoever made it may have left gradients, as `warm_start`'s own training does
    wrapped, run.optimizer = accelerator.prepare(model.train(), run.optimizer)
    vars(model).pop("forward", None)  # accelerate's own autocast, which would begin again inside the float32 of a JVP
    if compiler:  # f's network alone, which teacher and students share, so that it is compiled once
        for function in (model, run.target.model) if run.target else (model,):
            getattr(function, "net", function).compile(backend=compiler)
    losses, began, start = list[Tensor](), time.monotonic(), run.step
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, disable=None if ranks.is_first() else True)
    for step, batch in zip(bar, batches(start), strict=False):
        batch, whole, weight = _share(batch, accelerator.device)
        generator = torch.Generator().manual_seed(step_seed(seed, step, 0))
        torch.manual_seed(step_seed(seed, step, accelerator.process_index) + 1)
        with accelerator.autocast(), whole, given(batch.get("label")):
            loss = objective(wrapped, run.target.model if run.target else model, batch, step, generator)[0].mean() * weight
        saving, mean = (step + 1) % every == 0 or step + 1 == steps, accelerator.reduce(loss.detach(), "mean")
        accelerator.backward(loss)
        if grad_clip:
            accelerator.clip_grad_norm_(wrapped.parameters(), grad_clip)
        run.finish_step(learning_rate(step, steps, lr, warmup, schedule))
        _check_finite([mean, *model.parameters()] if saving else [mean], step, checkpoint)
        losses.append(mean)
        if saving:
            seconds = round(time.monotonic() - began + (run.history[-1]["seconds"] if run.history else 0.0), 1)
            more = on_every(run.step, run.average.model) if on_every else None
            row = ranks.told({"step": run.step, "loss": float(torch.stack(losses).mean()), "seconds": seconds} | (more or {}))
            run.history.append(row)
            losses, began = [], time.monotonic()
            bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k in ("loss", "held_out")})
            if checkpoint and accelerator.is_main_process:
                run.save(checkpoint)
            if stop and stop(run.history):
                break
    if not run.history:
        raise ValueError(f"the stream of batches ended before step {every} of {steps}; there was nothing to train on")
    return run.average.model, run.history
