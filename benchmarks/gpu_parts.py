"""The parts of `benchmarks.gpu_cifar10`: sizes, what travels to the machine with the GPU and back, samplers, measures."""

from __future__ import annotations

import copy
import inspect
import io
import json
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cmlib import data, evaluate
from cmlib.consistency import ConsistencyFunction, sample
from cmlib.export import Exported
from cmlib.files import sha256, write_atomically
from cmlib.pipeline import shipped
from cmlib.process import DDPM
from cmlib.recipes import largest_sigma
from cmlib.teacher import Teacher
from cmlib.unet import UNet

# dense bf16 (and fp16) TFLOP/s, from the data sheets
PEAK = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121}


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    widths: tuple[int, ...] = (64, 128, 128)  # 6.5 million parameters, 13 MB in float16
    layers: int = 2
    groups: int = 32
    batch: int = 512
    pairs: int = 200_000
    samples: int = 50_000
    few: int = 5_000  # samples for a point of the curve
    steps: int = 25  # of Heun, the teacher at its best
    probe: int = 20  # updates that measure the pace
    updates: int = 0  # instead of those that the minutes hold
    teacher_minutes: float = 8.0  # of training; how many updates that is follows from a measured pace
    student_minutes: float = 3.0


DRY = Sizes((8, 16), 1, 4, 4, 16, 8, 4, 2, 1, 8)


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


def kept(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}


class Denoiser(nn.Module):
    """ε(x, n) with the network inside and n a float, as a student has it: so both train by one compiled graph."""

    def __init__(self, net: UNet):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return self.net(x, n.float())


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


def jump(f: ConsistencyFunction, evaluations: int, noise: list[Tensor]) -> Tensor:
    return sample(f, noise[:evaluations], f.levels(evaluations), f.sigma_min)


def walk(teacher: Teacher, steps: int, noise: list[Tensor]) -> Tensor:
    return teacher.sample(noise[0], steps, "heun")


def descend(teacher: Teacher, evaluations: int, noise: list[Tensor]) -> Tensor:
    """DDIM from the students' σ_max over n_i = n(σ_max)·(1 − i/k) − i/k, i = 0 … k; n_k = −1 is the image.

    Better at few evaluations than the "leading" indices, which take pure noise for a later state, and than a Karras grid,
    whose last evaluation is spent at σ_min: with the digits' teacher, fd_digits in 4 is 52, 124 and 272.
    """
    process, x = teacher.process, noise[0]
    first = float(process.index(torch.tensor(largest_sigma(teacher))))
    levels = process.sigma(torch.linspace(first, -1, evaluations + 1)).to(x.device)
    x = levels[0] * x
    for t, r in zip(levels, levels[1:], strict=False):
        x = teacher.ode_step(x, t.expand(len(x)), r.expand(len(x)))
    return x


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


def speed(name: str, history: list[dict[str, float]], batch: int, flops: int, gpu: str) -> dict[str, Any]:
    """Images per second of training, the median of the intervals between checkpoints, and at `flops` an image the share of
    the peak of `gpu` that this is."""
    intervals = [(b["step"] - a["step"], b["seconds"] - a["seconds"]) for a, b in zip(history, history[1:], strict=False)]
    rates = [updates / seconds for updates, seconds in intervals if seconds > 0]
    if not rates:
        return {}
    images = batch * statistics.median(rates)
    found = {f"{name}.images_per_second": round(images, 1), f"{name}.gflop_per_image": flops / 1e9}
    if peak := next((v for k, v in PEAK.items() if k in gpu), None):
        found |= {"protocol.peak_bf16_tflops": peak, f"{name}.mfu": images * flops / (peak * 1e12)}
    return found


def providers(exported: Exported) -> str:
    """What the ONNX Runtime session inside an export that was loaded runs on, its first choice first."""
    return ", ".join(inspect.getclosurevars(exported.run).nonlocals["session"].get_providers())


def table(metrics: dict[str, Any], names: Sequence[str], evaluations: Sequence[int]) -> str:
    """The distances, a row a model, as Markdown."""
    rows = [f"| {metrics['protocol.features'].split(':')[0]} | " + " | ".join(f"{k} evaluations" for k in evaluations)]
    rows += ["|---" * (1 + len(evaluations))]
    for name in names:
        found = [metrics.get(f"fd.{name}_{k}") for k in evaluations]
        rows += [f"| {name} | " + " | ".join("" if v is None else f"{v:.4g}" for v in found)]
    best, floor = (metrics.get(f"fd.{name}", float("nan")) for name in ("teacher", "training_images_drawn_again"))
    return " |\n".join(rows) + f" |\n\nteacher at its best {best:.4g}, training images drawn again {floor:.4g}"
