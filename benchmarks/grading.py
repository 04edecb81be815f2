"""`cmlib grade` on thirty submissions of an exercise, and a second run over them. `python benchmarks/grading.py`

Ten are right, ten half done, and ten as handed out. Seconds are of the whole command, its start included; the load average
before the first run says whether the machine was quiet.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat

from cmlib.grader.submissions import exercises

SOLUTIONS = Path(__file__).resolve().parent.parent / "notebooks" / "solutions"


def submissions(folder: Path, name: str, n: int) -> None:
    """n notebooks, `<learner>/<name>.ipynb`: all, every second and none of the answers in code filled in, in turns."""
    exercise = exercises(SOLUTIONS)[name]
    solved = {c.metadata.nbgrader.grade_id: c.source for c in exercise.solved.cells if "nbgrader" in c.metadata}
    for k in range(n):
        notebook = copy.deepcopy(exercise.student)
        answers = [c for c in notebook.cells if c.cell_type == "code" and c.metadata.get("nbgrader", {}).get("solution")]
        for cell in (answers, answers[::2], [])[k % 3]:
            cell.source = solved[cell.metadata.nbgrader.grade_id]
        (folder / f"learner{k}").mkdir(parents=True)
        nbformat.write(notebook, folder / f"learner{k}" / f"{name}.ipynb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exercise", default="01_curious_generalist")
    parser.add_argument("--n", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as top:
        submissions(Path(top, "in"), args.exercise, args.n)
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        for run in ("first", "second"):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-m", "cmlib", "grade", f"{top}/in", "--out", f"{top}/out"], check=True)
            print(f"{run} run: {args.n} submissions of {args.exercise} in {(time.perf_counter() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
