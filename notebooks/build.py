"""Make the notebooks from their sources: `python notebooks/build.py [01 …]`, or with --badges [owner/name], --check, --time.

The README's table of lessons follows from them, too.

A source is jupytext's py:percent. In it `{badge}` and `{times}` are filled in, and the empty code cell tagged `setup`
becomes SETUP; all three follow from pyproject.toml's address, the package's version and times.json.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import io
import json
import os
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from cmlib.grader.submissions import student_version
from cmlib.handin import SEED

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PYPROJECT, TIMES, README = ROOT / "pyproject.toml", HERE / "times.json", ROOT / "README.md"
TABLE = re.compile(r"(?<=<!-- lessons: written by notebooks/build.py -->\n).*?(?=<!-- end of lessons -->)", re.S)
LIMIT = 100_000  # bytes a figure
VIEW = "application/vnd.jupyter.widget-view+json"
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MACHINES = {"ci": "at profile ci", "cpu": "at cpu (two cores)", "t4": "at t4 (a GPU)"}
SETUP = """\
# @title Setup: run this cell first, and again whenever you like
# It installs cmlib on Colab, nothing elsewhere, and never touches torch, numpy or ipywidgets.
import importlib.util
import subprocess
import sys
from pathlib import Path

REPO, TAG = "{repo}", "{tag}"  # the public address
colab = Path("/content")
places = [Path.cwd(), *Path.cwd().parents]
for top in (colab, colab / "drive/MyDrive"):
    places += [top, *sorted(top.glob("*")), *sorted(top.glob("Colab Notebooks/*"))]
home = next((str(place) for place in places if (place / "cmlib" / "__init__.py").is_file()), None)
if home and home not in sys.path:
    sys.path.insert(0, home)  # this copy of the course, also an uploaded one or one in a mounted Drive
if not importlib.util.find_spec("cmlib") and colab.is_dir() and REPO:
    subprocess.run(f"pip install -q --no-deps git+https://github.com/{{REPO}}@{{TAG}}".split(), check=True)
    importlib.invalidate_caches()
if not importlib.util.find_spec("cmlib"):
    raise ModuleNotFoundError(
        "cmlib is not here. Open this notebook inside the course's folder; on Colab, put that folder"
        " into /content or mount the Drive that holds it, and run this cell again."
    )

import cmlib
from cmlib import profiles

profile = profiles.select()
print(f"cmlib {{cmlib.__version__}}, profile {{profile.name}}, data set {{profile.dataset}}")
"""


def repository() -> str:
    """owner/name from pyproject.toml, empty while it is undecided."""
    found = re.search(r'^Repository = "https://github.com/([^"]+)"$', PYPROJECT.read_text(encoding="utf-8"), re.M)
    return found.group(1) if found else ""


def set_repository(name: str) -> None:
    """Write owner/name into pyproject.toml, its one place."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise SystemExit(f"build: REPO is owner/name, got {name!r}")
    text = PYPROJECT.read_text(encoding="utf-8")
    line = f'Repository = "https://github.com/{name}"'
    new, n = re.subn(r"^(# )?Repository = .*$", line, text, count=1, flags=re.M)
    if not n:
        raise SystemExit("build: pyproject.toml has no line `Repository = …` or `# Repository = …` under [project.urls]")
    PYPROJECT.write_text(new, encoding="utf-8")


def tag() -> str:
    """v and the package's version."""
    return "v" + re.search(r'__version__ = "(.+)"', (ROOT / "cmlib" / "__init__.py").read_text(encoding="utf-8")).group(1)


def badge(path: Path) -> str:
    """Markdown that opens `path` in Colab; without a public address, Colab's page for uploads."""
    picture = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    if repository():
        return f"{picture}(https://colab.research.google.com/github/{repository()}/blob/{tag()}/{path.relative_to(ROOT).as_posix()})"
    return f"{picture}(https://colab.research.google.com/#upload=true) with the course's folder in your Drive"


