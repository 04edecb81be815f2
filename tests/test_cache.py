"""The pair cache: what a shard holds, what is refused, repair, refresh and the loader."""

import json
import os
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from cmlib import cache as module
from cmlib.cache import PairCache
from cmlib.data import to_float
from cmlib.ops import indexed_integers, indexed_normal
from cmlib.process import DDPM
from cmlib.teacher import SOLVERS, Teacher
from cmlib.unet import UNet
from tests.small import UNET

T, SHAPE = 50, (1, 8, 8)


def make_teacher(seed: int = 0, process: DDPM | None = None) -> Teacher:
    torch.manual_seed(seed)
    return Teacher(UNet(**UNET), process or DDPM.linear(T, 1e-3, 0.2)).to("cpu")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 20)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # what it is for is in faults/


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return make_teacher()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (90, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cache(tmp_path, teacher, images) -> PairCache:
    """70 pairs: three shards of 20 and one of 10."""
    return PairCache.build(tmp_path / "cache", teacher, 70, images=images, batch_size=16)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the locks."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix != ".lock"}


def stored(cache: PairCache) -> dict[str, torch.Tensor]:
    shards = [torch.load(cache.path(s), weights_only=True) for s in range(cache.n_shards)]
    return {k: torch.cat([shard[k] for shard in shards]) for k in shards[0]}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- content


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("delta", [1, 7, T])
def test_data_shards_hold_what_the_teacher_says(tmp_path, teacher, images, solver, delta):
    args = {"images": images, "solver": solver, "delta": delta, "seed": 3, "batch_size": 20}
    cache = PairCache.build(tmp_path, teacher, 110, **args)
    rows = stored(cache)
    assert {k: v.dtype for k, v in rows.items()} == {
        "x_t": torch.float16, "x_r": torch.float16, "t": torch.int16, "r": torch.int16, "index": torch.int64,
    }  # fmt: skip
    item = torch.arange(110)
    assert torch.equal(rows["index"], item % 90)  # images start anew, with other levels and noise
    n = indexed_integers(3, item, 0, T, stream=0)
    assert torch.equal(rows["t"].long(), n)
    assert torch.equal(rows["r"].long(), (n - delta).clamp(min=-1))
    x0 = to_float(images[rows["index"]])
    x_t = teacher.process.perturb(x0, indexed_normal(3, item, SHAPE, stream=1), n).half()
    assert torch.equal(rows["x_t"], x_t)
    noise = indexed_normal(3, item, SHAPE, stream=2)
    for part in item.split(20):
        x_r = teacher.step(x_t[part].float(), n[part], rows["r"][part].long(), solver, noise[part])
        assert torch.equal(rows["x_r"][part], x_r.half())


@pytest.mark.parametrize("solver", ["ddim", "heun", "ancestral"])
def test_rollout_shards_hold_whole_trajectories(tmp_path, teacher, solver):
    cache = PairCache.build(tmp_path, teacher, 61, source="rollout", shape=SHAPE, solver=solver, steps=5, batch_size=8, seed=2)
    assert len(cache) == 65 and cache.per_shard == 20  # whole trajectories: 13 of 5 steps, four a shard
    shards = [torch.load(cache.path(s), weights_only=True) for s in range(cache.n_shards)]
    rows = {k: torch.cat([shard[k] for shard in shards]) for k in shards[0]}
    by = {k: v.unflatten(0, (13, 5)) for k, v in rows.items() if k != "x_end"}
    assert torch.equal(by["index"], torch.arange(13)[:, None].expand(-1, 5))
    assert by["t"][0].tolist() == [40, 30, 20, 10, 0] and by["r"][0].tolist() == [30, 20, 10, 0, -1]
    assert torch.equal(by["x_r"][:, :-1], by["x_t"][:, 1:])  # each pair starts where the last one ended
    assert torch.equal(rows["x_end"], by["x_r"][:, -1])
    for part in torch.arange(13).split(8):  # two shards fill a batch of eight
        x = indexed_normal(2, part, SHAPE, stream=1)
        for k in range(5):
            assert torch.equal(by["x_t"][part, k], x.half())
            noise = indexed_normal(2, part, SHAPE, stream=2 + k)
            x = teacher.step(x, by["t"][part, k].long(), by["r"][part, k].long(), solver, noise)
        assert torch.equal(rows["x_end"][part], x.half())
    if solver != "ancestral":
        path = teacher.sample(indexed_normal(2, range(13), SHAPE, stream=1), 5, solver, path=True)
        torch.testing.assert_close(rows["x_end"].float(), path[-1], rtol=1e-3, atol=1e-3)


def test_a_long_rollout_has_a_shard_a_trajectory_and_a_short_one_keeps_to_the_batch(tmp_path, teacher, monkeypatch):
    long = PairCache.build(tmp_path / "long", teacher, 50, source="rollout", shape=SHAPE, solver="ddim", steps=25)
    assert (long.per_shard, long.n_shards, len(long)) == (25, 2, 50)
    sizes = []
    step = Teacher.step
    monkeypatch.setattr(Teacher, "step", lambda self, x, *rest: sizes.append(len(x)) or step(self, x, *rest))
    PairCache.build(tmp_path / "short", teacher, 40, source="rollout", shape=SHAPE, solver="ddim", steps=1, batch_size=8)
    assert sizes == [8, 8, 4, 8, 8, 4]


def test_readers_get_edm_coordinates(tmp_path, teacher, images):
    for args in ({"images": images}, {"source": "rollout", "shape": SHAPE, "solver": "ddim", "steps": 5}):
        cache = PairCache.build(tmp_path / str(len(args)), teacher, 60, **args)
        rows = stored(cache)
        if "x_end" in rows:
            rows["x_end"] = rows["x_end"].repeat_interleave(5, 0)
        batch = next(cache.loader(60))
        assert len(batch["t"]) == 60
        for i in range(-60, 60, 7):
            pair = cache[i]
            for x, t in (("x_t", "t"), ("x_r", "r")):
                edm, sigma = teacher.process.to_edm(rows[x][i][None].float(), rows[t][i][None].long())
                torch.testing.assert_close(pair[x], edm[0])
                torch.testing.assert_close(pair[t], sigma[0])
                assert (rows[t][i] >= 0) == (pair[t] > 0)  # r = −1 is the clean image, σ = 0
            assert pair["n"] == rows["t"][i] and pair["index"] == rows["index"][i]
            if "x_end" in rows:
                assert torch.equal(pair["x_end"], rows["x_end"][i].float())
            mine = (batch["x_t"] == pair["x_t"]).flatten(1).all(1)
            assert mine.sum() == 1
            assert same({k: v[mine][0] for k, v in batch.items()}, pair)  # a batch holds the same rows
    with pytest.raises(IndexError, match="pair 60 of 60"):
        cache[60]


def test_a_pair_does_not_depend_on_how_many_there_are(tmp_path, teacher, images, cache):
    PairCache.build(tmp_path / "more", teacher, 100, images=images, batch_size=16)
    more, less = contents(tmp_path / "more"), contents(cache.folder)
    assert [more[f"shard-0000{s}.pt"] == less[f"shard-0000{s}.pt"] for s in range(3)] == [True] * 3


def test_batch_size_is_part_of_the_key(cache, teacher, images):
    """A network's last bits may vary with the batch, so a cache of another batch size is another cache."""
    with pytest.raises(ValueError, match="batch_size is 16, not 8"):
        PairCache.build(cache.folder, teacher, 70, images=images, batch_size=8)


def test_a_short_chain_needs_no_steps(tmp_path, images):
    """`steps` is the rollouts' argument; its default may exceed T."""
    assert len(PairCache.build(tmp_path, make_teacher(0, DDPM.linear(10, 1e-2, 0.5)), 20, images=images)) == 20


def test_no_temporary_file_and_no_group_lock_is_left(cache):
    assert sorted(p.name for p in cache.folder.iterdir()) == [
        "manifest.json", "manifest.lock", "shard-00000.pt", "shard-00001.pt", "shard-00002.pt", "shard-00003.pt",
    ]  # fmt: skip


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0, not 1"),
        ({"solver": "heun"}, "solver is 'posterior_mean', not 'heun'"),
        ({"delta": 2}, "delta is 1, not 2"),
        ({"pairs": 80}, "pairs is 70, not 80"),
        ({"images": torch.zeros(90, *SHAPE, dtype=torch.uint8)}, "images is "),
        ({"teacher": make_teacher(1)}, "teacher is "),
        ({"teacher": make_teacher(0, DDPM.cosine(40))}, r"teacher is .*schedule is 'T=50.*not 'T=40"),
        ({"source": "rollout", "shape": SHAPE, "solver": "ddim", "steps": 5}, "source is 'data', not 'rollout'"),
    ],
)
def test_a_stale_cache_is_refused_and_the_message_names_what_differs(cache, teacher, images, change, message):
    before = contents(cache.folder)
    with pytest.raises(ValueError, match=message) as error:
        PairCache.build(cache.folder, **{"teacher": teacher, "pairs": 70, "images": images, "batch_size": 16, **change})
    assert "stale cache" in str(error.value) and "\n" not in str(error.value)
    assert contents(cache.folder) == before


