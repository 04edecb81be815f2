"""sCM and MeanFlow: their derivatives against finite differences, their gradients alone and under DDP, and the truth."""

import math

import pytest
import torch
from torch import nn

from cmlib.consistency import ConsistencyFunction
from cmlib.continuous import SCM, AdaptiveWeight, MeanFlow, MeanFlowFunction, jvp, normalised, student_f
from cmlib.oracle import GaussianMixture
from cmlib.process import TrigFlow
from cmlib.unet import UNet
from tests.small import UNET, PointNet, seeded

SIGMA_DATA = 0.8
PROCESS = TrigFlow(SIGMA_DATA)
T = torch.tensor([0.01, 0.1, 0.5, 1.0, 1.4, 1.56], dtype=torch.float64)


def student(dtype=torch.float64):
    torch.manual_seed(0)
    return ConsistencyFunction(PointNet(), 0.0, 80.0, SIGMA_DATA).to(dtype)


def states():
    x0, eps = torch.randn(2, 6, 2, generator=seeded(), dtype=torch.float64)
    x = PROCESS.perturb(x0, eps, T)
    return x, SCM().velocity(x0, SIGMA_DATA * eps, x, T, PROCESS)


# ---- sCM


def test_f_in_trigflow_is_scm_s():
    """f = cos t·x − sin t·σ_d·F with F = −net(x/σ_d): the same function, so one student serves both."""
    f = student()
    x, _ = states()
    x_edm, sigma = PROCESS.to_edm(x, T)
    F = -f.net(x / SIGMA_DATA, 250 * sigma.log())
    torch.testing.assert_close(student_f(x, T, f(x_edm, sigma), SIGMA_DATA), F)
    torch.testing.assert_close(T.cos()[:, None] * x - T.sin()[:, None] * SIGMA_DATA * F, f(x_edm, sigma))


def test_scm_tangent_is_cos_t_times_df_dt():
    """g = cos t·df/dt along the path (sCM eq. 6), by central differences of f itself, to 1e-4."""
    f = student()
    x, v = states()

    def along(h):
        return f(*PROCESS.to_edm(x + h * v, T + h))

    h = 1e-6
    with torch.no_grad():
        derivative = (along(h) - along(-h)) / (2 * h)
    _, g = SCM(normalise=False).tangent(f, x, T, v, 1.0)
    expected = T.cos()[:, None] * derivative
    for i in range(len(T)):
        assert float((g[i] - expected[i]).norm() / expected[i].norm()) < 1e-4


def test_scm_warm_up_starts_without_the_derivative():
    f = student()
    x, v = states()
    objective = SCM(normalise=False)
    F, cold = objective.tangent(f, x, T, v, 0.0)
    torch.testing.assert_close(cold, -(T.cos()[:, None] ** 2) * (SIGMA_DATA * F - v))
    half, warm = (objective.tangent(f, x, T, v, r)[1] for r in (0.5, 1.0))
    torch.testing.assert_close(half, (cold + warm) / 2)
    seen = []
    probe = SCM(warmup=10)
    object.__setattr__(probe, "tangent", lambda f, x, t, v, warm: (seen.append(warm), SCM().tangent(f, x, t, v, warm))[1])
    for step in (0, 5, 10, 1000):
        probe(f, f, {"x0": x}, step, seeded())
    assert seen == [0.0, 0.5, 1.0, 1.0]


def test_tangent_normalisation_bounds_the_tangent_and_keeps_its_direction():
    g = torch.randn(5, 3, 4, 4, generator=seeded()) * torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e4])[:, None, None, None]
    out = normalised(g)
    rms = out.pow(2).flatten(1).mean(1).sqrt()
    raw = g.pow(2).flatten(1).mean(1).sqrt()
    torch.testing.assert_close(rms, raw / (raw + 0.1))
    assert bool((torch.cosine_similarity(out.flatten(1), g.flatten(1)) > 0.9999).all())


def test_adaptive_weight_finds_one_over_the_error():
    """argmin_w e^w·E − w is w = −ln E."""
    torch.manual_seed(0)
    weight = AdaptiveWeight()
    t = torch.linspace(0.05, 1.5, 64)
    assert weight(t).abs().max() == 0
    error = 0.2 + t
    optimizer = torch.optim.Adam(weight.parameters(), lr=3e-2)
    for _ in range(1500):
        optimizer.zero_grad()
        w = weight(t)
        (w.exp() * error - w).mean().backward()
        optimizer.step()
    assert float((weight(t).detach() + error.log()).abs().max()) < 0.1


def test_scm_uses_the_students_weight_and_sends_it_gradients():
    f = student(torch.float32)
    f.log_weight = AdaptiveWeight()
    nn.init.constant_(f.log_weight.linear.bias, 0.7)
    plain = student(torch.float32)
    batch = {"x0": torch.randn(16, 2, generator=seeded())}
    loss, logs = SCM()(f, f, batch, 50, seeded(1))
    reference, _ = SCM()(plain, plain, batch, 50, seeded(1))
    torch.testing.assert_close(loss, math.exp(0.7) * reference - 0.7)
    loss.mean().backward()
    expected = float((math.exp(0.7) * logs["error"] - 1).mean())  # d/dw of e^w·E − w
    assert float(f.log_weight.linear.bias.grad) == pytest.approx(expected, rel=1e-4)


