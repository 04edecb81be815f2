"""`cmlib grade`: run submissions in the sandbox, check what they handed in outside of it, and keep nbgrader's gradebook."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from torch import Tensor
from tqdm import tqdm

from cmlib.files import read_sealed, write_atomically, write_sealed
from cmlib.grader import gradebook, sandbox, submissions
from cmlib.grader.gradebook import Result
from cmlib.grader.runner import KILLED
from cmlib.grader.submissions import HIDDEN, GradedExercise, Submission, collect, exercises, merge, parse, recognise, similar
from cmlib.handin import FOLDER, SEED, Work, seed_of

LARGEST = 16_000_000  # bytes of a value
ALIKE = 0.8  # share of common runs above which two submissions are flagged
UNCHECKED = "the value handed in could not be checked"
ONE_BY_ONE = threading.Lock()  # loading a model patches torch for all threads
READ_ME = re.compile(
    r"EXERCISES|\.reference\b|persona\d\._\w+|(?:(?:from|import) )?\bcmlib[\w.]*|CMLIB_GRADING|HandIn\b|os\._exit"
    r"|\b(?:plateaued|stable_denoised|ScoreCorrected|BootstrapRegression|subprocess|socket|ctypes|gradebook)\b"
)


# ---- one submission


def values(folder: Path) -> dict[str, Tensor]:
    """The tensors that a run left in `folder`; nothing that is a link, not a plain file, too large or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    found = {}
    for path in [] if folder.is_symlink() else sorted(folder.glob("*.safetensors")):
        about = path.lstat()
        if stat.S_ISREG(about.st_mode) and about.st_size <= LARGEST:
            try:
                found[path.stem] = load(path.read_bytes())["value"]
            except (SafetensorError, KeyError, OSError):
                continue
    return found


def verdict(test: str, work: Work) -> str:
    """Run a hidden test, here, where no submission's code runs: empty where it passes, else why not."""
    try:
        with ONE_BY_ONE:
            exec(compile(test, "<hidden test>", "exec"), {"work": work})
    except AssertionError as error:
        return str(error) or "not right"
    except Exception as error:
        return f"{UNCHECKED} ({type(error).__name__}: {error})"
    return ""


def tests(exercise: GradedExercise) -> dict[str, str]:
    """The hidden test of every line that code grades, after the cell named `imports`."""
    cells = {c.metadata.nbgrader.grade_id: c.source for c in exercise.solved.cells if "nbgrader" in c.metadata}
    auto = [line.name for line in exercise.lines if not line.manual]
    return {name: "\n".join([cells.get("imports", ""), *HIDDEN.findall(cells[name])]) for name in auto}


def typed(notebook: NotebookNode) -> str:
    """The name that a learner typed in, for whom the shown outputs were made."""
    found = re.findall(r"""^learner\s*=\s*["'](.*?)["']""", "\n".join(c.source for c in notebook.cells), re.M)
    return found[-1] if found else ""


