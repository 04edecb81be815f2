"""f(x, t) whole, scalings inside and any batch size, as TorchScript, a torch.export program or ONNX, in fp32, fp16 or INT8."""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmlib.consistency import SIGMAS, ConsistencyFunction
from cmlib.data import to_float
from cmlib.ops import Network, expand_like
from cmlib.unet import UNet

Inputs = tuple[Tensor, Tensor]  # x [B,C,H,W] and t [B]
MULTIPLICATIONS = ("Conv", "Gemm", "MatMul")  # ONNX's names for where the network's weights are
PLAIN = re.compile(  # the files of a torch.export archive of tensors and one graph in JSON
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/model_constants_config\.json"
    r"|data/sample_inputs/model\.pt|models/model\.json|archive_format|archive_version|version|byteorder|\.data/\w+"
)


def need(*packages: str) -> None:
    """Raise ValueError with what to install unless all of `packages` are there."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f"{package} is missing; pip install {' '.join(packages)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings nor logs: exporters and quantiser print pages of them that a user can do nothing about."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# ---- fp16


class HalfNetwork(nn.Module):
    """F(x, t) in float16 between float32 ends; t stays float32 as far as its sinusoids, and f's scalings outside do.

    In float16 σ² overflows above σ = 256, 250·ln σ is rounded to a whole number at σ = 80, and f(x, σ_min) = x would hold to
    three digits instead of exactly.
    """

    def __init__(self, net: UNet):
        super().__init__()
        self.config = net.config
        self.net = copy.deepcopy(net).half()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x.half(), t).float()


def halved(f: ConsistencyFunction) -> ConsistencyFunction:
    """f with its network in float16 and its scalings in float32."""
    if not isinstance(f.net, UNet):
        raise TypeError("only a ConsistencyFunction over cmlib.unet.UNet has a float16 twin")
    return ConsistencyFunction(HalfNetwork(f.net), **{k: getattr(f, k) for k in SIGMAS}).eval()


# ---- TorchScript


def torchscript(f: nn.Module, inputs: Inputs) -> bytes:
    """f traced; `torch.jit` is deprecated and warns, but loads in C++ without Python."""
    buffer = io.BytesIO()
    with torch.no_grad(), _quiet():
        torch.jit.save(torch.jit.trace(f, inputs), buffer)
    return buffer.getvalue()


def read_torchscript(path: Path) -> Network:
    """The function of a file that `torchscript` wrote."""
    with _quiet():
        return torch.jit.load(str(path)).eval()


# ---- torch.export


def _program(f: nn.Module, inputs: Inputs) -> Any:
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(f, inputs, dynamic_shapes=({0: batch}, {0: batch}))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the paths of this machine
    return program


def torch_export(f: nn.Module, inputs: Inputs) -> bytes:
    """f as a `torch.export` archive (.pt2)."""
    buffer = io.BytesIO()
    torch.export.save(_program(f, inputs), buffer)
    return buffer.getvalue()


def _is_plain(path: Path) -> bool:
    """Whether an archive is tensors and a graph: `torch.export.load` runs a pickle or a shared library that it finds in one."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name.partition("/")[2]: name for name in archive.namelist()}
            configs = [json.loads(archive.read(name))["config"] for short, name in files.items() if "_config." in short]
            torch.load(io.BytesIO(archive.read(files["data/sample_inputs/model.pt"])), weights_only=True)
            return (
                len(files) == len(archive.namelist())
                and all(PLAIN.fullmatch(name) for name in files)
                and not any(entry["use_pickle"] for config in configs for entry in config.values())
            )
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, TypeError, ValueError, RuntimeError):
        return False


def read_torch_export(path: Path) -> Network:
    """The function of an archive that `torch_export` wrote. Raises ValueError for one with more than tensors and a graph."""
    if not _is_plain(path):
        raise ValueError(f"{path} is damaged, or holds a pickle or a library, which is not run; refused")
    return torch.export.load(str(path)).module()


# ---- ONNX


def onnx(f: nn.Module, inputs: Inputs) -> bytes:
    """f as an ONNX model, weights inside, with inputs `x` and `t` and output `x0_hat`."""
    need("onnx", "onnxruntime", "onnxscript")
    names: dict[str, Any] = {"input_names": ["x", "t"], "output_names": ["x0_hat"]}
    with torch.no_grad(), _quiet():
        model: Any = torch.onnx.export(_program(f, inputs), (), dynamo=True, verbose=False, **names)
    return model.model_proto.SerializeToString()


def read_onnx(path: Path, tensorrt: bool = False) -> Network:
    """The function of an ONNX file in ONNX Runtime, on a GPU where its package has one, with as many threads as torch's.

    `tensorrt` puts ONNX Runtime's TensorRT provider first, which builds engines for the batch sizes that it meets.
    """
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    there = onnxruntime.get_available_providers()
    wanted = ["TensorrtExecutionProvider"] * tensorrt + ["CUDAExecutionProvider", "CPUExecutionProvider"]
    providers = [p for p in wanted if p in there]
    session = onnxruntime.InferenceSession(str(path), options, providers)
    return lambda x, t: torch.from_numpy(session.run(None, {"x": x.numpy(), "t": t.numpy()})[0])


def triton_config(shape: Sequence[int], most: int = 64) -> str:
    """`config.pbtxt` of an ONNX model of images `shape` for Triton, which batches up to `most` of them; t is sent as [N,1]."""
    image = f"data_type: TYPE_FP32, dims: {[*shape]}"
    return f"""backend: "onnxruntime"
max_batch_size: {most}
dynamic_batching {{ }}
input [
  {{ name: "x", {image} }},
  {{ name: "t", data_type: TYPE_FP32, dims: [1], reshape {{ shape: [] }} }}
]
output [ {{ name: "x0_hat", {image} }} ]
"""


def noise_levels(f: ConsistencyFunction, n: int) -> Tensor:
    """n levels σ from max(σ_min, 0.002) to σ_max, evenly spaced in ln σ: [n], ascending."""
    return torch.linspace(np.log(max(f.sigma_min, 0.002)), np.log(f.sigma_max), n).exp().clamp(f.sigma_min, f.sigma_max)


def calibration(f: ConsistencyFunction, images: Tensor, batch_size: int = 32) -> list[Inputs]:
    """Real (x_t, t): every uint8 image once, their levels spread evenly in ln σ."""
    t, x0 = noise_levels(f, len(images)), to_float(images)
    x_t = x0 + expand_like(t, x0) * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    return list(zip(x_t.split(batch_size), t.split(batch_size), strict=True))


def quantized(model: bytes, batches: Sequence[Inputs], operators: Sequence[str] = MULTIPLICATIONS) -> bytes:
    """An ONNX model with `operators` in INT8: Q/DQ nodes whose ranges are the largest values over `batches`.

    Symmetric, per channel and with float biases, which TensorRT reads, too, and which no CPU's kernels saturate. Leave the
    scalings out of `operators`: with an x_t at σ = 80 in its range, one INT8 step is wider than the whole image's.
    """
    need("onnx", "onnxruntime")
    from onnx import load_model_from_string
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        feeds = iter([{"x": x.numpy(), "t": t.numpy()} for x, t in batches])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        quantize_static(
            load_model_from_string(model),
            f"{folder}/int8.onnx",
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(operators),
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        return Path(folder, "int8.onnx").read_bytes()
