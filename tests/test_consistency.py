"""Boundary, scalings, averaging, sampling and files of the consistency function."""

import os

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cmlib.consistency import EMA, ConsistencyFunction, PlainFunction, c_in, c_noise, c_out, c_skip, sample
from cmlib.objectives import EndpointRegression
from cmlib.process import DDPM
from cmlib.train import fit
from cmlib.unet import UNet
from tests.small import UNET

TINY = {**UNET, "dropout": 0.3}


def tiny(**sigmas):
    torch.manual_seed(0)
    return ConsistencyFunction(UNet(**TINY), **sigmas)


# ---- the parameterisation


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("sigma_min", [0.0, 0.002, 0.01])
def test_boundary_is_the_identity_in_both_modes(train, sigma_min):
    f = tiny(sigma_min=sigma_min).train(train)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(f(x, torch.full((4,), sigma_min)), x)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.002, 80), st.sampled_from([0.002, 0.01]), st.sampled_from([0.5, 1.0]))
def test_scalings_equal_diffusers(sigma, sigma_min, sigma_data):
    scheduler = CMStochasticIterativeScheduler(sigma_min=sigma_min, sigma_data=sigma_data)
    t = torch.tensor(sigma, dtype=torch.float64)
    theirs = scheduler.get_scalings_for_boundary_condition(t)
    ours = c_skip(t, sigma_min, sigma_data), c_out(t, sigma_min, sigma_data)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(c_noise(t), torch.tensor(scheduler.sigma_to_t(sigma)))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_c_in_gives_the_network_unit_variance(sigma_data):
    """With c_in's root missing, or c_out's σ_data, the variances at t = 2 would be 1/4.25 and 4 times too large."""
    t = torch.full((20_000,), 2.0)
    x = sigma_data * torch.randn(20_000) + t * torch.randn(20_000)
    assert float((c_in(t, sigma_data) * x).var()) == pytest.approx(1, abs=0.05)
    far = torch.tensor(1e6)
    assert float(c_out(far, 0.002, sigma_data)) == pytest.approx(sigma_data)  # the output has the data's scale


def test_points_work_like_images():
    class Net(nn.Module):
        def forward(self, x, t):
            return x * t[:, None]

    f = ConsistencyFunction(Net(), sigma_min=0.0, sigma_data=1.0)
    x, t = torch.randn(5, 2), torch.linspace(0.1, 3, 5)
    by_hand = x / (t**2 + 1)[:, None] + (t * 250 * t.log() / (t**2 + 1))[:, None] * x
    torch.testing.assert_close(f(x, t), by_hand)


@pytest.mark.parametrize("sigmas", [{"sigma_min": -1.0}, {"sigma_min": 2.0, "sigma_max": 1.0}, {"sigma_data": 0.0}])
def test_impossible_sigmas_are_refused(sigmas):
    with pytest.raises(ValueError, match="need 0 <= sigma_min < sigma_max and sigma_data > 0"):
        tiny(**sigmas)


# ---- the average


def test_ema_moves_towards_the_model_and_leaves_the_model_alone():
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.9)
    start = ema.model.weight.clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    goal = model.weight.clone()
    for step in range(3):
        ema.update(model, step)
    torch.testing.assert_close(ema.model.weight, start + 1 - 0.9**3)
    assert torch.equal(model.weight, goal)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())


def test_ema_warm_up_follows_its_formula():
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, 0.9, warmup=True)
    expected = model.weight.item()
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.update(model, step)
        mu = min(0.9, (1 + step) / (10 + step))
        expected = mu * expected + (1 - mu) * step
    assert ema.model.weight.item() == pytest.approx(expected, rel=1e-5)


def test_ema_copies_buffers_and_refuses_bad_decays():
    model = nn.BatchNorm1d(3)
    ema = EMA(model, 0.9)
    model(torch.randn(8, 3))
    ema.update(model, 0)
    assert torch.equal(ema.model.running_mean, model.running_mean)
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"lies in \[0, 1\)"):
            EMA(model, decay)


# ---- sampling


@pytest.mark.parametrize("sigmas", [{}, {"sigma_min": 0.01, "sigma_data": 1.0}, {"sigma_min": 0.5, "sigma_max": 10.0}], ids=str)
@pytest.mark.parametrize("evaluations", [1, 2])
def test_sampling_equals_diffusers_pipeline(evaluations, sigmas):
    f = tiny(**sigmas).eval()
    pipe = ConsistencyModelPipeline(f.net.to_diffusers(), CMStochasticIterativeScheduler(**sigmas))
    pipe.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(5)
    theirs = pipe(4, num_inference_steps=evaluations, generator=seeded, output_type="np").images
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(4, 1, 8, 8, generator=generator) for _ in range(evaluations)]
    levels = f.levels(evaluations)
    np.testing.assert_allclose(levels, pipe.scheduler.sigmas[:-1], rtol=1e-5)
    ours = sample(f, noise, levels, f.sigma_min) / 2 + 0.5
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, rtol=0, atol=1e-4)


