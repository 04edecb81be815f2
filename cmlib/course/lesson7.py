"""Exercises of the failure clinic: averages of weights, and a teacher's calibration."""

from __future__ import annotations

import torch

from cmlib.checks import Exercise

_AVERAGE = torch.tensor([[0.5, -1.0, 2.0], [1.2, 0.3, -0.4]])
_LIVE = torch.tensor([[0.7, -1.5, 1.0], [-0.2, 0.9, 0.1]])
_EPS = torch.tensor([[0.3, -1.2, 0.8], [2.1, -0.4, 0.6]]).reshape(2, 1, 1, 3)
_PREDICTED = torch.tensor([[0.5, -0.9, 0.7], [1.6, 0.1, 0.2]]).reshape(2, 1, 1, 3)

EXERCISES = {
    "ema": Exercise(
        lambda average, live, mu: mu * average + (1 - mu) * live,
        [(_AVERAGE, _LIVE, mu) for mu in (0.99, 0.7, 0.0)],
        {
            "at μ = 0.99 one step must hardly move the average; you exchanged μ and 1 − μ, so it is the live weights again": (
                lambda average, live, mu: (1 - mu) * average + mu * live
            ),
            "the average must move; you returned it as it was, and a model saved from it is the untrained one": (
                lambda average, live, mu: average
            ),
            "the average must remember; you returned the live weights": lambda average, live, mu: live,
            "equal weights must stay as they are; your two factors don't sum to 1": (
                lambda average, live, mu: mu * average + live
            ),
            "the average must come closer to the live weights; the sign of the difference is wrong": (
                lambda average, live, mu: average + (1 - mu) * (average - live)
            ),
        },
    ),
    "calibration": Exercise(
        lambda eps, predicted: (eps * predicted).sum() / predicted.pow(2).sum(),
        [(_EPS, _PREDICTED), (_EPS, 1.05 * _PREDICTED), (_PREDICTED, _EPS)],
        {
            "you divided by Σε²; a perfect ε̂ is a mean, smaller than ε, and this would call it too weak": (
                lambda eps, predicted: (eps * predicted).sum() / eps.pow(2).sum()
            ),
            "you compared sizes; a perfect ε̂ is a mean, smaller than ε, and this would call it too weak": (
                lambda eps, predicted: eps.norm() / predicted.norm()
            ),
            "where ε̂ is near 0 a single quotient can be anything; divide the sums": (
                lambda eps, predicted: (eps / predicted).mean()
            ),
            "a prediction 5 % too large must give a smaller factor; a correlation doesn't see the size": (
                lambda eps, predicted: (eps * predicted).sum() / (eps.norm() * predicted.norm())
            ),
            "this is the other way round: the factor that ε̂ should be multiplied by is below 1 where ε̂ is too large": (
                lambda eps, predicted: predicted.pow(2).sum() / (eps * predicted).sum()
            ),
        },
    ),
}
