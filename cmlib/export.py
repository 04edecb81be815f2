"""Students in the formats that others load: written whole or not at all, described, and read back as f(x, t).

A folder holds the model and, written after it, `metadata.json`, which names the model's SHA-256: `load` takes both or neither.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmlib import engine, formats
from cmlib.consistency import SIGMAS, ConsistencyFunction
from cmlib.files import move_in, packed, sha256, write_atomically, write_json
from cmlib.ops import Network, device_of
from cmlib.unet import UNet

# format -> its file, and the precisions it comes in
FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "diffusers": ("unet/diffusion_pytorch_model.safetensors", ("fp32",)),
    "torchscript": ("model.torchscript", ("fp32", "fp16")),
    "torch-export": ("model.pt2", ("fp32", "fp16")),
    "onnx": ("model.onnx", ("fp32", "fp16", "int8")),
    "tensorrt": ("model.plan", ("fp32", "fp16", "int8")),
    "triton": ("student/1/model.onnx", ("fp32", "fp16", "int8")),
}


@dataclass(frozen=True)
class Exported:
    """f(x, t) as a saved model computes it on `device`: torch tensors in, x0_hat out on the device of x."""

    run: Network
    device: str | torch.device

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.run(x.to(self.device), t.to(self.device)).to(x.device)


def save(
    f: ConsistencyFunction, folder: str | Path, format: str, precision: str = "fp32", images: Tensor | None = None
) -> dict[str, Any]:
    """Write f and its metadata into `folder`, to run where f is now (ONNX anywhere); INT8 is calibrated on uint8 `images`.

    Returns the metadata. Raises ValueError where the format does not come in that precision, or needs a package or a GPU
    that is missing.
    """
    folder, (name, precisions) = Path(folder), FORMATS[format]
    if precision not in precisions:
        raise ValueError(f"{format} comes in {', '.join(precisions)}, not in {precision}")
    folder.mkdir(parents=True, exist_ok=True)
    if format == "diffusers":
        export_diffusers(f, folder)
    else:
        data = _bytes(f, format, precision, images)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, lambda file: file.write(data))
    if format == "triton":
        config = formats.triton_config(f.image_shape).encode()
        write_atomically(folder / "student" / "config.pbtxt", lambda file: file.write(config))
    told = {
        "format": format,
        "precision": precision,
        "file": name,
        "sha256": sha256(folder / name),
        "weights_sha256": weights_sha256(f),
        "device": "any" if format in ("onnx", "triton", "diffusers") else device_of(f).type,
        **signature(f),
        "torch": torch.__version__,
    }
    write_json(folder / "metadata.json", told)
    return told


def _bytes(f: ConsistencyFunction, format: str, precision: str, images: Tensor | None) -> bytes:
    if format == "tensorrt":
        engine.available()
    if precision == "int8" and images is None:
        raise ValueError("int8 needs images to calibrate on")
    g = formats.halved(f) if precision == "fp16" else f
    inputs = (torch.zeros(2, *f.image_shape, device=device_of(f)), torch.ones(2, device=device_of(f)))
    if format == "torchscript":
        return formats.torchscript(g, inputs)
    if format == "torch-export":
        return formats.torch_export(g, inputs)
    model = formats.onnx(g, inputs)
    if precision == "int8":
        assert images is not None
        model = formats.quantized(model, formats.calibration(f, images))
    return model if format in ("onnx", "triton") else engine.build(model, f.image_shape)


def load(folder: str | Path) -> Exported:
    """The function that `save` wrote into `folder`. Raises ValueError where the model is not the one its metadata describe."""
    folder = Path(folder)
    readers: dict[str, Callable[[Path], Network]] = {
        "diffusers": lambda path: load_diffusers(folder),
        "torchscript": formats.read_torchscript,
        "torch-export": formats.read_torch_export,
        "onnx": formats.read_onnx,
        "triton": formats.read_onnx,
        "tensorrt": engine.read,
    }
    try:
        told = json.loads((folder / "metadata.json").read_bytes())
        path, read, device = folder / told["file"], readers[told["format"]], told["device"]
        whole = sha256(path) == told["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no export that cmlib can read ({type(error).__name__})") from error
    if not whole:
        raise ValueError(f"{path} is not what its metadata describe: damaged, or its export was interrupted; export again")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{path} was exported on a GPU and runs on one; export again on this machine, or as onnx")
    return Exported(read(path), "cpu" if device == "any" else device)


def weights_sha256(f: ConsistencyFunction) -> str:
    """SHA-256 of weights and configuration: what `f.save` writes into the header of a `.safetensors`."""
    return hashlib.sha256(packed(f.net.state_dict(), "consistency_function", f.config)).hexdigest()


def signature(f: ConsistencyFunction) -> dict[str, Any]:
    """What a caller must know: inputs, ranges, the meaning of σ, and the levels to sample at."""
    image = {"shape": ["batch", *f.image_shape], "dtype": "float32"}
    t = {"shape": ["batch"], "dtype": "float32", "min": f.sigma_min, "max": f.sigma_max}
    return {
        "inputs": {
            "x": {**image, "meaning": "x0 + t*noise, for images x0 in [-1, 1] and standard normal noise"},
            "t": {**t, "meaning": "sigma, the standard deviation of the noise (EDM); at min and below, f(x, t) = x"},
        },
        "outputs": {"x0_hat": {**image, "meaning": "the image, not clipped to [-1, 1]"}},
        "sampling": {
            "first": "x = sigma*noise",
            "further": "x = clip(x0_hat, -1, 1) + sqrt(sigma^2 - sigma_min^2)*noise",
            "sigma_min": f.sigma_min,
            "sigmas": {str(n): f.levels(n) for n in (1, 2)},
        },
    }


def diffusers_pipeline(f: ConsistencyFunction) -> Any:
    """A `ConsistencyModelPipeline` that computes f and samples the same images from the same noise."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    if not isinstance(f.net, UNet):
        raise TypeError("only a ConsistencyFunction over cmlib.unet.UNet has a diffusers twin")
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=40, sigma_min=f.sigma_min, sigma_max=f.sigma_max, sigma_data=f.sigma_data, rho=f.rho
    )
    return ConsistencyModelPipeline(unet=f.net.to_diffusers(), scheduler=scheduler)


def export_diffusers(f: ConsistencyFunction, folder: str | Path) -> None:
    """Write `folder` so that `ConsistencyModelPipeline.from_pretrained(folder)` loads the student (safetensors).

    `model_index.json`, without which no folder is a pipeline, goes first and comes last.
    """
    with tempfile.TemporaryDirectory() as made:
        diffusers_pipeline(f).save_pretrained(made)
        (Path(folder) / "model_index.json").unlink(missing_ok=True)
        move_in(Path(made), Path(folder), last="model_index.json")


def load_diffusers(folder: str | Path) -> ConsistencyFunction:
    """The ConsistencyFunction of a folder or hub id that holds a `ConsistencyModelPipeline`, in eval mode."""
    from diffusers import ConsistencyModelPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()  # two files are no wait
    pipe = ConsistencyModelPipeline.from_pretrained(str(folder))
    config = pipe.scheduler.config
    return ConsistencyFunction(UNet.from_diffusers(pipe.unet), **{k: config[k] for k in SIGMAS}).eval()


def save_npz(path: Path, images: Tensor) -> None:
    """uint8 images as `samples` [N,H,W,C], the layout that published FID tools read."""
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    write_atomically(path, lambda file: np.savez_compressed(file, samples=pixels))
