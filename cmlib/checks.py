"""What a lesson's exercise is, and the verdict on an answer to it: right, not done yet, or which misconception it shows."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NOT_DONE = "not done yet"


@dataclass(frozen=True)
class Exercise:
    """A function that a learner writes: the right one, inputs to try it on, and the wrong ones that people really write.

    `cases` are tuples of positional arguments; `wrong` maps a diagnosis (which property fails, and the misconception
    behind it) to a function that makes this mistake. Results are numbers, tensors or tuples of them.
    """

    reference: Callable[..., Any]
    cases: Sequence[tuple]
    wrong: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    tolerance: float = 1e-4

    def verdict(self, fn: Callable[..., Any]) -> str:
        """An empty string where `fn` is right, NOT_DONE for a stub, else one line that says what is wrong."""
        results: list[Any] = []
        for case in self.cases:
            arguments = copy.deepcopy(case)
            try:
                results.append(fn(*arguments))
            except NotImplementedError:
                return NOT_DONE
            except Exception as error:  # whatever a learner's code may raise
                reason = " ".join(str(error).split())
                return f"it raised {type(error).__name__}: {reason}, with {self._told(case)}"
            if not self._same(arguments, case):
                return "it changes its input in place; make a new tensor instead"
        if all(result is None for result in results):
            return NOT_DONE
        expected = [self.reference(*copy.deepcopy(case)) for case in self.cases]
        if self._same(results, expected):
            return ""
        for diagnosis, wrong in self.wrong.items():
            if self._same(results, [wrong(*copy.deepcopy(case)) for case in self.cases]):
                return diagnosis
        problems = zip(self.cases, results, expected, strict=True)
        case, right, what = next((c, b, why) for c, a, b in problems if (why := self._mismatch(a, b)))
        if self._mismatch(fn(*copy.deepcopy(case)), right) != what:
            return (
                "two calls with the same input give two answers; nothing random is wanted here, nor anything kept between calls"
            )
        return f"{what}, with {self._told(case)}"

    def _same(self, mine: Sequence[Any], right: Sequence[Any]) -> bool:
        return not any(self._mismatch(a, b) for a, b in zip(mine, right, strict=True))

    def _mismatch(self, mine: Any, right: Any) -> str:
        """Why `mine` is not `right`, empty where it is."""
        if isinstance(right, tuple):
            if not isinstance(mine, tuple | list) or len(mine) != len(right):
                return f"it returned {_kind(mine)}, expected {len(right)} values"
            found = (self._mismatch(a, b) for a, b in zip(mine, right, strict=True))
            return next((f"value {k} of {len(right)}: {why}" for k, why in enumerate(found, 1) if why), "")
        if not isinstance(right, Tensor | float | int):
            return "" if mine == right else f"it returned {mine!r}, expected {right!r}"
        try:
            a, b = torch.as_tensor(mine).detach().cpu(), torch.as_tensor(right).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            return f"it returned {_kind(mine)}, expected {_kind(right)}"
        if a.shape != b.shape:
            return f"it returned shape {list(a.shape)}, expected {list(b.shape)}"
        if a.is_complex() and bool(a.imag.abs().max() < self.tolerance):
            a = a.real
        if isinstance(right, Tensor) and a.is_floating_point() != b.is_floating_point():
            return f"it returned {a.dtype}, expected {b.dtype}"
        if not bool(a.isfinite().all()) and bool(b.isfinite().all()):
            return "it returned NaN or infinity"
        if torch.allclose(a.double(), b.double(), rtol=self.tolerance, atol=self.tolerance, equal_nan=True):
            return ""
        worst = (a.double() - b.double()).abs().flatten().argmax()
        return f"it returned {a.flatten()[worst]:.6g} where {b.flatten()[worst]:.6g} is right"

    def _told(self, case: tuple) -> str:
        names = list(inspect.signature(self.reference).parameters)
        return ", ".join(f"{name} = {_kind(value)}" for name, value in zip(names, case, strict=False))


def _kind(value: Any) -> str:
    """A value in a few words: a number or a tuple itself, a tensor's shape."""
    if isinstance(value, Tensor):
        return f"{value.item():.4g}" if value.ndim == 0 else f"a tensor {list(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_kind, value))})"
    return repr(value) if isinstance(value, int | float | str) or value is None else type(value).__name__
