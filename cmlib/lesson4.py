"""Exercises of lesson 4: the consistency student."""

from __future__ import annotations

from cmlib.checks import Exercise

EXERCISES: dict[str, Exercise] = {}
