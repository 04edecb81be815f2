"""Graded exercises, and what comes back: folders, zips and learning platforms' names, put back into the exercise's form."""

from __future__ import annotations

import copy
import json
import re
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from cmlib.grader.runner import ROOM

MARK = re.compile(r"@(answer|graded|locked) (\w+)")
MODEL = re.compile(r"<!-- BEGIN SOLUTION -->(.*?)<!-- END SOLUTION -->", re.S)
HIDDEN = re.compile(r"^### BEGIN HIDDEN TESTS\n(.*?)^### END HIDDEN TESTS", re.M | re.S)
MOODLE = re.compile(r"(.+?_\d+)_assignsubmission_[a-z]+_(.*)")
CANVAS = re.compile(r"([^_]+)(_LATE)?(_\d+)_\d+_(.+)")
LARGEST, MOST, LONGEST = 20_000_000, 1_000, 200_000  # bytes, cells and written characters of a notebook
SHOWN = ("text/plain", "text/markdown", "text/latex", "image/png", "image/jpeg")  # kinds of output that run nothing


@dataclass(frozen=True)
class Line:
    """A line of a rubric: a cell of that name, graded by its hidden test or by a person."""

    name: str
    points: float
    manual: bool
    about: str


@dataclass(frozen=True)
class GradedExercise:
    """The solved notebook with its hidden tests, what learners get, and the rubric."""

    name: str
    solved: NotebookNode
    student: NotebookNode
    lines: list[Line]


@dataclass
class Submission:
    """A file of one learner; `data` is None where there is none that can be read, and `notes` say why."""

    learner: str
    file: str
    data: bytes | None
    order: Any = 0
    notes: list[str] = field(default_factory=list)


def student_version(solved: NotebookNode) -> NotebookNode:
    """What learners get of a solved notebook: no solutions, no hidden tests, no outputs (by nbgrader's own steps)."""
    try:
        from nbgrader import preprocessors as steps
    except ImportError as error:
        raise ValueError("graded exercises need nbgrader: pip install -e '.[grade]' in the course's folder") from error
    notebook = copy.deepcopy(solved)
    for step in (steps.ClearSolutions, steps.ClearHiddenTests, steps.ClearOutput, steps.LockCells, steps.ComputeChecksums):
        notebook, _ = step().preprocess(notebook, {})
    return notebook


def exercises(folder: Path) -> dict[str, GradedExercise]:
    """The solved notebooks of `folder` by name. Raises ValueError where there are none."""
    found = {}
    for path in sorted(folder.glob("*.ipynb")):
        solved = nbformat.read(path, 4)
        lines = [
            Line(info["grade_id"], float(info["points"]), info["solution"], cell.metadata.get("about", info["grade_id"]))
            for cell in solved.cells
            if (info := cell.metadata.get("nbgrader", {})).get("grade")
        ]
        found[path.stem] = GradedExercise(path.stem, solved, student_version(solved), lines)
    if not found:
        raise ValueError(f"no solved exercises in {folder}; give their folder with --exercises")
    return found


# ---- whose file is it


def collect(source: Path) -> list[Submission]:
    """Submissions in a folder or zip: `<learner>/x.ipynb`, or the names that Moodle and Canvas export. Raises ValueError."""
    found: list[tuple[Path, int, Any, bytes | None]] = []
    if source.is_file() and zipfile.is_zipfile(source):
        try:
            with zipfile.ZipFile(source) as archive:
                for info in archive.infolist():
                    if not info.is_dir():
                        read = archive.read(info) if info.file_size <= LARGEST and info.filename.endswith(".ipynb") else None
                        found.append((Path(info.filename), info.file_size, info.date_time, read))
        except Exception as error:  # whatever a damaged file may raise
            raise ValueError(f"{source} is damaged or has a password ({error}); unpack it and give the folder") from error
    elif source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.is_file() and not p.is_symlink()):
            stat = path.stat()
            read = path.read_bytes() if stat.st_size <= LARGEST and path.suffix == ".ipynb" else None
            found.append((path.relative_to(source), stat.st_size, stat.st_mtime, read))
    else:
        raise ValueError(f"{source} is neither a folder nor a zip of submissions")
    found = [f for f in found if not any(part.startswith((".", "__MACOSX")) for part in f[0].parts)]
    while found and all(len(p.parts) > 2 for p, *_ in found) and len({p.parts[0] for p, *_ in found}) == 1:
        found = [(f[0].relative_to(f[0].parts[0]), *f[1:]) for f in found]  # the folder that was zipped
    submissions, written = [], dict[str, str]()
    for path, size, order, data in found:
        (learner, name), theirs = whose(path), _split(path)[0]
        if written.setdefault(learner, theirs) != theirs:
            raise ValueError(f"{written[learner]!r} and {theirs!r} would both be called {learner!r}; rename one of them")
        submission = Submission(learner, name, data, order)
        if len(path.parts) == 1 and (canvas := CANVAS.fullmatch(path.name)) and canvas[2]:
            submission.notes.append("handed in late")
        if data is None:
            large = size > LARGEST and path.suffix == ".ipynb"
            other = "a zip, unpack it there and grade again" if path.suffix == ".zip" else "not a notebook"
            why = f"larger than {LARGEST // 10**6} MB, not read" if large else other
            submission.notes.append(f"{why}: {name}")
        submissions.append(submission)
    whole = {s.learner for s in submissions if s.data is not None}
    kept = [s for s in submissions if s.data is not None or s.learner not in whole]  # beside a notebook, other files are data
    if not kept:
        raise ValueError(f"no submissions in {source}; expected <learner>/<exercise>.ipynb")
    return kept


