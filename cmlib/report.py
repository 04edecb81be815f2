"""The demo's table, on the terminal and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from cmlib.files import write_atomically
from cmlib.profiles import Profile

# key -> (what it is, network evaluations an image)
ROWS = {
    "real": ("real images, held out", ""),
    "resampled": ("training images drawn again: a memoriser", ""),
    "teacher_ddim50": ("teacher, DDIM-50", "50"),
    "teacher_ddim200": ("teacher, DDIM-200", "200"),
    "teacher_ddpm1000": ("teacher, DDPM-1000", "1000"),
    "student_1": ("student (this run)", "1"),
    "student_2": ("student (this run)", "2"),
    "shipped_student_1": ("student (shipped, trained longer)", "1"),
    "shipped_student_2": ("student (shipped, trained longer)", "2"),
    "regression_1": ("the brief's regression onto x̂_r", "1"),
    "identity_1": ("identity map (noise itself)", "0"),
}


def label(key: str) -> str:
    """What a row of the table is called in a figure."""
    name, evaluations = ROWS[key]
    return f"{name}, {evaluations} ev." if key.endswith(("_1", "_2")) else name


def table(dataset: str, metrics: dict[str, Any]) -> list[list[str]]:
    """Header and rows; a ratio to DDIM-50, and the distance at the N of the held-out reals, stand beside every distance."""
    fd = f"fd_{dataset}"
    teacher = metrics[f"{fd}.teacher_ddim50"]
    rows = [
        [
            "generator",
            "evaluations",
            "N",
            fd,
            "÷ DDIM-50",
            f"{fd}, N={metrics['protocol.n_real']}",
            "KID",
            "precision",
            "recall",
        ]
    ]
    for key, (name, evaluations) in ROWS.items():
        if f"{fd}.{key}" not in metrics:
            continue
        value, real = metrics[f"{fd}.{key}"], key == "real"
        few = value if real else metrics.get(f"{fd}.{key}_at_n_real")
        rows.append(
            [
                name,
                evaluations,
                str(metrics["protocol.n_real" if real else "protocol.n"]),
                "" if real else f"{value:.2f}",
                "" if real else f"{value / teacher:.2f}",
                "" if few is None else f"{few:.2f}",
                f"{metrics[f'kid.{key}']:.3g}",
                f"{metrics[f'precision.{key}']:.2f}",
                f"{metrics[f'recall.{key}']:.2f}",
            ]
        )
    return rows


def text(rows: list[list[str]]) -> str:
    """The table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def verdict(metrics: dict[str, Any]) -> str:
    """What the mean squared error of the brief says, next to the identity map's."""
    return (
        f"Pair MSE: regression {metrics['mse.regression']:.4f}, identity map {metrics['mse.identity']:.4f}"
        f" (skill {metrics['mse.regression_skill']:.0%}). At the brief's δ = 1 the identity map scores"
        f" {metrics['mse.identity_delta1_posterior_mean']:.1e} against the teacher's posterior mean and"
        f" {metrics['mse.identity_delta1_ancestral']:.4f} against an ancestral sample, so an MSE below 0.01 proves little."
    )


FIGURE = """<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{alt}</figcaption></figure>"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --line: #8884; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }}
th, td {{ padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; }}
figure {{ margin: 2rem 0; }} figcaption {{ font-size: .92rem; }}
img {{ max-width: 100%; background: white; border-radius: 4px; }}
</style></head><body>
<h1>{title}</h1>
<p>{lead}</p>
<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>
<p>{verdict}</p>
{figures}
<h2>{below}</h2>
<div class="wide"><table><tbody>{numbers}</tbody></table></div>
</body></html>
"""


def write(out: Path, profile: Profile, metrics: dict[str, Any], captions: dict[str, str]) -> None:
    """`out/report.html` with the table and the PNG figures of `captions` (name -> alt text) inside."""

    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    rows = table(profile.dataset, metrics)
    figures = "\n".join(
        FIGURE.format(alt=html.escape(text), data=base64.b64encode((out / f"{name}.png").read_bytes()).decode())
        for name, text in captions.items()
    )
    names = ("pair-regression", "endpoint-regression", "consistency-distillation")
    trained = sum(metrics[f"seconds.{name}"] for name in names)
    lead = (
        f"Data set {profile.dataset}, profile {profile.name}, {metrics['seconds.total']:.0f} s on this machine."
        f" The brief's regression had {metrics['updates.regression']} updates of {profile.batch_size} pairs; the student"
        f" {metrics['updates.endpoint']} of endpoint regression and {metrics['updates.distillation']} of distillation;"
        f" {trained:.0f} s of training in all, reused where this folder had it."
        f" fd_{profile.dataset} is a Fréchet distance on the features of a small classifier that comes with the course;"
        f" it is not FID and compares only with itself at equal N. Reference: {metrics['protocol.reference']}."
    )
    page = PAGE.format(
        title="Consistency distillation: one jump against the walk",
        lead=html.escape(lead),
        head=line(rows[0], "th"),
        body="".join(line(r, "td") for r in rows[1:]),
        verdict=html.escape(verdict(metrics)),
        figures=figures,
        below="Protocol and every number",
        numbers="".join(line([k, f"{v:.5g}" if isinstance(v, float) else str(v)], "td") for k, v in sorted(metrics.items())),
    )
    write_atomically(out / "report.html", lambda file: file.write(page.encode()))
