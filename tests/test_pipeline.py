"""What the pipeline refuses, and noise that belongs to the image."""

import pytest
import torch

from cmlib import pipeline, recipes
from cmlib.cache import PairCache
from cmlib.consistency import ConsistencyFunction
from cmlib.ops import expand_like
from cmlib.process import DDPM, EDM
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


@pytest.mark.parametrize("objective", ["ct", "ict", "ect", "sct", "scm", "scd", "bootstrap", "meanflow"])
def test_objectives_on_images_train_and_save(objective, teacher, tmp_path):
    images = torch.randint(0, 256, (80, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    start = recipes.first_student(objective, teacher, 80.0)
    assert start.sigma_min == (teacher.process.sigma_min if objective in ("ct", "ict", "bootstrap") else 0)
    assert start.levels(2) == pytest.approx(warm_start(teacher, 80.0).levels(2), rel=1e-5)
    if objective == "ict":
        chosen, _ = recipes.recipe(objective, CI, 3, start, (1, 8, 8), teacher, images)
        assert chosen.process == EDM(start.sigma_min, start.sigma_max)
    weights = [p.detach().clone() for p in start.parameters()]
    f, history = pipeline.distill(objective, start, CI, tmp_path, updates=3, teacher=teacher, images=images)
    assert len(history) == 3 and any(not torch.equal(a, b) for a, b in zip(weights, f.parameters(), strict=True))
    drawn = pipeline.draw(f, 4, 2, (1, 8, 8), 0)
    assert drawn.shape == (4, 1, 8, 8)
    if objective != "meanflow":
        f.save(tmp_path / "f.safetensors")
        assert torch.equal(pipeline.draw(ConsistencyFunction.load(tmp_path / "f.safetensors"), 4, 2, (1, 8, 8), 0), drawn)
    cache = PairCache.build(tmp_path / "cache", teacher, 20, images=images, solver="ddim")
    with pytest.raises(ValueError, match="leave --cache out"):
        pipeline.distill(objective, f, CI, tmp_path, cache=cache)


def test_meanflow_starts_at_the_flow_of_the_same_weights(teacher):
    """At r = t the average velocity is the straight path's own, ε̂ − x̂0 with x̂0 the consistency function's one jump."""
    u, f = (recipes.first_student(objective, teacher, 80.0).eval() for objective in ("meanflow", "ect"))
    sigma = torch.tensor([0.05, 0.3, 1.0, 3.0, 20.0, 70.0])
    x, t = expand_like((1 + sigma**2).sqrt(), torch.ones(6, 1, 8, 8)) * torch.randn(6, 1, 8, 8), sigma / (1 + sigma)
    with torch.no_grad():
        x0_hat = f(x, sigma)
        v = (x - x0_hat) / expand_like(sigma, x) - x0_hat
        torch.testing.assert_close(u(x / expand_like(1 + sigma, x), t, t), v, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(u(x, sigma), x0_hat, rtol=1e-3, atol=1e-3)


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
