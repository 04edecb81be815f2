"""A batch of honest and hostile submissions: every one is reported, none gets marks it has not earned, none stops the rest.

The hostile ones are bounded themselves: at most 150 processes, 2 GiB and a minute; they call nobody but a listener of the test.
"""

import contextlib
import csv
import shlex
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
import pytest

pytest.importorskip("nbgrader", reason="the instructor's extra: pip install 'cmlib[grade]'")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "notebooks"))

import build  # noqa: E402

from cmlib.grader import grading, sandbox  # noqa: E402
from cmlib.grader.sandbox import Limits  # noqa: E402
from cmlib.grader.submissions import student_version  # noqa: E402
from tests.faults.counts import fault  # noqa: E402

SOURCE = """
# %% locked="imports"
import torch
from cmlib.handin import HandIn

# %%
learner = ""

# %% locked="start"
work = HandIn("tiny", learner)
x = torch.rand(5, generator=torch.Generator().manual_seed(work.seed))

# %% answer="double"
def double(x):
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION

# %% grade="doubled" points=2 about="twice x"
work.hand_in("doubled", double, x)
### BEGIN HIDDEN TESTS
x = torch.rand(5, generator=torch.Generator().manual_seed(work.seed))
assert work.close("doubled", 2 * x), "not twice x"
### END HIDDEN TESTS

# %% answer="total"
def total(x):
    ### BEGIN SOLUTION
    return x.sum()
    ### END SOLUTION

# %% grade="summed" points=3 about="the sum of x"
work.hand_in("summed", total, x)
### BEGIN HIDDEN TESTS
x = torch.rand(5, generator=torch.Generator().manual_seed(work.seed))
assert work.close("summed", x.sum()), "not the sum"
### END HIDDEN TESTS

# %% [markdown] manual="essay" points=4 about="why"
# **Why?**
#
# <!-- BEGIN SOLUTION -->
# Because.
# <!-- END SOLUTION -->
"""
DOUBLE, TOTAL = "def double(x):\n    return 2 * x", "def total(x):\n    return x.sum()"
TEXT = "Because I say so."
ORIGINAL = """
def total(numbers):
    running = numbers.new_zeros(())
    for position in range(len(numbers)):
        if position % 2 == 0:
            running = running + numbers[position] * 3 - numbers[position] * 2
        else:
            running = running - (0 - numbers[position])
    return running
"""
COPY = ORIGINAL.replace("running", "acc").replace("numbers", "values").replace("position", "k")  # and nothing else


def solved():
    notebook = jupytext.reads(SOURCE, "py:percent")
    notebook.metadata = nbformat.from_dict(build.KERNEL)
    build.gradable(notebook)
    return notebook


