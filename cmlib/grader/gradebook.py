"""nbgrader's gradebook, and the tables, feedback and figure that instructors and learners get from it."""

from __future__ import annotations

import base64
import csv
import html
import io
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
from matplotlib.figure import Figure

from cmlib import plots
from cmlib.files import write_atomically
from cmlib.grader.submissions import GradedExercise
from cmlib.report import FIGURE, PAGE

TAGS = (
    "a b blockquote br code del details div em h1 h2 h3 h4 h5 h6 hr i img li ol p pre span strong sub summary sup"
    " table tbody td th thead tr ul"
)
SAFE = {
    "href": r"(https?|mailto):.*",
    "src": r"data:image/(png|jpeg|gif|webp);base64,[\w+/=\s]*|https://colab\.research\.google\.com/assets/colab-badge\.svg",
    "alt": r".*",
    "class": r"[\w -]*",
}
STYLE = "<style>th, td { padding: 0 .8em .2em 0; vertical-align: top } pre { white-space: pre-wrap }</style></head>"
MANUAL = ("learner", "exercise", "line", "max", "points", "comment")
Row = dict[str, Any]


@dataclass
class Result:
    """What became of a submission: a message a rubric line (empty: right), notes for the learner, flags for the instructor."""

    learner: str
    exercise: str
    lines: dict[str, str] = field(default_factory=dict)
    graded: bool = False
    notes: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    key: str = ""
    seconds: float = 0.0


def database(out: Path) -> str:
    """The gradebook's address."""
    return f"sqlite:///{out.resolve() / 'gradebook.db'}"


def resources(out: Path, exercise: str, learner: str = "") -> dict[str, Any]:
    """What nbgrader's steps want to know."""
    named = {"notebook": exercise, "assignment": exercise, "student": learner, "db_url": database(out)}
    return {"nbgrader": named, "unique_key": exercise}


def begin(out: Path, known: Mapping[str, GradedExercise]) -> None:
    """Make `out` a folder that nbgrader's formgrader opens. Raises ValueError where an exercise has other cells than it had."""
    from nbgrader.api import Gradebook
    from nbgrader.preprocessors import SaveCells

    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # nbgrader calls alembic by its name
    lines = [f"c.CourseDirectory.root = {str(out.resolve())!r}", 'c.CourseDirectory.course_id = ""']
    lines.append(f"c.HTMLExporter.filters = {{'markdown2html': '{harmless.__module__}.{harmless.__name__}'}}")
    text = "\n".join(["c = get_config()", *lines, ""])
    (out / "source").mkdir(exist_ok=True)
    write_atomically(out / "nbgrader_config.py", lambda file: file.write(text.encode()))
    for name, exercise in known.items():
        with Gradebook(database(out)) as book:
            book.update_or_create_assignment(name)
        try:
            SaveCells().preprocess(exercise.student, resources(out, name))
        except RuntimeError as error:
            raise ValueError(f"{name} has other cells than when {out} was begun; give another --out") from error


def harmless(markdown: str) -> str:
    """A learner's Markdown as HTML that runs nothing: no script, no handler, links to the web and embedded pictures alone.

    Where it has more than 500 angle brackets it stays text, as reading nested HTML takes the square of its depth.
    """
    from bleach import clean
    from nbconvert.filters import markdown2html

    def kept(tag: str, name: str, value: str) -> bool:
        return name in SAFE and bool(re.fullmatch(SAFE[name], value, re.S))

    if markdown.count("<") > 500:
        return f"<pre>{html.escape(markdown)}</pre>"
    return clean(markdown2html(markdown), TAGS.split(), kept, protocols=["http", "https", "mailto", "data"])


def record(out: Path, result: Result) -> None:
    """Keep the verdicts of a freshly graded submission; points that a person gave stay, and are to be looked at again."""
    from nbgrader.api import Gradebook
    from nbgrader.preprocessors import SaveAutoGrades

    with Gradebook(database(out)) as book, warnings.catch_warnings(action="ignore"):  # SQLAlchemy's, about nbgrader's ways
        book.update_or_create_student(result.learner)
        book.update_or_create_submission(result.exercise, result.learner)
    notebook = nbformat.read(autograded(out, result), 4)
    SaveAutoGrades().preprocess(notebook, resources(out, result.exercise, result.learner))