def test_a_student_with_its_weight_is_saved_and_loaded_without_it(tmp_path):
    f = ConsistencyFunction(UNet(**UNET), 0.0, 80.0).eval()
    f.log_weight = AdaptiveWeight()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 20.0])
    for name in ("f.pt", "f.safetensors"):
        f.save(tmp_path / name)
        assert torch.equal(ConsistencyFunction.load(tmp_path / name)(x, t), f(x, t))


def test_scm_refuses_a_boundary_above_zero():
    f = ConsistencyFunction(PointNet(), 0.01, 80.0)
    with pytest.raises(ValueError, match="sigma_min=0"):
        SCM()(f, f, {"x0": torch.zeros(2, 2)}, 0, seeded())


def test_scd_takes_dx_dt_from_the_teachers_ode():
    """For one Gaussian the probability-flow ODE in TrigFlow is known: with s = σ_d it is at rest after rotation, dx/dt = μ-term
    only; here checked against the velocity of the exact flow by finite differences."""
    oracle = GaussianMixture(torch.zeros(1, 2), SIGMA_DATA)
    x, _ = states()
    v = SCM(teacher=oracle).velocity(x, x, x, T, PROCESS)
    torch.testing.assert_close(v, torch.zeros_like(v), atol=1e-6, rtol=0)  # the ODE keeps x of N(0, σ_d²) where it is
    shifted = GaussianMixture(torch.full((1, 2), 1.5), 0.3)
    v = SCM(teacher=shifted).velocity(x, x, x, T, PROCESS)
    h = 1e-5
    moved = []
    for s in (-h, h):
        x_edm, sigma = PROCESS.to_edm(x, T)
        s1 = SIGMA_DATA * (T + s).tan()
        mean, var = 1.5, 0.3**2
        y = mean + ((var + s1**2) / (var + sigma**2)).sqrt()[:, None] * (x_edm - mean)
        moved.append(y * (T + s).cos()[:, None])
    torch.testing.assert_close(v, (moved[1] - moved[0]) / (2 * h), rtol=1e-4, atol=1e-4)


# ---- MeanFlow


def average_velocity():
    torch.manual_seed(0)
    return MeanFlowFunction(PointNet(inputs=3).double())


