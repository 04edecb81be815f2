"""Explorers without a browser: set a control's value, look at the picture and at the line, against cmlib's own maths."""

import base64

import numpy as np
import pytest
import torch

from cmlib import data, widgets
from cmlib.consistency import ConsistencyFunction
from cmlib.ops import expand_like, indexed_normal
from cmlib.oracle import Gaussian, GaussianMixture
from cmlib.pipeline import load_teacher, shipped
from cmlib.process import DDPM


@pytest.fixture(scope="module")
def images():
    return data.load("digits", limit=20)[0]


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("digits_teacher")


@pytest.fixture(scope="module")
def student():
    return ConsistencyFunction.load(shipped("digits_student.safetensors"))


def moved(explorer, name, value):
    """Set a control; the picture and the line must change. Returns the line."""
    picture, text = bytes(explorer.image.value), explorer.text
    explorer.controls[name].value = value
    now = bytes(explorer.image.value)
    assert now.startswith(b"\x89PNG") and now != picture and explorer.text != text
    assert explorer.text in explorer.line.value
    return explorer.text


def test_jump(student, teacher, images):
    explorer = widgets.jump_explorer(student, teacher, images)
    moved(explorer, "seed", 3)
    moved(explorer, "steps", 5)
    text = moved(explorer, "sigma", 4.0)
    x0, t = data.to_float(images[3:4]), torch.tensor([4.0])
    with torch.no_grad():
        x = x0 + 4 * indexed_normal(3, [0], (1, 8, 8))
        jump, walk = student(x, t), teacher.walk(x, 4.0, 5)
    told = [float((a - b).pow(2).mean().sqrt()) for a, b in ((jump, x0), (walk, x0), (jump, walk))]
    assert text == (
        f"σ = 4. RMS distance to the clean image: student {told[0]:.3f} with 1 evaluation, teacher {told[1]:.3f} with 5; "
        f"between the two {told[2]:.3f}."
    )


def test_jump_of_the_denoiser(teacher, images):
    explorer = widgets.jump_explorer(None, teacher, images)
    text = moved(explorer, "sigma", 4.0)
    x0 = data.to_float(images[:1])
    denoised = teacher.denoise(x0 + 4 * indexed_normal(0, [0], (1, 8, 8)), torch.tensor([4.0]))
    assert f"denoiser {float((denoised - x0).pow(2).mean().sqrt()):.3f} with 1 evaluation" in text


def test_one_step_of_the_walk_is_the_denoiser(teacher):
    x, t = 4 * indexed_normal(0, [0], (1, 8, 8)), torch.tensor([4.0])
    torch.testing.assert_close(teacher.walk(x, 4.0, 1), teacher.denoise(x, t))


def test_schedule(images):
    explorer = widgets.schedule_explorer(data.to_float(images[0]))
    moved(explorer, "n", 600)
    text = moved(explorer, "schedule", "cosine")
    ab = float(DDPM.cosine().alpha_bar[600])
    assert text == f"cosine, n = 600: ᾱ = {ab:.4g}, σ = {((1 - ab) / ab) ** 0.5:.4g}, SNR = {ab / (1 - ab):.4g}."


def test_schedule_of_a_colour_image():
    moved(widgets.schedule_explorer(torch.zeros(3, 8, 8)), "n", 999)


def test_delta(teacher, images):
    explorer = widgets.delta_explorer(teacher, images, predict=lambda x, n, r: 0.9 * x)
    text = moved(explorer, "delta", 100)
    x0, n = data.to_float(images[:1]), torch.tensor([500])
    x = teacher.process.perturb(x0, indexed_normal(0, [0], (1, 8, 8)), n)
    target = teacher.step(x, n, n - 100)
    identity, mine = float((x - target).pow(2).mean()), float((0.9 * x - target).pow(2).mean())
    assert text == (
        f"n = 500, δ = 100, posterior_mean: the identity map's MSE is {identity:.3g}, "
        f"the student's {mine:.3g}, its skill {1 - mine / identity:.3g}."
    )
    moved(explorer, "solver", "ancestral")
    explorer.controls["delta"].value = 500
    explorer.controls["n"].value = 3
    assert explorer.text.startswith("n = 3, δ = 4"), "a step ends at the clean image at the latest"


def test_consistency_map():
    mixture = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.3)
    explorer = widgets.consistency_map(mixture, paths=4, levels=10)
    assert float(moved(explorer, "level", 4).split("lands ")[1].split()[0]) < 0.01, "the exact f is constant along a path"
    explorer = widgets.consistency_map(mixture, f=lambda x, t: x, paths=4, levels=10)
    assert float(explorer.text.split("lands ")[1].split()[0]) > 1, "the identity map is not"
    moved(explorer, "level", 0)
    assert "lands 0 from" in explorer.text, "until the boundary"
    single = Gaussian(torch.zeros(2), 0.5)
    moved(widgets.consistency_map(single, lambda x, t: x * expand_like(0.5 / (0.25 + t**2).sqrt(), x), levels=6), "level", 2)


def test_fid_against_n():
    distances = {"teacher": np.array([[30.0, 12.0], [32.0, 12.5]]), "student": np.array([[33.0, 14.0], [34.0, 14.0]])}
    text = moved(widgets.fid_explorer([100, 1000], distances), "at", 0)
    assert text == "N = 100: teacher 31 ± 1, student 33.5 ± 0.5; against N = 1000: teacher +18.8, student +19.5."


def test_bundle_is_live_and_still(images):
    explorer = widgets.schedule_explorer(data.to_float(images[0]))
    content, metadata = explorer._repr_mimebundle_()
    assert content["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.box.model_id
    assert base64.b64decode(content["image/png"]) == bytes(explorer.image.value)
    assert content["text/plain"] == metadata["image/png"]["alt"] == explorer.text
    assert all(control.description for control in explorer.controls.values())
