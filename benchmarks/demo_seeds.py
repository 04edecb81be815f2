"""The demo under several seeds: the table of the README, with the spread between seeds.

    python benchmarks/demo_seeds.py --seeds 0 1 2        # about 8 minutes a seed on two cores; resumes

Writes `benchmarks/results/demo_seeds.json` and prints the table as Markdown.
"""

import argparse
import json
from pathlib import Path

from cmlib.cli import main
from cmlib.compare import spread
from cmlib.report import ROWS

RESULTS = Path(__file__).parent / "results" / "demo_seeds.json"


def markdown(runs: list[dict]) -> str:
    n, n_real = runs[0]["protocol.n"], runs[0]["protocol.n_real"]
    lines = [
        f"| generator | evaluations | `fd_digits`, N={n} | ÷ DDIM-50 | `fd_digits`, N={n_real} | precision | recall |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, (label, evaluations) in ROWS.items():
        if f"fd_digits.{key}" not in runs[0]:
            continue
        real = key == "real"
        rows = runs[:1] if real else runs  # real ones are one set of images, whatever the seed
        fd = [run[f"fd_digits.{key}"] for run in rows]
        ratio = [run[f"fd_digits.{key}"] / run["fd_digits.teacher_ddim50"] for run in rows]
        few = fd if real else [run[f"fd_digits.{key}_at_n_real"] for run in rows]
        quality = [spread([run[f"{metric}.{key}"] for run in rows], 2) for metric in ("precision", "recall")]
        values = ["" if real else spread(fd), "" if real else spread(ratio, 2), spread(few), *quality]
        lines.append(f"| {label} | {evaluations} | {' | '.join(values)} |")
    seconds = spread([run["seconds.total"] for run in runs], 0)
    memory = max(run["memory.peak_mb"] for run in runs)
    return "\n".join(
        [*lines, "", f"{len(runs)} seeds, mean ± half the range; {seconds} s a run on two cores, at most {memory:.0f} MB."]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        done = args.out / str(seed) / "metrics.json"
        if not done.exists() and main(["demo", "--profile", "cpu", "--seed", str(seed), "--out", str(done.parent)]):
            raise SystemExit(2)
        runs.append(json.loads(done.read_text()))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(runs, indent=2) + "\n")
    print(markdown(runs))