def grade_one(
    submission: Submission,
    theirs: NotebookNode,
    exercise: GradedExercise,
    seed: int,
    out: Path,
    names: Mapping[str, str],
    hidden: Sequence[Path],
) -> Result:
    """Run one submission with a seed that its author has never seen, and write the notebook that nbgrader shows.

    `names` are the names typed into everybody's notebooks: values that are right for their seeds alone are flagged;
    `hidden` are the places that the submission must not see.
    """
    begin = time.monotonic()
    notebook, notes = merge(theirs, exercise)
    result = Result(submission.learner, exercise.name, notes=[*submission.notes, *notes], graded=True)
    public = {c.source for c in exercise.student.cells}
    mine = "\n".join(c.source for c in notebook.cells if "outputs" in c and c.source not in public)
    if words := sorted(set(READ_ME.findall(mine))):
        result.flags.append(f"mentions {', '.join(words)}: read it")
    if same := submissions.published(exercise, notebook):
        result.flags.append(f"{', '.join(same)}: the published solution, word for word")
    with tempfile.TemporaryDirectory(prefix="cmlib-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        bare = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.source) for c in notebook.cells if "outputs" in c])
        nbformat.write(bare, folder / "notebook.ipynb")
        limits = sandbox.Limits()
        why = sandbox.run(
            [sys.executable, "-m", "cmlib.grader.runner", limits.told()],
            folder,
            limits,
            hidden=hidden,
            extra={SEED: str(seed), FOLDER: f"{folder}/handed"},
        )
        handed = values(folder / "handed")
        ran = _executed(folder / "executed.ipynb")
    if why:
        why = "a cell ended the kernel; those after it did not run" if why.endswith(f"status {KILLED}") else why
        result.notes.append(f"the run was stopped: {why}")
    for cell, again in zip([c for c in notebook.cells if c.cell_type == "code"], ran, strict=False):
        if error := next((o for o in again.outputs if o.output_type == "error"), None):
            where = cell.metadata.get("nbgrader", {}).get("grade_id", "that you added")
            told = "raised " + " ".join(f"{error.ename}: {error.evalue}".split())[:200]
            late = f"ran longer than {limits.cell} s and was interrupted"
            told = late if error.ename == "KeyboardInterrupt" else told
            result.notes.append(f"run from top to bottom, cell {where} {told}")
        cell.outputs = cell.outputs or again.outputs  # what the learner saw, made with the learner's seed
    _judge(result, exercise, seed, handed, names)
    _write_graded(notebook, result, out)
    result.seconds = time.monotonic() - begin
    return result


def _judge(result: Result, exercise: GradedExercise, seed: int, handed: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """The verdict on every line that code grades, and what of it an instructor should look at."""
    work, hidden_tests = Work(seed, handed), tests(exercise)
    if missing := [line for line in hidden_tests if line not in handed]:
        result.notes.append(f"nothing was handed in for {', '.join(missing)}")
    for line, test in hidden_tests.items():
        result.lines[line] = wrong = verdict(test, work)
        if wrong.startswith(UNCHECKED):
            result.flags.append(f"{line} counts 0, as {wrong}")
        if wrong and line in handed:
            for name, learner in names.items():
                if not verdict(test, Work(seed_of(exercise.name, name), handed)):
                    whose = "the learner's own" if learner == result.learner else f"{learner}'s"
                    result.flags.append(f"{line} is hard-coded: it is right for {whose} seed, not for the grader's")


def _executed(path: Path) -> list[NotebookNode]:
    """The code cells that the sandbox left, or none: it is the submission's to forge, so only outputs are taken."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > 4 * LARGEST:
            return []
        return [c for c in parse(path.read_bytes()).cells if c.cell_type == "code"]
    except (OSError, ValueError):
        return []


def _write_graded(notebook: NotebookNode, result: Result, out: Path) -> None:
    """The notebook with verdicts as outputs, where nbgrader looks for it."""
    for cell in notebook.cells:
        info = cell.metadata.get("nbgrader", {})
        if info.get("grade") and not info.get("solution"):
            wrong = result.lines[info["grade_id"]]
            cell.outputs = [o for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"]
            cell.outputs.append(
                nbformat.v4.new_output("error", ename="Not right", evalue=wrong, traceback=[f"Not right: {wrong}"])
                if wrong
                else nbformat.v4.new_output("stream", text="Right.\n")
            )
    if result.notes:
        said = nbformat.v4.new_output("stream", text="".join(f"- {note}\n" for note in result.notes))
        notebook.cells.insert(0, nbformat.v4.new_code_cell("# what the grader noticed", outputs=[said]))
    text = nbformat.writes(notebook).encode()
    path = gradebook.autograded(out, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text))


# ---- all of them


def grade(source: Path, folder: Path, out: Path) -> dict[str, Any]:
    """Grade every submission in `source` against the solved exercises in `folder`; a second run goes on, and merges points
    that a person gave meanwhile. Writes grades.csv, manual.csv, feedback/, similarity.csv, summary.html; returns metrics."""
    begin = time.monotonic()
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} lies within the submissions and would be graded, too; give another --out")
    found, known, isolation = collect(source), exercises(folder), sandbox.level()
    (out / "state").mkdir(parents=True, exist_ok=True)
    gradebook.begin(out, known)
    merged = gradebook.merge_manual(out, known)
    read, lost = _sort(found, known)
    salt = out / "state" / "salt"
    if not salt.exists():
        write_atomically(salt, lambda file: file.write(secrets.token_hex(16).encode()))
    hidden = [path.resolve() for path in (sandbox.ROOT / "notebooks", sandbox.ROOT / ".git", folder, out, source)]
    results, fresh = _run(read, known, out, salt.read_text(), hidden)
    by = {(r.learner, r.exercise): r for r in results}
    for result in lost:
        if other := by.get((result.learner, result.exercise)):
            other.notes += result.notes
        else:
            results.append(result)
    pairs = _compare(read, known, results)
    gradebook._write(out / "similarity.csv", ["exercise", "learner_a", "learner_b", "kind", "share", "flagged"], pairs)
    for result in results:
        if result.graded:
            try:
                gradebook.feedback(out, result)
            except Exception as error:  # one page never stops the others
                result.notes.append(f"there is no feedback page for it ({type(error).__name__}: {error})")
    rows = gradebook.tables(out, results, known)
    graded = [r for r in results if r.graded]
    promise = f"{isolation}: {sandbox.PROMISES[isolation]}"
    lead = (
        f"{len(results)} submissions, {len(graded)} graded, {fresh} of them in this run, {merged} rows of manual.csv taken"
        f" over, {sum(bool(r['to grade']) for r in rows)} wait for a person. Isolation: {promise}."
    )
    gradebook.summary(out, rows, known, lead, pairs)
    print(lead)
    print(f"Now read {out / 'summary.html'}, fill in {out / 'manual.csv'}, and give the same command again.")
    return {
        "submissions": len(results),
        "submissions.graded": len(graded),
        "submissions.flagged": sum(bool(r.flags or r.notes) for r in results),
        "seconds.total": time.monotonic() - begin,
        "protocol.isolation": promise,
        "protocol.profile": "ci",  # the submissions', whatever the grader's
    }


def _sort(found: list[Submission], known: dict[str, GradedExercise]) -> tuple[dict, list[Result]]:
    """The newest readable submission of every learner and exercise, and a result for each that cannot be graded."""
    read: dict[tuple[str, str], tuple[Submission, NotebookNode]] = {}
    lost = []
    for submission in sorted(found, key=lambda s: (s.order, s.file)):
        notebook = None
        try:
            notebook = None if submission.data is None else parse(submission.data)
        except ValueError as error:
            submission.notes.append(f"{error}: {submission.file}")
        name = recognise(submission, notebook, known)
        if notebook is None or not name:
            notes = submission.notes or [f"belongs to none of {', '.join(known)}: {submission.file}"]
            lost.append(Result(submission.learner, name or "unknown", notes=notes))
            continue
        if older := read.get((submission.learner, name)):
            submission.notes.append(f"handed in more than once; {submission.file} is graded, {older[0].file} is not")
        read[submission.learner, name] = submission, notebook
    return read, lost


def _run(
    read: dict, known: dict[str, GradedExercise], out: Path, salt: str, hidden: Sequence[Path]
) -> tuple[list[Result], int]:
    """Results of all, those of an earlier run where nothing has changed, and how many are new."""
    results, todo = [], []
    for (learner, name), (submission, notebook) in read.items():
        seed = seed_of(name + salt, learner)
        key = hashlib.sha256(
            b"".join([submission.data, json.dumps(known[name].solved).encode(), str(seed).encode()])
        ).hexdigest()
        path = out / "state" / f"{learner}.{name}.json"
        try:
            old = Result(**read_sealed(path))
        except (FileNotFoundError, ValueError, TypeError):
            old = Result(learner, name)
        if old.key == key:
            results.append(old)
        else:
            names = {own: who for (who, what), (_, n) in read.items() if what == name and (own := typed(n))}
            todo.append((path, key, (submission, notebook, known[name], seed, out, names, hidden)))
    sandbox.STOP.clear()
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        jobs = {pool.submit(_safely, *arguments): (path, key) for path, key, arguments in todo}
        try:
            for job in tqdm(as_completed(jobs), "submissions", len(jobs), disable=None):
                (path, key), result = jobs[job], job.result()
                results.append(result)
                if result.graded:
                    gradebook.record(out, result)
                    result.key = key
                    write_sealed(path, asdict(result))
        except BaseException:
            sandbox.STOP.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results, len(todo)


def _safely(submission: Submission, theirs: NotebookNode, exercise: GradedExercise, *rest: Any) -> Result:
    try:
        return grade_one(submission, theirs, exercise, *rest)
    except Exception as error:  # one submission never stops the others
        note = f"the grader failed on it, look at it yourself ({type(error).__name__}: {error})"
        return Result(submission.learner, exercise.name, notes=[*submission.notes, note])


def _compare(read: dict, known: dict[str, GradedExercise], results: list[Result]) -> list[dict[str, Any]]:
    """Pairs that have much in common, most first; flags both where it is over ALIKE, and whoever shows another's seed."""
    by = {(r.learner, r.exercise): r for r in results}
    pairs = []
    for name, exercise in known.items():
        mine = {learner: notebook for (learner, what), (_, notebook) in read.items() if what == name}
        alike: dict[tuple[str, str], list[str]] = defaultdict(list)
        for a, b, kind, share in similar(exercise, mine):
            if share >= 0.5:
                entry = {"exercise": name, "learner_a": a, "learner_b": b, "kind": kind}
                pairs.append({**entry, "share": round(share, 3), "flagged": share >= ALIKE})
            if share >= ALIKE:
                alike[a, kind].append(b)
                alike[b, kind].append(a)
        for (learner, kind), others in alike.items():
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            by[learner, name].flags.append(f"{kind} like {others[0]}'s{more}")
        seeds = {learner: seed_of(name, typed(notebook)) for learner, notebook in mine.items() if typed(notebook)}
        for learner, notebook in mine.items():
            own = seeds.get(learner)
            shown = {int(s) for c in notebook.cells for s in re.findall(r"seed (\d{1,10})\b", json.dumps(c.get("outputs", [])))}
            for other, seed in seeds.items():
                if other != learner and seed == own:
                    by[learner, name].flags.append(f"has the same name typed in as {other}")
                elif other != learner and seed in shown:
                    by[learner, name].flags.append(f"shows outputs made with {other}'s seed")
            if own is None:
                by[learner, name].flags.append("no name is typed in")
            elif shown and own not in shown:
                by[learner, name].flags.append("its outputs were made with another name than the one typed in")
    return sorted(pairs, key=lambda p: -p["share"])
