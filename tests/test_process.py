"""Forward processes against diffusers, the chain's own recursion, autograd and published formulas."""

import math

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlib.process import DDPM, EDM, TrigFlow, ode_step

CHAINS = {"linear": DDPM.linear(), "cosine": DDPM.cosine(), "cosine-linear": DDPM.cosine_linear()}


@pytest.fixture(params=list(CHAINS))
def chain(request):
    return CHAINS[request.param]


def test_linear_betas_and_alpha_bar_equal_diffusers():
    scheduler = DDPMScheduler()
    assert torch.equal(DDPM.linear().betas, scheduler.betas)
    assert torch.equal(DDPM.linear().alpha_bar, scheduler.alphas_cumprod)


def test_cosine_alpha_bar_equals_diffusers():
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(DDPM.cosine().alpha_bar, scheduler.alphas_cumprod, rtol=2e-5, atol=0)


def test_from_scheduler_copies_the_chain():
    chain = DDPM.from_scheduler(DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50))
    assert chain.T == 50 and chain.name == "squaredcos_cap_v2"


def test_cosine_linear_has_the_ends_and_the_total_noise_of_linear():
    betas, linear = DDPM.cosine_linear().betas, DDPM.linear().betas
    assert betas[0] == linear[0] and betas[-1] == linear[-1] and bool((betas.diff() > 0).all())
    torch.testing.assert_close(betas.double().sum(), linear.double().sum(), rtol=1e-6, atol=0)
    assert (betas - linear).abs().max() > 1e-3  # and is not the linear schedule


def test_perturb_has_the_marginals_of_the_chain(chain):
    """x_n = √(1−β_n)·x_{n−1} + √β_n·ε, so the mean shrinks by √(1−β) and the variance v becomes (1−β)·v + β a step."""
    mean, variance = np.ones(chain.T), np.zeros(chain.T)
    m, v = 1.0, 0.0
    for n, beta in enumerate(chain.betas.double().tolist()):
        m, v = m * math.sqrt(1 - beta), v * (1 - beta) + beta
        mean[n], variance[n] = m, v
    n = torch.tensor([0, 1, 10, 250, 500, 900, 999])
    count = 100_000
    eps = torch.randn(count, generator=torch.Generator().manual_seed(0))
    for k in n.tolist():
        x = chain.perturb(torch.full((count,), 0.7), eps, torch.full((count,), k)).double()
        assert abs(x.mean() - 0.7 * mean[k]) < 5 * math.sqrt(variance[k] / count)
        assert abs(x.var() / variance[k] - 1) < 5 * math.sqrt(2 / count) + 2e-3  # 2e-3: ᾱ_0 in float32


def test_perturb_equals_diffusers_add_noise():
    x0, eps = torch.randn(2, 6, 3, 4, 4)
    n = torch.tensor([0, 3, 77, 500, 998, 999])
    torch.testing.assert_close(DDPM.linear().perturb(x0, eps, n), DDPMScheduler().add_noise(x0, eps, n), rtol=1e-5, atol=1e-5)


def test_minus_one_is_the_clean_image(chain):
    x0, eps = torch.randn(2, 4, 1, 2, 2)
    n = torch.full((4,), -1)
    assert torch.equal(chain.perturb(x0, eps, n), x0)
    assert torch.equal(chain.sigma(n), torch.zeros(4))
    assert torch.equal(chain.to_edm(x0, n)[0], x0)


def test_sigma_of_the_linear_chain():
    chain = DDPM.linear()
    assert f"{chain.sigma_min:.4f}" == "0.0100" and f"{chain.sigma_max:.1f}" == "157.4"
    sigma = chain.sigma(torch.arange(1000))
    scheduler_bar = DDPMScheduler().alphas_cumprod.double()
    torch.testing.assert_close(sigma.double(), ((1 - scheduler_bar) / scheduler_bar).sqrt(), rtol=1e-6, atol=0)
    assert abs(float(chain.index(torch.tensor([80.0]))) - 929.6) < 0.1


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(CHAINS)), st.floats(0, 998.9))
def test_index_inverts_sigma(name, n):
    chain, n = CHAINS[name], torch.tensor([n])
    sigma = chain.sigma(n)
    torch.testing.assert_close(chain.sigma(chain.index(sigma)), sigma, rtol=1e-5, atol=0)
    torch.testing.assert_close(chain.index(sigma), n, rtol=0, atol=0.01)


