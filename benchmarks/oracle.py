"""How far each objective gets, in 1,500 updates on points in the plane, towards the consistency function that is known there.

    python -m benchmarks.oracle    # about 8 minutes on one core; writes benchmarks/results/oracle.json and oracle.png

The runs are those of `tests/test_objectives.py`, three seeds of each: ‖f − truth‖/‖truth‖ in ten bins of ln t.
"""

import json
import statistics
from pathlib import Path

import torch

from cmlib import plots
from cmlib.compare import spread
from cmlib.files import write_json
from tests.test_objectives import CASES, MIXTURE, errors, learned

RESULTS = Path(__file__).parent / "results" / "oracle.json"
SEEDS = 3
BANDS = {"t < 0.4": range(4), "0.4 to 5": range(4, 7), "above 5": range(7, 10)}  # of the bins


def band(run: dict[str, float], bins: range) -> float:
    """Mean error over some of the bins."""
    values = list(run.values())
    return statistics.mean(values[k] for k in bins)


def markdown(kept: dict[str, list[dict[str, float]]]) -> str:
    """Mean errors at low, middle and high noise, the smallest at high noise first."""
    lines = ["| objective | " + " | ".join(BANDS) + " |", "|---" * (1 + len(BANDS)) + "|"]
    for name, runs in sorted(kept.items(), key=lambda item: statistics.mean(band(r, BANDS["above 5"]) for r in item[1])):
        lines.append(f"| {name} | " + " | ".join(spread([band(r, bins) for r in runs], 3) for bins in BANDS.values()) + " |")
    seeds = len(kept["CT"])
    return "\n".join([*lines, "", f"{seeds} seeds, mean ± half the range."])


def main() -> None:
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"denoiser E[x0 \\| x_t]": [errors(MIXTURE.denoise, 0.0)]}
    for seed in range(SEEDS):
        for name, (objective, lr, _) in CASES.items():
            if len(kept.setdefault(name, [])) == seed:
                kept[name].append(learned(objective, lr, seed)[1])
                write_json(RESULTS, kept)
    middles = torch.logspace(-2, 1.9, 21)[1::2]
    curves = {name: [(middles, torch.tensor(list(run.values()))) for run in kept[name]] for name in CASES}
    level = list(errors(MIXTURE.denoise, 0.0).values())[-1]
    title = "Relative error of f on the mixture, a line a seed; grey: all the others"
    figure = plots.small_multiples(curves, level, "the denoiser at t = 80", "noise level t", "‖f − truth‖/‖truth‖", title)
    figure.axes[0].set_ylim(top=4)
    plots.save(figure, RESULTS.with_suffix(".png"))
    print(markdown(kept))


if __name__ == "__main__":
    main()
