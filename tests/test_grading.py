"""Graded exercises: what is handed out, whose file is whose, how a submission is repaired, and who wrote with whom.

tests/faults/test_grading_faults.py runs submissions in the sandbox.
"""

import contextlib
import csv
import io
import json
import re
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import pytest
import torch

pytest.importorskip("nbgrader", reason="the instructor's extra: pip install 'cmlib[grade]'")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))

import build  # noqa: E402

from cmlib.cli import main  # noqa: E402
from cmlib.course import persona4  # noqa: E402
from cmlib.grader import gradebook, grading, sandbox  # noqa: E402
from cmlib.grader.submissions import collect, exercises, merge, parse, published, recognise, similar, whose  # noqa: E402
from cmlib.handin import FOLDER, SEED, HandIn, Work, seed_of  # noqa: E402
from tests.faults.test_grading_faults import COPY, DOUBLE, GOOD, ORIGINAL, TOTAL, solved, stripped, write  # noqa: E402

PERSONAS, FIRST = exercises(ROOT / "notebooks" / "solutions"), "01_curious_generalist"


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "exercises").mkdir()
    nbformat.write(solved(), tmp_path / "exercises" / "tiny.ipynb")
    return exercises(tmp_path / "exercises")["tiny"]


def played(notebook, monkeypatch, tmp_path):
    """The values that a notebook's cells hand in, run here as the sandbox would: those that the grader knows by name, as the
    experiments beside them are run with the solutions, by nbval."""
    monkeypatch.setenv("CMLIB_PROFILE", "ci")
    monkeypatch.setenv(SEED, "123456")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    space = {"learner": ""}
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("grade_id") not in (None, "setup"):
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
    assert not re.search(r"plateaued|stable_denoised|BootstrapRegression", text), "an answer, imported for the learner"
    assert "cmlib[" not in text, "nobody has published a package of this name"
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


@pytest.fixture
def bench(monkeypatch, capsys):
    """`bench(exercise, answers, *cells)`: what these cells print after imports, start and `answers`, and their names."""
    monkeypatch.setenv("CMLIB_PROFILE", "ci")
    monkeypatch.setenv(SEED, "123456")

    def run(exercise, answers, *cells):
        sources = {c.metadata.nbgrader.grade_id: c.source for c in PERSONAS[exercise].student.cells if "nbgrader" in c.metadata}
        space = {"learner": ""}
        for text in (sources["imports"], sources["start"], answers, *(sources[name] for name in cells)):
            exec(text, space)
        return capsys.readouterr().out, space

    return run


def test_what_is_not_written_yet_is_told_and_raises_nothing(bench):
    stubs = "noisy = jump = distance = spread = lambda *_: None"
    out, space = bench(FIRST, stubs, "noisy_pictures", "reconstructions", "picture", "errors", "spreads")
    assert out.count("not done yet") == 2 and not space["work"]
    out, space = bench(FIRST, stubs + "\nnoisy = lambda x0, *_: x0", "noisy_pictures", "reconstructions", "picture")
    assert out.count("not done yet") == 1 and list(space["work"]) == ["noisy_pictures"]


@pytest.mark.parametrize(
    "exercise, answers, cell",
    [
        (FIRST, "spread = lambda *_: 0.5; work['reconstructions'] = x0", "spreads"),
        ("03_applied_engineer", "error_ratio = lambda *_: [1.0] * 5; work['exports'] = work['int8'] = ours[None]", "ratios"),
        ("04_applied_researcher", "validation = lambda *_, **__: 0.1", "validation_mse"),
        (
            "05_theory_student",
            "roughness = lambda *_: 0.1; updates = 1; t = torch.arange(1.0, 4.0); curves = dict.fromkeys('ab', [(t, t)])",
            "table",
        ),
    ],
)
def test_an_answer_may_be_a_plain_number_or_a_list(bench, exercise, answers, cell):
    bench(exercise, answers, cell)


