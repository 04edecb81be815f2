"""Objectives by hand-computed values, by what their gradients reach, and by learning a known consistency function."""

import math

import pytest
import torch
from torch import nn

from cmlib.consistency import ConsistencyFunction
from cmlib.objectives import ConsistencyDistillation, Denoising, EndpointRegression, PairRegression, feature_distance
from cmlib.oracle import GaussianMixture
from cmlib.process import DDPM, EDM
from cmlib.train import fit

MIXTURE = GaussianMixture(torch.tensor([[1.0, 0.5], [-1.0, 1.0], [0.0, -1.2]]), 0.5, torch.tensor([5.0, 3.0, 2.0]))
SIGMA_MIN, SIGMA_MAX = 0.01, 80.0


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class PointNet(nn.Module):
    """F(x, t) for points [B,2]: a small multilayer perceptron on x and on sinusoids of the time input."""

    def __init__(self, width=64):
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, 5) * math.pi / 2)
        self.layers = nn.Sequential(
            nn.Linear(11, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x, t):
        u = t[:, None] / 1000
        angles = u * self.frequencies
        return self.layers(torch.cat([x, u, angles.sin(), angles.cos()], dim=1))


def pairs():
    """A cache-like batch of four 2×3×3 images in EDM coordinates."""
    g = seeded()
    batch = {name: torch.randn(4, 2, 3, 3, generator=g) for name in ("x_t", "x_r", "x_end")}
    return {**batch, "t": torch.tensor([0.1, 1.0, 10.0, 80.0]), "r": torch.tensor([0.0, 0.5, 9.0, 70.0])}


# ---- learning the truth


def test_consistency_distillation_learns_the_true_consistency_function():
    """With the exact score as teacher, f is within 5 % of the ODE's flow in each of ten bins of ln t, boundary to noise."""
    torch.manual_seed(0)
    f = ConsistencyFunction(PointNet(), SIGMA_MIN, SIGMA_MAX, sigma_data=1.0)
    objective = ConsistencyDistillation(MIXTURE, EDM(SIGMA_MIN, SIGMA_MAX).grid(24), mu=0.95)

    def batches(start):
        for k in range(start, 10**9):
            yield {"x0": MIXTURE.sample(256, seeded(k))}

    f, _ = fit(f, objective, batches, 4000, lr=8e-3, weight_decay=0.0, ema=0.99, every=4000)

    t = torch.logspace(math.log10(SIGMA_MIN * 1.01), math.log10(SIGMA_MAX), 4000)
    x = MIXTURE.sample(4000, seeded(10**9)) + t[:, None] * torch.randn(4000, 2, generator=seeded(10**9 + 1))
    truth = MIXTURE.consistency(x, t, SIGMA_MIN)
    with torch.no_grad():
        bins = list(zip(t.chunk(10), f(x, t).chunk(10), truth.chunk(10), strict=True))
    error = {f"t = {u[0]:.2g} … {u[-1]:.2g}": round(float((a - b).norm() / b.norm()), 4) for u, a, b in bins}
    print("relative error:", error)
    assert max(error.values()) < 0.05, error


# ---- consistency distillation, one step


def test_distillation_draws_neighbouring_levels_and_one_heun_step():
    levels = EDM().grid(18)
    objective = ConsistencyDistillation(MIXTURE, levels)
    x0 = MIXTURE.sample(500, seeded())
    x_t, t, x_r, r = objective.pairs({"x0": x0}, seeded(1))
    i = torch.searchsorted(levels, t)
    assert torch.equal(levels[i], t) and torch.equal(levels[i - 1], r) and set(i.tolist()) == set(range(1, 18))
    assert torch.equal(x_r, MIXTURE.ode_step(x_t, t, r, "heun"))
    eps = (x_t - x0) / t[:, None]
    assert abs(float(eps.mean())) < 0.15 and abs(float(eps.std()) - 1) < 0.15


def test_distillation_takes_its_pairs_from_a_cache():
    batch = pairs()
    x_t, t, x_r, r = ConsistencyDistillation().pairs(batch, seeded())
    assert x_t is batch["x_t"] and t is batch["t"] and x_r is batch["x_r"] and r is batch["r"]


def test_the_gradient_does_not_flow_into_the_target():
    """∂L/∂θ equals the gradient of mse(f(x_t, t), constant), even where the target is the live network."""
    torch.manual_seed(0)
    f = ConsistencyFunction(PointNet(), SIGMA_MIN, SIGMA_MAX)
    objective = ConsistencyDistillation(MIXTURE, EDM(SIGMA_MIN, SIGMA_MAX).grid(18))
    batch = {"x0": MIXTURE.sample(64, seeded())}
    loss, _ = objective(f, f, batch, 0, seeded(1))
    loss.mean().backward()
    gradients = [p.grad.clone() for p in f.parameters()]
    f.zero_grad()
    x_t, t, x_r, r = objective.pairs(batch, seeded(1))
    constant = f(x_r, r).detach().numpy().copy()
    (f(x_t, t) - torch.from_numpy(constant)).pow(2).mean().backward()
    torch.testing.assert_close(gradients, [p.grad for p in f.parameters()])
    target = ConsistencyFunction(PointNet(), SIGMA_MIN, SIGMA_MAX)
    objective(f, target, batch, 0, seeded(1))[0].mean().backward()
    assert all(p.grad is None for p in target.parameters())


def test_both_branches_share_the_dropout_mask():
    """With r = t and x̂_r = x_t the two branches are one computation, so its loss is exactly zero."""
    torch.manual_seed(0)

    class Dropping(nn.Module):
        def forward(self, x, t):
            return nn.functional.dropout(x, 0.5, self.training)

    f = ConsistencyFunction(Dropping()).train()
    batch = pairs()
    batch |= {"x_r": batch["x_t"], "r": batch["t"]}
    assert not torch.equal(f(batch["x_t"], batch["t"]), f(batch["x_t"], batch["t"]))  # two masks differ
    for _ in range(3):
        assert ConsistencyDistillation()(f, f, batch, 0, seeded())[0].tolist() == [0.0] * 4
    masks = {tuple(f.net(torch.ones(1, 20), batch["t"])[0].tolist()) for _ in range(5)}
    assert len(masks) == 5  # and the next step's mask is a new one


# ---- regressions


def test_pair_regression_is_the_mse_in_chain_units():
    """‖x_r/√(1+r²) − f‖² per pixel: the brief's loss on states of the chain."""
    batch, chain = pairs(), DDPM.linear()
    batch["r"] = chain.sigma(torch.tensor([-1, 5, 500, 990]))
    loss, logs = PairRegression()(lambda x, t: 0.9 * x, lambda x, t: x, batch, 0, seeded())
    scale = torch.cat([torch.ones(1), chain.alpha_bar[[5, 500, 990]].sqrt()])[:, None, None, None]
    by_hand = (scale * batch["x_r"] - 0.9 * batch["x_t"]).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(loss, by_hand, rtol=1e-4, atol=1e-6)
    assert logs["t"] is batch["t"]


def test_pair_regression_is_minimised_by_the_mean_of_the_targets():
    """So that its minimiser is E[x̂_r | x_t], one reverse step, and not the end of the ODE."""
    x_t = torch.ones(2, 1, 2, 2)
    x_r = torch.stack([torch.full((1, 2, 2), 0.2), torch.full((1, 2, 2), 0.6)])
    batch = {"x_t": x_t, "x_r": x_r, "t": torch.ones(2), "r": torch.full((2,), 0.9)}
    a = torch.tensor(0.4 / (1 + 0.9**2) ** 0.5, requires_grad=True)
    PairRegression()(lambda x, t: a * x, lambda x, t: x, batch, 0, seeded())[0].mean().backward()
    assert abs(float(a.grad)) < 1e-6


def test_endpoint_regression_is_the_distance_to_the_endpoint():
    batch = pairs()
    loss, logs = EndpointRegression()(lambda x, t: 0 * x, lambda x, t: x, batch, 0, seeded())
    torch.testing.assert_close(loss, batch["x_end"].pow(2).mean((1, 2, 3)))
    absolute = EndpointRegression(distance=lambda a, b: (a - b).abs().flatten(1).sum(1))
    loss, logs = absolute(lambda x, t: 0 * x, lambda x, t: x, batch, 0, seeded())
    torch.testing.assert_close(loss, batch["x_end"].abs().sum((1, 2, 3)))
    assert logs["t"] is batch["t"]


def test_denoising_is_the_mse_of_the_noise():
    """Of a network that knows x0 = 0 and inverts the process, exactly zero; of one that answers 0, ‖ε‖²/d ≈ 1."""
    chain = DDPM.linear()
    batch = {"x0": torch.zeros(2000, 1, 2, 2)}
    loss, logs = Denoising(chain)(lambda x, n: 0 * x, lambda x, n: x, batch, 0, seeded())
    assert float(loss.mean()) == pytest.approx(1, abs=0.1)
    assert 0 <= logs["t"].min() < 10 and 990 < logs["t"].max() < 1000
    loss, _ = Denoising(chain)(lambda x, n: x / (1 - chain.alpha_bar[n])[:, None, None, None].sqrt(), None, batch, 0, seeded())
    assert loss.max() < 1e-6


@pytest.mark.parametrize(
    "objective",
    [PairRegression(), EndpointRegression(), ConsistencyDistillation(), Denoising(DDPM.linear())],
    ids=lambda o: type(o).__name__,
)
def test_losses_and_logs_are_per_sample(objective):
    batch = pairs() | {"x0": torch.randn(4, 2, 3, 3)}
    loss, logs = objective(lambda x, t: 0.5 * x, lambda x, t: 0.5 * x, batch, 0, seeded())
    assert loss.shape == (4,) and logs["t"].shape == (4,) and all(v.shape == (4,) for v in logs.values())
    again, _ = objective(lambda x, t: 0.5 * x, lambda x, t: 0.5 * x, batch, 0, seeded())
    assert torch.equal(loss, again) and objective.mu == 0


def test_feature_distance_compares_frozen_features():
    features = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    distance = feature_distance(features)
    a, b = torch.randn(2, 5, 1, 2, 2)
    torch.testing.assert_close(distance(a, b), (features(a) - features(b)).pow(2).mean(1))
    assert not any(p.requires_grad for p in features.parameters()) and not features.training
