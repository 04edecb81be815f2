"""The edges of `benchmarks.gpu_cifar10`: what travels to the machine with the GPU and back, features, the table."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from cmlib import data, evaluate
from cmlib.files import sha256, write_atomically
from cmlib.pipeline import shipped
from cmlib.process import DDPM
from cmlib.teacher import Teacher
from cmlib.unet import UNet


def pack(out: Path) -> Path:
    """Write the training images, as they are but compressed together, to `out/cifar10.parquet`."""
    import pyarrow.parquet as parquet

    files = sorted(Path(data.resolve("cifar10")).rglob("train-*.parquet"))
    if not files:
        raise ValueError("no train-*.parquet of CIFAR-10; set CMLIB_DATASETS to the folder that holds cifar10/")
    out.mkdir(parents=True, exist_ok=True)
    parquet.write_table(parquet.read_table(files), out / "cifar10.parquet", compression="zstd", use_dictionary=False)
    return out / "cifar10.parquet"


def unpack(path: Path) -> Tensor:
    """Images uint8 [N,3,32,32] of a file that `pack` wrote."""
    import pyarrow.parquet as parquet

    def pixels(cell: dict[str, Any]) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")).transpose(2, 0, 1)

    if not path.exists():
        raise ValueError(f"no {path}; write it with `python -m benchmarks.gpu_cifar10 pack`")
    with ThreadPoolExecutor() as pool:
        cells = parquet.read_table(path, columns=["img"])["img"].to_pylist()
        return torch.from_numpy(np.ascontiguousarray(list(pool.map(pixels, cells))))


def save_student(f: Any, path: Path) -> None:
    """As `f.save`, weights in float16."""
    copy.deepcopy(f).half().save(path)


def save_teacher(denoiser: Any, path: Path) -> None:
    """Weights of `denoiser.net` in float16 and its architecture, as safetensors."""
    weights = {k: v.half().contiguous().cpu() for k, v in denoiser.net.state_dict().items()}
    content = save(weights, metadata={"unet": json.dumps(denoiser.net.config), "chain": "linear"})
    write_atomically(path, lambda file: file.write(content))


def load_teacher(path: Path) -> Teacher:
    """What `save_teacher` wrote; its `save_pretrained` makes a folder for diffusers of it."""
    if not path.exists():
        raise ValueError(f"{path} is missing; copy it from the --out of the run that made it")
    with safe_open(path, framework="pt") as file:
        unet = UNet.from_config(json.loads(file.metadata()["unet"]))
        unet.load_state_dict({k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118 (not a dict)
    return Teacher(unet, DDPM.linear())


def distance_to(images: Tensor, device: torch.device, untrained: bool) -> tuple[Callable[[Tensor], float], str]:
    """The Fréchet distance of uint8 images to `images`, and on what features: Inception's where its weights are here, else
    the shipped classifier's, else, where that is all the same, an untrained one's. Raises ValueError."""
    path = shipped("cifar10_classifier.safetensors")
    if untrained:
        torch.manual_seed(0)
        classifier, name = evaluate.Classifier(3, 32).eval().requires_grad_(False), "fd_random: an untrained classifier"
    else:
        with suppress(ValueError):
            fid = evaluate.FID(images)

            def inception(fakes: Tensor) -> float:
                for part in fakes.split(500):
                    fid.add(part)
                return fid.distance()

            return inception, "FID: torch-fidelity's Inception, 2048 features"
        if not path.exists():
            raise ValueError("no features to measure with; make data/ some by `python -m benchmarks.classifier cifar10`")
        classifier, name = evaluate.Classifier.load(path), f"fd_cifar10: {path.name}, sha256 {sha256(path)[:12]}"
    classifier = classifier.to(device)
    reference = evaluate.features(classifier, images)
    return lambda fakes: evaluate.frechet_distance(reference, evaluate.features(classifier, fakes)), name


def table(metrics: dict[str, Any], names: Sequence[str], evaluations: Sequence[int]) -> str:
    """The distances, a row a model, as Markdown."""
    rows = [f"| {metrics['protocol.features'].split(':')[0]} | " + " | ".join(f"{k} evaluations" for k in evaluations)]
    rows += ["|---" * (1 + len(evaluations))]
    for name in names:
        found = [metrics.get(f"fd.{name}_{k}") for k in evaluations]
        rows += [f"| {name} | " + " | ".join("" if v is None else f"{v:.4g}" for v in found)]
    best, floor = (metrics.get(f"fd.{name}", float("nan")) for name in ("teacher", "training_images_drawn_again"))
    return " |\n".join(rows) + f" |\n\nteacher at its best {best:.4g}, training images drawn again {floor:.4g}"
