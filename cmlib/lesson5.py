"""Exercises of lesson 5: training without a teacher."""

from __future__ import annotations

from cmlib.checks import Exercise

EXERCISES: dict[str, Exercise] = {}
