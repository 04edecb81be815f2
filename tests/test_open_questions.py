"""The script of the open questions: every study runs, at a size that says nothing."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import open_questions as script  # noqa: E402
from cmlib import pipeline  # noqa: E402


@pytest.fixture
def small(tmp_path, monkeypatch):
    tiny = {"SEEDS": 1, "DIMENSIONS": (2, 3), "GAPS": (1.0, 0.5), "POINT_UPDATES": 4, "POINT_BATCH": 8, "UPDATES": 4}
    for name, value in {**tiny, "BATCH": 8, "POINTS": 2, "RESULTS": tmp_path}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "CPU", replace(script.CPU, samples=64))
    return tmp_path


def test_every_study_ends_and_none_is_made_twice(small, capsys, monkeypatch):
    script.main(["spacing", *script.ADDITIONS])
    table = capsys.readouterr().out
    assert "| alone |" in table and all(f"| with {label} |" in table for _, _, label in list(script.ADDITIONS.values())[1:])
    assert {path.stem.removeprefix("open_") for path in small.glob("*.png")} == {"spacing", *script.ADDITIONS} - {"plain"}
    kept = json.loads((small / "open_questions.json").read_text())
    assert all(len(kept[name]) == 1 and len(kept[name][0]["gap"]) == 2 for name in script.ADDITIONS)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="run all studies"):
        patch.setattr(script, "BATCH", 9)
        script.main(["spacing"])
    monkeypatch.setattr(script, "addition", None)
    monkeypatch.setattr(script, "spacing", None)
    script.main(["spacing", *script.ADDITIONS])
    assert capsys.readouterr().out == table


def test_additions_start_from_the_plain_network(small):
    teacher = pipeline.load_teacher("digits_teacher")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 500.0])
    made = {}
    for name, (_, change, _) in script.ADDITIONS.items():
        torch.manual_seed(0)
        net = script.UNet.from_config(teacher.unet.config).eval()
        change(net)
        made[name] = net(x, t)
    for name in ("auxiliary", "attention"):
        torch.testing.assert_close(made[name], made["plain"])
    assert not torch.allclose(made["spectral"], made["plain"]), "the norm of the time embedding is changed"