def whose(path: Path) -> tuple[str, str]:
    """Learner and file name of a path inside the folder of submissions, with no letters that a table or a disk trips over."""
    learner, name = _split(path)
    short = re.sub(r"[^\w.@ -]+", "_", learner).encode()[:150].decode(errors="ignore")
    return short.strip(" .@-") or "unnamed", re.sub(r"[^\w.@ ()-]+", "_", name)


def _split(path: Path) -> tuple[str, str]:
    path = Path(unicodedata.normalize("NFC", str(path)))  # a Mac writes é as two letters
    first = path.parts[0]
    if found := MOODLE.fullmatch(first):
        return found[1], found[2] if len(path.parts) == 1 else path.name
    if len(path.parts) > 1:
        return first, path.name
    if found := CANVAS.fullmatch(first):
        return found[1] + found[3], found[4]
    return path.stem, path.name


def recognise(submission: Submission, notebook: NotebookNode | None, known: dict[str, GradedExercise]) -> str:
    """Which exercise a submission belongs to, by its file's name, else by its cells; empty where nothing tells."""
    plain = re.sub(r"\W+", "_", Path(submission.file).stem.casefold())
    if named := [name for name in known if re.sub(r"\W+", "_", name.casefold()) in plain]:
        return max(named, key=len)
    ids = {found for cell in (notebook.cells if notebook else []) if (found := _identity(cell))}
    shared = {name: len(ids & {_identity(c) for c in e.student.cells}) for name, e in known.items()}
    return max(shared, key=lambda name: shared[name]) if any(shared.values()) else ""


# ---- back into the exercise's form


def _identity(cell: NotebookNode) -> str:
    """A cell's grade id, by nbgrader's metadata, or where that was stripped by the mark in its text."""
    mark = MARK.search(cell.source)
    return str(cell.metadata.get("nbgrader", {}).get("grade_id") or (mark[2] if mark else ""))


def parse(data: bytes) -> NotebookNode:
    """A notebook's cells with their text, pictures and outputs, nothing else of it. Raises ValueError."""
    try:
        text = json.loads(data)
        if len(text["cells"]) > MOST:
            raise OverflowError(f"more than {MOST} cells")
        valid = json.dumps(text, ensure_ascii=False).encode(errors="replace").decode()  # half a surrogate is no letter
        raw = nbformat.reads(valid, 4)
        if sum(len(cell.source) for cell in raw.cells) > LONGEST:
            raise OverflowError(f"more than {LONGEST} characters of text and code")
        cells = []
        for cell in raw.cells:
            make = nbformat.v4.new_markdown_cell if cell.cell_type == "markdown" else nbformat.v4.new_code_cell
            new = make(str(cell.source))
            for name, kinds in cell.get("attachments", {}).items():  # a picture that was pasted in
                for kind, picture in kinds.items():
                    new.source = new.source.replace(f"attachment:{name}", f"data:{kind};base64,{picture}", 1)
            if isinstance(info := cell.metadata.get("nbgrader"), dict):
                new.metadata.nbgrader = {"grade_id": info.get("grade_id")}
            if cell.cell_type == "code":
                new.outputs = _shown(cell.outputs)
                nbformat.validate(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=new.outputs)]))
            if cell.cell_type in ("markdown", "code"):
                cells.append(new)
        return nbformat.v4.new_notebook(cells=cells)
    except Exception as error:  # whatever a damaged file may raise
        why = error if isinstance(error, OverflowError) else type(error).__name__
        raise ValueError(f"not a notebook that can be read ({why})") from error


