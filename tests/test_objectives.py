"""Objectives by hand-computed values, by what their gradients reach, and by learning a known consistency function."""

import math

import pytest
import torch
from torch import nn

from cmlib.consistency import EMA, ConsistencyFunction
from cmlib.continuous import SCM, MeanFlow, MeanFlowFunction
from cmlib.objectives import (
    ECT,
    ICT,
    SCT,
    BootstrapRegression,
    ConsistencyDistillation,
    ConsistencyTraining,
    Denoising,
    EndpointRegression,
    PairRegression,
    ScoreCorrected,
    coupled,
)
from cmlib.ops import norm
from cmlib.oracle import Gaussian, GaussianMixture
from cmlib.process import DDPM, EDM
from cmlib.stable import cached_score, gamma, guided, lower_edge, sample_phased, stable_denoised, stable_score, to_edge
from cmlib.train import fit
from tests.small import PointNet, seeded

MIXTURE = GaussianMixture(torch.tensor([[1.0, 0.5], [-1.0, 1.0], [0.0, -1.2]]), 0.5, torch.tensor([5.0, 3.0, 2.0]))
SIGMA_MIN, SIGMA_MAX = 0.01, 80.0


def pairs():
    """A cache-like batch of four 2×3×3 images in EDM coordinates."""
    g = seeded()
    batch = {name: torch.randn(4, 2, 3, 3, generator=g) for name in ("x_t", "x_r", "x_end")}
    return {**batch, "t": torch.tensor([0.1, 1.0, 10.0, 80.0]), "r": torch.tensor([0.0, 0.5, 9.0, 70.0])}


# ---- learning the truth


def errors(f, sigma_min):
    """‖f − truth‖/‖truth‖ in ten bins of ln t, from the boundary to noise."""
    t = torch.logspace(math.log10(SIGMA_MIN * 1.01), math.log10(SIGMA_MAX), 4000)
    x = MIXTURE.sample(4000, seeded(10**9)) + t[:, None] * torch.randn(4000, 2, generator=seeded(10**9 + 1))
    truth = MIXTURE.consistency(x, t, sigma_min)
    with torch.no_grad():
        bins = list(zip(t.chunk(10), f(x, t).chunk(10), truth.chunk(10), strict=True))
    return {f"t = {u[0]:.2g} … {u[-1]:.2g}": round(float((a - b).norm() / b.norm()), 4) for u, a, b in bins}


def test_consistency_distillation_learns_the_true_consistency_function():
    """With the exact score as teacher, f is within 5 % of the ODE's flow in each of ten bins of ln t, boundary to noise."""
    torch.manual_seed(0)
    f = ConsistencyFunction(PointNet(), SIGMA_MIN, SIGMA_MAX, sigma_data=1.0)
    objective = ConsistencyDistillation(MIXTURE, EDM(SIGMA_MIN, SIGMA_MAX).grid(24), mu=0.95)

    def batches(start):
        for k in range(start, 10**9):
            yield {"x0": MIXTURE.sample(256, seeded(k))}

    f, _ = fit(f, objective, batches, 4000, lr=8e-3, weight_decay=0.0, ema=0.99, every=4000)

    error = errors(f, SIGMA_MIN)
    assert max(error.values()) < 0.05, error


REFERENCE = MIXTURE.sample(2000, seeded(77))
SHORT = 1500


