"""How each objective is trained from a teacher's weights: the student it starts from, its options, optimiser and step size."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cmlib import data
from cmlib.consistency import ConsistencyFunction, PlainFunction
from cmlib.continuous import AdaptiveWeight, FlowNetwork, MeanFlowFunction
from cmlib.objectives import (
    ECT,
    ICT,
    SCM,
    SCT,
    BootstrapRegression,
    ConsistencyDistillation,
    ConsistencyTraining,
    EndpointRegression,
    MeanFlow,
    PairRegression,
)
from cmlib.ops import Distance, device_of, pseudo_huber
from cmlib.process import EDM
from cmlib.profiles import Profile
from cmlib.teacher import Teacher, warm_start
from cmlib.unet import UNet

LEVELS = 18  # of consistency distillation
WHOLE_REFERENCE = 5_000  # up to so many images, SCT's reference is the whole data set
CACHED = ("pair-regression", "endpoint-regression", "consistency-distillation")  # that can train on a pair cache
TUNING = ("ect", "sct", "scm", "scd")  # whose f(x, 0) = x has its boundary at 0
OBJECTIVES = (*CACHED, "ct", "ict", *TUNING, "bootstrap", "meanflow")


def largest_sigma(teacher: Teacher) -> float:
    """Where a student of images jumps from: the papers' 80 for 32×32 (CM, iCT, ECT), in proportion to the side, as a
    smaller image drowns in less noise (Hoogeboom et al. 2023)."""
    return 80.0 * teacher.image_shape[1] / 32


def first_student(objective: str, teacher: Teacher, sigma_max: float) -> Any:
    """What training by `objective` starts from: the teacher's weights behind the boundary that its paper has."""
    f = warm_start(teacher, sigma_max)
    if objective == "pair-regression":
        return PlainFunction(f.net)
    rho = math.log(sigma_max / f.levels(2)[1]) / math.log(39 / 19)  # with σ_min = 0, the same second level as f's
    if objective == "meanflow":
        return MeanFlowFunction(FlowNetwork(with_one_more_channel(cast(UNet, f.net)), sigma_max), sigma_max, rho)
    return ConsistencyFunction(f.net, 0.0, sigma_max, f.sigma_data, rho) if objective in TUNING else f


def stages(steps: int) -> int:
    """Of ECT's and SCT's gap: a run twice as long affords one halving more, from 5 at 500 updates to the paper's 8."""
    return min(8, max(2, round(math.log2(steps / 16))))


def with_one_more_channel(net: UNet) -> UNet:
    """The same function of its first channels; the weights of the new input channel are 0."""
    wider = UNet.from_config({**net.config, "in_channels": net.config["in_channels"] + 1}).to(device_of(net))
    weights = net.state_dict()
    weights["conv_in.weight"] = F.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, 1))
    wider.load_state_dict(weights)
    return wider


def recipe(
    objective: str,
    profile: Profile,
    updates: int | None,
    student: Any,
    shape: tuple[int, ...],
    teacher: Teacher | None = None,
    images: Tensor | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The objective called `objective`, and the settings of `fit` that go with it: the papers' optimisers (but
    MeanFlow's Adam), PyTorch's momenta, our step sizes. A student of sCM that has no weight w(t) yet gets one."""
    huber: Distance = partial(pseudo_huber, c=0.03 * math.prod(shape) ** 0.5)
    steps = updates or profile.distill_updates
    tuning: dict[str, Any] = {"steps": steps, "lr": 6e-4, "optimizer": "radam", "warmup": steps // 20}
    if objective == "pair-regression":
        return PairRegression(), {"steps": updates or profile.regression_updates, "lr": 2e-4}
    if objective == "endpoint-regression":
        return EndpointRegression(huber), {"steps": updates or profile.endpoint_updates, "lr": 1e-3, "warmup": 20}
    if objective == "consistency-distillation":
        levels = None
        if teacher is not None and images is not None:
            last = teacher.process.index(torch.tensor(student.sigma_max))
            levels = teacher.process.sigma(torch.linspace(0, float(last), LEVELS))
        chosen = ConsistencyDistillation(teacher if images is not None else None, levels, distance=huber, mu=0.9)
        return chosen, {"steps": steps, "lr": 3e-4, "optimizer": "radam"}
    if objective == "sct" and images is not None:
        reference = data.to_float(images).to(device_of(student)) if len(images) <= WHOLE_REFERENCE else "batch"
        return SCT(steps, stages(steps), reference=reference), {**tuning, "lr": 1e-3}
    if objective == "ct":
        return ConsistencyTraining(steps, s1=20, process=EDM(student.sigma_min, student.sigma_max), distance=huber), tuning
    if objective == "bootstrap":
        assert teacher is not None
        return BootstrapRegression(teacher.process), {"steps": steps, "lr": 2e-4, "grad_clip": 1.0}
    if objective == "meanflow":
        return MeanFlow(), tuning
    if objective in ("scm", "scd"):
        if not hasattr(student, "log_weight"):
            student.log_weight = AdaptiveWeight().to(device_of(student))
        return SCM(teacher if objective == "scd" else None, warmup=steps // 5), tuning
    if objective == "ict":
        return ICT(steps, EDM(student.sigma_min, student.sigma_max)), tuning
    if objective == "ect":
        return ECT(steps, stages(steps)), {**tuning, "lr": 1e-3}
    raise ValueError(f"no objective {objective!r}; choose one of {', '.join(OBJECTIVES)}")