def write(path, answers, learner="", essay=TEXT, added=(), change=lambda notebook: None):
    """A submission: the student version with these answers, and cells added behind."""
    notebook = student_version(solved())
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        if name in answers:
            cell.source = f"# @answer {name} (keep this line)\n{answers[name]}"
        if name == "essay":
            cell.source = cell.source.replace("YOUR ANSWER HERE", essay)
        if cell.source.startswith('learner = ""'):
            cell.source = f'learner = "{learner}"'
    notebook.cells += [nbformat.v4.new_code_cell(text) for text in added]
    change(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def stripped(notebook):
    notebook.cells = [c for c in notebook.cells if "@graded doubled" not in c.source]
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if "@graded summed" in cell.source:
            cell.source += "\nprint('edited')"


def twice(notebook):
    for k, cell in enumerate(notebook.cells):
        if "@answer total" in cell.source:
            notebook.cells.insert(k, nbformat.from_dict({**cell, "id": "again", "source": cell.source.replace("x.sum()", "x")}))
            break


FORK = """import os, time
for _ in range(150):
    if os.fork() == 0:
        time.sleep(40)
        os._exit(0)
time.sleep(40)"""
RAISES = "def double(x):\n    raise RuntimeError('<script>alert(1)</script>')"
GOOD = {"double": DOUBLE, "total": TOTAL}


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """All submissions graded once: (rows of grades.csv by learner, folder of results, what the listener heard)."""
    top = tmp_path_factory.mktemp("grading")
    top.chmod(0o755)
    handed_in, out = top / "submissions", top / "out"
    (top / "exercises").mkdir()
    nbformat.write(solved(), top / "exercises" / "tiny.ipynb")
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    port = listener.getsockname()[1]
    thief = f"""
import os, pathlib, socket
found = []
for place in {[str(top), str(ROOT / "notebooks"), str(ROOT / "tests")]!r}:
    for path in pathlib.Path(place).rglob("*"):
        found += [str(path)] if path.is_file() and b"HIDDEN" + b" TESTS" in path.read_bytes() else []
print("FOUND", found)
"""
    vandal = f"""
import pathlib
for place in {[str(handed_in / "x"), str(out / "grades.csv"), str(ROOT / "cmlib" / "x"), str(Path.home() / "cmlib-x")]!r}:
    try:
        pathlib.Path(place).write_text("was here")
        print("WROTE", place)
    except OSError as error:
        print(error)
"""
    forged = """
import os, pathlib, sys
import cmlib.handin, cmlib.checks
import torch
torch.allclose = lambda *_, **__: True
cmlib.handin.Work.__missing__ = lambda *_: None
HandIn.hand_in = lambda self, *_: print("Right.")
pathlib.Path("executed.ipynb").unlink(missing_ok=True)
pathlib.Path("executed.ipynb").symlink_to("/etc/passwd")
(pathlib.Path(os.environ["CMLIB_GRADING_FOLDER"]) / "doubled.safetensors").write_bytes(b"points: 2")
os.mkfifo(pathlib.Path(os.environ["CMLIB_GRADING_FOLDER"]) / "summed.safetensors")
"""
    call = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=3)"
    greedy = ["x = [bytearray(2**26) for _ in range(32)]", "for _ in range(3000):\n    print('x' * 10_000)"]
    cases = {
        "honest": (GOOD, {"learner": "Honest", "added": ["print('a cell of my own')"]}),
        "handed out": ({}, {"essay": "YOUR ANSWER HERE"}),
        "loop": ({"double": "def double(x):\n    while True:\n        pass", "total": TOTAL}, {}),
        "greedy": (GOOD, {"added": greedy}),
        "fork": ({"total": TOTAL, "double": FORK}, {}),
        "burglar": (GOOD, {"added": [vandal, thief, call]}),
        "stripped": (GOOD, {"change": stripped}),
        "twice": (GOOD, {"change": twice}),
        "raises": ({"double": RAISES, "total": "import sys\nsys.exit(0)"}, {}),
        "dies": ({**GOOD, "total": "import os\nos._exit(0)"}, {}),
        "forger": ({"double": forged, "total": "total = None"}, {"learner": "Forger"}),
        "hard": ({**GOOD, "total": "def total(x):\n    return HARD"}, {"learner": "Hard Coder"}),
        "author": ({"double": DOUBLE, "total": ORIGINAL}, {"learner": "Author"}),
        "copyist": ({"double": DOUBLE, "total": COPY}, {"learner": " author"}),
    }
    import torch

    from cmlib.handin import seed_of

    right = torch.rand(5, generator=torch.Generator().manual_seed(seed_of("tiny", "Hard Coder"))).sum()
    for name, (answers, options) in cases.items():
        answers = {k: v.replace("HARD", repr(float(right))) for k, v in answers.items()}
        write(handed_in / name / "tiny.ipynb", answers, **options)
    (handed_in / "scribbler").mkdir()
    (handed_in / "scribbler" / "tiny.ipynb").write_text("dear teacher, my computer ate it")
    (handed_in / "poet").mkdir()
    (handed_in / "poet" / "poem.txt").write_text("roses are red")
    limits = Limits(wall=240, cpu=60, cell=30, memory=2**30, disk=2**26)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "Limits", lambda **_: limits)
        metrics = grading.grade(handed_in, top / "exercises", out)
        again = grading.grade(handed_in, top / "exercises", out)
    heard = []
    with contextlib.suppress(BlockingIOError):
        heard.append(listener.accept())
    listener.close()
    with open(out / "grades.csv", encoding="utf-8-sig", newline="") as file:
        rows = {row["learner"]: row for row in csv.DictReader(file)}
    assert set(rows) == {*cases, "scribbler", "poet"}
    assert metrics["submissions.graded"] == again["submissions.graded"] == len(cases)
    return rows, out, heard, again["seconds.total"] / metrics["seconds.total"]