def test_open_refuses_another_teacher_and_an_unfinished_cache(cache, teacher):
    assert len(PairCache.open(cache.folder, teacher)) == 70
    with pytest.raises(ValueError, match=r"stale cache.*teacher is"):
        PairCache.open(cache.folder, make_teacher(1))
    cache.path(2).unlink()
    with pytest.raises(ValueError, match=r"1 of 4 shards in .* are missing; run the build"):
        PairCache.open(cache.folder)


def test_open_does_not_read_the_shards(cache, monkeypatch):
    monkeypatch.setattr(module, "sha256", lambda path: pytest.fail("open hashes the shards"))
    PairCache.open(cache.folder)


def test_the_name_of_an_equal_schedule_does_not_matter(cache, teacher, images):
    """A saved and loaded teacher's chain is called "trained_betas"."""
    loaded = Teacher(teacher.unet, DDPM(teacher.process.betas, "trained_betas"))
    PairCache.build(cache.folder, loaded, 70, images=images, batch_size=16)


def test_a_missing_folder_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"no pair cache at .*nowhere; build one with"):
        PairCache.open(tmp_path / "nowhere")


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_a_damaged_manifest_is_one_clear_line(cache, teacher, images):
    path = cache.folder / "manifest.json"
    good, shards = path.read_bytes(), contents(cache.folder)
    rng = np.random.Generator(np.random.Philox(0))
    damages = [b"", b"[]", b"null", b"{}", b"\xff\xfe", good[: len(good) // 2], good.replace(b'"seed": 0', b'"seed": 1')]
    damages += [flipped(good, int(rng.integers(8 * len(good)))) for _ in range(50)]
    for damage in damages:
        path.write_bytes(damage)
        try:
            assert PairCache.open(cache.folder).key == cache.key  # a few flips change no value: 1e-05, 1E-05
            assert json.loads(damage) == json.loads(good)
        except ValueError as error:
            assert str(error) == f"{path} is damaged; delete that file and build again"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged; delete that file"):
        PairCache.build(cache.folder, teacher, 70, images=images, batch_size=16)
    path.unlink()
    PairCache.build(cache.folder, teacher, 70, images=images, batch_size=16)
    assert contents(cache.folder) == shards


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "web"}, "source must be"),
        ({"solver": "euler"}, "solver must be one of"),
        ({"images": None}, "needs images"),
        ({"images": torch.zeros(0, *SHAPE, dtype=torch.uint8)}, "needs images"),
        ({"images": torch.zeros(9, *SHAPE)}, "uint8"),
        ({"images": torch.zeros(9, 8, 8, dtype=torch.uint8)}, r"\[N,C,H,W\]"),
        ({"images": torch.zeros(9, 3, 8, 8, dtype=torch.uint8)}, r"does not take images of shape \(3, 8, 8\)"),
        ({"images": torch.zeros(9, 1, 7, 7, dtype=torch.uint8)}, r"does not take images of shape \(1, 7, 7\)"),
        ({"source": "rollout", "solver": "ddim"}, "needs the image shape"),
        ({"source": "rollout", "solver": "posterior_mean", "shape": SHAPE}, "a solver that ends on an image"),
        ({"source": "rollout", "solver": "ddim", "shape": (3, 8, 8)}, "does not take images of shape"),
        ({"source": "rollout", "solver": "ddim", "shape": SHAPE, "steps": T + 1}, "at most T=50"),
        ({"pairs": 0}, "must be positive"),
        ({"delta": T + 1}, "at most T=50"),
        ({"batch_size": 0}, "must be positive"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, teacher, images, change, message):
    with pytest.raises(ValueError, match=message):
        PairCache.build(tmp_path / "new", **{"teacher": teacher, "pairs": 70, "images": images, **change})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", [{"source": "data"}, {"source": "rollout", "shape": SHAPE, "solver": "ddim", "steps": 5}])
