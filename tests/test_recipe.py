"""`make recipe`: the brief's steps at the smallest size, stopped in the middle and gone on with."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from cmlib import cli, pipeline

ROOT = Path(__file__).resolve().parent.parent


def commands(folder):
    """The lines of the target as make would run them, on digits."""
    told = [f"RECIPE={folder}", "PROFILE=ci", "DATA=--dataset digits"]
    lines = subprocess.run(["make", "-n", "recipe", *told], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = [line.split(" || ")[-1] for line in lines.splitlines() if "/cmlib " in line]
    return [shlex.split(line)[1:] for line in found], "test -d" in lines


def test_the_recipe_runs_is_resumed_in_the_middle_of_a_refresh_and_says_what_it_reached(tmp_path, monkeypatch, capsys):
    (build, finetune, regression, student, evaluation), built_once = commands(tmp_path)
    assert built_once, "a refreshed cache is not the first teacher's any more"
    monkeypatch.setenv("CMLIB_PROFILE", "ci")
    few = ["--updates", "10", "--limit", "320"]
    assert cli.main([*build, "--pairs", "1000"]) == 0
    error, epochs = pipeline.epsilon_error, []

    def killed(*args):
        epochs.append(args)
        if len(epochs) == 3:  # before the training, and after two epochs
            raise KeyboardInterrupt
        return error(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "epsilon_error", killed)
        assert cli.main([*finetune, *few]) == 130
    for command in ([*finetune, *few], regression, student, evaluation):
        assert cli.main(command) == 0, capsys.readouterr().err
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/metrics.json")}
    assert found["teacher"]["protocol.schedule"] == "cosine-linear" and found["teacher"]["updates"] == 10
    assert all(metrics["seconds.command"] > 0 and metrics["memory.peak_mb"] > 100 for metrics in found.values())
    assert 0 < found["regression"]["mse.identity"] < 0.01, "the brief's bar, met by doing nothing"
    regressed, teacher = found["regression"]["fd_digits.regression_1"], found["evaluation"]["fd_digits.teacher_ddim50"]
    assert regressed > 2 * teacher and found["regression"]["distance.regression"] > 0
    assert found["evaluation"]["fd_digits.student_1"] > found["evaluation"]["fd_digits.teacher_ddim50"] > 0
    assert list((tmp_path / "student" / "training").glob("samples-*.png"))


@pytest.mark.parametrize("schedule", ["linear", "cosine-linear"])
def test_a_cache_is_built_on_the_schedule_that_was_asked_for(schedule, tmp_path):
    told = ["--source", "data", "--pairs", "20", "--schedule", schedule, "--profile", "ci", "--out", str(tmp_path)]
    assert cli.main(["cache", "build", *told]) == 0
    sigmas = json.loads((tmp_path / "manifest.json").read_text())["sigmas"]
    chain = {"linear": pipeline.DDPM.linear, "cosine-linear": pipeline.DDPM.cosine_linear}[schedule]()
    assert sigmas == pytest.approx(chain.sigma(torch.arange(chain.T)).tolist())