def points(row):
    return row["doubled"], row["summed"]


def isolated():
    return sandbox.level() != "limits alone"


needs_isolation = pytest.mark.skipif("not isolated()", reason="no bubblewrap and no namespaces here")


def test_honest_work_earns_all_points_that_code_gives(batch):
    row = batch[0]["honest"]
    assert points(row) == ("2.0", "3.0") and row["to grade"] == "1" and row["flags"] == ""


def test_what_was_handed_out_earns_nothing_and_waits_for_nobody(batch):
    row = batch[0]["handed out"]
    assert points(row) == ("0.0", "0.0") and row["essay"] == "0.0" and row["to grade"] == ""


@pytest.mark.parametrize(
    "name, earned, said",
    [
        ("handed out", ("0.0", "0.0"), "nothing was handed in for doubled, summed"),
        ("loop", ("0.0", "3.0"), "cell doubled ran longer than 30 s"),
        ("greedy", ("2.0", "3.0"), "MemoryError"),
        ("fork", ("0.0", "0.0"), "the run was stopped: "),
        ("stripped", ("2.0", "3.0"), "cell doubled was deleted, and is put back"),
        ("stripped", ("2.0", "3.0"), "cell summed was edited, and is put back"),
        ("stripped", ("2.0", "3.0"), "metadata was stripped"),
        ("twice", ("2.0", "3.0"), "2 cells are named total"),
        ("raises", ("0.0", "0.0"), "cell doubled raised RuntimeError"),
        ("raises", ("0.0", "0.0"), "cell total raised SystemExit"),
        ("dies", ("2.0", "0.0"), "a cell ended the kernel"),
        ("forger", ("0.0", "0.0"), "mentions"),
        ("hard", ("2.0", "0.0"), "summed is hard-coded: it is right for the learner's own seed"),
        ("author", ("2.0", "3.0"), "code like copyist's"),
        ("copyist", ("2.0", "3.0"), "has the same name typed in as author"),
    ],
)
def test_each_is_reported_and_gets_what_it_earned(batch, name, earned, said):
    row = batch[0][name]
    with fault(f"submission: {name}"):
        assert points(row) == earned and said in row["flags"], row


def test_what_cannot_be_graded_has_no_points_and_says_why(batch):
    for name, why in (("scribbler", "not a notebook that can be read"), ("poet", "not a notebook: poem.txt")):
        row = batch[0][name]
        with fault(f"submission: {name}"):
            assert row["graded"] == "no" and row["total"] == "" and why in row["flags"]


@needs_isolation
def test_nobody_reaches_the_network_the_hidden_tests_or_other_folders(batch):
    rows, out, heard, _ = batch
    shown = (out / "autograded" / "burglar" / "tiny" / "tiny.ipynb").read_text()
    with fault("submission: burglar"):
        assert not heard and points(rows["burglar"]) == ("2.0", "3.0")
        assert "FOUND []" in shown and "WROTE /" not in shown
        assert not any(p.exists() for p in (out.parent / "submissions" / "x", ROOT / "cmlib" / "x", Path.home() / "cmlib-x"))


def test_a_second_run_only_reads_what_the_first_has_done(batch):
    assert batch[3] < 0.5


