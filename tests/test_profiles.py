"""The profiles for larger images, each run end to end on a tiny folder that looks like what the hub has."""

import itertools
import json
import math
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from cmlib import cli, data, evaluate, latents, profiles, ranks, recipes
from cmlib.cache import PairCache
from cmlib.consistency import ConsistencyFunction
from cmlib.course import persona6
from cmlib.process import DDPM
from cmlib.teacher import Teacher
from cmlib.unet import UNet, balanced, classes

TINY = {
    "layers": 1, "precision": "no", "batch_size": 4, "teacher_updates": 2, "pairs": 16, "rollout_steps": 4,
    "endpoint_updates": 2, "distill_updates": 2, "samples": 14, "timesteps": 1,
}  # fmt: skip


def files(folder, split, pictures, shards=1, **columns):
    """Parquet files as the hub keeps them."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), **{k: datasets.Value("int64") for k in columns}})
    table = datasets.Dataset.from_dict({"image": pictures, **columns}, features=features)
    for k in range(shards):
        table.shard(shards, k).to_parquet(str(folder / f"{split}-{k:05d}-of-{shards:05d}.parquet"))


def objects(n, modes=("RGB", "L")):
    """Pictures that are not square, some of them grey, as in ImageNet."""
    rng = np.random.Generator(np.random.Philox(1))
    made = [Image.fromarray(rng.integers(0, 256, (150, 180, 3), dtype=np.uint8)) for _ in range(n)]
    return [picture.convert(mode) for picture, mode in zip(made, itertools.cycle(modes), strict=False)]


def small_vae(folder, seed=0):
    torch.manual_seed(seed)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(block_out_channels=[4] * 4, latent_channels=4, norm_num_groups=2, layers_per_block=1, **blocks)
    vae.save_pretrained(folder)
    latents.vae.cache_clear()
    return vae.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What CMLIB_DATASETS names."""
    root = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMLIB_DATASETS", str(root))
        faces = [Image.fromarray(face.permute(1, 2, 0).numpy()) for face in persona6.drawn(28, 0)]
        files(root / "celebahq64", "train", faces[:14])
        files(root / "celebahq64", "validation", faces[14:21])
        for name, side, shape in (("ffhq-latents", 64, (4, 8, 8)), ("imagenet128", 32, (3, 32, 32))):  # smaller, for time
            patch.setitem(data.SETS, name, replace(data.SETS[name], side=side, shape=shape))
        files(root / "ffhq-latents", "train", faces)
        small_vae(root / "stabilityai" / "sd-vae-ft-mse")
        files(root / "imagenet128", "train", objects(32), shards=4, label=[i % 3 for i in range(32)])
        files(root / "imagenet128", "validation", objects(6), label=[i % 3 for i in range(6)])
        for name, change in {
            "celeba64": {"widths": (8, 8, 8)},
            "ffhq-latent": {"widths": (8, 8)},
            "imagenet128": {"widths": (8, 8, 8, 8), "classes": 3, "in_memory": 16},
        }.items():
            patch.setitem(profiles.PROFILES, name, replace(profiles.PROFILES[name], **TINY, **change))
        yield root


