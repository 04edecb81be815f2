"""Exercises of lesson 3: the pair cache."""

from __future__ import annotations

from cmlib.checks import Exercise

EXERCISES: dict[str, Exercise] = {}
