"""What an exported student lost and gained: measured on the file that was written, beside eager PyTorch in the same run."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmlib.consistency import ConsistencyFunction
from cmlib.data import to_float
from cmlib.evaluate import reconstruction_error
from cmlib.export import Exported
from cmlib.formats import noise_levels
from cmlib.ops import Network, device_of, randn_like
from cmlib.process import DDPM

BATCHES = (1, 8, 32)
LEVELS = 7
PER_IMAGE = 4  # random levels an image in the reconstruction error
WARM_UP, RUNS, SECONDS = 5, 100, 3.0  # calls that don't count; then RUNS do, or those of SECONDS, at least WARM_UP


@torch.no_grad()
def measure(f: ConsistencyFunction, exported: Exported, images: Tensor, seed: int = 0) -> dict[str, Any]:
    """Parity of `exported` with f, as flat keys: differences at LEVELS noise levels, the ratio of their reconstruction errors
    on held-out uint8 `images` (linear DDPM schedule), and latencies.

    A ratio near 1 alone says little: at high noise any blur is about as far from the image as any other, so read
    `relative` = ‖Δ‖/‖f‖ beside it.
    """
    eager = Exported(f, device_of(f))
    found: dict[str, Any] = {}
    x0, generator = to_float(images), torch.Generator().manual_seed(seed)
    for k, sigma in enumerate(noise_levels(f, LEVELS)):
        t = sigma.expand(len(x0))
        x_t = x0 + sigma * randn_like(x0, generator)
        ours, theirs = eager(x_t, t), exported(x_t, t)
        delta = theirs - ours
        found |= {
            f"level_{k}.sigma": float(sigma),
            f"level_{k}.max_abs": float(delta.abs().max()),
            f"level_{k}.mean_abs": float(delta.abs().mean()),
            f"level_{k}.relative": float(delta.norm() / ours.norm()),
            f"level_{k}.error_ratio": float(_distance(theirs, x0) / _distance(ours, x0)),
        }
    for key, over in {"max_abs": max, "mean_abs": np.mean, "relative": max}.items():
        found[f"parity.{key}"] = float(over([found[f"level_{k}.{key}"] for k in range(LEVELS)]))  # type: ignore[operator]
    for name, g in {"eager": eager, "export": exported}.items():
        _, distance = reconstruction_error(g, images, DDPM.linear(), PER_IMAGE, seed, f.sigma_max)
        found[f"reconstruction.{name}"] = float(distance.mean())
    found["reconstruction.ratio"] = found["reconstruction.export"] / found["reconstruction.eager"]
    return {**found, **latency({"eager": eager, "export": exported}, f), **_protocol(f, len(images), seed)}


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).flatten(1).norm(dim=1).mean()


def latency(functions: dict[str, Network], f: ConsistencyFunction, batches: Sequence[int] = BATCHES) -> dict[str, Any]:
    """p50 and p95 in milliseconds of each function at each of `batches`, taken in turns after a warm-up.

    From an image in the CPU's memory to one there, so a GPU's times include both copies.
    """
    found: dict[str, Any] = {}
    for batch in batches:
        x = f.sigma_max * torch.randn(batch, *f.image_shape, generator=torch.Generator().manual_seed(0))
        t = torch.full((batch,), f.sigma_max)
        times: dict[str, list[float]] = {name: [] for name in functions}
        for g in WARM_UP * [*functions.values()]:  # untimed, as a first call may compile for longer than SECONDS
            g(x, t)
        end = time.perf_counter() + SECONDS
        while (n := len(times["eager"])) < RUNS and (n < WARM_UP or time.perf_counter() < end):
            for name, g in functions.items():
                start = time.perf_counter()
                g(x, t)
                times[name].append(1e3 * (time.perf_counter() - start))
        for name, all_times in times.items():
            p50, p95 = np.percentile(all_times, (50, 95))
            found |= {f"latency_ms.{name}.batch_{batch}.p50": float(p50), f"latency_ms.{name}.batch_{batch}.p95": float(p95)}
        found[f"protocol.runs.batch_{batch}"] = n
    return found


def _protocol(f: ConsistencyFunction, n: int, seed: int) -> dict[str, Any]:
    """What was measured on what: the machine, its threads, the packages and the images."""
    versions = {}
    for package in ("torch", "onnx", "onnxruntime", "tensorrt"):
        with suppress(metadata.PackageNotFoundError):
            versions[f"protocol.{package}"] = metadata.version(package)
    return {
        "protocol.images": n,
        "protocol.noise_seed": seed,
        "protocol.eager_device": device_of(f).type,
        "protocol.gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "protocol.cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "protocol.cores": os.cpu_count(),
        "protocol.threads": torch.get_num_threads(),
        **versions,
    }


def table(found: dict[str, Any]) -> str:
    """The report as a person reads it."""
    lines = ["     σ   max |Δ|  mean |Δ|   ‖Δ‖/‖f‖  error ÷ eager's"]
    for k in range(LEVELS):
        sigma, *rest = (found[f"level_{k}.{key}"] for key in ("sigma", "max_abs", "mean_abs", "relative", "error_ratio"))
        lines.append(f"{sigma:6.3g}" + "".join(f"{value:10.2g}" for value in rest[:3]) + f"{rest[3]:12.4f}")
    lines.append(
        f"reconstruction error {found['reconstruction.export']:.4f}, eager {found['reconstruction.eager']:.4f}:"
        f" ratio {found['reconstruction.ratio']:.4f}"
    )
    lines.append("\nmilliseconds, p50 (p95)       eager          export")
    for batch in BATCHES:
        row = [[found[f"latency_ms.{name}.batch_{batch}.{p}"] for p in ("p50", "p95")] for name in ("eager", "export")]
        lines.append(f"batch {batch:2}            " + "".join(f"{a:9.2f} ({b:5.2f})" for a, b in row))
    return "\n".join(lines)