def autograded(out: Path, result: Result) -> Path:
    """Where nbgrader looks for a graded notebook."""
    return out / "autograded" / result.learner / result.exercise / f"{result.exercise}.ipynb"


def merge_manual(out: Path, known: Mapping[str, GradedExercise]) -> int:
    """Take over the points and comments that a person wrote into manual.csv since it was written; returns how many rows."""
    from nbgrader.api import Gradebook, MissingEntry

    rows, before = _read(out / "manual.csv"), _read(out / "state" / "manual.csv")
    changed = [row for row in rows if row not in before and (row["points"].strip() or row["comment"].strip())]
    with Gradebook(database(out)) as book:
        for row in changed:
            where = f"manual.csv, {row['learner']}, {row['line']}"
            try:
                entry = (row["line"], row["exercise"], row["exercise"], row["learner"])
                grade, comment = book.find_grade(*entry), book.find_comment(*entry)
            except MissingEntry as error:
                raise ValueError(f"{where}: no such submission or line") from error
            comment.manual_comment = row["comment"].strip() or comment.manual_comment
            if text := row["points"].strip().replace(",", "."):
                if not text.replace(".", "", 1).isdigit() or float(text) > grade.max_score:
                    raise ValueError(f"{where}: points must lie in 0 … {grade.max_score:g}, got {row['points']!r}")
                grade.manual_score, grade.needs_manual_grade = float(text), False
        book.db.commit()
    return len(changed)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, encoding="utf-8-sig", newline="") as file:
        text = file.read()
    rows = csv.DictReader(io.StringIO(text), delimiter=";" if ";" in text.partition("\n")[0] else ",")  # as Excel saved it
    if rows.fieldnames is None or not set(MANUAL) <= set(rows.fieldnames):
        raise ValueError(f"{path} must have the columns {', '.join(MANUAL)}")
    return [{name: row[name] or "" for name in MANUAL} for row in rows]


def _write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode("utf-8-sig")))


def tables(out: Path, results: Sequence[Result], known: Mapping[str, GradedExercise]) -> list[Row]:
    """Write grades.csv and manual.csv from the gradebook, and return the rows of grades.csv."""
    from nbgrader.api import Gradebook

    rows, manual = [], []
    with Gradebook(database(out)) as book:
        for result in sorted(results, key=lambda r: (r.exercise, r.learner)):
            row: Row = {"learner": result.learner, "exercise": result.exercise, "graded": "yes" if result.graded else "no"}
            lines = known[result.exercise].lines if result.graded else []
            opened = 0
            for line in lines:
                entry = (line.name, result.exercise, result.exercise, result.learner)
                grade = book.find_grade(*entry)
                points = grade.auto_score if grade.manual_score is None else grade.manual_score
                opened += (todo := points is None or bool(grade.needs_manual_grade))
                row[line.name] = "" if points is None else points
                if line.manual:
                    told = "" if todo and points is None else f"{points:g}"
                    comment = book.find_comment(*entry).manual_comment or ""
                    values = (result.learner, result.exercise, line.name, f"{line.points:g}", told, comment)
                    manual.append(dict(zip(MANUAL, values, strict=True)))
            for kind in (False, True):
                given = [row[line.name] or 0 for line in lines if line.manual == kind]
                row["manual" if kind else "auto"] = sum(given) if result.graded else ""
            row["total"] = row["auto"] + row["manual"] if result.graded else ""
            row["max"] = sum(line.points for line in lines) or ""
            row["to grade"] = opened or ""
            row["flags"] = "; ".join([*result.flags, *result.notes])
            rows.append(row)
    graded = {result.exercise for result in results if result.graded}
    names = dict.fromkeys(line.name for name, exercise in known.items() if name in graded for line in exercise.lines)
    columns = ["learner", "exercise", "graded", *names, "auto", "manual", "total", "max", "to grade", "flags"]
    _write(out / "grades.csv", columns, rows)
    for path in (out / "state" / "manual.csv", out / "manual.csv"):
        _write(path, MANUAL, manual)
    return rows


