"""The schedules print the papers' own sequences."""

import math

import pytest
import torch

from cmlib.curricula import ct_levels, ct_mu, ect_r, ict_levels, lognormal, lognormal_bins
from cmlib.process import EDM


def test_ict_doubles_from_11_to_1281():
    K = 8000
    sequence = [ict_levels(k, K) for k in range(0, K + 1)]
    assert sorted(set(sequence)) == [11, 21, 41, 81, 161, 321, 641, 1281] and sequence == sorted(sequence)
    assert all(sequence.count(n) == 1000 for n in (11, 21, 641))


def test_ct_starts_at_two_levels_and_ends_at_s1_plus_one():
    K = 800_000
    assert ct_levels(0, K) == 2 and ct_levels(K, K) == 151
    sequence = [ct_levels(k, K) for k in range(0, K + 1, 1000)]
    assert sequence == sorted(sequence)
    middle = math.sqrt(0.5 * (151**2 - 4) + 4)  # by hand: 106.79
    assert ct_levels(K // 2, K) == math.ceil(middle - 1) + 1 == 107


def test_ct_mu_starts_at_mu0_and_tends_to_one():
    assert ct_mu(0, 1000) == pytest.approx(0.9)
    assert ct_mu(1000, 1000) == pytest.approx(0.9 ** (2 / 151))
    assert all(ct_mu(k, 1000) <= ct_mu(k + 1, 1000) < 1 for k in range(1000))


def test_lognormal_bins_are_the_normal_law_of_ln_sigma():
    levels = EDM().grid(1281)
    p = lognormal_bins(levels)
    assert p.shape == (1280,) and float(p.sum()) == pytest.approx(1, abs=1e-5) and bool((p >= 0).all())
    normal = torch.distributions.Normal(-1.1, 2.0)
    inside = normal.cdf(levels[-1].log()) - normal.cdf(levels[0].log())
    for lo, hi in ((0, 400), (400, 900), (900, 1280)):
        mass = (normal.cdf(levels[hi].log()) - normal.cdf(levels[lo].log())) / inside
        assert float(p[lo:hi].sum()) == pytest.approx(float(mass), abs=1e-4)


def test_lognormal_has_the_mean_and_spread_it_names():
    t = lognormal(20_000, torch.Generator().manual_seed(0))
    assert float(t.log().mean()) == pytest.approx(-1.1, abs=0.05) and float(t.log().std()) == pytest.approx(2.0, abs=0.05)


def test_ect_pairs_close_stage_by_stage():
    """r/t by stage, by hand: at t → ∞ 1 − 2^{−(a+1)}; at small t clamped to 0 until 5·2^{−(a+1)} < 1."""
    far = torch.tensor([1e4], dtype=torch.float64)
    assert [round(float(ect_r(far, a) / far), 6) for a in range(4)] == [0.5, 0.75, 0.875, 0.9375]
    near = torch.tensor([1e-6], dtype=torch.float64)
    assert [round(float(ect_r(near, a) / near), 4) for a in range(5)] == [0, 0, 0.375, 0.6875, 0.8438]
    t = torch.tensor([1.0], dtype=torch.float64)
    by_hand = 1 - (1 + 8 / (1 + math.e)) / 256**2
    assert float(ect_r(t, 1, q=256)) == pytest.approx(by_hand, abs=1e-12)
    t = torch.logspace(-3, 2, 100)
    gaps = [t - ect_r(t, a / 2) for a in range(16)]
    assert all(bool((b <= a).all()) for a, b in zip(gaps, gaps[1:], strict=False)) and bool((gaps[0] <= t).all())


def test_karras_grid_has_the_papers_eighteen_nodes():
    """EDM eq. 5 with ρ = 7, by hand."""
    grid = EDM().grid(18)
    by_hand = [(0.002 ** (1 / 7) + i / 17 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(18)]
    assert grid.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert grid[0] == pytest.approx(0.002) and grid[-1] == pytest.approx(80)