def test_what_no_check_sees_beforehand_is_judged_before_it_is_handed_in(bench):
    out, _ = bench("02_cs_student", "work['fine'] = torch.zeros(3)", "rollouts_checked")
    assert "✗ fine: expected rollouts of [1001] states" in out
    wrong = "work['exports'] = torch.stack([ours, 1.01 * ours, ours]); models = dict.fromkeys('abc')"
    out, _ = bench("03_applied_engineer", wrong, "moved")
    assert "b: ‖Δ‖/‖f‖ = 1.0e-02, expected 1e-6 to 2e-3" in out


def test_ect_and_sct_differ_in_one_thing():
    (cell,) = (c.source for c in PERSONAS["06_frontier_researcher"].student.cells if "@locked experiment" in c.source)
    assert '{"ECT": ECT(updates, 4), "SCT": SCT(updates, 4, smooth=False)}' in cell


def test_the_ablations_teacher_is_where_the_data_are(monkeypatch):
    moved, real = [], persona4.load_teacher

    def elsewhere(name):
        teacher = real(name)
        teacher.to = lambda device: moved.append(device) or teacher
        return teacher

    monkeypatch.setattr(persona4, "load_teacher", elsewhere)
    persona4.world()
    assert moved == ["cpu"]


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
        ("Ana Pe\u0301rez/tiny.ipynb", "Ana Pérez", "tiny.ipynb"),
        ("an\udcffa\n/ti<b>ny.ipynb", "an_a_", "ti_b_ny.ipynb"),
        ("é" * 300 + "/tiny.ipynb", "é" * 75, "tiny.ipynb"),
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


def test_what_came_late_is_graded_and_says_so(tmp_path):
    for name in ("perezana_LATE_1_2_tiny.ipynb", "benbo_3_4_tiny.ipynb"):
        write(tmp_path / name, GOOD)
    assert {s.learner: s.notes for s in collect(tmp_path)} == {"perezana_1": ["handed in late"], "benbo_3": []}


def test_two_learners_never_become_one(tmp_path):
    for name in ("O'Neill", "O_Neill"):
        write(tmp_path / name / "tiny.ipynb", GOOD)
    with pytest.raises(ValueError, match=r"\"O'Neill\" and 'O_Neill' would both be called 'O_Neill'; rename one"):
        collect(tmp_path)


