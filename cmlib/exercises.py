"""`check("01.marginal", my_marginal)`: a learner's function against the right one, and what its mistake suggests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cmlib.checks import NOT_DONE, Exercise
from cmlib.course import (
    lesson1,
    lesson2,
    lesson3,
    lesson4,
    lesson5,
    lesson6,
    lesson7,
    persona1,
    persona2,
    persona3,
    persona4,
    persona5,
    persona6,
)

EXERCISES: dict[str, Exercise] = {
    f"{number:02d}.{name}": exercise
    for number, lesson in enumerate((lesson1, lesson2, lesson3, lesson4, lesson5, lesson6, lesson7), 1)
    for name, exercise in lesson.EXERCISES.items()
} | {
    f"p{number}.{name}": exercise
    for number, persona in {1: persona1, 2: persona2, 3: persona3, 4: persona4, 5: persona5, 6: persona6}.items()
    for name, exercise in persona.EXERCISES.items()
}


def check(name: str, fn: Callable[..., Any]) -> bool:
    """Print one line on `fn` as an answer to the exercise `name`: right, not done yet, or what is wrong and why people
    write that. Returns whether it is right. Raises ValueError on an unknown name."""
    if name not in EXERCISES:
        raise ValueError(f"no exercise {name!r}; choose one of {', '.join(EXERCISES)}")
    wrong = EXERCISES[name].verdict(fn)
    print(f"{name}: {NOT_DONE}" if wrong == NOT_DONE else f"✗ {name}: {wrong}" if wrong else f"✓ {name}: right")
    return not wrong
