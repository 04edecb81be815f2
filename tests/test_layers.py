"""A module of cmlib imports only from those above it in this list, and no module outgrows a sitting."""

import ast
from pathlib import Path

ORDER = """
    files ranks ops process unet oracle latents data consistency curricula stable continuous teacher cache objectives
    train evaluate plots widgets checks handin lesson1 lesson2 lesson3 lesson4 lesson5 lesson6 lesson7 formats engine
    export parity profiles recipes pipeline sizing protocol persona1 persona2 persona3 persona4 persona5 persona6 exercises
    report demo compare site service serve sandbox runner submissions gradebook grading commands cli __main__
"""
LAYERS = ORDER.split()
PACKAGE = Path(__file__).resolve().parent.parent / "cmlib"


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "cmlib":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cmlib."):
            yield node.module.split(".")[1]


def test_imports_go_down():
    files = {p.stem: ast.parse(p.read_text()) for p in PACKAGE.glob("*.py") if p.stem != "__init__"}
    assert set(files) == set(LAYERS), "every module has its place in LAYERS"
    upwards = [(m, i) for m, tree in files.items() for i in imports(tree) if i in LAYERS and LAYERS.index(i) >= LAYERS.index(m)]
    assert not upwards


def test_size():
    lines = {p.name: len(p.read_text().splitlines()) for p in PACKAGE.glob("*.py")}
    exercises = sum(n for name, n in lines.items() if name.startswith(("lesson", "persona")))
    grader = sum(lines[f"{name}.py"] for name in ("sandbox", "runner", "submissions", "gradebook", "grading"))
    server = sum(lines[f"{name}.py"] for name in ("site", "service", "serve"))
    assert sum(lines.values()) - exercises - grader - server <= 6600 and grader <= 1170, lines  # a learner needs no grader
    assert server <= 480, lines
    assert max(lines.values()) <= 350, lines
    functions = [
        (p.name, node.name, node.end_lineno - node.lineno + 1)
        for p in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert not [f for f in functions if f[2] > 85], "longer than 85 lines"
