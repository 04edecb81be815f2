"""The script of the laptop's models, on forty grey squares: it ends, goes on where it was, and ships what the library loads."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import small_models as script  # noqa: E402
from cmlib.consistency import ConsistencyFunction  # noqa: E402
from cmlib.pipeline import load_teacher  # noqa: E402

TINY = {"widths": (8, 8), "teacher_updates": 8, "samples": 16}


@pytest.fixture
def world(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": [k % 10 for k in range(40)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict(rows, features=features)
    folder = tmp_path / "sets" / "fashion_mnist"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    monkeypatch.setenv("CMLIB_DATASETS", str(tmp_path / "sets"))
    monkeypatch.setattr(script, "LAPTOP", replace(script.LAPTOP, **TINY))
    for size, value in {"SEEDS": range(2), "UPDATES": 8, "STAGES": 2, "BATCH": 8}.items():
        monkeypatch.setattr(script, size, value)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results" / "seeds.json")
    (tmp_path / "data").mkdir()
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(sys, "argv", ["small_models", "fashion_mnist"])
    return tmp_path


def test_it_ships_a_teacher_and_a_student_with_their_distances(world, capsys, monkeypatch):
    script.main()
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in ("training images drawn again", "teacher, DDIM-50", "student"))
    teacher = load_teacher(str(world / "data" / "fashion_mnist_teacher"))
    f = ConsistencyFunction.load(world / "data" / "fashion_mnist_student.safetensors")
    told = json.loads((world / "data" / "fashion_mnist_student.json").read_text())
    assert told["teacher"] == teacher.hash() and f.image_shape == teacher.image_shape == (1, 32, 32)
    assert (told["updates"], told["stages"], told["precision"]) == (8, 2, script.PRECISION)

    def measured():
        found = json.loads((world / "results" / "small_fashion_mnist.json").read_text())
        return {key: value for key, value in found.items() if not key.startswith("ms_")}

    before, made = measured(), {path: path.stat().st_mtime_ns for path in (world / "runs").rglob("*.pt")}
    script.main()
    assert measured() == before
    assert {path: path.stat().st_mtime_ns for path in made} == made and len(made) == 10, "a second call repeats nothing"

    monkeypatch.setattr(sys, "argv", ["small_models", "fashion_mnist", "--keep-teacher"])
    shipped = {path: path.stat().st_mtime_ns for path in (world / "data" / "fashion_mnist_teacher").iterdir()}
    script.main()
    assert measured() == before and {path: path.stat().st_mtime_ns for path in shipped} == shipped