def test_sampling_refuses_misfits():
    noise = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="2 levels need as many noise batches, got 1"):
        sample(lambda x, t: x, noise, [80.0, 1.0])
    with pytest.raises(ValueError, match="sigmas must descend"):
        sample(lambda x, t: x, [noise, noise], [1.0, 80.0])
    with pytest.raises(ValueError, match="evaluations must lie in 1 … 40"):
        tiny().levels(41)


# ---- files


@pytest.mark.parametrize("name", ["student.safetensors", "student.pt"])
def test_save_load_round_trip(tmp_path, name):
    f = tiny(sigma_min=0.01, sigma_max=40.0, sigma_data=1.0, rho=5.0).eval()
    f.save(tmp_path / name)
    loaded = ConsistencyFunction.load(tmp_path / name)
    assert loaded.config == f.config and not loaded.training
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 30.0])
    assert torch.equal(loaded(x, t), f(x, t))
    assert [p.name for p in tmp_path.iterdir()] == [name]  # no temporary file stays


def test_load_takes_the_average_from_a_training_checkpoint(tmp_path):
    batch = {"x_t": torch.randn(4, 1, 8, 8), "t": torch.ones(4), "x_end": torch.randn(4, 1, 8, 8)}
    f = tiny()
    average, _ = fit(f, EndpointRegression(), lambda start: iter([batch] * (3 - start)), 3, lr=1e-2, folder=tmp_path)
    loaded = ConsistencyFunction.load(tmp_path / "checkpoint.pt")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, average.state_dict()[name])
    assert not torch.equal(loaded.net.conv_out.weight, f.net.conv_out.weight)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"config": {}, "ema": m}], ids=["bare", "inside a checkpoint"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, wrap):
    torch.save(wrap(Malicious(tmp_path / "owned")), tmp_path / "student.pt")
    with pytest.raises(ValueError, match="pickle with code in it, which is not run; refused"):
        ConsistencyFunction.load(tmp_path / "student.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["student.safetensors", "student.pt"])
def test_truncated_files_are_refused(tmp_path, name):
    path = tmp_path / name
    tiny().save(path)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=name) as error:
            ConsistencyFunction.load(path)
        assert "\n" not in str(error.value)


def test_a_flipped_bit_in_safetensors_is_refused(tmp_path):
    path = tmp_path / "student.safetensors"
    tiny().save(path)
    whole = path.read_bytes()
    for at in (len(whole) - 1, whole.index(b"sigma_data") + 13):  # a weight; a digit of a setting
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="not a consistency model"):
            ConsistencyFunction.load(path)


@pytest.mark.parametrize("content", [{}, {"config": {"unet": {}}, "ema": {}}, [1, 2], {"config": 3, "ema": {}}], ids=str)
def test_files_of_something_else_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "student.pt")
    with pytest.raises(ValueError, match="not a consistency model this version can read"):
        ConsistencyFunction.load(tmp_path / "student.pt")
    with pytest.raises(ValueError, match="no checkpoint at"):
        ConsistencyFunction.load(tmp_path / "nothing.safetensors")


def test_only_a_unet_is_saved(tmp_path):
    with pytest.raises(TypeError, match=r"only a ConsistencyFunction over cmlib\.unet\.UNet"):
        ConsistencyFunction(nn.Linear(2, 2)).save(tmp_path / "student.safetensors")


def test_below_the_boundary_f_is_the_identity_too():
    f = ConsistencyFunction(lambda_net(), sigma_min=0.01)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(f(x, torch.tensor([0.0, 0.005, 0.01])), x)


def test_the_briefs_student_is_the_network_on_the_chains_state():
    net, chain = lambda_net(), DDPM.linear()
    x, n = torch.randn(3, 1, 8, 8), torch.tensor([10, 500, 999])
    edm_x, sigma = chain.to_edm(x, n)
    torch.testing.assert_close(PlainFunction(net)(edm_x, sigma), net(x, 250 * sigma.log()), rtol=1e-4, atol=1e-4)


def lambda_net():
    torch.manual_seed(0)
    return UNet(**UNET)