def test_index_is_clamped_to_the_chain():
    assert DDPM.linear().index(torch.tensor([1e-5, 1e5])).tolist() == [0.0, 999.0]


@pytest.mark.parametrize("process", [DDPM.linear(), DDPM.cosine_linear(), TrigFlow(), TrigFlow(sigma_data=1.0), EDM()])
@settings(max_examples=10, deadline=None)
@given(st.floats(0.02, 0.99), st.integers(0, 1000))
def test_conversions_invert_each_other(process, u, seed):
    x0, eps = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    t = torch.full((3,), u * {DDPM: 998.0, TrigFlow: math.pi / 2, EDM: 80.0}[type(process)])
    x = process.perturb(x0, eps, t)
    edm_x, sigma = process.to_edm(x, t)
    torch.testing.assert_close(edm_x, EDM().perturb(x0, eps, sigma), rtol=1e-4, atol=1e-4)  # the common language
    back, t_back = process.from_edm(edm_x, sigma)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(t_back, t, rtol=1e-5, atol=0.01 if isinstance(process, DDPM) else 1e-6)


@pytest.mark.parametrize(
    ("process", "levels"),
    [
        (EDM(), [0.01, 0.5, 7.0, 80.0]),
        (TrigFlow(), [0.01, 0.4, 1.1, 1.55]),
        (TrigFlow(sigma_data=1.0), [0.01, 0.4, 1.1, 1.55]),
        (DDPM.linear(), [0.5, 20.3, 499.5, 998.7]),
        (DDPM.cosine(), [0.5, 20.3, 499.5, 990.7]),
        (DDPM.cosine_linear(), [0.5, 20.3, 499.5, 998.7]),
    ],
)
def test_velocity_is_the_derivative_of_perturb(process, levels):
    x0, eps = torch.randn(2, len(levels), 1, 2, 2, dtype=torch.float64)
    t = torch.tensor(levels, dtype=torch.float64)
    x, dx = torch.func.jvp(lambda t: process.perturb(x0, eps, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(process.velocity(x, x0, t).double(), dx, rtol=1e-5, atol=1e-7)


def test_karras_grid_is_the_published_one():
    grid = EDM().grid(18)
    assert grid[0] == pytest.approx(0.002, rel=1e-6) and grid[-1] == pytest.approx(80.0, rel=1e-6)
    descending = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]  # EDM eq. 5
    np.testing.assert_allclose(grid.numpy(), descending[::-1], rtol=1e-6)
    np.testing.assert_allclose(grid.flip(0), CMStochasticIterativeScheduler(18).sigmas, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 10, 50, 1000])
def test_chain_grid_is_diffusers_leading_spacing(steps):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    assert DDPM.linear().grid(steps).flip(0).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, 1001])
def test_chain_grid_refuses_impossible_step_counts(steps):
    with pytest.raises(ValueError, match="steps must lie in 1 … 1000"):
        DDPM.linear().grid(steps)


@pytest.mark.parametrize("betas", [[0.0, 0.1], [0.1, 1.0], [-0.1, 0.1], [0.1, float("nan")], [[0.1, 0.2]], [], [0.1]], ids=str)
def test_bad_betas_are_refused(betas):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        DDPM(torch.tensor(betas))


def test_ode_step_refuses_unknown_solvers():
    with pytest.raises(ValueError, match="'ddim' or 'heun', got 'rk4'"):
        ode_step(lambda x, t: x, torch.zeros(1, 1), torch.ones(1), torch.zeros(1), "rk4")


def test_heun_is_euler_where_r_is_zero():
    x, t, r = torch.randn(4, 2), torch.full((4,), 2.0), torch.tensor([0.0, 0.0, 1.0, 1.0])
    euler, heun = (ode_step(lambda x, t: 0.1 * x, x, t, r, solver) for solver in ("ddim", "heun"))
    assert torch.equal(euler[:2], heun[:2]) and bool((euler[2:] != heun[2:]).all())