def feedback(out: Path, result: Result) -> None:
    """One page for the learner: the notebook with points, verdicts and comments, by nbgrader's template."""
    import nbgrader
    from nbconvert.exporters import HTMLExporter
    from nbgrader.api import Gradebook
    from nbgrader.preprocessors import GetGrades
    from traitlets.config import Config

    formgrader = Path(nbgrader.__file__).parent / "server_extensions" / "formgrader"
    setting = Config()
    setting.HTMLExporter.template_name = "feedback"
    setting.HTMLExporter.extra_template_basedirs = [str(formgrader / "templates")]
    setting.HTMLExporter.extra_template_paths = [str(formgrader / "static/node_modules/bootstrap/dist/css")]
    setting.HTMLExporter.preprocessors = [GetGrades]
    setting.HTMLExporter.filters = {"markdown2html": harmless}
    page, _ = HTMLExporter(config=setting).from_filename(
        str(autograded(out, result)), resources=resources(out, result.exercise, result.learner)
    )
    with Gradebook(database(out)) as book:
        entry = book.find_submission_notebook(result.exercise, result.exercise, result.learner)
        waiting = sum(bool(grade.needs_manual_grade) for grade in entry.grades)
    told = f"<p>Answers that wait for a person, at 0 or what they had: {waiting}.</p>" if waiting else ""
    page = page.replace("</head>", STYLE, 1).replace('<div id="toc">', f'{told}<div id="toc">', 1)
    path = out / "feedback" / result.learner / f"{result.exercise}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(page.encode()))


def distribution(rows: Sequence[Row], known: Mapping[str, GradedExercise]) -> Figure:
    """How many submissions have how many points, a panel an exercise; what waits for a person counts as 0."""
    named = {name: [r for r in rows if r["exercise"] == name and r["graded"] == "yes"] for name in known}
    shown = {name: mine for name, mine in named.items() if mine}
    rows_of_panels = max(1, len(shown))
    size = (8.5, 2.2 * rows_of_panels + 0.4)
    figure, axes = plt.subplots(rows_of_panels, figsize=size, squeeze=False, layout="constrained")
    for ax, (name, mine) in zip(axes[:, 0], shown.items(), strict=False):
        top = int(mine[0]["max"])
        bins = [k - 0.5 for k in range(top + 2)]
        both = [[r["auto"] for r in mine], [r["total"] for r in mine]]
        ax.hist(both[1], bins, color=plots.COLOURS[0], label="with what a person gave")
        ax.hist(both[0], bins, histtype="step", color=plots.COLOURS[1], linewidth=2, label="by code alone")
        waiting = sum(bool(r["to grade"]) for r in mine)
        ax.set(xlabel=f"points of {top}", ylabel="submissions", title=f"{name}, {waiting} of {len(mine)} not complete")
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True)
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def summary(out: Path, rows: Sequence[Row], known: Mapping[str, GradedExercise], lead: str, pairs: Sequence[Row]) -> None:
    """summary.html: points by rubric line, the distribution, similar pairs, and every submission with its flags."""

    def line(cells: Sequence[Any], tag: str = "td") -> str:
        shown = (f"{c:g}" if isinstance(c, float) else str(c) for c in cells)
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in shown) + "</tr>"

    body = []
    for name, exercise in known.items():
        mine = [r for r in rows if r["exercise"] == name and r["graded"] == "yes"]
        for part in exercise.lines if mine else []:
            given = [float(r[part.name]) for r in mine if r[part.name] != ""]
            mean = f"{sum(given) / len(given):.2f}" if given else ""
            by = "a person" if part.manual else "code"
            body.append(line([f"{name}: {part.about}", by, part.points, mean, f"{len(given)} of {len(mine)}"]))
    plots.save(distribution(rows, known), out / "scores.png")
    picture = base64.b64encode((out / "scores.png").read_bytes()).decode()
    alike = ", ".join(f"{p['learner_a']} and {p['learner_b']} ({p['kind']}, {p['share']:.0%})" for p in pairs if p["flagged"])
    shown = ("exercise", "total", "max")
    page = PAGE.format(
        title="Grades",
        lead=html.escape(lead),
        head=line(["rubric line", "graded by", "points", "mean", "graded"], "th"),
        body="".join(body),
        verdict=html.escape(f"Similar: {alike}." if alike else "No two submissions are conspicuously similar."),
        below="Every submission: its flags, points, and the most there are",
        figures=FIGURE.format(alt="Histograms of points, an exercise a panel.", data=picture),
        numbers="".join(line([": ".join(filter(None, (r["learner"], r["flags"]))), *map(r.get, shown)]) for r in rows),
    )
    write_atomically(out / "summary.html", lambda file: file.write(page.encode()))
