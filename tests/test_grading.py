"""Graded exercises: what is handed out, whose file is whose, how a submission is repaired, and who wrote with whom.

tests/faults/test_grading_faults.py runs submissions in the sandbox.
"""

import contextlib
import csv
import io
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
import torch

pytest.importorskip("nbgrader", reason="the instructor's extra: pip install 'cmlib[grade]'")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))

import build  # noqa: E402

from cmlib import gradebook, grading, sandbox  # noqa: E402
from cmlib.cli import main  # noqa: E402
from cmlib.handin import FOLDER, SEED, HandIn, Work, seed_of  # noqa: E402
from cmlib.submissions import collect, exercises, merge, parse, recognise, similar, whose  # noqa: E402
from tests.faults.test_grading_faults import COPY, DOUBLE, GOOD, ORIGINAL, TOTAL, solved, stripped, write  # noqa: E402

PERSONAS = exercises(ROOT / "notebooks" / "solutions")


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "exercises").mkdir()
    nbformat.write(solved(), tmp_path / "exercises" / "tiny.ipynb")
    return exercises(tmp_path / "exercises")["tiny"]


def played(notebook, monkeypatch, tmp_path):
    """The values that a notebook's cells hand in, run here as the sandbox would."""
    monkeypatch.setenv("CMLIB_PROFILE", "ci")
    monkeypatch.setenv(SEED, "123456")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    space = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and "setup" not in cell.metadata.get("tags", []):
            with contextlib.suppress(NotImplementedError, NameError), contextlib.redirect_stdout(io.StringIO()):
                exec(cell.source, space)
    return grading.values(tmp_path)


# ---- what is handed out


@pytest.mark.parametrize("name", PERSONAS)
def test_the_student_version_holds_neither_solution_nor_hidden_test(name):
    handed_out = build.HERE / "personas" / f"{name}.ipynb"
    text = handed_out.read_text(encoding="utf-8")
    assert nbformat.read(handed_out, 4) == PERSONAS[name].student
    assert "HIDDEN" not in text and "BEGIN SOLUTION" not in text and '"outputs": [{' not in text
    secret = "\n".join(c.source for c in PERSONAS[name].solved.cells)
    taken = [part.split("###" if "### END" in part else "<!--")[0] for part in secret.split("BEGIN SOLUTION")[1:]]
    taken += [part.split("###")[0] for part in secret.split("BEGIN HIDDEN TESTS")[1:]]
    lines = {line.strip() for part in taken for line in part.splitlines() if len(line.strip()) > 24}
    public = nbformat.read(handed_out, 4)
    assert len(lines) > 5
    assert not [line for line in lines if line in "\n".join(c.source for c in public.cells)]


@pytest.mark.parametrize("name", PERSONAS)
def test_as_handed_out_it_earns_nothing_and_the_solution_earns_all(name, monkeypatch, tmp_path):
    exercise = PERSONAS[name]
    tests = grading.tests(exercise)
    assert tests and sum(line.points for line in exercise.lines) >= 10
    names = [c.metadata.nbgrader.grade_id for c in exercise.solved.cells if "nbgrader" in c.metadata]
    assert len(set(names)) == len(names), "a cell is found by its name alone where an editor strips its metadata"
    for notebook, right in ((exercise.student, False), (exercise.solved, True)):
        folder = tmp_path / str(right)
        folder.mkdir()
        values = played(notebook, monkeypatch, folder)
        assert [grading.verdict(test, Work(123456, values)) == "" for test in tests.values()] == [right] * len(tests)
    other = [grading.verdict(test, Work(654321, values)) for test in tests.values()]
    assert all(other), "results of one seed are wrong for another"


def test_a_seed_is_the_learners_own_and_knows_no_capitals():
    assert seed_of("x", " Ana  Perez") == seed_of("x", "ana perez") != seed_of("x", "ana peres")
    assert seed_of("x", "ana") != seed_of("y", "ana")


def test_handing_in_is_patient_and_asks_for_a_name(monkeypatch, capsys):
    monkeypatch.delenv(SEED, raising=False)
    with pytest.raises(ValueError, match="write your name"):
        HandIn("tiny", " ")
    work = HandIn("tiny", "Ana")

    def stub(x):
        raise NotImplementedError

    work.hand_in("a", stub, 1)
    work.hand_in("b", [1, 2])
    assert "a: not done yet" in capsys.readouterr().out and "a" not in work and work["b"].tolist() == [1, 2]
    with pytest.raises(AssertionError, match="nothing was handed in as 'a'"):
        work["a"]


@pytest.mark.parametrize("value", [torch.zeros(0, 3), torch.ones(2, 3), torch.full((3,), torch.nan), torch.tensor(1.0)])
def test_a_value_of_another_shape_or_without_numbers_is_not_close(value):
    assert Work(0, {"a": torch.ones(3)}).close("a", torch.ones(3)) and not Work(0, {"a": value}).close("a", torch.ones(3))


# ---- whose file is it


@pytest.mark.parametrize(
    "path, learner, name",
    [
        ("ana/tiny.ipynb", "ana", "tiny.ipynb"),
        ("ana/work/tiny.ipynb", "ana", "tiny.ipynb"),
        ("Ana Pérez_12345_assignsubmission_file_/tiny.ipynb", "Ana Pérez_12345", "tiny.ipynb"),
        ("Ana Pérez_12345_assignsubmission_file_tiny.ipynb", "Ana Pérez_12345", "tiny.ipynb"),
        ("perezana_12345_67890_tiny.ipynb", "perezana_12345", "tiny.ipynb"),
        ("perezana_LATE_12345_67890_tiny-1.ipynb", "perezana_12345", "tiny-1.ipynb"),
        ("ana.ipynb", "ana", "ana.ipynb"),
        ("=cmd|calc/tiny.ipynb", "_cmd_calc", "tiny.ipynb"),
    ],
)
def test_names_of_learning_platforms(path, learner, name):
    assert whose(Path(path)) == (learner, name)


