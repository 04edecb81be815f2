"""Distances against closed forms and torchmetrics; errors as functions of t against functions whose error is known."""

import sys

import pytest
import torch
from torch import nn
from torchmetrics.image.kid import poly_mmd

from cmlib import data, evaluate
from cmlib.process import DDPM
from cmlib.teacher import Teacher
from cmlib.unet import UNet
from tests.small import UNET

PROCESS = DDPM.linear()


def normal(n, d, mean=0.0, std=1.0, seed=0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # exact moments
    return mean + std * x


def test_frechet_distance_of_gaussians_in_closed_form():
    """N(0, I) and N(m, s²I) in d dimensions: d·m² + d·(1 − s)²."""
    found = evaluate.frechet_distance(normal(400, 5), normal(300, 5, 0.7, 1.5, 1))
    assert found == pytest.approx(5 * 0.7**2 + 5 * 0.5**2, rel=1e-6)
    assert evaluate.frechet_distance(normal(400, 5), normal(400, 5)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at least 2 images"):
        evaluate.frechet_distance(normal(400, 5), normal(300, 5)[:1])


def test_frechet_distance_is_torchmetrics(dim=12):
    """Against the library that the field uses, which takes the features of a network of ours: the identity."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    identity = torch.nn.Identity()
    identity.num_features = dim
    metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    mixing = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    real, fake = normal(50, dim) @ mixing, normal(30, dim, 0.2, 1.1, 4) @ mixing.T
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert evaluate.frechet_distance(real, fake) == pytest.approx(float(metric.compute()), rel=1e-9)
    few = real[:5]  # fewer images than features: a singular covariance
    assert 0 < evaluate.frechet_distance(few, fake) < float("inf")


def test_the_limit_of_frechet_distances_has_no_bias_of_the_fakes():
    """N(0, I) against itself: c = d + d(d + 1)/4 to first order in 1/N."""
    d = 8
    fake = torch.randn(8_000, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    limit, slope = evaluate.frechet_limit(normal(9_000, d), fake)
    expected = d + d * (d + 1) / 4
    assert abs(limit) < expected / len(fake)
    assert slope == pytest.approx(expected, rel=0.2)


def test_kernel_distance_equals_torchmetrics_and_is_unbiased():
    a, b = normal(60, 4), normal(60, 4, 0.5, 1.2, 1)
    assert evaluate.kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    same = [evaluate.kernel_distance(*torch.randn(2, 50, 4, generator=generator)) for _ in range(300)]
    mean, error = torch.tensor(same).mean(), torch.tensor(same).std() / 300**0.5
    assert abs(mean) < 4 * error


def test_precision_and_recall_tell_fidelity_from_coverage():
    both = torch.cat([normal(100, 2, 0, 0.1), normal(100, 2, 5, 0.1, 1)])
    one, far = normal(100, 2, 0, 0.05, 2), normal(100, 2, 50, 0.1, 3)
    precision, recall = evaluate.precision_recall(both, one)
    assert precision > 0.95 and recall < 0.6
    assert evaluate.precision_recall(both, far) == (0, 0)
    assert evaluate.precision_recall(both, both) == (1, 1)


def test_shipped_features_see_what_an_eye_sees():
    """Blur, noise and a shift by a pixel all lie further from the digits than other digits do."""
    from cmlib.pipeline import shipped

    classifier = evaluate.Classifier.load(shipped("digits_classifier.safetensors"))
    images, _ = data.load("digits")
    held_out, labels = data.load("digits", "test")
    assert evaluate.accuracy(classifier, held_out, labels) > 0.98
    reference = evaluate.features(classifier, images)
    n = len(held_out)
    x = data.to_float(images[:n])
    generator = torch.Generator().manual_seed(0)
    other = evaluate.frechet_distance(reference, evaluate.features(classifier, held_out))
    for worse in (
        nn.functional.avg_pool2d(nn.functional.pad(x, (1,) * 4, mode="replicate"), 3, 1),
        x.roll(1, 3),
        x + torch.randn(x.shape, generator=generator),
    ):
        assert evaluate.frechet_distance(reference, evaluate.features(classifier, worse)) > 2 * other


def test_features_round_before_they_look():
    classifier = evaluate.Classifier().eval()
    x = torch.rand(5, 1, 8, 8) * 2 - 1
    assert torch.equal(evaluate.features(classifier, x), evaluate.features(classifier, data.to_uint8(x)))


def test_classifier_file_round_trip(tmp_path):
    classifier = evaluate.Classifier(3, 16, classes=4).eval()
    classifier.save(tmp_path / "c.safetensors")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(evaluate.Classifier.load(tmp_path / "c.safetensors")(x), classifier(x))
    whole = (tmp_path / "c.safetensors").read_bytes()
    for damaged in (b"rubbish", whole[:-1] + bytes([whole[-1] ^ 1])):
        (tmp_path / "c.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="not a classifier"):
            evaluate.Classifier.load(tmp_path / "c.safetensors")


def test_reconstruction_error_of_the_identity_is_the_noise():
    """f(x, t) = x leaves σ·ε, of length σ·√d on average."""
    images = torch.zeros(50, 1, 8, 8, dtype=torch.uint8)
    n, distance = evaluate.reconstruction_error(lambda x, t: x, images, PROCESS, per_image=256, seed=1)
    assert len(n) == 50 * 256 and n.min() >= 0 and n.max() <= 999
    ratio = distance / PROCESS.sigma(n)
    assert ratio.mean() == pytest.approx(63.5**0.5, rel=0.01)
    perfect = evaluate.reconstruction_error(lambda x, t: -torch.ones_like(x), images, PROCESS, 4)[1]
    assert perfect.max() == 0


def test_self_consistency_gap_is_zero_at_the_paths_end_alone():
    torch.manual_seed(0)
    teacher = Teacher(UNet(**UNET), PROCESS).to("cpu")
    noise = torch.randn(4, 1, 8, 8)
    end = teacher.sample(noise, 10, "ddim", path=True)[-1]
    sigmas, gap = evaluate.self_consistency_gap(lambda x, t: end, teacher, noise, 10)
    assert gap.max() == 0 and len(sigmas) == 10 and sigmas[0] > sigmas[-1]
    assert evaluate.self_consistency_gap(lambda x, t: end + 0.5, teacher, noise, 10)[1] == pytest.approx([0.5] * 10)
    below, gap = evaluate.self_consistency_gap(lambda x, t: end, teacher, noise, 10, float(sigmas[3]))
    assert below.tolist() == sigmas[3:].tolist() and len(gap) == 7


def test_pair_error_reports_the_identity_beside_the_model():
    x_t, r = torch.randn(6, 1, 4, 4) * 3, torch.full((6,), 2.0)
    t = torch.full((6,), 3.0)
    batch = {"x_t": x_t, "t": t, "r": r, "x_r": x_t * (5**0.5 / 10**0.5)}  # the same state in the chain's own units
    found = evaluate.pair_error(lambda x, t: x, batch)
    assert found["identity"] == pytest.approx(0, abs=1e-12)
    batch["x_r"] = torch.randn(6, 1, 4, 4)
    found = evaluate.pair_error(lambda x, t: batch["x_r"] / 5**0.5, batch)
    assert found["model"] < 1e-12 and found["skill"] == pytest.approx(1) and found["identity"] > 0


def test_fid_without_torchmetrics_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match="pip install --no-deps torchmetrics"):
        evaluate.FID(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