def told(seconds: float) -> str:
    """A running time in words that don't change from run to run."""
    return "under a minute" if seconds < 50 else f"about {round(seconds / 60) or 1} minute{'s' * (seconds >= 90)}"


def times(name: str) -> str:
    """The measured running times of a notebook; a graded exercise has a profile more, which one of them is about."""
    known = json.loads(TIMES.read_text()).get(name, {})
    exercise = (HERE / "source" / "personas" / f"{name}.py").exists()
    machines = MACHINES | ({"rtx4070": "at rtx4070 (that card)"} if exercise else {})
    return "; ".join(f"{told(known[p]) if p in known else 'not measured yet'} {words}" for p, words in machines.items())


def gradable(notebook: NotebookNode) -> None:
    """Give the cells of a graded exercise their marks and nbgrader's metadata, and fill in `{rubric}`.

    A cell says `answer="name"` (the learner writes it), `grade="name" points=2 about="…"` (a hidden test grades it),
    `manual="name" points=2 about="…"` (the learner writes it, a person grades it) or `locked="name"`.
    """
    lines = ["| what is graded | points | by |", "|---|---|---|"]
    for cell in notebook.cells:
        kind = next((k for k in ("answer", "grade", "manual", "locked") if k in cell.metadata), None)
        name = cell.metadata.pop(kind) if kind else "setup" if "setup" in cell.metadata.get("tags", []) else None
        if name is None:
            continue
        info = {"grade": kind in ("grade", "manual"), "solution": kind in ("answer", "manual"), "grade_id": name}
        info |= {"locked": not info["solution"], "schema_version": 3, "task": False}
        if info["grade"]:
            info["points"] = cell.metadata.pop("points")
            lines.append(f"| {cell.metadata.about} | {info['points']} | {'code' if kind == 'grade' else 'a person'} |")
        cell.metadata.nbgrader = nbformat.from_dict(info)
        if kind:  # a second way to find the cell, where an editor strips its metadata
            mark = f"@{'answer' if info['solution'] else 'graded' if info['grade'] else 'locked'} {name}"
            told = "keep this line" if info["solution"] else "leave this cell as it is"
            cell.source = (f"<!-- {mark} -->" if cell.cell_type == "markdown" else f"# {mark} ({told})") + f"\n{cell.source}"
    for cell in notebook.cells:
        cell.source = cell.source.replace("{rubric}", "\n".join(lines))


def assemble(source: Path) -> NotebookNode:
    """The notebook of a source, not executed: generated parts filled in, ids that follow from the cells' text.

    Of a persona's exercise, it is the solved one; `student_version` makes what learners get.
    """
    target = HERE / source.relative_to(HERE / "source").with_suffix(".ipynb")
    notebook = jupytext.read(source)
    notebook.metadata = nbformat.from_dict(KERNEL)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: set[str] = set()
    if source.parent.name == "personas":
        gradable(notebook)
    for cell in notebook.cells:
        if "setup" in cell.metadata.get("tags", []):
            cell.source = SETUP.format(repo=repository(), tag=tag()).rstrip()
        if {"setup", "solution"} & set(cell.metadata.get("tags", [])):
            cell.metadata |= {"jupyter": {"source_hidden": True}, "cellView": "form"}  # folded, in JupyterLab and in Colab
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("{badge}", badge(target)).replace("{times}", times(target.stem))
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        cell.id = next(i for k in range(99) if (i := digest + f"-{k}" * (k > 0)) not in seen)
        seen.add(cell.id)
    return notebook


def targets(names: list[str]) -> dict[Path, Path]:
    """source -> notebook, all or those whose names start with one of `names`; a persona's goes to solutions/."""
    known = {p.relative_to(HERE / "source").with_suffix("").as_posix(): p for p in sorted((HERE / "source").rglob("*.py"))}
    found = {name: source for name, source in known.items() if not names or name.startswith(tuple(names))}
    if not found:
        raise SystemExit(f"build: no source starts with {' or '.join(names)}; there are {', '.join(known)}")
    return {source: HERE / f"{name.replace('personas/', 'solutions/')}.ipynb" for name, source in found.items()}


