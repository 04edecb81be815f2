"""Objectives side by side: what a pass costs, what is kept, and what is refused."""

import json

import pytest
import torch

from cmlib import compare, pipeline, recipes
from cmlib.cli import main
from cmlib.process import DDPM
from cmlib.profiles import CI
from cmlib.teacher import Teacher
from cmlib.unet import UNet
from tests.small import UNET


@pytest.mark.parametrize(
    ("objective", "passes"),
    [("ect", 2), ("sct", 2), ("ict", 2), ("scm", 2), ("meanflow", 2), ("scd", 3), ("consistency-distillation", 4)],
)
def test_forward_passes_an_image(objective, passes):
    """Student and target once each; distillation adds the teacher's, twice for a Heun step."""
    torch.manual_seed(0)
    teacher = Teacher(UNet(**UNET), DDPM.linear())
    images = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    f = recipes.first_student(objective, teacher, 80.0)
    chosen, _ = recipes.recipe(objective, CI, 8, f, (1, 8, 8), teacher, images)
    assert compare.evaluations(chosen, f, teacher, {"x0": torch.zeros(8, 1, 8, 8)}) == passes
    assert not f.net._forward_hooks and not teacher.unet._forward_hooks


def test_a_comparison_is_kept_row_by_row(tmp_path, capsys, monkeypatch):
    args = ["compare", "--profile", "ci", "--objectives", "endpoint-regression,ect", "--budget-images", "640", "--seeds", "2"]
    assert main([*args, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "compare.json").read_text())
    assert [(r["objective"], r["seed"]) for r in found["rows"]] == [
        ("endpoint-regression", 0), ("ect", 0), ("endpoint-regression", 1), ("ect", 1)
    ]  # fmt: skip
    assert {r["evaluations"] for r in found["rows"]} == {1280.0}  # 640 + a cache of 640; 2 · 640
    assert all(row["curve"][-1] == [640, row["fd_1"]] for row in found["rows"])
    assert found["rows"][1]["fd_1"] != found["rows"][3]["fd_1"]
    assert found["baselines"][0]["teacher_ddim50"] < 0.2 * min(r["fd_1"] for r in found["rows"])
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    table = capsys.readouterr().out
    assert table.index("*teacher, DDIM-50*") < table.index("| ect |") and "2 seed(s)" in table
    rows = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/row.json")}
    assert len(rows) == 4 and main([*args, "--out", str(tmp_path)]) == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/row.json")} == rows

    def other_recipe(objective, *given):
        chosen, settings = recipes.recipe(objective, *given)
        return chosen, settings | ({"lr": 1e-4} if objective == "ect" else {})

    for module in (compare, pipeline):
        monkeypatch.setattr(module, "recipe", other_recipe)
    assert main([*args, "--seeds", "1", "--out", str(tmp_path)]) == 0
    kept, anew = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert kept == found["rows"][0]
    assert anew["fd_1"] != found["rows"][1]["fd_1"] and "'lr': 0.0001" in anew["recipe"]


def test_random_weights_start_worse_than_the_teachers(tmp_path):
    images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    teacher = pipeline.load_teacher("digits_teacher")
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.full((8,), 0.5)
    features = None  # not needed to start
    errors = []
    for from_nothing in (False, True):
        comparison = compare.Comparison(CI, teacher, images, images, features, 640, from_nothing)
        f = comparison.start("ect", 0).eval()
        with torch.no_grad():
            errors.append(float((f(0.5 * x, t) - teacher.denoise(0.5 * x, t)).pow(2).mean()))
    assert errors[0] < 0.05 * errors[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--objectives", "ect,lct"], "cannot compare lct; choose among endpoint-regression"),
        (["--objectives", "pair-regression"], "cannot compare pair-regression"),
        (["--objectives", "ect", "--budget-images", "64"], "less than 8 batches"),
    ],
)
def test_bad_requests_end_in_one_line(args, message, tmp_path, capsys):
    assert main(["compare", "--profile", "ci", *args, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_a_student_of_images_jumps_from_the_papers_80_in_proportion_to_the_side():
    """32×32: 80 (CM, iCT, ECT); digits of 8×8: 20, where pure noise and noised digits are all but the same."""
    digits = pipeline.load_teacher("digits_teacher")
    wide = Teacher(UNet(**{**UNET, "sample_size": 32}), DDPM.linear())
    assert (recipes.largest_sigma(wide), recipes.largest_sigma(digits)) == (80.0, 20.0)
    for objective in ("ect", "sct", "ct", "meanflow"):
        f = recipes.first_student(objective, digits, recipes.largest_sigma(digits))
        assert f.levels(1) == [20.0] and 0.3 < f.levels(2)[1] < 1, "two evaluations meet in the middle of ln σ"
    images = pipeline.data.to_float(pipeline.data.load("digits")[0])
    noised = images + 20 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noise = 20 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    t = torch.full((len(images),), 20.0)
    made = [digits.denoise(x, t) for x in (noised, noise)]
    assert float((made[0].mean(0) - made[1].mean(0)).pow(2).mean().sqrt()) < 0.1 * float(images.std())


def test_stages_of_the_gap_grow_with_the_run():
    assert [recipes.stages(k) for k in (1, 40, 500, 1_000, 2_600, 5_000, 400_000)] == [2, 2, 5, 6, 7, 8, 8]
