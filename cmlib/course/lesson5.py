"""Exercises of lesson 5: training without a teacher."""

from __future__ import annotations

import torch

from cmlib.checks import Exercise

_X0 = torch.tensor([[0.5, -1.0], [1.2, 0.3], [-0.7, 0.8]])
_EPS = torch.tensor([[0.3, -1.2], [0.8, 2.1], [-0.4, 0.6]])
_T = torch.tensor([0.003, 0.02, 0.4, 1.0, 3.0, 80.0])
_A = torch.linspace(-1, 1, 8).reshape(2, 1, 2, 2)
_B = torch.tensor([0.3, -1.2, 0.8, 2.1, -0.4, 0.1, -1.7, 0.6]).reshape(2, 1, 2, 2)


def _away(x_t: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """‖x_t − x_i‖² [B,M]."""
    return (x_t[:, None] - references).pow(2).sum(-1)


EXERCISES = {
    "score_identity": Exercise(
        lambda x_t, x0, t: (x0 - x_t) / t**2,
        [(_X0 + t * _EPS, _X0, t) for t in (0.3, 1.0, 5.0)],
        {
            "the estimate must point from the noisy point to the clean one, where data is dense; the sign is wrong": (
                lambda x_t, x0, t: (x_t - x0) / t**2
            ),
            "the score divides by the variance t²; you divided by the standard deviation t, which gives −ε": (
                lambda x_t, x0, t: (x0 - x_t) / t
            ),
            "the division by t² is missing; the difference alone is how far Tweedie's formula moves, t² times the score": (
                lambda x_t, x0, t: x0 - x_t
            ),
            "there is no factor ½; the 2 from the square's derivative cancels the one in −‖x_t − x0‖²/2t²": (
                lambda x_t, x0, t: (x0 - x_t) / (2 * t**2)
            ),
            "(x_t − x0)/t is the slope dx/dt of the ODE, which is −t times the score": lambda x_t, x0, t: (x_t - x0) / t,
        },
    ),
    "stable_target": Exercise(
        lambda x_t, references, t: (-_away(x_t, references) / (2 * t**2)).softmax(1) @ references,
        [(_X0 + 0.5 * _EPS, torch.cat([_X0, -_X0, _EPS]), t) for t in (0.02, 0.5, 1.5, 6.0)],  # 0.02: exp alone gives 0/0
        {
            "the weights are too narrow or too wide; the Gaussian's exponent has 2t² below ‖x_t − x_i‖², not t²": (
                lambda x_t, references, t: (-_away(x_t, references) / t**2).softmax(1) @ references
            ),
            "near references must weigh more than far ones; the minus in the exponent is missing": (
                lambda x_t, references, t: (_away(x_t, references) / (2 * t**2)).softmax(1) @ references
            ),
            "the weights of one x_t must sum to 1 over the references; your softmax runs over the batch, the wrong axis": (
                lambda x_t, references, t: (-_away(x_t, references) / (2 * t**2)).softmax(0) @ references
            ),
            "the exponent needs the distance squared; you took the distance itself": (
                lambda x_t, references, t: (-_away(x_t, references).sqrt() / (2 * t**2)).softmax(1) @ references
            ),
            "it is NaN at small t, where all the exponentials round to 0: 0/0; softmax takes off the largest exponent first": (
                lambda x_t, references, t: (
                    (w := (-_away(x_t, references) / (2 * t**2)).exp()) / w.sum(1, keepdim=True) @ references
                )
            ),
            "the weights of one x_t must sum to 1; you left their sum out": (
                lambda x_t, references, t: (-_away(x_t, references) / (2 * t**2)).exp() @ references
            ),
            "at small t the answer must be the nearest reference; you weighted all of them alike": (
                lambda x_t, references, t: references.mean(0).expand_as(x_t)
            ),
        },
    ),
    "ect_r": Exercise(
        lambda t, stage, q: (t * (1 - q ** -(stage + 1) * (1 + 8 * torch.sigmoid(-t)))).clamp(min=0),
        [(_T, 0, 2.0), (_T, 3, 2.0), (_T, 7, 2.0), (_T, 0, 256.0)],
        {
            "r must not be below 0, there is no negative noise; cut it off": (
                lambda t, stage, q: t * (1 - q ** -(stage + 1) * (1 + 8 * torch.sigmoid(-t)))
            ),
            "the gap must already be divided by q at stage 0; the exponent is stage + 1": (
                lambda t, stage, q: (t * (1 - q ** -float(stage) * (1 + 8 * torch.sigmoid(-t)))).clamp(min=0)
            ),
            "the relative gap must be largest at small t; the sigmoid falls with t, so its argument is −t": (
                lambda t, stage, q: (t * (1 - q ** -(stage + 1) * (1 + 8 * torch.sigmoid(t)))).clamp(min=0)
            ),
            "at large t the relative gap must be q^−(stage+1), not 0; the 1 beside 8·sigmoid is missing": (
                lambda t, stage, q: (t * (1 - q ** -(stage + 1) * 8 * torch.sigmoid(-t))).clamp(min=0)
            ),
            "the gap is relative, a share of t; you took it off t as it is: r = t·(1 − gap)": (
                lambda t, stage, q: (t - q ** -(stage + 1) * (1 + 8 * torch.sigmoid(-t))).clamp(min=0)
            ),
            "r is a noise level; you returned the ratio r/t": (
                lambda t, stage, q: (1 - q ** -(stage + 1) * (1 + 8 * torch.sigmoid(-t))).clamp(min=0)
            ),
        },
    ),
    "loss": Exercise(
        lambda x0_hat, goal, t, r: (x0_hat - goal).flatten(1).norm(dim=1) / (t - r),
        [(_A, _B, torch.tensor([0.5, 3.0]), torch.tensor([0.4, 0.0])), (_B, _A, torch.tensor([2.0, 9.0]), torch.ones(2))],
        {
            "the distance is ‖·‖, not ‖·‖²; divided by t − r, the squared one would vanish as the pairs close": (
                lambda x0_hat, goal, t, r: (x0_hat - goal).flatten(1).pow(2).sum(1) / (t - r)
            ),
            "the norm is of the whole image; you summed pixel by pixel, which is the L1 distance": (
                lambda x0_hat, goal, t, r: (x0_hat - goal).flatten(1).abs().sum(1) / (t - r)
            ),
            "close pairs, whose outputs differ less, must weigh more; you multiplied by t − r instead of dividing": (
                lambda x0_hat, goal, t, r: (x0_hat - goal).flatten(1).norm(dim=1) * (t - r)
            ),
            "the weight is missing; close pairs would hardly count": (
                lambda x0_hat, goal, t, r: (x0_hat - goal).flatten(1).norm(dim=1)
            ),
            "a loss must not be negative; r is the smaller level, so the gap is t − r": (
                lambda x0_hat, goal, t, r: (x0_hat - goal).flatten(1).norm(dim=1) / (r - t)
            ),
        },
    ),
}