@pytest.mark.parametrize(
    ("name", "shape", "picture"),
    [
        ("celeba64", (3, 64, 64), (3, 64, 64)),
        ("ffhq-latent", (4, 8, 8), (3, 64, 64)),
        ("imagenet128", (3, 32, 32), (3, 32, 32)),
    ],
)
def test_a_profile_end_to_end(folder, tmp_path, monkeypatch, name, shape, picture):
    def run(command, *more):
        out = tmp_path / command.replace(" ", "-")
        assert cli.main([*command.split(), "--profile", name, "--out", str(out), *map(str, more)]) == 0, command
        return json.loads((out / "metrics.json").read_text())

    streamed = []
    monkeypatch.setattr(data, "stream", lambda *a, _stream=data.stream: streamed.append(a) or _stream(*a))
    assert run("teacher train")["updates"] == 2
    given = ("--teacher", tmp_path / "teacher-train" / "pipeline")
    teacher = Teacher.from_pretrained(given[1])
    assert teacher.image_shape == shape and classes(teacher.unet) == (3 if name == "imagenet128" else 0)
    assert run("cache build", *given)["pairs"] == 16
    run("distill", *given, "--objective", "endpoint-regression", "--cache", tmp_path / "cache-build", "--updates", 1)
    if name == "imagenet128":
        run("distill", *given, "--objective", "ect", "--updates", 1)
    assert len(streamed) == (2 if name == "imagenet128" else 0)  # teacher and ECT
    student = tmp_path / "distill" / "student.pt"
    assert ConsistencyFunction.load(student).image_shape == shape
    found = run("evaluate", *given, "--checkpoint", student, "--seeds", 1)
    for key in ("student_1", "student_2", "teacher_ddim50", "real"):
        assert math.isfinite(found[f"fd_{profiles.PROFILES[name].dataset.replace('-', '_')}.{key}"])
    assert found["gap.student"] > 0 and found["distance.student"] > 0
    run("sample", "--checkpoint", student, "--n", 3)
    if name == "imagenet128":  # what is not there yet says so
        assert cli.main(["export", "--profile", name, "--checkpoint", str(student), "--out", str(tmp_path / "x")]) == 2
        assert (
            cli.main(["distill", "--profile", name, *map(str, given), "--objective", "sct", "--out", str(tmp_path / "y")]) == 2
        )
    with np.load(tmp_path / "sample" / "samples.npz") as file:
        images = file[file.files[0]]
    assert sorted(images.shape) == sorted((3, *picture)) and images.dtype == np.uint8


def test_faces_are_what_the_exercise_makes_of_them(folder):
    """Block means of 4×4 pixels, the network's shape and the largest noise level: the profile's and exercise 6's agree."""
    ours, _ = data.load("celebahq64")
    assert ours.shape == (14, 3, 64, 64)
    theirs = persona6.EXERCISES["shrink"].reference(data.load(str(folder / "celebahq64"))[0], 64)
    assert int((ours.int() - theirs.int()).abs().max()) <= 1
    student = persona6.student(0)
    assert student.image_shape == tuple(ours.shape[1:]) == data.SETS["celebahq64"].shape
    unet = profiles.small_unet(student.image_shape, (8, 8, 16, 16), 0.0)
    assert recipes.largest_sigma(Teacher(UNet.from_config(unet), DDPM.linear())) == student.sigma_max


def test_latents_are_the_vaes_in_eight_bits(folder, monkeypatch):
    vae = small_vae(folder / "stabilityai" / "sd-vae-ft-mse", seed=1)  # other weights than those of the run: encoded anew
    images, _ = data.load("ffhq-latents")
    held_out, _ = data.load("ffhq-latents", "test")
    assert images.shape == (24, 4, 8, 8) and len(held_out) == 4 and images.dtype == torch.uint8
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setitem(data.SETS, "ffhq-latents", replace(data.SETS["ffhq-latents"], vae=""))
        faces = torch.cat([data.load("ffhq-latents", split)[0] for split in ("train", "test")])
        exact = vae.encode(data.to_float(faces)).latent_dist.mode() * vae.config.scaling_factor
    kept = data.to_float(stored := torch.cat([images, held_out])) * latents.RANGE
    assert float((kept - exact.clamp(-5, 5)).abs().max()) <= latents.RANGE / 255 + 1e-4
    with torch.no_grad():
        pictures = vae.decode(kept / vae.config.scaling_factor).sample.clamp(-1, 1)
    shown = data.to_float(data.pictures("ffhq-latents", stored))
    assert shown.shape == pictures.shape and float((shown - pictures).abs().max()) < 0.01
    seen = []
    fid = evaluate.FID(stored, Mean(), decode=lambda part: seen.append(part) or data.pictures("ffhq-latents", part))
    fid.add(stored)
    assert fid.distance() == pytest.approx(0, abs=1e-6) and sum(map(len, seen)) == 2 * len(stored)
    monkeypatch.setattr(latents, "encode", None)
    assert torch.equal(data.load("ffhq-latents")[0], images)  # from the disk


