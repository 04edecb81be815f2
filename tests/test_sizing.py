"""What a run costs, against what it is counted from."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from cmlib import cli, data, profiles, sizing
from cmlib.cache import PairCache
from cmlib.process import DDPM
from cmlib.teacher import Teacher
from cmlib.unet import UNet
from tests.small import UNET


def test_operations_of_a_forward_pass_are_those_of_its_layers(monkeypatch):
    """2·C_in·k²·C_out·H·W for a convolution, 2·in·out for a linear layer, added up by hooks; and attention's two products."""
    monkeypatch.setitem(data.SETS, "small", data.Source("", (3, 16, 16)))
    profile = replace(profiles.T4, dataset="small", widths=(32, 64), attention=1)
    net, total = sizing.network(profile), [0.0]

    def count(layer, inputs, output):
        if isinstance(layer, nn.Conv2d):
            total[0] += 2 * layer.weight.numel() * output.shape[2] * output.shape[3]
        elif isinstance(layer, nn.Linear):
            total[0] += 2 * layer.weight.numel() * output[0].numel() / layer.out_features

    for layer in net.modules():
        layer.register_forward_hook(count)
    with torch.no_grad():
        net(torch.zeros(1, 3, 16, 16), torch.ones(1))
    attention = 6 * 2 * 2 * 64**2 * 64  # 2 on the way down, 1 in the middle, 3 up; 8×8 places, 64 channels, two products
    assert sizing.forward_flops(profile) == pytest.approx(total[0] + attention, rel=1e-3)


def test_bytes_are_those_of_a_cache(tmp_path):
    torch.manual_seed(0)
    images = torch.zeros(10, 1, 8, 8, dtype=torch.uint8)
    cache = PairCache.build(tmp_path, Teacher(UNet(**UNET), DDPM.linear()), 1000, images=images)
    assert cache.path(0).stat().st_size == pytest.approx(1000 * (4 * math.prod((1, 8, 8)) + 12), rel=0.02)
    found = sizing.table("cifar10", 1e12)
    assert found["gigabytes.cache"] == pytest.approx(200_000 * (4 * 3 * 32 * 32 + 12) / 1e9)
    assert found["parameters.millions"] == pytest.approx(35.746307)  # google/ddpm-cifar10-32's


def test_hours_follow_the_rate_and_every_data_set_has_a_plan(tmp_path, monkeypatch):
    assert list(sizing.PLANS) == ["cifar10", "celebahq64", "ffhq-latents", "imagenet128"]
    for name, profile in sizing.PLANS.items():
        slow, fast = sizing.table(name, 1e12), sizing.table(name, 2e12)
        passes = {
            "teacher": 3 * profile.teacher_updates * profile.batch_size,  # forward, and backward as two
            "cache": profile.pairs,
            "distil": 4 * profile.distill_updates * profile.batch_size,  # and the target
            "evaluate": 3 * profile.samples * (50 + 1 + 2),  # seeds; DDIM-50, the student at one and two evaluations
        }
        for stage, n in passes.items():
            key = f"hours.{stage}.this machine"
            hours = pytest.approx(n * sizing.forward_flops(profile) / 1e12 / 3600)
            assert slow[key] == hours and 2 * fast[key] == hours
    monkeypatch.setattr(sizing, "measured_rate", lambda: 1e11)
    assert cli.main(["doctor", "--plan", "cifar10", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["pairs"] == 200_000


def test_the_rate_is_measured():
    assert 1e8 < sizing.measured_rate(0.1) < 1e15
