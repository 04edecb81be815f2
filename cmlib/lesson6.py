"""Exercises of lesson 6: evaluation."""

from __future__ import annotations

from cmlib.checks import Exercise

EXERCISES: dict[str, Exercise] = {}