def test_a_teacher_that_gives_nan_is_refused(tmp_path, images, source):
    broken = make_teacher()
    broken.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"shard 0 is not stored: its x_. holds NaN"):
        PairCache.build(tmp_path, broken, 40, images=images, **source)
    assert not list(tmp_path.glob("shard-*"))


# ---- repair


@pytest.mark.parametrize("source", [{}, {"source": "rollout", "shape": SHAPE, "solver": "ddim", "steps": 5}])
def test_every_flipped_bit_and_truncation_is_found_and_repaired(tmp_path, teacher, images, source):
    args = {"teacher": teacher, "pairs": 80, "images": images, "batch_size": 8, **source}
    cache = PairCache.build(tmp_path, **args)
    good = contents(tmp_path)
    rng = np.random.Generator(np.random.Philox(5))
    for k in range(50):
        shard = int(rng.integers(cache.n_shards))
        data = cache.path(shard).read_bytes()
        at = int(rng.integers(8 * len(data)))
        cache.path(shard).write_bytes(flipped(data, at) if k % 2 else data[: at // 8])
        assert cache.verify() == [shard]
        PairCache.build(tmp_path, **args)
        assert cache.verify() == [] and contents(tmp_path) == good


def test_a_shard_damaged_after_opening_is_a_clear_error(cache):
    stream = cache.loader(10)
    next(stream)
    cache.path(1).write_bytes(flipped(cache.path(1).read_bytes(), 9000))
    for read in (lambda: cache[25], lambda: next(cache.loader(10))):
        with pytest.raises(ValueError, match=r"shard 1 of .* is missing or damaged; build it again with teacher \w{12}"):
            read()
    cache.path(1).unlink()
    with pytest.raises(ValueError, match=r"shard 1 of .* is missing or damaged"):
        cache[25]
    assert cache[5]["n"] >= 0  # the others are as good as before


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_no_pickle_is_executed(cache):
    """A foreign shard fails its checksum; with the right checksum it still meets `weights_only`."""
    cache.path(1).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"shard 1 .* damaged"):
        cache[25]
    torch.save(Bomb(), cache.path(1))
    assert cache.verify() == [1]
    with pytest.raises(ValueError, match=r"shard 1 .* damaged"):
        next(cache.loader(10))
    cache.shards["1"]["sha256"] = module.sha256(cache.path(1))
    with pytest.raises(pickle.UnpicklingError):
        cache[25]


# ---- refresh


def test_refresh_changes_the_targets_and_nothing_else(cache, teacher, images, tmp_path):
    before, other = stored(cache), make_teacher(1)
    fresh = cache.refresh(other)
    after = stored(fresh)
    assert not torch.equal(before.pop("x_r"), after["x_r"])
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    PairCache.build(tmp_path / "new", other, 70, images=images, batch_size=16)
    assert contents(tmp_path / "new") == contents(cache.folder)  # as if built with the new teacher
    assert PairCache.open(cache.folder, other).verify() == []
    with pytest.raises(ValueError, match=r"stale cache.*teacher is"):
        PairCache.open(cache.folder, teacher)
    with pytest.raises(ValueError, match="open it again if another process refreshed it"):
        cache[0]  # opened before the refresh


def test_refresh_is_refused_and_changes_nothing(cache, teacher, tmp_path):
    before = contents(cache.folder)
    with pytest.raises(ValueError, match="schedule or image shape differs"):
        cache.refresh(make_teacher(0, DDPM.cosine(T)))
    with pytest.raises(ValueError, match="schedule or image shape differs"):
        cache.refresh(make_teacher(0, DDPM.linear(40, 1e-3, 0.2)))
    larger = Teacher(UNet(**{**UNET, "in_channels": 3, "out_channels": 3}), teacher.process)
    with pytest.raises(ValueError, match="schedule or image shape differs"):
        cache.refresh(larger)
    assert contents(cache.folder) == before
    rollout = PairCache.build(tmp_path / "r", teacher, 40, source="rollout", shape=SHAPE, solver="ddim", steps=5)
    with pytest.raises(ValueError, match="build a new one"):
        rollout.refresh(make_teacher(1))
    cache.path(2).write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard 2 of .* damaged; build it again with teacher"):
        cache.refresh(make_teacher(1))
    cache.path(2).write_bytes(before["shard-00002.pt"])
    assert contents(cache.folder) == before


def test_two_refreshes_at_once_cannot_mix_their_targets(cache, monkeypatch):
    """The second to begin wins; the first says so instead of storing its targets under the other's name."""
    step = Teacher.step

    def interrupted(self, *args):
        now = PairCache(cache.folder)
        now.key["teacher"] = "another"
        now._save()
        return step(self, *args)

    monkeypatch.setattr(Teacher, "step", interrupted)
    with pytest.raises(ValueError, match=r"another process refreshed .* to teacher another meanwhile"):
        cache.refresh(make_teacher(1))
    with pytest.raises(ValueError, match="4 of 4 shards"):
        PairCache.open(cache.folder)


# ---- the loader


def test_loader_is_a_function_of_the_seed(cache):
    a, b, c = (list(islice(cache.loader(16, seed), 9)) for seed in (0, 0, 1))
    assert all(map(same, a, b))
    assert not any(map(same, a, c))
    assert not same(a[0], a[4])  # every epoch has its own order


@pytest.mark.parametrize("window", [1, 2, 10])
def test_loader_starts_anywhere_in_its_stream(cache, monkeypatch, window):
    monkeypatch.setattr(module, "WINDOW_BYTES", window * 6 * 20 * 64)
    cache = PairCache.open(cache.folder)
    stream = list(islice(cache.loader(6, seed=4), 60))  # about six epochs
    for start in (0, 1, 2, 3, 8, 10, 11, 12, 30, 57):
        assert all(map(same, stream[start:], islice(cache.loader(6, seed=4, start=start), 60 - start)))


@pytest.mark.parametrize(("window", "epoch"), [(1, 10), (2, 11), (10, 11)])
def test_an_epoch_holds_a_pair_at_most_once_within_its_memory(cache, monkeypatch, window, epoch):
    monkeypatch.setattr(module, "WINDOW_BYTES", window * 6 * 20 * 64)
    cache = PairCache.open(cache.folder)
    stream = cache.loader(6)
    for _ in range(5):
        seen = []
        for _ in range(epoch):
            batch = next(stream)
            assert len(batch["t"]) == 6
            seen += batch["index"].tolist()
            assert len(stream.gi_frame.f_locals["rows"]["x_t"]) <= 20 * window
        assert len(set(seen)) == len(seen) == 6 * epoch  # of 70; what does not fill a batch is left out
    assert not cache._loaded
    for i in range(0, 70, 3):
        assert cache[i]["index"] == i and len(cache._loaded) <= window


def test_a_cache_smaller_than_a_batch_is_one_batch_an_epoch(cache):
    for batch in islice(cache.loader(1000), 3):
        assert sorted(batch["index"].tolist()) == list(range(70))


def test_a_small_cache_is_read_once(cache, monkeypatch):
    read = []
    load = PairCache._load
    monkeypatch.setattr(PairCache, "_load", lambda self, shard: read.append(shard) or load(self, shard))
    list(islice(cache.loader(10), 50))
    assert sorted(read) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["with space", "päätös-キャッシュ-σ", "[a]*?"])
def test_any_path_works(tmp_path, teacher, images, name):
    args = {"teacher": teacher, "pairs": 40, "images": images}
    cache = PairCache.build(tmp_path / name / "cache", **args)
    cache.path(1).unlink()
    PairCache.build(str(cache.folder), **args)
    assert len(next(PairCache.open(str(cache.folder)).loader(16))["t"]) == 16
    assert not list(cache.folder.glob("group-*"))