def where(source: Path) -> str:
    """What `make notebooks NB=` takes to make a source's notebook."""
    return f"{source.parent.name}/{source.stem[:2]}".removeprefix("source/")


def release(source: Path) -> Path:
    """Where the student version of a persona's exercise is."""
    return HERE / "personas" / f"{source.stem}.ipynb"


def write_release(source: Path) -> None:
    """Write the student version of a persona's exercise; nothing to do for a lesson."""
    if source.parent.name == "personas":
        release(source).parent.mkdir(exist_ok=True)
        nbformat.write(student_version(assemble(source)), release(source))


def execute(notebook: NotebookNode, folder: Path, profile: str) -> float:
    """Run it in place in this checkout, and return the seconds it took."""
    os.environ |= {"CMLIB_PROFILE": profile, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0", SEED: "0"}
    begin = time.perf_counter()
    client = NotebookClient(
        notebook, timeout=3600, store_widget_state=False, record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return time.perf_counter() - begin


def tidy(notebook: NotebookNode) -> list[str]:
    """Remove what no reader can use, and say what must not be committed."""
    problems = []
    notebook.metadata = nbformat.from_dict(KERNEL)
    for k, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.outputs = [o for o in cell.outputs if VIEW not in (shown := o.get("data", {})) or "image/png" in shown]  # no bars
        for output in cell.outputs:
            data, metadata = output.get("data", {}), output.get("metadata", {})
            data.pop(VIEW, None)  # it points at a kernel that is gone
            text = json.dumps(output)
            if output.output_type == "stream" and output.name == "stderr":
                problems.append(f"code cell {k} wrote to stderr: {output.text[:200]}")
            if str(ROOT) in text or " at 0x" in text:
                problems.append(f"code cell {k} shows a path or an address of this machine")
            if "image/png" in data and len(base64.b64decode(data["image/png"])) > LIMIT:
                problems.append(f"code cell {k} has a figure over {LIMIT // 1000} kB")
            if "image/png" in data and not metadata.get("image/png", {}).get("alt"):
                problems.append(f"code cell {k} has a figure without alternative text; use plots.display")
    return problems


def build(source: Path, target: Path) -> None:
    """Execute at profile cpu and write the notebook."""
    notebook = assemble(source)
    target.parent.mkdir(exist_ok=True)
    before = source.read_bytes()
    seconds = execute(notebook, target.parent, "cpu")
    if source.read_bytes() != before:
        raise SystemExit(f"build: {source.name} was edited while it ran; run `make notebooks NB={where(source)}` again")
    record(target.stem, "cpu", seconds)
    problems = tidy(notebook)
    for cell, fresh in zip(notebook.cells, assemble(source).cells, strict=True):  # its time may be new
        cell.source, cell.id = fresh.source, fresh.id
    nbformat.write(notebook, target)
    write_release(source)
    print(f"{target.relative_to(ROOT)}: {len(notebook.cells)} cells, {target.stat().st_size // 1000} kB")
    if problems:
        raise SystemExit("build: " + "\nbuild: ".join(problems))


def record(name: str, profile: str, seconds: float) -> None:
    """Keep a running time, unless the old one says the same in words."""
    known = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    old = known.setdefault(name, {}).get(profile)
    if old is None or told(old) != told(seconds):
        known[name][profile] = round(seconds)
    TIMES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(f"{name}: {seconds:.0f} s at {profile}")


def regenerate(source: Path, target: Path) -> None:
    """Write the generated parts anew and keep the outputs."""
    old, new = nbformat.read(target, 4), assemble(source)
    generated = [
        k for k, cell in enumerate(new.cells) if "setup" in cell.metadata.get("tags", []) or cell.cell_type == "markdown"
    ]
    same = len(old.cells) == len(new.cells) and all(
        a.source == b.source for k, (a, b) in enumerate(zip(old.cells, new.cells, strict=True)) if k not in generated
    )
    if not same:
        raise SystemExit(f"build: {target.name} is older than its source; run `make notebooks NB={where(source)}`")
    for before, now in zip(old.cells, new.cells, strict=True):
        if now.cell_type == "code":
            now.outputs, now.execution_count = before.outputs, before.execution_count
    nbformat.write(new, target)
    write_release(source)


def drift(source: Path, target: Path) -> list[str]:
    """How a notebook differs from what its source makes, and what else is wrong with it."""
    name = target.relative_to(ROOT).as_posix()
    if not target.exists():
        return [f"{name} is missing"]
    old, new = nbformat.read(target, 4), assemble(source)
    nbformat.validate(old)
    keys = [[(c.cell_type, c.id, c.source, c.metadata) for c in notebook.cells] for notebook in (old, new)]
    problems = [] if keys[0] == keys[1] and old.metadata == new.metadata else ["differs from its source"]
    if any(c.cell_type == "code" and c.source and c.execution_count is None for c in old.cells):
        problems.append("has cells that were not executed")
    if source.parent.name == "personas":
        handed_out = release(source)
        if not handed_out.exists() or nbformat.read(handed_out, 4) != student_version(new):
            problems.append("has another student version; run `make release`")
    return [f"{name} {p}; run `make notebooks NB={where(source)}`" for p in problems + tidy(old)]


def cover(notebook: NotebookNode) -> tuple[bytes, str]:
    """The figure of the cell tagged `cover`, else the first one, small, and its alternative text."""
    figures = [(c, o) for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    output = next((o for c, o in figures if "cover" in c.metadata.get("tags", [])), figures[0][1])
    picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
    picture.thumbnail((480, 320))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), output.metadata["image/png"]["alt"]


def readme(covers: bool) -> str:
    """The README with its table of lessons as it should be; `covers` also writes the pictures."""
    lines = ["| lesson | what you will see | time to run | open |", "|---|---|---|---|"]
    for target in (t for t in targets([]).values() if t.parent == HERE and t.exists()):
        notebook = nbformat.read(target, 4)
        title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        small, alt = cover(notebook)
        path, picture = target.relative_to(ROOT).as_posix(), HERE / "covers" / f"{target.stem}.png"
        if covers:
            picture.parent.mkdir(exist_ok=True)
            picture.write_bytes(small)
        image = f'<img src="{picture.relative_to(ROOT).as_posix()}" width="240" alt="{html.escape(alt)}">'
        opens = badge(target).split(" with ")[0]
        lines.append(f"| **[{title}]({path})** | {image} | {times(target.stem)} | {opens} |")
    text = README.read_text(encoding="utf-8")
    if not TABLE.search(text):
        raise SystemExit("build: README.md has lost the two comments between which the table of lessons stands")
    return TABLE.sub(lambda _: "\n".join(lines) + "\n", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="which notebooks, by how their names start (default: all)")
    parser.add_argument(
        "--badges", nargs="?", const="", help="set the address to owner/name, write the generated cells, don't execute"
    )
    parser.add_argument("--check", action="store_true", help="fail where a notebook differs from its source")
    parser.add_argument("--release", action="store_true", help="only write the personas' student versions")
    parser.add_argument("--time", metavar="PROFILE", help="only execute at PROFILE and keep the time")
    args = parser.parse_args()
    if args.badges:
        set_repository(args.badges)
    problems: list[str] = []
    for source, target in targets(args.names).items():
        if args.check:
            problems += drift(source, target)
        elif args.release:
            write_release(source)
        elif args.time:
            record(target.stem, args.time, execute(assemble(source), target.parent, args.time))
            regenerate(source, target)
        elif args.badges is not None:
            regenerate(source, target)
        else:
            build(source, target)
    table = readme(covers=not args.check)
    if not args.check:
        README.write_text(table, encoding="utf-8")
    elif table != README.read_text(encoding="utf-8"):
        problems.append("README.md's table of lessons is out of date; run `make badges`")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
