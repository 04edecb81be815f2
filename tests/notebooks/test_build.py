"""The committed notebooks are those of their sources, valid, and whole in a static rendering."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "notebooks"))

import build  # noqa: E402

PAIRS = build.targets([])


@pytest.mark.parametrize("source", PAIRS, ids=lambda p: p.stem)
def test_notebook_is_that_of_its_source(source):
    assert not build.drift(source, PAIRS[source])


@pytest.mark.parametrize("source", PAIRS, ids=lambda p: p.stem)
def test_static_rendering_has_every_figure_with_its_alternative_text(source):
    from nbconvert import HTMLExporter

    notebook = nbformat.read(PAIRS[source], 4)
    assert "widgets" not in notebook.metadata
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    figures = sum("image/png" in o.get("data", {}) for o in outputs)
    for template in ("lab", "classic"):  # the lab template leaves alternative text out
        html, _ = HTMLExporter(template_name=template).from_notebook_node(notebook)
        assert len(re.findall('src="data:image/png', html)) == figures > 0
        assert "Widget Javascript not detected" not in html
    assert "No description has been provided" not in html


def test_an_exercise_tells_of_the_profile_that_one_of_them_is_about():
    assert "not measured yet at rtx4070" in build.times("02_cs_student") and "rtx4070" not in build.times("02_teacher")


def test_the_readme_lists_the_lessons_as_they_are():
    text = build.README.read_text(encoding="utf-8")
    assert build.readme(covers=False) == text
    pictures = re.findall(r'src="(notebooks/covers/[^"]+)"', text)
    assert len(pictures) == len(LESSONS) and all((ROOT / p).stat().st_size < 100_000 for p in pictures)


LESSONS = [p for p in PAIRS if p.parent.name == "source"]


@pytest.mark.parametrize("source", LESSONS, ids=lambda p: p.stem)
def test_lesson_has_what_every_lesson_has(source):
    notebook = nbformat.read(PAIRS[source], 4)
    tags = [c.metadata.get("tags", []) for c in notebook.cells]
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert "colab.research.google.com" in notebook.cells[0].source
    assert sum("setup" in t for t in tags) == 1
    assert sum("your-turn" in t for t in tags) >= 2 and text.count("<details>") >= 2
    for here, after in zip(notebook.cells, notebook.cells[1:], strict=False):
        if "your-turn" in here.metadata.get("tags", []):
            assert "not done yet" in json.dumps(here.outputs)
            assert "solution" in after.metadata.tags and after.metadata.jupyter.source_hidden
            assert after.metadata.cellView == "form" and after.source.startswith("# @title Solution")
            assert "assert check(" in after.source


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A folder with one tiny notebook and its source."""
    (tmp_path / "notebooks" / "source").mkdir(parents=True)
    (tmp_path / "cmlib").mkdir()
    (tmp_path / "cmlib" / "__init__.py").write_text('__version__ = "9.8.7"\n')
    (tmp_path / "pyproject.toml").write_text('[project.urls]\n# Repository = "…"\n')
    source = tmp_path / "notebooks" / "source" / "01_tiny.py"
    source.write_text('# %% [markdown]\n# # Tiny\n# {badge} {times}\n\n# %% tags=["setup"]\n\n# %%\nprint(1 + 1)\n')
    for name, value in {
        "ROOT": tmp_path, "HERE": tmp_path / "notebooks", "PYPROJECT": tmp_path / "pyproject.toml",
        "TIMES": tmp_path / "notebooks" / "times.json", "README": tmp_path / "README.md",
    }.items():  # fmt: skip
        monkeypatch.setattr(build, name, value)
    build.TIMES.write_text('{"01_tiny": {"cpu": 130}}')
    build.README.write_text("A course.\n<!-- lessons: written by notebooks/build.py -->\n<!-- end of lessons -->\n")
    monkeypatch.setattr(sys, "argv", ["build"])
    return source, tmp_path / "notebooks" / "01_tiny.ipynb"


def write_executed(source, target):
    notebook = build.assemble(source)
    for k, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.execution_count = k + 1
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="2\n")]
    figure = {"data": {"image/png": PIXEL}, "metadata": {"image/png": {"alt": "a pixel"}}}
    notebook.cells[-1].outputs.append(nbformat.v4.new_output("display_data", **figure))
    nbformat.write(notebook, target)