def _shown(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Of a cell's outputs what a page may show; none where they are much larger than ROOM."""
    kept = []
    for output in outputs:
        if output.output_type in ("display_data", "execute_result"):
            data = {kind: value for kind, value in output.data.items() if kind in SHOWN}
            kept.append(nbformat.v4.new_output("display_data", data))
        elif output.output_type in ("stream", "error"):
            kept.append(output)
    return kept if len(json.dumps(kept)) <= 2 * ROOM else []


def merge(theirs: NotebookNode, exercise: GradedExercise) -> tuple[NotebookNode, list[str]]:
    """The exercise with the learner's answers and added cells in it, every other cell as handed out; and what was odd."""
    names = {_identity(c): k for k, c in enumerate(exercise.student.cells) if _identity(c)}
    texts = {c.source.strip(): k for k, c in enumerate(exercise.student.cells)}
    given: dict[int, list[NotebookNode]] = defaultdict(list)
    added: dict[int, list[NotebookNode]] = defaultdict(list)
    place = -1
    for cell in theirs.cells:
        k = names.get(_identity(cell), texts.get(cell.source.strip()))
        if k is not None:
            given[k].append(cell)
            place = max(place, k)
        elif cell.source.strip():
            added[place].append(cell)
    notes, cells, waiting = [], [], added[-1]
    for k, original in enumerate(exercise.student.cells):
        mine, info = given[k], original.metadata.get("nbgrader", {})
        cell = copy.deepcopy(original)
        name, answer = info.get("grade_id"), info.get("solution", False)
        if not name and not mine and any(c.source.startswith("learner") for c in waiting) and cell.source.startswith("learner"):
            continue  # it was filled in
        if name or mine:  # else an edited version of this cell is among those that wait, and must come after it
            cells += waiting
            waiting = []
        written = [c for c in mine if c.source.strip() != original.source.strip()]
        if answer and not written and cell.cell_type == "markdown":  # some answer in a cell of their own, below
            written = [original, *(c for c in added[k] if c.cell_type == "markdown")]
            added[k] = [c for c in added[k] if c.cell_type != "markdown"]
        if mine and cell.cell_type == "code" == mine[0].cell_type:
            cell.outputs = mine[0].outputs
        if name and not mine:
            notes.append(f"cell {name} was deleted" + ("" if answer else ", and is put back"))
        if len(mine) > 1 and name:
            notes.append(f"{len(mine)} cells are named {name}" + (", and all of them count" if answer else ""))
        if answer:
            cell.source = "\n\n".join(c.source for c in written) or original.source
        elif name and written:
            notes.append(f"cell {name} was edited, and is put back")
        cells.append(cell)
        waiting += added[k]
    if names and not any(c.metadata.get("nbgrader") for c in theirs.cells):
        notes.append("the grading metadata was stripped; cells were found by their text")
    return nbformat.v4.new_notebook(cells=[*cells, *waiting], metadata=exercise.student.metadata), notes


# ---- who wrote with whom


def published(exercise: GradedExercise, notebook: NotebookNode) -> list[str]:
    """The questions that are answered with the words of the published solution, where those are more than eight."""

    def plain(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.casefold()))

    models = {_identity(c): plain(" ".join(MODEL.findall(c.source))) for c in exercise.solved.cells}
    answers = {_identity(c): plain(c.source) for c in notebook.cells}
    return [name for name, model in models.items() if model.count(" ") > 7 and model in answers.get(name, "")]


def similar(exercise: GradedExercise, answers: dict[str, NotebookNode]) -> Iterator[tuple[str, str, str, float]]:
    """(learner, learner, `code` or `text`, share) of every pair: how much of what they wrote beyond the exercise and its
    solution they have in common, as the Jaccard index of runs of 6 tokens or 4 words; names of their own count alike."""
    public = [c.source for c in (*exercise.solved.cells, *exercise.student.cells)]
    vocabulary = set(re.findall(r"\w+", " ".join(public)))
    for kind, n, cell_type in (("code", 6, "code"), ("text", 4, "markdown")):
        known = set().union(*(_runs(source, kind, n, vocabulary) for source in public))
        own = {}
        for learner, notebook in answers.items():
            cells = (_runs(c.source, kind, n, vocabulary) for c in notebook.cells if c.cell_type == cell_type)
            own[learner] = set().union(*cells) - known
        for a, b in combinations([learner for learner in own if len(own[learner]) >= 15], 2):
            yield a, b, kind, len(own[a] & own[b]) / len(own[a] | own[b])


def _runs(source: str, kind: str, n: int, vocabulary: set[str]) -> set[tuple[str, ...]]:
    if kind == "text":
        words = re.findall(r"\w+", source.casefold())
    else:
        words = re.findall(r"\w+|[^\w\s]", re.sub(r"#.*", "", source))
        words = [w if w in vocabulary or not w[0].isalpha() else "name" for w in words]
    return set(zip(*(words[k:] for k in range(n)), strict=False))