def test_meanflow_target_against_finite_differences():
    u = average_velocity()
    z, v = torch.randn(2, 5, 2, generator=seeded(), dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9, 1.0], dtype=torch.float64)
    r = torch.tensor([0.0, 0.3, 0.2, 0.5, 0.0], dtype=torch.float64)
    h = 1e-5
    with torch.no_grad():
        du = (u(z + h * v, t + h, r) - u(z - h * v, t - h, r)) / (2 * h)
    target = MeanFlow().target(u, z, t, r, v)
    torch.testing.assert_close(target, v - (t - r)[:, None] * du, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(target[1], v[1])  # r = t is flow matching


def test_meanflow_times():
    t, r = MeanFlow().times(20_000, seeded())
    assert bool((r <= t).all()) and float((r == t).double().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(r.min()) > 0 and float(t.max()) < 1


def test_meanflow_weight_has_no_gradient_and_the_papers_power():
    u = average_velocity()
    batch = {"x0": torch.randn(8, 2, generator=seeded(), dtype=torch.float64)}
    loss, logs = MeanFlow()(u, u, batch, 0, seeded(1))
    torch.testing.assert_close(loss.detach(), logs["error"] / (logs["error"] + 1e-3) ** 0.75)
    flat, _ = MeanFlow(power=0.0)(u, u, batch, 0, seeded(1))
    g, g_flat = (torch.autograd.grad(v[0], list(u.parameters()))[-1] for v in (loss, flat))
    torch.testing.assert_close(g, g_flat / (logs["error"][0] + 1e-3) ** 0.75)


def test_meanflow_function_is_a_consistency_function_of_the_straight_path():
    """x̂0 = z − t·u(z, 0, t), z = x/(1+σ), t = σ/(1+σ); at σ = 0 the identity, at σ → ∞ one step from pure noise."""
    u = average_velocity()
    x = torch.randn(3, 2, generator=seeded(), dtype=torch.float64)
    assert torch.equal(u(x, torch.zeros(3, dtype=torch.float64)), x)
    sigma = torch.tensor([0.5, 2.0, 1e9], dtype=torch.float64)
    t = sigma / (1 + sigma)
    z = x / (1 + sigma)[:, None]
    torch.testing.assert_close(u(x, sigma), z - t[:, None] * u(z, t, 0 * t))


# ---- both


def test_derivatives_through_the_unet_match_finite_differences():
    """sCM's tangent and MeanFlow's du/dt of a whole U-Net in float64, in x and in t, to 1e-4."""
    torch.manual_seed(0)
    f = ConsistencyFunction(UNet(**UNET), 0.0, 80.0, SIGMA_DATA).double().eval()
    x0, eps = torch.randn(2, 6, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    x = PROCESS.perturb(x0, eps, T)
    v = SCM().velocity(x0, SIGMA_DATA * eps, x, T, PROCESS)
    u = MeanFlowFunction(UNet(**{**UNET, "in_channels": 2})).double().eval()
    z, t, r = x0 + 0.6 * (eps - x0), torch.full_like(T, 0.6), torch.full_like(T, 0.2)
    h = 1e-7  # the sinusoids of 250·ln σ are fast
    with torch.no_grad():
        along = [f(*PROCESS.to_edm(x + k * h * v, T + k * h)) for k in (1, -1)]
        expected = T.cos()[:, None, None, None] * (along[0] - along[1]) / (2 * h)
        flow = [u(z + k * h * (eps - x0), t + k * h, r) for k in (1, -1)]
    _, g = SCM(normalise=False).tangent(f, x, T, v, 1.0)
    for i in range(len(T)):
        assert float((g[i] - expected[i]).norm() / expected[i].norm()) < 1e-4
    goal = MeanFlow().target(u, z, t, r, eps - x0)
    expected = eps - x0 - 0.4 * (flow[0] - flow[1]) / (2 * h)
    assert float((goal - expected).norm() / expected.norm()) < 1e-4


def test_jvp_goes_through_the_unet_and_its_attention():
    torch.manual_seed(0)
    f = ConsistencyFunction(UNet(**UNET), 0.0, 80.0).eval()
    batch = {"x0": torch.randn(3, 1, 8, 8, generator=seeded())}
    loss, _ = SCM(warmup=0)(f, f, batch, 0, seeded(1))
    loss.mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in f.parameters())
    x, t = batch["x0"], torch.full((3,), 2.0)
    d = torch.randn(3, 1, 8, 8, generator=seeded(2))
    value, derivative = jvp(lambda x: f(x, t), (x,), (d,))
    with torch.no_grad():
        assert torch.allclose(value, f(x, t), atol=1e-5)
        by_difference = (f(x + 1e-3 * d, t) - f(x - 1e-3 * d, t)) / 2e-3
    assert float((derivative - by_difference).norm() / by_difference.norm()) < 1e-2  # float32


@pytest.mark.parametrize("name", ["scm", "meanflow"])
def test_both_branches_share_the_dropout_mask_of_a_unet(name):
    """F and F⁻ are one computation, so with equal masks their difference is rounding."""
    torch.manual_seed(0)
    x0, seen = torch.randn(4, 1, 8, 8, generator=seeded()), []

    if name == "scm":
        f = ConsistencyFunction(UNet(**{**UNET, "dropout": 0.3}), 0.0, 80.0).train()
        objective = SCM(normalise=False)
    else:
        f = MeanFlowFunction(UNet(**{**UNET, "dropout": 0.3, "in_channels": 2})).train()
        objective = MeanFlow()
    f.net.register_forward_hook(lambda net, inputs, output: seen.append(output.detach().clone()))
    objective(f, f, {"x0": x0}, 0, seeded(1))
    with torch.no_grad():
        other = f(x0, torch.ones(4)), f(x0, torch.ones(4))
    assert not torch.allclose(*other)  # the masks do differ from call to call
    assert float((torch.as_tensor(seen[0]) - seen[1]).abs().max()) < 1e-4


def _rank(rank, port, out):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    for name in ("scm", "meanflow"):
        f = student(torch.float32) if name == "scm" else average_velocity().float()
        if name == "scm":
            f.log_weight = AdaptiveWeight()
        wrapped = DistributedDataParallel(f)
        objective = SCM(warmup=0) if name == "scm" else MeanFlow()
        batch = {"x0": torch.randn(8, 2, generator=seeded(rank))}
        objective(wrapped, f, batch, 0, seeded(10 + rank))[0].mean().backward()
        found[name] = torch.cat([p.grad.flatten() for p in f.parameters()])
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_gradients_agree_on_all_ranks(tmp_path):
    """Two gloo processes with different data: the same gradient on both, the mean of what each alone would have."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in ("scm", "meanflow"):
        assert torch.equal(a[name], b[name])
        alone = []
        for rank in (0, 1):
            f = student(torch.float32) if name == "scm" else average_velocity().float()
            if name == "scm":
                f.log_weight = AdaptiveWeight()
            objective = SCM(warmup=0) if name == "scm" else MeanFlow()
            batch = {"x0": torch.randn(8, 2, generator=seeded(rank))}
            objective(f, f, batch, 0, seeded(10 + rank))[0].mean().backward()
            alone.append(torch.cat([p.grad.flatten() for p in f.parameters()]))
        torch.testing.assert_close(a[name], (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(alone[0], alone[1])
