"""Distances over seeds: streamed, resumed, and refused beside numbers of another protocol."""

import gc
import json
import weakref

import pytest
import torch

from cmlib import data, evaluate, pipeline, protocol


class Shades(torch.nn.Module):
    """Two features of uint8 RGB images [B,3,H,W] as a feature extractor of torchmetrics: mean and top left pixel."""

    num_features = 2

    def forward(self, x):
        x = x.double()
        return torch.stack([x.mean((1, 2, 3)), x[:, 0, 0, 0]], 1)


def grey(n, seed, top=256):
    return torch.randint(top, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def features():
    images, labels = data.load("digits", limit=300)
    return pipeline.Features.of("digits", None, images, labels, data.load("digits", "test", limit=40))


def test_fid_is_the_frechet_distance_of_its_features_whatever_the_batches():
    real, fake, other = grey(50, 0), grey(40, 1, 200), grey(30, 2)
    fid, see = evaluate.FID(real, Shades()), Shades()
    for expected, sizes in ((fake, 7), (other, 30), (fake, 40)):
        for part in expected.split(sizes):
            fid.add(part)
        exact = evaluate.frechet_distance(see(real.expand(-1, 3, -1, -1)), see(expected.expand(-1, 3, -1, -1)))
        assert fid.distance() == pytest.approx(exact, rel=1e-9)
    with pytest.raises(ValueError, match="uint8"):
        fid.add(torch.rand(4, 3, 8, 8))


def test_fid_asks_its_features_in_float32_and_sums_them_in_float64():
    class Network(Shades):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)

        def forward(self, x):
            assert self.linear.weight.dtype == torch.float32, "a T4 takes 32 times as long in float64"
            return self.linear(super().forward(x).float() / 255)

    network = Network().requires_grad_(False)
    fid = evaluate.FID(grey(50, 0), network)
    fid.add(fakes := grey(40, 1, 200))
    seen = [network(v.expand(-1, 3, -1, -1)).double() for v in (grey(50, 0), fakes)]
    assert fid.distance() == pytest.approx(evaluate.frechet_distance(*seen), rel=1e-5)


def test_means_and_spread_are_those_of_the_seeds_and_a_killed_run_goes_on(features, tmp_path):
    sets = {seed: grey(80, seed) for seed in (0, 1, 2)}
    made = []

    def generator(seed, keep):
        if seed == 2 and len(made) == 2:
            raise KeyboardInterrupt
        made.append(seed)
        return torch.cat([keep(part) for part in sets[seed].split(30)])

    def measured(key="weights"):
        return protocol.measured({"noise": generator}, sets, features, None, key, tmp_path)[0]

    with pytest.raises(KeyboardInterrupt):
        measured()
    made.append("again")
    found = measured()
    assert made == [0, 1, "again", 2]
    fd = [features.distance(images) for images in sets.values()]
    assert found["fd_digits.noise"] == pytest.approx(sum(fd) / 3, rel=1e-6)
    assert found["fd_digits.noise_spread"] == pytest.approx((max(fd) - min(fd)) / 2, rel=1e-4)
    assert found["fd_digits.noise_limit"] < found["fd_digits.noise"]
    measured("other weights")
    assert made[4:] == [0, 1, 2]
    path = next(tmp_path.glob("features/*.pt"))
    whole = bytearray(path.read_bytes())
    flipped = whole.copy()
    flipped[len(whole) // 2] ^= 1  # of a feature's bits
    for damaged in (b"cut", whole[:-100], flipped):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged; delete it"):
            measured(), measured("other weights")


def test_no_image_outlives_its_batch(features):
    alive = weakref.WeakSet()

    class Noise(torch.nn.Module):
        sigma_min = 0.0

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def levels(self, n):
            return [1.0]

        def forward(self, x, t):
            gc.collect()
            assert len(alive) <= 1
            return x

    def keep(images):
        alive.add(images)
        return features.see(images)

    drawn = pipeline.draw(Noise(), 100, 1, (1, 8, 8), 3, batch=20, keep=keep)
    images = pipeline.draw(Noise(), 100, 1, (1, 8, 8), 3)
    assert torch.allclose(drawn, evaluate.features(features.classifier, images), atol=1e-5)


@pytest.mark.parametrize("key", protocol.COMPARABLE)
def test_numbers_of_another_protocol_are_refused(key, features, tmp_path):
    told = {**features.protocol, "protocol.n": 300}
    other = tmp_path / "metrics.json"
    other.write_text(json.dumps({**told, "fd_digits.student_1": 5.0, "fd_digits.student_1_spread": 0.5}))
    table = protocol.beside({"fd_digits.student_1": 7.25, "gap.student": 1.0}, protocol.comparable(other, told))
    assert "7.25" in table and "5 ± 0.5" in table and "gap" not in table
    with pytest.raises(ValueError, match=f"another protocol: {key} is"):
        protocol.comparable(other, {**told, f"protocol.{key}": "changed"})
    with pytest.raises(ValueError, match="another protocol: fid is"):
        other.write_text(json.dumps({**told, "protocol.fid": "one Inception"}))
        protocol.comparable(other, {**told, "protocol.fid": "another"})
    assert protocol.comparable(other, told), "a run without FID has one protocol with both"
    with pytest.raises(ValueError, match="give the metrics"):
        protocol.comparable(tmp_path / "none.json", told)
