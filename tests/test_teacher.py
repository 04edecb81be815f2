"""The teacher's steps against diffusers' schedulers and pipelines, and against an oracle that knows the truth."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import nn

from cmlib.ops import expand_like
from cmlib.oracle import GaussianMixture
from cmlib.process import DDPM
from cmlib.teacher import Teacher, warm_start
from cmlib.unet import UNet
from tests.small import UNET

TINY = {**UNET, "in_channels": 3, "out_channels": 3}


def tiny_teacher(process=None, clip=1.0, variance_type="fixed_large"):
    torch.manual_seed(0)
    return Teacher(UNet(**TINY), process or DDPM.linear(), clip, variance_type).to("cpu")


class OracleNet(nn.Module):
    """ε(x_n, n) = (x − D(x, σ))/σ of known data: what a perfect DDPM network would answer."""

    def __init__(self, oracle, process):
        super().__init__()
        self.oracle, self.process = oracle, process

    def forward(self, x, n):
        x, sigma = self.process.to_edm(x, n)
        return (x - self.oracle.denoise(x, sigma)) / expand_like(sigma, x)


MIXTURE = GaussianMixture(torch.tensor([[1.0, 0.5], [-1.0, 1.0], [0.0, -1.2]]), 0.5, torch.tensor([5.0, 3.0, 2.0]))
ORACLE = Teacher(OracleNet(MIXTURE, DDPM.linear()), DDPM.linear(), clip=None)


# ---- the chain's own steps


@pytest.mark.parametrize("process", [DDPM.linear(), DDPM.cosine(), DDPM.cosine_linear()], ids=lambda p: p.name)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [None, 1.0, 0.7])
@pytest.mark.parametrize("stride", [1, 20])
def test_vectorised_posterior_is_bit_exact_to_diffusers(process, variance_type, clip, stride):
    teacher = Teacher(nn.Identity(), process, clip, variance_type)
    scheduler = teacher.scheduler()
    scheduler.set_timesteps(1000 // stride)
    n = torch.tensor([0, 0, 1, 2, 19, 37, 499, 500, 998, 999]) // stride * stride
    x, eps = torch.randn(2, len(n), 3, 4, 4)
    mean, std = teacher.posterior(x, eps, n, (n - stride).clamp(min=-1))
    for i, t in enumerate(n.tolist()):
        noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(i))
        theirs = scheduler.step(eps[i : i + 1], t, x[i : i + 1], generator=torch.Generator().manual_seed(i)).prev_sample
        assert torch.equal(mean[i : i + 1] + std[i : i + 1] * noise, theirs), f"t={t}"


def test_ancestral_and_posterior_mean_steps():
    teacher = tiny_teacher()
    x, noise = torch.randn(2, 4, 3, 8, 8)
    n, r = torch.tensor([999, 500, 1, 0]), torch.tensor([998, 480, 0, -1])
    mean, std = teacher.posterior(x, teacher.eps(x, n), n, r)
    assert torch.equal(teacher.step(x, n, r, "posterior_mean"), mean)
    assert torch.equal(teacher.step(x, n, r, "ancestral", noise), mean + std * noise)
    assert std[3] == 0 and bool((std[:3] > 0).all())


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_step_equals_diffusers(clip, steps):
    teacher = tiny_teacher(clip=clip)
    scheduler = DDIMScheduler(clip_sample=clip is not None)
    scheduler.set_timesteps(steps)
    stride = 1000 // steps
    for t in (scheduler.timesteps[0], scheduler.timesteps[steps // 2], scheduler.timesteps[-1]):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(int(t)))
        n = torch.full((2,), int(t))
        theirs = scheduler.step(teacher.eps(x, n), int(t), x, use_clipped_model_output=True).prev_sample
        ours = teacher.step(x, n, (n - stride).clamp(min=-1), "ddim")
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_ddim_10_equals_diffusers_pipeline():
    teacher = tiny_teacher()
    pipe = DDIMPipeline(teacher.unet.to_diffusers(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    theirs = pipe(2, generator, num_inference_steps=10, use_clipped_model_output=True, output_type="np").images
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    ours = teacher.sample(noise, 10) / 2 + 0.5
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, rtol=0, atol=1e-5)


def test_ancestral_sampling_equals_diffusers_pipeline():
    teacher = tiny_teacher(DDPM.linear(20, beta_end=0.3))
    pipe = DDPMPipeline(teacher.unet.to_diffusers(), teacher.scheduler())
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(2, torch.Generator().manual_seed(3), num_inference_steps=20, output_type="np").images
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(2, 3, 8, 8, generator=generator)
    ours = teacher.sample(start, 20, "ancestral", draw=lambda k: torch.randn(start.shape, generator=generator)) / 2 + 0.5
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, rtol=0, atol=1e-5)


def test_sample_path_starts_at_the_noise_and_ends_at_the_image():
    teacher = tiny_teacher()
    noise = torch.randn(2, 3, 8, 8)
    path = teacher.sample(noise, 5, path=True)
    assert path.shape == (6, 2, 3, 8, 8)
    torch.testing.assert_close(path[0], teacher.process.to_edm(noise, torch.full((2,), 800))[0])
    assert torch.equal(path[-1].clamp(-1, 1), teacher.sample(noise, 5))


# ---- the ODE against the oracle


def test_score_is_tweedie():
    t = torch.logspace(-1.5, 2, 64)
    x = MIXTURE.sample(64) + t[:, None] * torch.randn(64, 2)
    torch.testing.assert_close(ORACLE.denoise(x, t), MIXTURE.denoise(x, t), rtol=0, atol=1e-3)
    torch.testing.assert_close(ORACLE.score(x, t) * t[:, None], MIXTURE.score(x, t) * t[:, None], rtol=0, atol=1e-3)


def test_clipping_is_off_in_the_score_only():
    teacher = Teacher(ORACLE.unet, ORACLE.process, clip=0.3)
    t = torch.full((32,), 0.2)
    x = MIXTURE.sample(32)
    assert teacher.denoise(x, t).abs().max() <= 0.3 < teacher.denoise(x, t, clip=False).abs().max()
    assert torch.equal(teacher.score(x, t), ORACLE.score(x, t))


@pytest.mark.parametrize(("solver", "factor"), [("ddim", 2), ("heun", 4)])
def test_order_of_the_solvers(solver, factor):
    """Halving the step divides the global error by 2 (Euler) and by 4 (Heun)."""
    generator = torch.Generator().manual_seed(0)
    x = MIXTURE.sample(256, generator) + 8 * torch.randn(256, 2, generator=generator)
    truth = MIXTURE.consistency(x, torch.full((256,), 8.0), 0.5)
    errors = []
    for steps in (16, 32, 64):
        levels, y = torch.logspace(np.log10(8), np.log10(0.5), steps + 1), x
        for t, r in zip(levels, levels[1:], strict=False):
            y = ORACLE.ode_step(y, t.expand(256), r.expand(256), solver)
        errors.append(float((y - truth).norm()))
    assert errors[0] / errors[1] == pytest.approx(factor, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(factor, rel=0.25)


def test_heun_chain_beats_ddim_chain_at_equal_steps():
    noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    top = torch.full((256,), 980)
    truth = MIXTURE.consistency(ORACLE.process.to_edm(noise, top)[0], ORACLE.process.sigma(top), 0.0)
    x = {solver: noise for solver in ("ddim", "heun")}
    for n, r in zip(range(980, -1, -20), [*range(960, -1, -20), -1], strict=True):
        at, to = torch.full((256,), n), torch.full((256,), r)
        x = {solver: ORACLE.step(y, at, to, solver) for solver, y in x.items()}
    errors = {solver: float((y - truth).norm() / truth.norm()) for solver, y in x.items()}
    assert errors["heun"] < 0.5 * errors["ddim"] < 0.1, errors


# ---- files and errors


@pytest.mark.parametrize("process", [DDPM.linear(), DDPM.cosine_linear(100)], ids=lambda p: p.name)
@pytest.mark.parametrize(("clip", "variance_type"), [(1.0, "fixed_large"), (None, "fixed_small"), (0.5, "fixed_small")])
def test_save_pretrained_round_trip(tmp_path, process, clip, variance_type):
    teacher = tiny_teacher(process, clip, variance_type)
    teacher.save_pretrained(tmp_path)
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe.scheduler, DDPMScheduler) and torch.equal(pipe.scheduler.betas, process.betas)
    loaded = Teacher.from_pretrained(tmp_path)
    assert loaded.hash() == teacher.hash() and loaded.process.name == process.name
    assert (loaded.clip, loaded.variance_type) == (clip, variance_type)
    x, n = torch.randn(2, 3, 8, 8), torch.tensor([3, 77])
    torch.testing.assert_close(loaded.eps(x, n), pipe.unet(x, n).sample, rtol=1e-5, atol=1e-5)


def test_hash_tells_teachers_apart():
    base = tiny_teacher()
    moved = tiny_teacher()
    moved.unet.conv_out.bias[0] += 1e-6
    others = [moved, tiny_teacher(DDPM.cosine()), tiny_teacher(clip=None), tiny_teacher(variance_type="fixed_small")]
    assert base.hash() == tiny_teacher().hash()
    assert len({t.hash() for t in [base, *others]}) == 5


def one_line(error):
    return "\n" not in str(error.value)


def test_missing_or_damaged_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot load a DDPM teacher from .*hub id such as google/ddpm-cifar10-32") as error:
        Teacher.from_pretrained(tmp_path / "nothing")
    assert one_line(error)
    tiny_teacher().save_pretrained(tmp_path)
    weights = next(tmp_path.glob("unet/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot load a DDPM teacher") as error:
        Teacher.from_pretrained(tmp_path)
    assert one_line(error)


def test_other_predictions_are_refused(tmp_path):
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    DDPMPipeline(tiny_teacher().unet.to_diffusers(), scheduler).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must predict epsilon, .* predicts 'v_prediction'") as error:
        Teacher.from_pretrained(tmp_path)
    assert one_line(error)


@pytest.mark.parametrize(
    ("n", "r", "solver", "message"),
    [
        (5, 4, "euler", "solver must be one of posterior_mean, ancestral, ddim, heun, got 'euler'"),
        (5, 5, "ddim", "-1 <= r < n < 1000"),
        (5, 6, "ddim", "-1 <= r < n < 1000"),
        (1000, 6, "ddim", "-1 <= r < n < 1000"),
        (5, -2, "ddim", "-1 <= r < n < 1000"),
        (5, 4, "ancestral", "needs noise"),
    ],
)
def test_bad_steps_are_refused(n, r, solver, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_teacher().step(torch.zeros(1, 3, 8, 8), torch.tensor([n]), torch.tensor([r]), solver)
    assert one_line(error)


def test_bad_variance_type_is_refused():
    with pytest.raises(ValueError, match="fixed_small or fixed_large, got 'learned'"):
        tiny_teacher(variance_type="learned")


def test_warm_start_keeps_the_body_and_translates_time():
    torch.manual_seed(0)
    teacher = Teacher(UNet(**TINY | {"block_out_channels": (32, 32)}), DDPM.linear()).to("cpu")
    student = warm_start(teacher, sigma_max=80.0)
    sigma = torch.logspace(-1.9, 1.9, 64)
    with torch.no_grad():
        goal = teacher.unet.time_features(teacher.process.index(sigma))
        refitted, untouched = (net.time_features(250 * sigma.log()) for net in (student.net, teacher.unet))
    assert (refitted - goal).norm() < 0.5 * (untouched - goal).norm()
    ours, theirs = student.net.state_dict(), teacher.unet.state_dict()
    for name in ours.keys() - {k for k in ours if k.startswith("time_embedding")}:
        assert torch.equal(ours[name], -theirs[name] if name.startswith("conv_out") else theirs[name]), name
