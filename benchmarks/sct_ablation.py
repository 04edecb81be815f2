"""Each ingredient of SCT alone and all together, against ECT, on a 2-D mixture whose consistency function is known.

    python -m benchmarks.sct_ablation        # about 10 minutes on one core; writes benchmarks/results/sct_ablation.json

"error" is ‖f − truth‖/‖truth‖ over noise levels from 0.01 to 80, even in ln t; "one jump" and "sampled" are the same for
whole jumps from σ = 80: in one evaluation, and in the number of evaluations given. Three seeds, mean ± half the range.
"""

import copy
import json
import math
from pathlib import Path

import torch

from cmlib.compare import spread
from cmlib.consistency import ConsistencyFunction
from cmlib.objectives import SCT
from cmlib.oracle import GaussianMixture
from cmlib.stable import guided, sample_phased
from cmlib.train import fit
from tests.small import PointNet, seeded

MIXTURE = GaussianMixture(torch.tensor([[1.0, 0.5], [-1.0, 1.0], [0.0, -1.2]]), 0.5, torch.tensor([5.0, 3.0, 2.0]))
SIGMA_MAX, UPDATES, BATCH, SEEDS = 80.0, 2000, 256, 3
EDGES = (0.5, 3.0)
WHOLE = MIXTURE.sample(5_000, seeded(77))
OFF = {"reference": None, "smooth": False}
ROWS = {
    "ECT (all off)": OFF,
    "+ reference: the batch": {**OFF, "reference": "batch"},
    "+ reference: 5,000 points": {**OFF, "reference": WHOLE},
    "+ smooth schedule": {**OFF, "smooth": True},
    "+ segments at 0.5 and 3": {**OFF, "edges": EDGES},
    "SCT: batch, smooth": {},
    "SCT: 5,000 points, smooth": {"reference": WHOLE},
    "SCT: all, with segments": {"reference": WHOLE, "edges": EDGES},
}


def relative(a, b):
    return float((a - b).norm() / b.norm())


def one(options: dict, seed: int) -> dict[str, float]:
    """Train once; every way of sampling is a measurement."""
    torch.manual_seed(seed)
    f = ConsistencyFunction(PointNet(), 0.0, SIGMA_MAX, sigma_data=1.0)
    earlier = []

    def batches(start):
        for k in range(start, 10**9):
            yield {"x0": MIXTURE.sample(BATCH, seeded(10**6 * seed + k))}

    def keep(step, average):
        earlier.append(copy.deepcopy(average))

    objective = SCT(UPDATES, **options)
    f, _ = fit(
        f, objective, batches, UPDATES, lr=1e-3, weight_decay=0.0, ema=0.99, every=UPDATES // 4, on_every=keep, seed=seed
    )
    t = torch.logspace(math.log10(0.01), math.log10(SIGMA_MAX), 2_000)
    x = MIXTURE.sample(2_000, seeded(1)) + t[:, None] * torch.randn(2_000, 2, generator=seeded(2))
    top = torch.full((2_000,), SIGMA_MAX)
    z = SIGMA_MAX * torch.randn(2_000, 2, generator=seeded(3))
    end = MIXTURE.consistency(z, top)
    with torch.no_grad():
        found = {
            f"sampled in {len(objective.edges) + 1}, η = {eta}": relative(
                sample_phased(f, z, SIGMA_MAX, objective.edges, eta), end
            )
            for eta in ((1.0, 0.9, 0.7) if objective.edges else (1.0,))
        }
        if not objective.edges:
            found["error"] = relative(f(x, t), MIXTURE.consistency(x, t))
            for strength in (0.1, 0.3):
                found[f"guided by the EMA at 3/4, ω = {strength}"] = relative(guided(f, earlier[2], strength)(z, top), end)
    return found


COLUMNS = {
    "error": "error",
    "one jump": "sampled in 1, η = 1.0",
    "guided, ω = 0.3": "guided by the EMA at 3/4, ω = 0.3",
    "three jumps, η = 1": "sampled in 3, η = 1.0",
    "η = 0.7": "sampled in 3, η = 0.7",
}


def markdown(results: dict[str, list[dict[str, float]]]) -> str:
    """A row a variant; a segmented student has no jump from 80 to 0, an unsegmented one no edges to skip."""
    lines = [f"| variant | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, runs in results.items():
        cells = [spread([r[key] for r in runs], 3) if key in runs[0] else "" for key in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    path = Path(__file__).parent / "results" / "sct_ablation.json"
    results = {}
    for name, options in ROWS.items():
        results[name] = [one(options, seed) for seed in range(SEEDS)]
        print(markdown({name: results[name]}), flush=True)
    path.write_text(json.dumps({"updates": UPDATES, "batch": BATCH, "seeds": SEEDS, "results": results}, indent=2) + "\n")
