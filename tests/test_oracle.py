"""The oracles against autograd, Bayes' rule by brute force, and an adaptive integrator."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.stats import multivariate_normal

from cmlib.oracle import Gaussian, GaussianMixture

MEANS = torch.tensor([[1.0, 0.5], [-1.0, 1.0], [0.0, -1.2]], dtype=torch.float64)
WEIGHTS = torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64)
STD = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MIXTURE = GaussianMixture(MEANS, STD, WEIGHTS)
GAUSSIAN = Gaussian(torch.tensor([0.4, -0.3]).double(), 0.6)


def states(oracle, n=64, low=0.01, high=80.0):
    """x [n,2] and t [n] from the process, t evenly spread in ln t."""
    g = torch.Generator().manual_seed(0)
    t = torch.logspace(np.log10(low), np.log10(high), n, dtype=torch.float64)
    return oracle.sample(n, g) + t[:, None] * torch.randn(n, 2, generator=g, dtype=torch.float64), t


def test_log_prob_is_the_convolved_mixture():
    x, t = states(MIXTURE, 8)
    for x_i, t_i, ours in zip(x.numpy(), t.tolist(), MIXTURE.log_prob(x, t), strict=True):
        density = sum(
            w / 10 * multivariate_normal(mean, s**2 + t_i**2).pdf(x_i)
            for w, mean, s in zip(WEIGHTS.tolist(), MEANS.numpy(), STD.tolist(), strict=True)
        )
        assert ours.exp() == pytest.approx(density, rel=1e-9)


def test_score_is_the_gradient_of_log_prob():
    x, t = states(MIXTURE)
    (by_autograd,) = torch.autograd.grad(MIXTURE.log_prob(x.requires_grad_(), t).sum(), x)
    torch.testing.assert_close(MIXTURE.score(x, t), by_autograd)


def test_denoise_is_the_posterior_mean_by_quadrature():
    """E[x0 | x] = ∫x0·p(x0)·N(x; x0, t²) / ∫p(x0)·N(x; x0, t²) on a fine grid of x0."""
    axis = torch.linspace(-4, 4, 401, dtype=torch.float64)
    x0 = torch.cartesian_prod(axis, axis)
    prior = MIXTURE.log_prob(x0, torch.zeros(len(x0)))
    x, t = states(MIXTURE, 6, low=0.1, high=5)
    for x_i, t_i, ours in zip(x, t, MIXTURE.denoise(x, t), strict=True):
        posterior = (prior - (x0 - x_i).pow(2).sum(1) / (2 * t_i**2)).softmax(0)
        torch.testing.assert_close(ours, posterior @ x0, rtol=0, atol=1e-6)


def test_samples_have_the_mixture_moments():
    x = MIXTURE.sample(40_000, torch.Generator().manual_seed(0))
    w = WEIGHTS / 10
    mean = w @ MEANS
    covariance = torch.diag((w @ STD**2).repeat(2)) + (MEANS - mean).T @ (w[:, None] * (MEANS - mean))
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0, atol=0.03)


@pytest.mark.parametrize("sigma_min", [0.0, 0.002, 0.3])
def test_ode_flow_equals_the_gaussian_closed_form(sigma_min):
    x, t = states(GAUSSIAN, low=0.31)
    by_integration = GaussianMixture.consistency(GAUSSIAN, x, t, sigma_min)
    torch.testing.assert_close(by_integration, GAUSSIAN.consistency(x, t, sigma_min), rtol=0, atol=1e-6)


def test_ode_flow_equals_an_adaptive_integrator():
    """DOP853 in ln σ, dx/dlnσ = x − D(x, σ), at tolerance 1e-10."""
    x, t = states(MIXTURE, 8, low=0.5)
    for x_i, t_i, ours in zip(x, t, MIXTURE.consistency(x, t, 0.002), strict=True):

        def slope(log_sigma, y):
            y = torch.from_numpy(y)[None]
            return (y - MIXTURE.denoise(y, torch.tensor([log_sigma]).double().exp()))[0].numpy()

        ends = (float(t_i.log()), float(np.log(0.002)))
        exact = solve_ivp(slope, ends, x_i.numpy(), method="DOP853", rtol=1e-10, atol=1e-10).y[:, -1]
        np.testing.assert_allclose(ours.numpy(), exact, rtol=0, atol=1e-6)


def test_consistency_is_self_consistent_and_the_identity_at_sigma_min():
    x, t = states(MIXTURE, low=1.0)
    halfway = MIXTURE.consistency(x, t, 0.5)
    end = MIXTURE.consistency(halfway, torch.full_like(t, 0.5), 0.002)
    torch.testing.assert_close(end, MIXTURE.consistency(x, t, 0.002), rtol=0, atol=1e-6)
    torch.testing.assert_close(MIXTURE.consistency(x, torch.full_like(t, 0.3), 0.3), x)


def test_float32_images_keep_shape_and_dtype():
    oracle = GaussianMixture(torch.randn(5, 1, 4, 4), 0.1)
    x, t = 3 * torch.randn(2, 1, 4, 4), torch.full((2,), 3.0)
    one_step = oracle.ode_step(x, t, torch.zeros(2))
    for y in (oracle.score(x, t), oracle.denoise(x, t), one_step, oracle.consistency(x, t)):
        assert y.shape == x.shape and y.dtype == torch.float32
    torch.testing.assert_close(one_step, oracle.denoise(x, t))  # Euler to σ = 0 is the denoiser
    assert oracle.sample(3).shape == (3, 1, 4, 4)
    assert Gaussian(torch.zeros(1, 4, 4), 0.5).consistency(x, t).shape == x.shape


@pytest.mark.parametrize(("std", "weights"), [(0.0, None), (-1.0, None), (0.5, [1.0, 2.0]), (0.5, [1.0, 0.0, 1.0])])
def test_bad_mixtures_are_refused(std, weights):
    with pytest.raises(ValueError, match="3 positive weights"):
        GaussianMixture(MEANS, std, None if weights is None else torch.tensor(weights))
