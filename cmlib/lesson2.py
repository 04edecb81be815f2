"""Exercises of lesson 2: the teacher."""

from __future__ import annotations

from cmlib.checks import Exercise

EXERCISES: dict[str, Exercise] = {}
