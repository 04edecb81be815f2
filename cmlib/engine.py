"""TensorRT: an engine out of an ONNX model, on the GPU that will run it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmlib.formats import need
from cmlib.ops import Network

MAX_BATCH = 64  # of one call; a larger batch is cut


def available() -> Any:
    """The module `tensorrt`. Raises ValueError without a GPU, or below version 10, which ignores a model's own precisions."""
    if not torch.cuda.is_available():
        raise ValueError("TensorRT needs the GPU that will run the engine, and this machine has none; give --format onnx")
    need("tensorrt")
    trt = importlib.import_module("tensorrt")
    if int(trt.__version__.split(".")[0]) < 10:
        raise ValueError(f"TensorRT {trt.__version__} is too old; pip install -U tensorrt brings 10 or newer")
    return trt


def build(model: bytes, shape: tuple[int, ...]) -> bytes:
    """An engine of an ONNX model, each tensor in the model's own precision, for 1 to MAX_BATCH images [C,H,W]."""
    trt = available()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise ValueError(f"TensorRT {trt.__version__} cannot read the model: {parser.get_error(0).desc()}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("x", *[(n, *shape) for n in (1, 8, MAX_BATCH)])  # the smallest, the best served, the largest
    profile.set_shape("t", *[(n,) for n in (1, 8, MAX_BATCH)])
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(f"TensorRT {trt.__version__} cannot build this model on {torch.cuda.get_device_name()}")
    return bytes(plan)


def read(path: Path) -> Network:
    """The function of an engine, of CUDA tensors."""
    trt = available()
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ValueError(f"{path} was built for another GPU, or another TensorRT than {trt.__version__}; export again here")
    context = engine.create_execution_context()

    def run(x: Tensor, t: Tensor) -> Tensor:
        if len(x) > MAX_BATCH:
            return torch.cat([run(*part) for part in zip(x.split(MAX_BATCH), t.split(MAX_BATCH), strict=True)])
        tensors = {"x": x.contiguous(), "t": t.contiguous(), "x0_hat": torch.empty(x.shape, device=x.device)}
        for name, tensor in tensors.items():
            if name != "x0_hat" and not context.set_input_shape(name, tuple(tensor.shape)):
                raise RuntimeError(f"TensorRT refuses {name} of shape {list(tensor.shape)}")
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT could not run the engine")
        return tensors["x0_hat"]

    return run
