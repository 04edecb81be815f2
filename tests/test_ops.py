"""Tensor operations against their formulas, and noise that depends on (seed, index) alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlib.ops import (
    expand_like,
    ict_huber,
    indexed_integers,
    indexed_normal,
    mse,
    pseudo_huber,
    randn_like,
    rng_state,
    seed_everything,
    set_rng_state,
)


def test_expand_like_appends_axes():
    assert expand_like(torch.arange(3), torch.zeros(3, 2, 4, 4)).shape == (3, 1, 1, 1)
    assert expand_like(torch.arange(3), torch.zeros(3, 2)).shape == (3, 1)


def test_mse_is_per_sample():
    a, b = torch.randn(2, 5, 3, 4, 4)
    by_hand = ((a - b).numpy() ** 2).reshape(5, -1).mean(1)
    torch.testing.assert_close(mse(a, b), torch.from_numpy(by_hand))


def test_pseudo_huber_takes_the_norm_of_the_whole_sample():
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    b[0, 0, 0, 0], b[0, 2, 3, 3] = 3.0, 4.0  # ‖a − b‖ = 5
    torch.testing.assert_close(pseudo_huber(a, b, c=12.0), torch.tensor([1.0, 0.0]))  # √(25 + 144) − 12
    assert pseudo_huber(a, b, c=0.0).tolist() == [5.0, 0.0]  # per pixel it would be 3 + 4, or their mean


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 10), st.integers(1, 50))
def test_pseudo_huber_lies_between_its_two_limits(c, d):
    a, b = torch.randn(2, 4, d, dtype=torch.float64)
    norm = (a - b).norm(dim=1)
    loss = pseudo_huber(a, b, c)
    assert (loss <= norm + 1e-9).all() and (loss >= norm - c - 1e-9).all() and (loss <= norm**2 / (2 * c) + 1e-9).all()


def test_ict_huber_grows_its_c_with_the_dimension():
    a, c = torch.randn(2, 3, 32, 32), 0.00054 * 3072**0.5
    torch.testing.assert_close(ict_huber(a, 0 * a), pseudo_huber(a, 0 * a, c))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=8, unique=True), st.integers(0, 2**62), st.randoms())
def test_indexed_noise_is_independent_of_batch_split_and_order(indices, seed, random):
    whole = indexed_normal(seed, indices, (1, 3, 3))
    cut = len(indices) // 2
    assert torch.equal(whole, torch.cat([indexed_normal(seed, part, (1, 3, 3)) for part in (indices[:cut], indices[cut:])]))
    order = list(range(len(indices)))
    random.shuffle(order)
    assert torch.equal(whole[order], indexed_normal(seed, torch.tensor(indices)[order], (1, 3, 3)))
    levels = indexed_integers(seed, indices, 0, 1000)
    assert torch.equal(levels[order], indexed_integers(seed, [indices[i] for i in order], 0, 1000))


def test_indexed_noise_differs_between_indices_seeds_and_streams():
    base = indexed_normal(1, [5], (16,))
    for other in (indexed_normal(1, [6], (16,)), indexed_normal(2, [5], (16,)), indexed_normal(1, [5], (16,), stream=1)):
        assert (base - other).abs().min() > 0
    assert indexed_normal(1, [], (2, 3)).shape == (0, 2, 3)


def test_indexed_draws_have_the_right_distribution():
    z = indexed_normal(3, range(2000), (10,)).double()
    assert abs(z.mean()) < 5 / 20000**0.5 and abs(z.var() - 1) < 5 * (2 / 20000) ** 0.5
    assert abs(z[:-1].mul(z[1:]).mean()) < 5 / 20000**0.5  # neighbours are uncorrelated
    n = indexed_integers(3, range(5000), 2, 7)
    assert n.dtype == torch.int64
    assert np.abs(np.bincount(n.numpy(), minlength=7) - [0, 0, *[1000] * 5]).max() < 5 * 1000**0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="draws on a GPU")
def test_noise_on_a_gpu_is_drawn_there_and_follows_from_the_generator():
    x = torch.empty(1000, device="cuda")

    def draws(seed):
        generator = torch.Generator().manual_seed(seed)
        return [randn_like(x, generator) for _ in range(2)]

    (first, second), again, other = draws(0), draws(0), draws(1)
    assert first.device == x.device and torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert torch.corrcoef(torch.stack([first, second, other[0]])).triu(1).abs().max() < 0.2


def test_rng_state_replays_dropout():
    x = torch.ones(100)
    state = rng_state(x.device)
    first, second = (torch.nn.functional.dropout(x) for _ in range(2))
    set_rng_state(state, x.device)
    assert torch.equal(torch.nn.functional.dropout(x), first) and not torch.equal(first, second)


def test_seed_everything_seeds_all_three():
    import random

    def draw():
        seed_everything(2**40 + 3)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw() == draw()