CASES = {  # objective, learning rate, and what its error in no bin may exceed
    "CT": (ConsistencyTraining(SHORT, s1=20), 2e-3, 0.3),
    "iCT": (ICT(SHORT), 1e-3, 0.27),
    "ECT": (ECT(SHORT), 1e-3, 0.25),
    "SCT-batch": (SCT(SHORT), 1e-3, 0.22),
    "SCT-reference": (SCT(SHORT, reference=REFERENCE), 1e-3, 0.27),
    "corrected": (ScoreCorrected(ECT(SHORT), MIXTURE.score), 1e-3, 0.25),
    "bootstrap": (BootstrapRegression(DDPM.linear(), gap=100, reset=20), 2e-3, 0.3),
    "sCT": (SCM(warmup=SHORT // 4, mean=-0.4, std=1.6), 1e-3, 0.25),
    "sCD": (SCM(teacher=MIXTURE, warmup=SHORT // 4, mean=-0.4, std=1.6), 1e-3, 0.17),
    "MeanFlow": (MeanFlow(), 2e-3, 0.25),
}


def learned(objective, lr, seed=0):
    """What 1,500 updates make of f: its errors before and after."""
    torch.manual_seed(seed)
    flow = isinstance(objective, MeanFlow)
    f = MeanFlowFunction(PointNet(inputs=3)) if flow else ConsistencyFunction(PointNet(), 0.0, SIGMA_MAX, sigma_data=1.0)

    def batches(start):
        for k in range(start, 10**9):
            yield {"x0": MIXTURE.sample(256, seeded(10**6 * seed + k))}

    before = errors(f, 0.0)
    f, _ = fit(f, objective, batches, SHORT, lr=lr, weight_decay=0.0, ema=0.99, seed=seed, every=SHORT)
    return before, errors(f, 0.0)


@pytest.mark.parametrize("name", CASES)
def test_every_objective_approaches_the_true_consistency_function(name):
    """In 1,500 updates, no more; a denoiser, which is what they would be without the bootstrap, is 0.9 off from noise."""
    objective, lr, limit = CASES[name]
    before, error = learned(objective, lr)
    assert max(error.values()) < min(limit, 0.7 * max(before.values())), error
    assert list(error.values())[4] < 0.15  # t = 0.37 … 0.9
    assert list(errors(MIXTURE.denoise, 0.0).values())[-1] > 0.8


def test_endpoint_regression_and_phased_sct_learn_the_truth_in_their_own_way():
    """From where exact paths end; and segment by segment, sampled in as many jumps."""
    torch.manual_seed(0)
    f, g = (ConsistencyFunction(PointNet(), 0.0, SIGMA_MAX, sigma_data=1.0) for _ in range(2))
    t = (2 * torch.randn(8192, generator=seeded())).exp().clamp(max=SIGMA_MAX)
    x_t = MIXTURE.sample(8192, seeded(1)) + t[:, None] * torch.randn(8192, 2, generator=seeded(2))
    known = {"x_t": x_t, "t": t, "x_end": MIXTURE.consistency(x_t, t)}

    def paths(start):
        for k in range(start, 10**9):
            yield {name: v[k % 32 * 256 :][:256] for name, v in known.items()}

    def images(start):
        for k in range(start, 10**9):
            yield {"x0": MIXTURE.sample(256, seeded(k))}

    f, _ = fit(f, EndpointRegression(norm), paths, 600, lr=4e-3, weight_decay=0.0, ema=0.99, every=600)
    error = errors(f, 0.0)
    assert max(error.values()) < 0.1

    edges = (0.5, 3.0)
    g, _ = fit(g, SCT(800, stages=6, edges=edges), images, 800, lr=2e-3, weight_decay=0.0, ema=0.99, every=800)
    z = SIGMA_MAX * torch.randn(2000, 2, generator=seeded(3))
    truth = MIXTURE.consistency(z, torch.full((2000,), SIGMA_MAX))
    error = float((sample_phased(g, z, SIGMA_MAX, edges) - truth).norm() / truth.norm())
    assert error < 0.2


# ---- consistency distillation, one step


def test_distillation_draws_neighbouring_levels_and_one_heun_step():
    levels = EDM().grid(18)
    objective = ConsistencyDistillation(MIXTURE, levels)
    x0 = MIXTURE.sample(500, seeded())
    x_t, t, x_r, r = objective.pairs({"x0": x0}, 0, seeded(1))
    i = torch.searchsorted(levels, t)
    assert torch.equal(levels[i], t) and torch.equal(levels[i - 1], r) and set(i.tolist()) == set(range(1, 18))
    assert torch.equal(x_r, MIXTURE.ode_step(x_t, t, r, "heun"))
    eps = (x_t - x0) / t[:, None]
    assert abs(float(eps.mean())) < 0.15 and abs(float(eps.std()) - 1) < 0.15


def test_distillation_takes_its_pairs_from_a_cache():
    batch = pairs()
    x_t, t, x_r, r = ConsistencyDistillation().pairs(batch, 0, seeded())
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
    x_t, t, x_r, r = objective.pairs(batch, 0, seeded(1))
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


# ---- consistency training and its kin: pairs


def test_both_couplings_have_the_marginals_and_only_one_shares_its_noise():
    x0 = torch.zeros(40_000, 1)
    t, r = torch.full((40_000,), 2.0), torch.full((40_000,), 1.5)
    for coupling in ("shared", "chunk"):
        x_t, _, x_r, _ = coupled(x0, t, r, seeded(), coupling)
        assert float(x_t.std()) == pytest.approx(2.0, rel=0.02) and float(x_r.std()) == pytest.approx(1.5, rel=0.02)
        correlation = float((x_t * x_r).mean() / (x_t.std() * x_r.std()))
        assert correlation == pytest.approx(1.0 if coupling == "shared" else 1.5 / 2.0, abs=0.02)
    with pytest.raises(ValueError, match="shared"):
        coupled(x0, t, r, seeded(), "fresh")


@pytest.mark.parametrize(("objective", "count"), [(ConsistencyTraining(100), 107), (ICT(8000), 81)])
def test_training_pairs_are_neighbours_of_the_curriculums_grid(objective, count):
    step = 50 if count == 107 else 3500
    x0 = MIXTURE.sample(500, seeded())
    x_t, t, x_r, r = objective.pairs({"x0": x0}, step, seeded(1))
    levels = EDM().grid(count)
    i = torch.searchsorted(levels, t)
    assert torch.equal(levels[i], t) and torch.equal(levels[i - 1], r)
    torch.testing.assert_close((x_t - x0) / t[:, None], (x_r - x0) / r[:, None], rtol=1e-3, atol=1e-2)  # one ε


def test_ict_weight_and_distance_by_hand():
    """d/(t − r) with √(‖Δ‖² + c²) − c, c = 0.00054·√d of the whole vector; not a sum over pixels."""
    x0 = torch.randn(6, 3, 4, 4, generator=seeded())
    objective = ICT(100)
    x_t, t, _, r = objective.pairs({"x0": x0}, 0, seeded(1))
    loss, _ = objective(lambda x, t: x, lambda x, t: 0 * x, {"x0": x0}, 0, seeded(1))
    c = 0.00054 * 48**0.5
    torch.testing.assert_close(loss, ((x_t.pow(2).flatten(1).sum(1) + c**2).sqrt() - c) / (t - r))


def test_ect_starts_as_diffusion_training_and_the_target_is_the_image_where_r_is_zero():
    objective = ECT(800)
    x0 = torch.randn(256, 2, generator=seeded())
    _, t, _, r = objective.pairs({"x0": x0}, 0, seeded(1))
    torch.testing.assert_close(r, (t * (1 - (1 + 8 * torch.sigmoid(-t)) / 2)).clamp(min=0))
    loss, _ = objective(lambda x, t: 0 * x, lambda x, t: 1e6 + 0 * x, {"x0": x0}, 0, seeded(1))
    terminal = r == 0
    assert 100 < int(terminal.sum()) < 256
    torch.testing.assert_close(loss[terminal], (x0.norm(dim=1) / t)[terminal], rtol=1e-3, atol=1e-3)
    assert [objective.stage(k) for k in (0, 99, 100, 799, 800)] == [0, 0, 1, 7, 7]


def test_ect_refuses_stages_that_round_to_nothing():
    with pytest.raises(ValueError, match="rounding"):
        ECT(100, stages=4, q=256)


def test_ect_gradient_is_finite_at_zero_difference():
    x = torch.zeros(3, 2, requires_grad=True)
    norm(x, torch.zeros(3, 2)).sum().backward()
    assert bool(x.grad.isfinite().all())


# ---- the stable target


def test_stable_target_is_the_denoiser_of_the_reference():
    """Against the mixture oracle with the references as narrow components: E[x0 | x_t] in closed form."""
    reference = torch.randn(50, 2, generator=seeded())
    oracle = GaussianMixture(reference.double(), 1e-6)
    t = torch.tensor([0.05, 0.3, 1.0, 5.0, 80.0])
    x = reference[:5] + t[:, None] * torch.randn(5, 2, generator=seeded(1))
    torch.testing.assert_close(
        stable_denoised(x, t, reference), oracle.denoise(x.double(), t.double()).float(), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        stable_score(reference)(x, t), oracle.score(x.double(), t.double()).float(), rtol=1e-2, atol=1e-3
    )


STATES = 40


def target_variance(make, t, draws=60):
    """E‖x̂_r − E[x̂_r | x_t]‖² of an estimated step to r = 0.8·t from fixed x_t, over what else is random."""
    x0 = MIXTURE.sample(STATES, seeded())
    x_t = x0 + t * torch.randn(STATES, 2, generator=seeded(1))
    return float(torch.stack([make(x_t, k) for k in range(draws)]).var(0).sum(1).mean())


def posterior_samples(x_t, t, seed, pool=MIXTURE.sample(20_000, seeded(5))):  # noqa: B008
    """x0 ~ p(x0 | x_t), by self-normalised importance sampling from a large pool."""
    w = (-torch.cdist(x_t, pool).pow(2) / (2 * t**2)).softmax(1)
    return pool[torch.multinomial(w, 1, generator=seeded(seed))[:, 0]]


def test_more_references_vary_less_and_one_is_consistency_training():
    """The variance of the target falls with the reference's size 1, 16, 256; the whole set leaves none (Xu et al. 2023)."""
    t, r = 1.5, 1.2
    level = torch.full((STATES,), t)

    def target(size):
        def make(x_t, k):
            own = posterior_samples(x_t, t, k)
            others = MIXTURE.sample(STATES * size, seeded(10_000 + k)).view(STATES, size, 2)
            rows = [
                stable_denoised(x[None], level[:1], torch.cat([o[None], other[1:]]))
                for x, o, other in zip(x_t, own, others, strict=True)
            ]
            return x_t + (r - t) / t * (x_t - torch.cat(rows))

        return target_variance(make, t)

    variance = {size: target(size) for size in (1, 16, 256)}
    assert 8 < variance[1] / variance[16] < 24 and 8 < variance[16] / variance[256] < 24  # as 1/n
    wholes = [MIXTURE.sample(5000, seeded(3 + k)) for k in range(8)]  # nothing random is left; what remains is a set's own bias
    x_t = MIXTURE.sample(STATES, seeded()) + t * torch.randn(STATES, 2, generator=seeded(1))
    steps = torch.stack([x_t + (r - t) / t * (x_t - stable_denoised(x_t, level, whole)) for whole in wholes])
    exact = x_t + (r - t) / t * (x_t - MIXTURE.denoise(x_t, level))
    bias = (steps - exact).pow(2).sum(2).mean(1)
    assert bias.min() > 1e-6 and float(bias.mean()) < variance[256] / 8  # one set's alone scatters

    def shared(x_t, k):  # CT: x_r = x0 + r·ε with ε = (x_t − x0)/t
        x0 = posterior_samples(x_t, t, k)
        return x0 + r * (x_t - x0) / t

    def chunk(x_t, k):  # the brief's: x_r | x_t, x0 of independent increments
        x0 = posterior_samples(x_t, t, k)
        mean, std = x0 + (r / t) ** 2 * (x_t - x0), r * (1 - (r / t) ** 2) ** 0.5
        return mean + std * torch.randn(STATES, 2, generator=seeded(k))

    one, fresh = target_variance(shared, t), target_variance(chunk, t)
    assert one == pytest.approx(variance[1], rel=0.05) and fresh > 3 * one


def test_sct_with_every_ingredient_off_is_ect():
    x0 = torch.randn(64, 1, 4, 4, generator=seeded())
    f = ConsistencyFunction(nn.Conv2d(1, 1, 3, padding=1), 0.0)
    f.net.forward = lambda x, t, conv=f.net.forward: conv(x)
    off = SCT(100, reference=None, smooth=False)
    for step in (0, 40, 99):
        a, b = (o(f, f, {"x0": x0}, step, seeded(1))[0] for o in (off, ECT(100)))
        torch.testing.assert_close(a, b)


def test_each_ingredient_of_sct_alone():
    x0 = torch.randn(64, 2, generator=seeded())
    off = {"reference": None, "smooth": False, "edges": ()}
    plain = SCT(100, **off).pairs({"x0": x0}, 55, seeded(1))
    x_t, t, x_r, r = SCT(100, **off | {"reference": "batch"}).pairs({"x0": x0}, 55, seeded(1))
    assert torch.equal(x_t, plain[0]) and torch.equal(r, plain[3])
    torch.testing.assert_close(x_r, x_t + ((r - t) / t)[:, None] * (x_t - stable_denoised(x_t, t, x0)))
    whole = SCT(100, **off | {"reference": x0[:1]}).pairs({"x0": x0}, 55, seeded(1))[2]
    torch.testing.assert_close(whole, x_t + ((r - t) / t)[:, None] * (x_t - x0[:1]))
    smooth, stepwise = SCT(100, **off | {"smooth": True}), SCT(100, **off)
    assert [smooth.stage(k) for k in (0, 55, 99)] == pytest.approx([0, 55 * 7 / 99, 7])
    assert [stepwise.stage(k) for k in (0, 55, 99)] == [0, 4, 7]
    x_t, t, x_r, r = SCT(100, **off | {"edges": (0.5, 2.0)}).pairs({"x0": x0}, 55, seeded(1))
    edge = lower_edge(t, (0.5, 2.0))
    assert set(edge.tolist()) == {0.0, 0.5, 2.0} and bool((edge < t).all()) and bool((r >= edge).all())


def test_a_phased_target_is_reached_at_its_own_edge():
    """to_edge leaves (x, s) where it is; with the exact denoiser's line it is the DDIM step to the edge."""
    x, x0_hat = torch.randn(2, 4, 2, generator=seeded())
    t, s = torch.tensor([0.5, 2.0, 2.0, 0.3]), torch.tensor([0.5, 0.5, 2.0, 0.0])
    out = to_edge(x, t, s, x0_hat)
    torch.testing.assert_close(out[[0, 2]], x[[0, 2]])
    torch.testing.assert_close(out[3], x0_hat[3])
    torch.testing.assert_close(out[1], x0_hat[1] + 0.25 * (x[1] - x0_hat[1]))
    sct, x0 = SCT(100, edges=(0.5,)), torch.randn(256, 2, generator=seeded())
    _, _, _, r = sct.pairs({"x0": x0}, 0, seeded(1))
    loss, _ = sct(lambda x, t: x, lambda x, t: 1e6 + x, {"x0": x0}, 0, seeded(1))
    at_edge = (r == 0.5) | (r == 0)  # where the target is x_r, whatever f⁻ says
    assert 50 < int(at_edge.sum()) < 256 and loss[at_edge].max() < 1e3 < 1e4 < loss[~at_edge].min()


def test_phased_sampling_follows_the_ode_edge_by_edge():
    """With the exact phased function, η = 1 ends where the ODE does; η < 1 leaves the path by what the line misses."""
    edges, z = (0.5, 3.0), torch.randn(200, 2, generator=seeded())
    counted = []

    def phased(x, t):  # aims so that the line from (x, t) passes the ODE's point at the lower edge
        counted.append(len(x))
        s = lower_edge(t, edges)
        at_s = MIXTURE.consistency(x, t, float(s[0]))
        return (at_s - (s / t)[:, None] * x) / (1 - s / t)[:, None]

    truth = MIXTURE.consistency(80 * z, torch.full((200,), 80.0))
    error = {eta: float((sample_phased(phased, 80 * z, 80.0, edges, eta) - truth).norm() / truth.norm()) for eta in (1, 0.9)}
    assert counted == [200] * 6
    assert error[1] < 1e-3 < error[0.9] < 0.1
    assert torch.equal(sample_phased(lambda x, t: x / 2, z, 80.0, ()), z / 2)
    with pytest.raises(ValueError, match="eta lies in"):
        sample_phased(phased, z, 80.0, edges, 0.0)


def test_guidance_leads_away_from_the_earlier_self():
    x, t = torch.randn(3, 2, generator=seeded()), torch.ones(3)
    f, earlier = (lambda x, t: 3 * x), (lambda x, t: 2 * x)
    assert torch.equal(guided(f, earlier, 0.0)(x, t), 3 * x)
    torch.testing.assert_close(guided(f, earlier, 0.5)(x, t), 3.5 * x)


# ---- the brief's variants


def test_score_correction_by_hand_and_from_every_source():
    batch = {"x0": MIXTURE.sample(32, seeded())}
    base = ConsistencyDistillation(MIXTURE, torch.tensor([0.3, 0.5, 1.0, 3.0]))
    x_t, t, _, r = base.pairs(batch, 0, seeded(1))
    half = (lambda x, t: 0.5 * x), (lambda x, t: x)
    plain, _ = base(*half, batch, 0, seeded(1))
    loss, logs = ScoreCorrected(base, MIXTURE.score, strength=2.0, sigma_data=1.0)(*half, batch, 0, seeded(1))
    s = (1 + t**2).sqrt()
    expected = 2 / s**2 * (x_t + (s * (s - 1))[:, None] * MIXTURE.score(x_t, t) - 0.5 * x_t).pow(2).mean(1)
    torch.testing.assert_close(loss - plain, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logs["correction"], expected, rtol=1e-3, atol=1e-4)
    cached = {"x_t": x_t, "t": t, "r": r, "x_r": MIXTURE.ode_step(x_t, t, r, "ddim")}
    torch.testing.assert_close(cached_score(cached), MIXTURE.score(x_t, t), rtol=1e-3, atol=1e-4)
    _, from_cache = ScoreCorrected(ConsistencyDistillation())(*half, cached, 0, seeded())
    _, from_oracle = ScoreCorrected(ConsistencyDistillation(), MIXTURE.score)(*half, cached, 0, seeded())
    torch.testing.assert_close(from_cache["correction"], from_oracle["correction"], rtol=1e-3, atol=1e-4)


def test_gamma_makes_the_score_identity_exact_for_a_gaussian():
    data = Gaussian(torch.tensor([0.3, -0.7]), 0.5)
    t = torch.tensor([0.01, 0.1, 0.5, 2.0, 80.0])
    small = torch.tensor([1e-4], dtype=torch.float64)
    assert float(gamma(small.float(), 0.5)) == pytest.approx(float(gamma(small, 0.5)), rel=1e-5)  # no cancellation
    x = torch.randn(5, 2, generator=seeded()) * (1 + t[:, None])
    torch.testing.assert_close(x + gamma(t, 0.5)[:, None] * data.score(x, t), data.consistency(x, t), rtol=1e-3, atol=1e-4)


def test_the_consistency_function_moves_half_as_far_as_tweedie_near_zero():
    """f − x = (t²/2)·score + O(t⁴) whatever the data, D − x = t²·score; and the other sign leads away from both."""
    x0 = MIXTURE.sample(500, seeded())
    t = torch.full((500,), 0.05)
    x = x0 + 0.05 * torch.randn(500, 2, generator=seeded(1))
    score, moved = MIXTURE.score(x, t), MIXTURE.consistency(x, t) - x
    along = float((moved * score).sum() / score.pow(2).sum()) / 0.05**2
    assert along == pytest.approx(0.5, abs=0.01)
    assert float((moved - 0.05**2 / 2 * score).norm() / moved.norm()) < 0.02
    assert float((MIXTURE.denoise(x, t) - x - 0.05**2 * score).norm()) < 1e-5


def test_bootstrap_regression_is_two_steps_apart_and_renews_its_target():
    chain = DDPM.linear()
    objective = BootstrapRegression(chain, reset=3)
    x0 = torch.randn(500, 2, generator=seeded())
    _, t, _, r = objective.pairs({"x0": x0}, 0, seeded(1))
    n = chain.index(t).round().long()
    torch.testing.assert_close(r, chain.sigma((n - 2).clamp(min=-1)))
    assert [objective.mu(k) for k in range(6)] == [1, 1, 0, 1, 1, 0]
    f = ConsistencyFunction(PointNet(), SIGMA_MIN, SIGMA_MAX)
    start = [p.detach().clone() for p in f.parameters()]
    target = EMA(f, objective.mu)
    for step in range(3):
        with torch.no_grad():
            [p.add_(1) for p in f.parameters()]
        target.update(f, step)
        moved = [float((a - b).abs().max()) for a, b in zip(target.model.parameters(), start, strict=True)]
        assert max(moved) == (0 if step < 2 else pytest.approx(3, abs=1e-5))