def test_a_zip_is_read_like_the_folder_that_was_zipped(tmp_path, tiny):
    write(tmp_path / "all" / "ana" / "tiny.ipynb", GOOD)
    write(tmp_path / "all" / "ben" / "Tiny (2).ipynb", GOOD)
    (tmp_path / "all" / "ben" / "notes.txt").write_text("data")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in (tmp_path / "all").rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path))
        archive.writestr("all/__MACOSX/._tiny.ipynb", b"rubbish")
    found = [sorted((s.learner, s.file) for s in collect(p)) for p in (tmp_path / "all", tmp_path / "all.zip")]
    assert found[0] == found[1] == [("ana", "tiny.ipynb"), ("ben", "Tiny (2).ipynb")]
    assert {recognise(s, None, {"tiny": tiny}) for s in collect(tmp_path / "all.zip")} == {"tiny"}
    write(tmp_path / "other" / "cara" / "my homework.ipynb", GOOD)
    (submission,) = collect(tmp_path / "other")
    assert recognise(submission, parse(submission.data), {"tiny": tiny}) == "tiny"


def test_what_is_no_folder_of_submissions_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "missing"):
        assert main(["grade", str(source), "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# ---- repair


def test_a_stripped_notebook_is_put_back(tmp_path, tiny):
    write(tmp_path / "a.ipynb", GOOD, learner="Ana", added=["extra = 1"], change=stripped)
    notebook, notes = merge(parse((tmp_path / "a.ipynb").read_bytes()), tiny)
    locked = [c.source for c in tiny.student.cells if c.metadata.get("nbgrader", {}).get("locked")]
    assert set(locked) <= {c.source for c in notebook.cells}
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    assert any(DOUBLE in c for c in code) and any(TOTAL in c for c in code) and code[-1] == "extra = 1"
    assert code.index('learner = "Ana"') < next(k for k, c in enumerate(code) if "HandIn(" in c)
    assert len(notes) == 3 and grading.typed(notebook) == "Ana"


def test_copies_under_other_names_are_found_and_common_answers_are_not(tmp_path, tiny):
    mine = {"ana": ORIGINAL, "ben": COPY, "cara": TOTAL, "dan": TOTAL}
    notebooks = {}
    for learner, code in mine.items():
        write(tmp_path / f"{learner}.ipynb", {"double": DOUBLE, "total": code})
        notebooks[learner] = parse((tmp_path / f"{learner}.ipynb").read_bytes())
    assert [(a, b, kind) for a, b, kind, share in similar(tiny, notebooks) if share > 0.8] == [("ana", "ben", "code")]


# ---- the gradebook


def test_points_that_a_person_gave_are_merged_and_kept(tmp_path, tiny, monkeypatch, capsys):
    ran = []

    def runs(command, folder, limits, hidden, extra):
        """In the sandbox's place: hands in the right values."""
        ran.append(folder)
        (folder / "handed").mkdir()
        monkeypatch.setenv(SEED, extra[SEED])
        monkeypatch.setenv(FOLDER, extra[FOLDER])
        space = {}
        for cell in nbformat.read(folder / "notebook.ipynb", 4).cells:
            exec(cell.source, space)
        return ""

    monkeypatch.setattr(sandbox, "run", runs)
    monkeypatch.setattr(sandbox, "level", lambda: "limits alone")
    monkeypatch.setattr(grading.os, "cpu_count", lambda: 1)
    source, out = tmp_path / "in", tmp_path / "out"
    write(source / "ana" / "tiny.ipynb", GOOD)
    write(source / "ben" / "tiny.ipynb", GOOD, essay="YOUR ANSWER HERE")
    command = ["grade", str(source), "--exercises", str(tmp_path / "exercises"), "--out", str(out)]

    def table(name):
        with open(out / name, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))

    assert main(command) == 0 and "NETWORK AND YOUR FILES ARE OPEN" in capsys.readouterr().out
    assert [(r["learner"], r["points"]) for r in table("manual.csv")] == [("ana", ""), ("ben", "0")]
    text = (out / "manual.csv").read_text(encoding="utf-8-sig")
    for points, status in (("5", 2), ("x", 2), ("3,5", 0)):
        (out / "manual.csv").write_text(text.replace(",", ";").replace(";4;;", f";4;{points};well argued", 1))
        assert main(command) == status
        told = capsys.readouterr()
        assert status == 0 or "manual.csv, ana, essay: points must lie in 0 … 4" in told.err
    row = table("grades.csv")[0]
    assert (row["auto"], row["manual"], row["total"], row["to grade"]) == ("5.0", "3.5", "8.5", "")
    assert "well argued" in (out / "feedback" / "ana" / "tiny.html").read_text()
    assert len(ran) == 2, "what has not changed does not run again"
    write(source / "ana" / "tiny.ipynb", GOOD, essay="A better answer.")
    assert main(command) == 0 and len(ran) == 3
    row = table("grades.csv")[0]
    assert row["manual"] == "3.5" and row["to grade"] == "1", "a new answer keeps its points until a person looks"
    figure = gradebook.distribution(gradebook.tables(out, [], {"tiny": tiny}), {"tiny": tiny})
    assert figure.axes
