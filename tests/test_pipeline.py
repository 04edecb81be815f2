"""What the pipeline refuses, and noise that belongs to the image."""

import pytest
import torch

from cmlib import pipeline
from cmlib.cache import PairCache
from cmlib.process import DDPM
from cmlib.profiles import CI
from cmlib.teacher import Teacher, warm_start
from cmlib.unet import UNet
from tests.small import UNET


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Teacher(UNet(**UNET), DDPM.linear())


def test_distillation_from_targets_off_the_ode_is_refused(tmp_path, teacher):
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    cache = PairCache.build(tmp_path / "cache", teacher, 20, images=images, solver="posterior_mean")
    student = warm_start(teacher, 80.0)
    with pytest.raises(ValueError, match="needs ODE steps; this cache's solver is posterior_mean"):
        pipeline.distill("consistency-distillation", student, CI, tmp_path, cache=cache)
    with pytest.raises(ValueError, match="source rollout"):
        pipeline.distill("endpoint-regression", student, CI, tmp_path, cache=cache)
    with pytest.raises(ValueError, match="needs a pair cache"):
        pipeline.distill("endpoint-regression", student, CI, tmp_path)


def test_samples_do_not_depend_on_the_batch(teacher):
    student = warm_start(teacher, 80.0).eval()
    for draw in (
        lambda batch: pipeline.draw(student, 6, 2, (1, 8, 8), 3, batch),
        lambda batch: pipeline.draw_teacher(Teacher(teacher.unet, DDPM.linear(5)), 6, 5, "ancestral", (1, 8, 8), 3, batch),
    ):
        assert (draw(6).int() - draw(4).int()).abs().max() <= 1


def test_teacher_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"makes images \(1, 8, 8\), the data set's are \(3, 32, 32\)"):
        pipeline.load_teacher("digits_teacher", (3, 32, 32))