def test_what_is_no_folder_of_submissions_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "missing"):
        assert main(["grade", str(source), "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_results_do_not_go_among_the_submissions(tmp_path, capsys):
    write(tmp_path / "ana" / "tiny.ipynb", GOOD)
    assert main(["grade", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "lies within the submissions" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["cut short", "a flipped bit", "a password"])
def test_a_damaged_zip_is_one_line(tmp_path, capsys, kind):
    write(tmp_path / "tiny.ipynb", GOOD)
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "tiny.ipynb", "ana/tiny.ipynb")
    data = bytearray((tmp_path / "all.zip").read_bytes())
    if kind == "cut short":
        del data[200:-120]
    elif kind == "a flipped bit":
        data[200] ^= 255
    else:
        data[6] |= 1
        data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "all.zip").write_bytes(data)
    assert main(["grade", str(tmp_path / "all.zip"), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "damaged or has a password" in told


# ---- what is read of a notebook


def raw(*cells):
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": list(cells)}).encode()


def markdown(source, **more):
    return {"cell_type": "markdown", "id": "a", "metadata": {}, "source": source, **more}


def code(*outputs):
    return {"cell_type": "code", "id": "a", "metadata": {}, "source": "", "execution_count": None, "outputs": list(outputs)}


def shows(data, **metadata):
    return {"output_type": "display_data", "data": data, "metadata": metadata}


@pytest.mark.parametrize(
    "data, why",
    [
        (raw(*[markdown("a")] * 1001), "more than 1000 cells"),
        (raw(markdown("a" * 200_001)), "more than 200000 characters"),
        (b"[" * 100_000, "RecursionError"),
        (raw(code(shows({"text/plain": 3}))), "ValidationError"),
    ],
)
def test_a_notebook_that_would_take_hours_is_not_read(data, why):
    with pytest.raises(ValueError, match=why):
        parse(data)


def test_half_a_letter_is_read_and_can_be_written():
    (cell,) = parse(raw(markdown("caf\ud800é"))).cells
    assert cell.source == "caf?é" and cell.source.encode()


def test_a_pasted_picture_is_kept_and_cannot_multiply():
    picture = {"image/png": "iVBORw0KGgo="}
    (cell,) = parse(raw(markdown("see ![it](attachment:it.png)", attachments={"it.png": picture}))).cells
    assert cell.source == "see ![it](data:image/png;base64,iVBORw0KGgo=)"
    bomb = markdown("attachment:a" * 10_000, attachments={"a": {"image/png": "A" * 100_000}})
    assert len(parse(raw(bomb)).cells[0].source) < 300_000


def test_outputs_are_text_and_pictures_of_a_bearable_size():
    script = {"text/html": "<script>", "application/javascript": "x", "image/svg+xml": "<svg>", "text/plain": "kept"}
    large = {"output_type": "stream", "name": "stdout", "text": "\x1b[0m" * 300_000}
    first, second = parse(raw(code(shows(script, width='"><script>')), code(large))).cells
    assert first.outputs == [shows({"text/plain": "kept"})] and second.outputs == []


# ---- repair


def test_a_stripped_notebook_is_put_back(tmp_path, tiny):
    write(tmp_path / "a.ipynb", GOOD, learner="Ana", added=["extra = 1"], change=stripped)
    notebook, notes = merge(parse((tmp_path / "a.ipynb").read_bytes()), tiny)
    locked = [c.source for c in tiny.student.cells if c.metadata.get("nbgrader", {}).get("locked")]
    assert set(locked) <= {c.source for c in notebook.cells}
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    assert any(DOUBLE in c for c in code) and any(TOTAL in c for c in code) and code[-1] == "extra = 1"
    assert code.index('learner = "Ana"') < next(k for k, c in enumerate(code) if "HandIn(" in c)
    assert len(notes) == 3 and grading.typed(notebook) == "Ana" and sum(c.startswith("learner") for c in code) == 1


def test_an_answer_in_a_cell_of_its_own_below_counts(tmp_path, tiny):
    def below(notebook):
        notebook.cells.append(nbformat.v4.new_markdown_cell("Since twice is twice."))

    write(tmp_path / "a.ipynb", GOOD, essay="YOUR ANSWER HERE", change=below)
    notebook, _ = merge(parse((tmp_path / "a.ipynb").read_bytes()), tiny)
    (essay,) = (c.source for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == "essay")
    assert "**Why?**" in essay and essay.endswith("Since twice is twice.")
    assert sum("Since twice" in c.source for c in notebook.cells) == 1


def test_the_published_answer_is_recognised():
    exercise = PERSONAS[FIRST]
    assert published(exercise, exercise.student) == []
    assert published(exercise, exercise.solved) == ["explain_jump", "explain_numbers", "explain_limit"]


def test_copies_under_other_names_are_found_and_common_answers_are_not(tmp_path, tiny):
    mine = {"ana": ORIGINAL, "ben": COPY, "cara": TOTAL, "dan": TOTAL}
    notebooks = {}
    for learner, code in mine.items():
        write(tmp_path / f"{learner}.ipynb", {"double": DOUBLE, "total": code})
        notebooks[learner] = parse((tmp_path / f"{learner}.ipynb").read_bytes())
    assert [(a, b, kind) for a, b, kind, share in similar(tiny, notebooks) if share > 0.8] == [("ana", "ben", "code")]


# ---- the gradebook


@pytest.fixture
def room(tmp_path, tiny, monkeypatch):
    """(folder for submissions, results, `grade()`, runs so far): `cmlib grade`, each run done here, unguarded."""
    ran = []

    def runs(command, folder, limits, hidden, extra):
        ran.append(hidden)
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
    command = ["grade", str(source), "--exercises", str(tmp_path / "exercises"), "--out", str(out)]
    return source, out, lambda: main(command), ran


def table(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_points_that_a_person_gave_are_merged_and_kept(room, tiny, capsys):
    source, out, grade, ran = room
    write(source / "ana" / "tiny.ipynb", GOOD)
    write(source / "ben" / "tiny.ipynb", GOOD, essay="YOUR ANSWER HERE")
    assert grade() == 0 and "NETWORK AND YOUR FILES ARE OPEN" in capsys.readouterr().out
    assert [(r["learner"], r["points"]) for r in table(out / "manual.csv")] == [("ana", ""), ("ben", "0")]
    text = (out / "manual.csv").read_text(encoding="utf-8-sig")
    for points, status in (("5", 2), ("x", 2), ("3,5", 0)):
        (out / "manual.csv").write_text(text.replace(",", ";").replace(";4;;", f";4;{points};well argued", 1))
        assert grade() == status
        told = capsys.readouterr()
        assert status == 0 or "manual.csv, ana, essay: points must lie in 0 … 4" in told.err
    row = table(out / "grades.csv")[0]
    assert (row["auto"], row["manual"], row["total"], row["to grade"]) == ("5.0", "3.5", "8.5", "")
    page = (out / "feedback" / "ana" / "tiny.html").read_text()
    assert "well argued" in page and "wait for a person" not in page
    assert len(ran) == 2, "what has not changed does not run again"
    write(source / "ana" / "tiny.ipynb", GOOD, essay="A better answer.")
    assert grade() == 0 and len(ran) == 3
    assert "wait for a person, at 0 or what they had: 1." in (out / "feedback" / "ana" / "tiny.html").read_text()
    row = table(out / "grades.csv")[0]
    assert row["manual"] == "3.5" and row["to grade"] == "1", "a new answer keeps its points until a person looks"
    figure = gradebook.distribution(gradebook.tables(out, [], {"tiny": tiny}), {"tiny": tiny})
    assert figure.axes


HOSTILE = """
<script>alert(1)</script> <img src=x onerror=alert(1)> <a href=" javascript:alert(1)">a</a> [b](javascript:alert(1))
<svg/onload=alert(1)>
<iframe src="//a.b"></iframe> <style>body {display: none}</style> <img src="https://a.b/seen.png">
<img src="data:image/svg+xml;base64,AA==">

<b onclick="alert(1)">kept</b> [c](https://a.b/c) ![d](data:image/png;base64,AA==)

| e | f |
|---|---|
| 1 | 2 |
"""


def test_a_page_runs_nothing_that_a_learner_wrote(room):
    """Neither the feedback nor formgrader's page, which nbgrader makes with the configuration in the folder of results."""
    from nbconvert.exporters import HTMLExporter
    from traitlets.config import PyFileConfigLoader

    source, out, grade, _ = room
    write(source / "ana" / "tiny.ipynb", GOOD, essay=HOSTILE)
    assert grade() == 0
    setting = PyFileConfigLoader("nbgrader_config.py", str(out)).load_config()
    formgrader, _ = HTMLExporter(config=setting).from_filename(str(out / "autograded" / "ana" / "tiny" / "tiny.ipynb"))
    for page in ((out / "feedback" / "ana" / "tiny.html").read_text(), formgrader):
        start = page.index("<b>kept</b>")
        mine = page[page.rindex("Why?", 0, start) : page.index("</table>", start)]
        for tag in re.findall(r"<[a-z][^>]*>", mine):
            assert not re.search(r"<script|\son|iframe|style|svg|//a.b/seen|<meta|<base", tag), tag
        assert '<a href="https://a.b/c">c</a>' in mine and 'src="data:image/png;base64,AA=="' in mine and "<td>1</td>" in mine


def test_deeply_nested_html_stays_text():
    begin = time.monotonic()
    assert gradebook.harmless("<div>" * 20_000).startswith("<pre>&lt;div&gt;")
    assert time.monotonic() - begin < 5  # read as HTML: minutes


def test_one_page_that_fails_stops_no_other(room, monkeypatch):
    source, out, grade, _ = room
    for learner in ("ana", "ben"):
        write(source / learner / "tiny.ipynb", GOOD, learner)
    real = gradebook.feedback

    def fails(out, result):
        if result.learner == "ana":
            raise RecursionError("too deep")
        real(out, result)

    monkeypatch.setattr(gradebook, "feedback", fails)
    assert grade() == 0 and (out / "feedback" / "ben" / "tiny.html").exists()
    ana, ben = table(out / "grades.csv")
    assert "no feedback page for it (RecursionError: too deep)" in ana["flags"] and ana["auto"] == "5.0" and not ben["flags"]


def test_odd_files_beside_a_graded_notebook_are_told(room):
    source, out, grade, ran = room
    write(source / "ana" / "tiny.ipynb", GOOD, added=["import cmlib.course.persona1"])
    (source / "ana" / "tiny (1).ipynb").write_text("{")
    write(source / "ben" / "tiny.ipynb", GOOD, change=lambda n: n.cells[3].update(outputs=[seed_shown("9" * 5000)]))
    (source / "cara").mkdir()
    (source / "cara" / "work.zip").write_bytes(b"PK")
    assert grade() == 0
    ana, ben, cara = table(out / "grades.csv")
    assert ana["auto"] == "5.0" and "not a notebook that can be read (JSONDecodeError): tiny (1).ipynb" in ana["flags"]
    assert "mentions import cmlib.course.persona1: read it" in ana["flags"]
    assert (
        ben["auto"] == "5.0" and cara["graded"] == "no" and "a zip, unpack it there and grade again: work.zip" in cara["flags"]
    )
    assert {ROOT / "notebooks", ROOT / ".git", source, out, out.parent / "exercises"} <= set(ran[0])


def test_why_a_line_counts_nothing_and_whose_outputs_these_are(room, monkeypatch):
    source, out, grade, _ = room
    six = {**GOOD, "double": "def double(x):\n    return torch.ones(6)"}
    monkeypatch.setattr(gradebook, "feedback", lambda *_: None)
    monkeypatch.setattr(grading, "tests", lambda _: {"doubled": "work['doubled'].view(5)", "summed": "work['summed']"})
    for learner, answers, seed in (("ana", six, seed_of("tiny", "ana")), ("ben", {}, 5), ("cara", GOOD, 5)):
        name = "" if learner == "ben" else learner
        write(
            source / learner / "tiny.ipynb", answers, name, change=lambda n, s=seed: n.cells[3].update(outputs=[seed_shown(s)])
        )
    assert grade() == 0
    ana, ben, cara = (row["flags"] for row in table(out / "grades.csv"))
    assert ana.startswith("doubled counts 0, as the value handed in could not be checked (RuntimeError: ") and ";" not in ana
    assert ben == "no name is typed in; nothing was handed in for doubled, summed"
    assert cara == "its outputs were made with another name than the one typed in"


@pytest.mark.parametrize(
    "answer, word",
    [
        ("converged = plateaued", "plateaued"),
        ("def stable_step(x_t, t, r, reference):\n    return x_t - stable_denoised(x_t, t, reference)", "stable_denoised"),
        ("def gamma(t, s):\n    return cmlib.stable.gamma(t, s)", "cmlib.stable.gamma"),
    ],
)
def test_the_librarys_own_answer_is_a_mention(answer, word):
    assert grading.READ_ME.findall(answer) == [word]


def test_no_solution_is_a_mention():
    answers = [c for e in PERSONAS.values() for c in e.solved.cells if c.metadata.get("nbgrader", {}).get("solution")]
    assert not [c.source for c in answers if c.cell_type == "code" and grading.READ_ME.search(c.source)]


def test_a_batch_that_was_stopped_goes_on(room, monkeypatch):
    source, out, grade, ran = room
    for learner in ("ana", "ben"):
        write(source / learner / "tiny.ipynb", GOOD)
    monkeypatch.setattr(gradebook, "feedback", lambda *_: None)
    run = sandbox.run

    def stopped(*arguments, **named):
        if ran:
            while not list((out / "state").glob("ana.*.json")):
                time.sleep(0.05)
            raise KeyboardInterrupt
        return run(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "run", stopped)
        assert grade() == 130 and len(ran) == 1
    assert grade() == 0 and len(ran) == 2
    assert [row["auto"] for row in table(out / "grades.csv")] == ["5.0", "5.0"]
    assert json.loads((out / "metrics.json").read_text())["protocol.profile"] == "ci"


def seed_shown(seed):
    return nbformat.v4.new_output("stream", text=f"tiny: learner Ben, seed {seed}")
