"""The command line as a user meets it: the whole pipeline at the `ci` profile, and bad input."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ConsistencyModelPipeline

from cmlib import cli, commands, pipeline, profiles
from cmlib.cache import PairCache
from cmlib.cli import main
from cmlib.consistency import ConsistencyFunction
from cmlib.process import DDPM
from cmlib.teacher import Teacher
from cmlib.unet import UNet
from tests.small import UNET


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "demo with spaces"
    assert main(["demo", "--profile", "ci", "--out", str(out)]) == 0
    return out


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_demo_writes_what_it_promises(demo):
    found = metrics(demo)
    for key in ("fd_digits.teacher_ddim50", "fd_digits.real", "fd_digits.regression_1", "fd_digits.student_1"):
        assert found[key] > 0
    for key in ("fd_digits.student_2", "mse.regression", "mse.identity", "seconds.total", "protocol.n"):
        assert found[key] > 0
    assert "1500 images" in found["protocol.reference"] and found["protocol.seed"] == 0
    assert all("." in key and isinstance(value, (int, float, str)) for key, value in found.items())
    for name in ("samples.png", "jump.png", "distances.png", "reconstruction.png", "gap.png"):
        picture = (demo / name).read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) < 100_000
    page = (demo / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and "http" not in page.replace("http-equiv", "")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 50.0])
    both = [ConsistencyFunction.load(demo / f"student.{kind}") for kind in ("pt", "safetensors")]
    assert torch.equal(both[0](x, t), both[1](x, t))


def test_demo_tells_the_good_from_the_bad_even_when_short(demo):
    found = metrics(demo)
    assert found["fd_digits.student_1"] < 0.7 * found["fd_digits.regression_1"]
    assert found["fd_digits.teacher_ddim50"] < 0.1 * found["fd_digits.identity_1"]
    assert found["distance.student"] < found["distance.regression"]
    assert found["mse.identity_delta1_posterior_mean"] < 0.01  # the brief's bar, met by doing nothing


def test_second_demo_reuses_cache_and_students(demo, capsys):
    shards = {p: p.stat().st_mtime_ns for p in (demo / "cache").glob("*.pt")}
    before = metrics(demo)
    assert main(["demo", "--profile", "ci", "--out", str(demo)]) == 0
    assert {p: p.stat().st_mtime_ns for p in (demo / "cache").glob("*.pt")} == shards
    after = metrics(demo)
    assert after["fd_digits.student_1"] == pytest.approx(before["fd_digits.student_1"], rel=1e-4)
    assert "÷ DDIM-50" in capsys.readouterr().out


def test_commands_chain_from_teacher_to_export(tmp_path, capsys, monkeypatch):
    """teacher train -> finetune with refresh -> cache -> distill, resumed -> sample -> evaluate -> export."""

    def run(*args):
        assert main([*map(str, args), "--profile", "ci"]) == 0, capsys.readouterr().err

    teacher, cache, student = tmp_path / "teacher", tmp_path / "cache", tmp_path / "student"
    run("teacher", "train", "--updates", 24, "--limit", 300, "--out", teacher)
    assert metrics(teacher)["mse.held_out"] < metrics(teacher)["mse.held_out_before"]
    run("cache", "build", "--teacher", teacher / "pipeline", "--source", "data", "--pairs", 300, "--out", cache)
    built = metrics(cache)["protocol.teacher"]
    run("cache", "verify", cache, "--out", tmp_path / "verify")
    run("distill", "--objective", "pair-regression", "--cache", cache, "--teacher", teacher / "pipeline", "--out", student)
    assert {"mse.regression", "mse.identity", "fd_digits.regression_1", "distance.regression"} <= set(metrics(student))
    tuned = tmp_path / "tuned"
    run(
        "teacher",
        "finetune",
        "--teacher",
        teacher / "pipeline",
        "--updates",
        8,
        "--limit",
        300,
        "--refresh",
        cache,
        "--out",
        tuned,
    )
    run("cache", "info", cache, "--out", tmp_path / "info")
    assert metrics(tmp_path / "info")["protocol.teacher"] != built
    out = tmp_path / "cd"
    distill = ["distill", "--teacher", tuned / "pipeline", "--updates", 6, "--out", out]
    run(*distill)
    run(*distill, "--resume")
    places = []
    monkeypatch.setattr(commands, "best_device", lambda: places.append("the GPU, if there is one") or "cpu")
    run("sample", "--checkpoint", out / "student.pt", "--evaluations", 2, "--n", 5, "--out", tmp_path / "samples")
    run("evaluate", "--checkpoint", out / "student.pt", "--samples", 60, "--out", tmp_path / "evaluation")
    assert {"fd_digits.student_1", "fd_digits.real", "distance.student", "gap.student"} <= set(metrics(tmp_path / "evaluation"))
    assert len(places) == 2, "both ask where to run"
    run("export", "--format", "diffusers", "--checkpoint", out / "student.pt", "--out", tmp_path / "pipe")
    images = ConsistencyModelPipeline.from_pretrained(tmp_path / "pipe")(num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 1, 8, 8)
    run("doctor", "--out", tmp_path / "doctor")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--profile", "abacus"], "no profile 'abacus'; choose one of"),
        (["sample", "--checkpoint", "nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["sample", "--checkpoint", "nowhere.pt", "--n", "0"], "--n must be at least 1"),
        (["cache", "info", "nowhere"], "no pair cache at nowhere"),
        (["distill", "--objective", "pair-regression", "--profile", "ci"], "needs a pair cache"),
        (["distill", "--teacher", "no/such", "--profile", "ci"], "cannot load a DDPM teacher from 'no/such'"),
        (["teacher", "train", "--dataset", "no/such", "--profile", "ci"], "cannot load data set 'no/such'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("cmlib: ") and message in error


def test_module_entry_point_and_wrong_option():
    done = subprocess.run([sys.executable, "-m", "cmlib", "demo", "--nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "unrecognized arguments" in done.stderr and "Traceback" not in done.stderr


def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--out", str(tmp_path / "file" / "out")]) == 2
    assert os.listdir(tmp_path) == ["file"] and "Traceback" not in capsys.readouterr().err


def test_each_command_has_a_folder_of_its_own():
    def folders(parser):
        inside = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        return [f for a in inside for p in a.choices.values() for f in folders(p)] or [parser.get_default("folder")]

    found = folders(cli.parser())
    assert len(found) == len(set(found)) > 15 and {"demo", "teacher-train", "teacher-finetune", "cache-build"} <= set(found)


@pytest.mark.parametrize(
    ("more", "said"), [([], "the same command with --resume goes on"), (["--resume"], "the same command goes on")]
)
def test_an_interrupted_training_says_how_to_go_on(tmp_path, capsys, monkeypatch, more, said):
    def interrupted(args, profile):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.commands, "distill", interrupted)
    assert cli.main(["distill", "--out", str(tmp_path), *more]) == 130
    assert said in capsys.readouterr().err


def test_a_named_data_set_brings_its_shipped_teacher(tmp_path, monkeypatch):
    shipped = {"fashion_mnist_teacher", "digits_teacher"}
    monkeypatch.setattr(cli, "shipped", lambda name: Path(__file__) if name in shipped else tmp_path / name)
    for profile, dataset, teacher in (
        ("cpu", "fashion_mnist", "fashion_mnist_teacher"),
        ("cpu", "somewhere/fashion_mnist", "fashion_mnist_teacher"),
        ("cpu", "cifar10", "digits_teacher"),  # none is shipped: the shape is refused later
        ("t4", "cifar10", "google/ddpm-cifar10-32"),
        ("t4", "digits", "digits_teacher"),
    ):
        args = cli.parser().parse_args(["teacher", "eval", "--dataset", dataset, "--profile", profile, "--out", str(tmp_path)])
        assert (made := cli._prepare(args)).teacher == teacher and made.dataset == dataset


@pytest.mark.parametrize(
    ("shape", "profile", "found"),
    [
        ((1, 8, 8), "t4", "digits"),
        ((3, 32, 32), "cpu", "cifar10"),
        ((1, 32, 32), "cpu", "fashion_mnist"),
        ((1, 32, 32), "laptop", "fashion_mnist"),
        ((3, 32, 32), "t4", "cifar10"),
        ((3, 8, 8), "cpu", "digits"),  # no set is like it: refused by its shape
    ],
)
def test_a_student_brings_the_set_of_its_shape(shape, profile, found):
    args = argparse.Namespace(dataset=None)
    assert commands._dataset(args, profiles.PROFILES[profile], shape) == found
    assert commands._dataset(argparse.Namespace(dataset="mine"), replace(profiles.CPU, dataset="mine"), shape) == "mine"


def test_the_shipped_student_is_its_own_teacher_s():
    teacher = pipeline.load_teacher("digits_teacher")
    assert pipeline.shipped_student("digits", teacher).image_shape == (1, 8, 8)
    assert pipeline.shipped_student("digits", replace(teacher, process=DDPM.cosine())) is None
    assert pipeline.shipped_student("nothing", teacher) is None


def test_regression_is_refused_before_it_trains_where_the_data_are_of_another_shape(tmp_path, capsys):
    unet = UNet(**{**UNET, "in_channels": 3, "out_channels": 3})
    teacher = Teacher(unet.eval(), DDPM.linear())
    teacher.save_pretrained(tmp_path / "teacher")
    PairCache.build(tmp_path / "cache", teacher, 4, "rollout", solver="ddim", steps=2, shape=(3, 8, 8), batch_size=2)
    told = [
        "distill",
        "--objective",
        "pair-regression",
        "--cache",
        str(tmp_path / "cache"),
        "--teacher",
        str(tmp_path / "teacher"),
    ]
    assert main([*told, "--profile", "ci", "--out", str(tmp_path / "out")]) == 2
    assert "give another --teacher" in capsys.readouterr().err