def test_any_drift_is_found(copy):
    source, target = copy
    assert "is missing" in build.drift(*copy)[0]
    write_executed(*copy)
    assert not build.drift(*copy)
    source.write_text(source.read_text().replace("1 + 1", "1 + 2"))
    assert "differs from its source" in build.drift(*copy)[0]
    nbformat.write(build.assemble(source), target)
    assert "not executed" in build.drift(*copy)[0]


def test_progress_bars_are_not_kept_and_explorers_keep_their_picture():
    cell = nbformat.v4.new_code_cell("fit()")
    view = {build.VIEW: {"model_id": "a"}}
    cell.outputs = [nbformat.v4.new_output("display_data", data={**view, "text/plain": "train: 0%"}) for _ in range(2)]
    picture = {**view, "image/png": "", "text/plain": "told"}
    cell.outputs.append(nbformat.v4.new_output("display_data", data=picture, metadata={"image/png": {"alt": "told"}}))
    assert not build.tidy(nbformat.v4.new_notebook(cells=[cell]))
    assert [sorted(o.data) for o in cell.outputs] == [["image/png", "text/plain"]]


def test_badges_change_the_generated_cells_and_keep_the_outputs(copy, monkeypatch):
    _, target = copy
    write_executed(*copy)
    assert "#upload=true" in target.read_text()
    assert "not measured yet at profile ci; about 2 minutes at cpu (two cores); not measured yet at t4" in target.read_text()
    for name in ("somebody/course", "else/where"):
        monkeypatch.setattr(sys, "argv", ["build", "--badges", name])
        build.main()
        notebook = nbformat.read(target, 4)
        assert f"github/{name}/blob/v9.8.7/notebooks/01_tiny.ipynb" in notebook.cells[0].source
        assert f'REPO, TAG = "{name}", "v9.8.7"' in notebook.cells[1].source
        assert notebook.cells[2].outputs[0].text == "2\n" and not build.drift(*copy)
    assert build.PYPROJECT.read_text().count("Repository") == 1
    with pytest.raises(SystemExit, match="owner/name"):
        build.set_repository("https://github.com/a/b")


def test_setup_finds_a_copy_and_says_clearly_where_there_is_none(copy, monkeypatch):
    setup = build.SETUP.format(repo="", tag="v0")
    monkeypatch.chdir(build.HERE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="inside the course's folder"):
        exec(setup, {})
    assert sys.path[0] == str(build.ROOT), "the copy that holds this notebook comes first"
    monkeypatch.undo()
    before = list(sys.path)
    monkeypatch.chdir(ROOT / "notebooks")
    for _ in range(2):
        exec(setup, {})
    assert len(sys.path) <= len(before) + 1


def test_on_colab_setup_installs_this_package_alone_and_once(tmp_path, monkeypatch):
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_dir", lambda path, was=Path.is_dir: path == Path("/content") or was(path))
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter(()))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: ran or None)
    monkeypatch.setattr("subprocess.run", lambda command, check: ran.append(command))
    for _ in range(2):
        exec(build.SETUP.format(repo="somebody/course", tag="v1"), {})
    assert [" ".join(command) for command in ran] == ["pip install -q --no-deps git+https://github.com/somebody/course@v1"]


def test_a_source_edited_while_it_runs_is_run_again(copy, monkeypatch):
    source, target = copy
    monkeypatch.setattr(build, "execute", lambda *_: source.write_text(source.read_text().replace("1 + 1", "1 + 2")) and 1.0)
    with pytest.raises(SystemExit, match=r"01_tiny.py was edited while it ran; run `make notebooks NB=01` again"):
        build.build(*copy)
    assert not target.exists()


def test_a_failing_cell_ends_its_notebook_and_gpu_cells_wait_for_a_gpu(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "conftest.py").write_text((ROOT / "notebooks" / "conftest.py").read_text())
    cells = [nbformat.v4.new_code_cell(s) for s in ("import os; assert os.environ['CMLIB_PROFILE'] == 'ci'", "1 / 0", "1", "2")]
    cells[0].metadata.tags = ["budget"]
    cells.insert(1, nbformat.v4.new_code_cell("raise SystemError", metadata={"tags": ["gpu"]}))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "bad.ipynb")
    command = ["-m", "pytest", "-rs", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env", "notebooks"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("CMLIB_PROFILE", None)
    out = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert "1 failed, 1 passed, 3 skipped" in out
    assert "needs a GPU" in out and "an earlier cell of this notebook failed" in out and "ZeroDivisionError" in out
    assert "notebooks/bad.ipynb: " in out and "rollouts and student training: 0.0 minutes of the 0.5 that ci has" in out
