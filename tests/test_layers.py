"""A module of cmlib imports only from those above it in this list, and no module outgrows a sitting."""

import ast
from pathlib import Path

ORDER = """
    files ranks ops process unet oracle latents data consistency curricula stable continuous teacher cache objectives
    train evaluate plots widgets checks handin course.lesson1 course.lesson2 course.lesson3 course.lesson4 course.lesson5
    course.lesson6 course.lesson7 formats engine export parity profiles recipes pipeline sizing protocol course.persona1
    course.persona2 course.persona3 course.persona4 course.persona5 course.persona6 exercises report demo compare
    serving.site serving.service serving.serve grader.sandbox grader.runner grader.submissions grader.gradebook
    grader.grading commands cli __main__
"""
LAYERS = ORDER.split()
PACKAGE = Path(__file__).resolve().parent.parent / "cmlib"
MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py") if p.stem != "__init__"}
LARGEST = {"": 6700, "course": 1660, "grader": 1200, "serving": 540}  # lines; a learner needs no grader


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("cmlib."):
            inside = node.module.removeprefix("cmlib").removeprefix(".")
            yield from (f"{inside}.{alias.name}".removeprefix(".") for alias in node.names)
            yield inside


def test_imports_go_down():
    assert set(MODULES) == set(LAYERS), "every module has its place in LAYERS"
    found = {m: {i for i in imports(ast.parse(p.read_text())) if i in LAYERS} for m, p in MODULES.items()}
    assert found["course.lesson2"] >= {"course.lesson1"} and found["commands"] >= {"serving.site", "ranks"}  # it sees imports
    assert not [(m, i) for m, known in found.items() for i in known if LAYERS.index(i) >= LAYERS.index(m)]


def test_size():
    lines = {m: len(p.read_text().splitlines()) for m, p in MODULES.items()}
    folders = {folder: sum(n for m, n in lines.items() if m.rpartition(".")[0] == folder) for folder in LARGEST}
    assert sum(folders.values()) == sum(lines.values()) and all(n <= LARGEST[folder] for folder, n in folders.items()), folders
    assert max(lines.values()) <= 350, lines
    functions = [
        (m, node.name, node.end_lineno - node.lineno + 1)
        for m, p in MODULES.items()
        for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert [f for f in functions if f[2] > 60] == [("train", "fit", 87)], "longer than 60 lines; half of fit is its signature"
