"""One training loop for teachers and students: the ten lines of the lessons plus what a long run needs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cmlib.consistency import EMA
from cmlib.files import write_atomically

Batches = Callable[[int], Iterator[dict[str, Tensor]]]


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
    """An even 62-bit seed for the random draws of one step on one rank; the odd one after it is dropout's."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2 << 1


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `fit` saved; weights and numbers only, a pickle with code in it is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint this version can read; move it away to start anew") from error


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
    name: str = "train",
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Minimise the mean of `objective` over `steps` batches; returns the EMA of `model` and the history.

    `batches(k)` is the stream of batches from step k on. Everything random at step k follows from (seed, k), so a run
    that was killed and resumed equals one that was not, bit for bit on the CPU. Every `every` steps, `on_every(step,
    ema_model)` may add metrics to the history, `stop(history)` may end the run, and `folder/checkpoint.pt` is replaced
    atomically. Raises FloatingPointError with the step at the first non-finite loss; the last checkpoint stays.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
    optimizers = {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
    if optimizer not in optimizers:
        raise ValueError(f"optimizer must be one of {', '.join(optimizers)}, got {optimizer!r}")
    opt = optimizers[optimizer](model.parameters(), lr=lr, weight_decay=weight_decay)
    average = EMA(model.to(accelerator.device), ema, warmup=True)
    target = EMA(model, objective.mu) if objective.mu > 0 else None
    checkpoint = Path(folder) / "checkpoint.pt" if folder else None
    start = 0
    history: list[dict[str, float]] = []
    if checkpoint:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint and resume and checkpoint.exists():
        start, history = _restore(read_checkpoint(checkpoint), checkpoint, model, average, target, opt, seed)
    wrapped, opt = accelerator.prepare(model.train(), opt)
    if target:
        target.model.train()  # the same dropout mask in both branches
    losses: list[Tensor] = []
    quiet = None if accelerator.is_main_process else True
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, disable=quiet)
    for step, batch in zip(bar, batches(start), strict=False):
        rank, world = accelerator.process_index, accelerator.num_processes
        batch = {k: v[rank::world].to(accelerator.device) for k, v in batch.items()}
        generator = torch.Generator().manual_seed(step_seed(seed, step, rank))
        torch.manual_seed(step_seed(seed, step, rank) + 1)
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup, schedule)
        with accelerator.autocast():
            per_sample, _ = objective(wrapped, target.model if target else model, batch, step, generator)
        loss = per_sample.mean()
        if not torch.isfinite(loss):
            kept = f"; the last good checkpoint is {checkpoint}" if checkpoint and checkpoint.exists() else ""
            raise FloatingPointError(f"loss is {loss.item()} at step {step}{kept}. Lower the learning rate or check the data.")
        accelerator.backward(loss)
        if grad_clip:
            accelerator.clip_grad_norm_(wrapped.parameters(), grad_clip)
        opt.step()
        opt.zero_grad()
        average.update(model, step)
        if target:
            target.update(model, step)
        losses.append(loss.detach())
        if (step + 1) % every == 0 or step + 1 == steps:
            row = {"step": step + 1, "loss": float(torch.stack(losses).mean())}
            row |= (on_every(step + 1, average.model) if on_every else None) or {}
            history, losses = [*history, row], []
            bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k != "step"})
            if checkpoint and accelerator.is_main_process:
                _save(checkpoint, model, average, target, opt, seed, step + 1, history)
            if stop and stop(history):
                break
    return average.model, history


def _save(
    path: Path, model: nn.Module, average: EMA, target: EMA | None, opt: Any, seed: int, step: int, history: list
) -> None:
    state = {
        "config": getattr(model, "config", {}),
        "model": model.state_dict(),
        "ema": average.model.state_dict(),
        "target": target.model.state_dict() if target else {},
        "optimizer": opt.state_dict(),
        "seed": seed,
        "step": step,
        "history": history,
    }
    write_atomically(path, lambda file: torch.save(state, file))


def _restore(
    state: dict, path: Path, model: nn.Module, average: EMA, target: EMA | None, opt: Any, seed: int
) -> tuple[int, list]:
    if state["seed"] != seed:
        raise ValueError(f"{path} was trained with seed {state['seed']}, not {seed}; resume with that seed")
    try:
        model.load_state_dict(state["model"])
        average.model.load_state_dict(state["ema"])
        if target:
            target.model.load_state_dict(state["target"])
        opt.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} belongs to another model or objective; give another --out to start anew") from error
    return state["step"], state["history"]