def test_feedback_exists_for_all_that_were_graded_and_runs_no_script_of_theirs(batch):
    rows, out, *_ = batch
    pages = {p.parent.name: p.read_text() for p in (out / "feedback").rglob("*.html")}
    assert set(pages) == {name for name, row in rows.items() if row["graded"] == "yes"}
    assert "alert(1)" in pages["raises"] and "<script>alert" not in pages["raises"]
    assert "Not right: nothing was handed in as" in pages["raises"]


def test_huge_output_is_cut(batch):
    notebook = (batch[1] / "autograded" / "greedy" / "tiny" / "tiny.ipynb").read_text()
    assert len(notebook) < 3_000_000 and "the rest of this output was cut off" in notebook


def test_the_isolation_is_named(batch):
    assert sandbox.level() in (batch[1] / "summary.html").read_text()


@pytest.mark.parametrize("name, program", [("bubblewrap", "bwrap"), ("unshare", "unshare")])
def test_what_is_hidden_cannot_be_seen_by_any_path(name, program, monkeypatch):
    """Folders, files and a folder within another, where bubblewrap shows what is around them; a name that a shell would run."""
    with tempfile.TemporaryDirectory(prefix="open-") as top, tempfile.TemporaryDirectory(prefix="cmlib-") as folder:
        monkeypatch.setenv("CMLIB_DATASETS", top)
        Path(top).chmod(0o755)
        places = [Path(top, *parts) for parts in (["a"], ["a", "b"], ["c'; exit 0; $(exit 0) '"], ["d.zip"], ["open"])]
        for place in places:
            if place.suffix:
                place.write_text("secret")
            else:
                place.mkdir()
                (place / "text").write_text("secret")
        look = f"""
import pathlib
found = []
for path in pathlib.Path({top!r}).rglob("*"):
    try:
        found += [str(path)] if path.is_file() and path.read_text() else []
    except OSError:
        pass
pathlib.Path("found").write_text("\\n".join(found))
"""
        hidden = [*places[:-1], Path(top, "is not there")]
        if not shutil.which(program) or sandbox.run(["true"], Path(folder), Limits(), name=name):
            pytest.skip(f"no {name} here")
        assert not sandbox.run([sys.executable, "-c", look], Path(folder), Limits(), hidden, name=name)
        assert Path(folder, "found").read_text() == str(places[-1] / "text")


@pytest.mark.parametrize(
    "limit, command, why",
    [
        ({"wall": 0.5}, "sleep 30", "longer than 0.5 s"),
        ({"cpu": 0.5}, "while :; do :; done", "0.5 s of processor time"),
        ({"memory": 2**25}, f"{sys.executable} -c 'x = str(1) * 2**26; input()'", "0.03125 GiB of memory"),
        ({"disk": 2**20}, "head -c 2000000 /dev/zero > tmp/x; sleep 30", "1 MiB"),
    ],
)
def test_each_limit_ends_a_run(limit, command, why, tmp_path, monkeypatch):
    monkeypatch.setitem(sandbox.LEVELS, "open", lambda folder, hidden: [])
    pipe = f"sleep 30 | sh -c {shlex.quote(command)}"  # what reads, waits
    with fault(f"beyond a limit: {next(iter(limit))}"):
        assert why in sandbox.run(["sh", "-c", pipe], tmp_path / "f", Limits(**limit), name="open")


def test_root_is_told_what_to_do_where_no_sandbox_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.os, "getuid", lambda: 0)
    with pytest.raises(
        ValueError, match=f"able to read {sys.base_prefix}, .*use a Python outside /root, or install bubblewrap"
    ):
        sandbox.LEVELS["limits alone"](tmp_path, [])


def test_empty_folders_count_as_written(tmp_path):
    for k in range(100):
        (tmp_path / str(k)).mkdir()
    assert sandbox._size(tmp_path, 10**9) >= 100 * 4096


def test_what_could_not_be_hidden_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sandbox.LEVELS, "broken", lambda folder, hidden: ["sh", "-c", f"exit {sandbox.UNCOVERED}", "sh"])
    with pytest.raises(OSError, match="could not hide"):
        sandbox.run(["true"], tmp_path / "f", Limits(), [tmp_path], name="broken")