class Mean(torch.nn.Module):
    """The mean of red, green and blue as features for FID."""

    num_features = 3

    def forward(self, pictures):
        assert pictures.shape[1:] == (3, 64, 64)
        return pictures.double().mean((2, 3))


def epoch(folder, monkeypatch, rank, world, batches, batch=8, start=0):
    monkeypatch.setattr(ranks, "here", lambda: (rank, world))
    return list(itertools.islice(data.stream(str(folder), batch, seed=5, start=start), batches))


def values(batches):
    return [int(v) for part in batches for v in data.to_uint8(part["x0"])[:, 0, 0, 0]]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_stream_each_picture_once(tmp_path, monkeypatch, world):
    """Four files of eight pictures; eight ranks don't divide them, and take every eighth picture instead."""
    flat = [Image.new("RGB", (4, 4), (i, i, i)) for i in range(32)]
    files(tmp_path, "train", flat, shards=4, label=list(range(32)))
    shares = [epoch(tmp_path, monkeypatch, rank, world, batches=8) for rank in range(world)]
    assert all(len(part["x0"]) == 8 // world and part["whole"] == 8 for share in shares for part in share)
    assert all(part["label"].tolist() == values([part]) for share in shares for part in share)
    first, second = ([values(share[k : k + 4]) for share in shares] for k in (0, 4))
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(32))
    assert first != second  # another order in the next epoch
    if 4 % world == 0:
        assert [len({v // 8 for v in share}) for share in first] == [4 // world] * world  # files that a rank reads
    for rank, share in enumerate(shares):  # a run that was stopped goes on where it was, in a later epoch, too
        for start in (3, 6):
            again = epoch(tmp_path, monkeypatch, rank, world, batches=2, start=start)
            assert values(again) == values(share[start : start + 2])


def test_a_streamed_batch_is_shared_equally_or_refused(tmp_path, monkeypatch):
    files(tmp_path, "train", [Image.new("RGB", (4, 4))] * 4)
    with pytest.raises(ValueError, match="batch of 8 cannot be shared equally by 3"):
        epoch(tmp_path, monkeypatch, 0, 3, 1)


def test_a_conditional_cache_gives_each_path_its_class(folder, tmp_path):
    torch.manual_seed(0)
    net = UNet.from_config(profiles.small_unet((1, 8, 8), (8, 8), 0.0, classes=3))
    torch.nn.init.normal_(net.class_embedding.weight, std=5.0)
    teacher = Teacher(net, DDPM.linear())
    cache = PairCache.build(tmp_path, teacher, 20, "rollout", solver="ddim", steps=4, shape=(1, 8, 8))
    batch = next(cache.loader(20))
    assert torch.equal(batch["label"], batch["index"] % 3) and len(batch["label"].unique()) == 3
    noise = torch.stack([cache[i]["x_t"] / cache[i]["t"] for i in range(0, 20, 4)])  # nearly: σ² + 1 is the variance
    scale = (1 + float(cache[0]["t"]) ** -2) ** 0.5
    with balanced(net, torch.arange(5)):
        right = teacher.sample(noise / scale, 4)
    with balanced(net, torch.arange(5) + 1):
        wrong = teacher.sample(noise / scale, 4)
    ends = torch.stack([cache[i]["x_end"] for i in range(0, 20, 4)])
    assert float((right - ends).abs().max()) < 0.02 < 10 * float((wrong - ends).abs().max())
    with pytest.raises(ValueError, match="holds rollouts"):
        PairCache.build(tmp_path / "b", teacher, 20, images=torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
