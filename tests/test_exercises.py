"""Every exercise accepts its reference, knows each wrong answer it lists by name, and is patient with a stub."""

import pytest
import torch

from cmlib.exercises import EXERCISES, check


@pytest.mark.parametrize("name", EXERCISES)
def test_the_reference_is_right(name, capsys):
    assert check(name, EXERCISES[name].reference)
    assert capsys.readouterr().out.startswith(f"✓ {name}")


@pytest.mark.parametrize("name, diagnosis", [(name, d) for name, e in EXERCISES.items() for d in e.wrong])
def test_a_wrong_answer_gets_its_own_diagnosis(name, diagnosis, capsys):
    assert not check(name, EXERCISES[name].wrong[diagnosis])
    assert capsys.readouterr().out == f"✗ {name}: {diagnosis}\n"


def not_implemented(*_):
    raise NotImplementedError


def misspelt(*_):
    return undefined_name  # noqa: F821


def in_place(x0, eps, alpha_bar):
    return x0.mul_(alpha_bar.sqrt()).add_(eps * (1 - alpha_bar).sqrt())


@pytest.mark.parametrize(
    "fn, says",
    [
        (lambda *_: None, "not done yet"),
        (not_implemented, "not done yet"),
        (misspelt, "raised NameError: name 'undefined_name' is not defined, with x0 = a tensor [2, 1, 2, 2]"),
        (lambda x0, eps: x0, "raised TypeError"),
        (lambda x0, eps, a: x0[0], "shape [1, 2, 2], expected [2, 1, 2, 2]"),
        (lambda x0, eps, a: x0.long(), "torch.int64, expected torch.float32"),
        (lambda x0, eps, a: x0 * float("nan"), "NaN"),
        (lambda x0, eps, a: x0 * 0.3, "alpha_bar = 0.9"),
        (lambda x0, eps, a: "text", "returned 'text', expected a tensor [2, 1, 2, 2]"),
        (in_place, "in place"),
        (lambda x0, eps, a: a * x0 + torch.randn_like(eps), "two calls with the same input give two answers"),
    ],
)
def test_anything_else_is_told_in_one_line(fn, says, capsys):
    before = torch.get_rng_state()
    assert not check("01.marginal", fn)
    out = capsys.readouterr().out
    assert says in out and out.count("\n") == 1
    assert "two calls" in says or torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "name, fn, says",
    [
        (
            "03.bytes",
            lambda shape: 4 * shape[0] * shape[1] * shape[2] + 9,
            "12297 where 12300 is right, with shape = (3, 32, 32)",
        ),
        (
            "04.boundary",
            lambda t, low, d: (*EXERCISES["04.boundary"].reference(t, low, d)[:2], 1 / t),
            "value 3 of 3: it returned 10 ",
        ),
        ("05.stable_target", lambda x_t, references, t: x_t / 0, "NaN or infinity, with x_t = a tensor [3, 2]"),
    ],
)
def test_what_nobody_foresaw_is_told_with_its_numbers(name, fn, says, capsys):
    assert not check(name, fn)
    assert says in capsys.readouterr().out


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"no exercise '01.margin'; choose one of 01.alpha_bar, "):
        check("01.margin", lambda: None)
