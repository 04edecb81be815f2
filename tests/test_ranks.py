"""Two processes under torchrun against one: the same training, samples, distances and cache."""

import json
import os
import subprocess
import sys

import pytest
import torch

from cmlib import ranks
from cmlib.consistency import ConsistencyFunction
from cmlib.teacher import Teacher
from tests import two_ranks
from tests.small import seeded

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ONE_CORE = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    command = [*TORCHRUN, "-m", "tests.two_ranks", str(two)]
    done = subprocess.run(command, env=ONE_CORE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    threads = torch.get_num_threads()
    torch.save(two_ranks.everything(one), one / "rank-0.pt")
    torch.set_num_threads(threads)
    return one, two


@pytest.fixture(scope="module")
def found(folders):
    one, two = folders
    return [torch.load(path, weights_only=True) for path in (one / "rank-0.pt", two / "rank-0.pt", two / "rank-1.pt")]


@pytest.mark.parametrize("name", two_ranks.NAMES)
def test_training_on_two_ranks_is_training_on_one(found, name):
    """The loss of every five steps, and f after 20; the average is one and the same on both ranks. (Weights that f does not
    depend on, as the bias of an attention's keys, may drift: their gradient is rounding.)"""
    one, first, second = (part[name] for part in found)
    assert one["step"].tolist() == [5, 10, 15, 20]
    torch.testing.assert_close(first["loss"], one["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(first["f"], one["f"], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(first[key], second[key]) for key in one)
    assert (one["f"] - one["before"]).abs().max() > 1e-3, "it did train"


def test_ranks_that_stream_stay_one_model(found):
    """Each reads files of its own, so the batches are not those of one process; gradients, weights and history are shared."""
    one, first, second = (part["streamed"] for part in found)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["average"], one["average"])
    torch.testing.assert_close(first["loss"], one["loss"], rtol=0.2, atol=0)  # of the same images, in another order


def test_sampling_is_split_without_padding_or_duplicates(found):
    one, first, second = (part["sampling"] for part in found)
    assert len(one["images"]) == 51 and len(one["images"].unique(dim=0)) == 51
    for key in ("images", "teacher"):
        assert torch.equal(one[key], first[key]) and torch.equal(one[key], second[key])
    for distance in ("fd", "fid"):
        assert abs(first[distance] / one[distance] - 1) < 1e-6 and first[distance] == second[distance]


@pytest.mark.parametrize("folder", ["cache", "rollouts", "images"])
def test_the_cache_of_two_ranks_has_the_bytes_of_one(folders, folder):
    one, two = ({p.name: p.read_bytes() for p in (f / folder).iterdir() if p.suffix in (".pt", ".json")} for f in folders)
    one.pop("metrics.json", None), two.pop("metrics.json", None)
    assert "shard-00000.pt" in one and one == two


def test_commands_in_two_processes_write_what_one_writes(folders, found):
    one, two = folders
    assert [part["dealt"]["least"] >= 1 for part in found] == [True] * 3, "each rank has a share of every draw"
    metrics = [json.loads((folder / "evaluation" / "metrics.json").read_text()) for folder in (one, two)]
    assert metrics[0].keys() == metrics[1].keys() and metrics[0]["fd_digits.student_1"] > 0
    for key, value in metrics[0].items():
        if key.startswith(("seconds.", "memory.")):
            continue
        assert metrics[1][key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
    assert (one / "samples" / "samples.npz").read_bytes() == (two / "samples" / "samples.npz").read_bytes()
    x, t = torch.randn(3, 1, 8, 8, generator=seeded()), torch.tensor([0.5, 2.0, 9.0])
    a, b = (ConsistencyFunction.load(folder / "student" / "student.pt")(x, t) for folder in folders)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert Teacher.from_pretrained(two / "teacher" / "pipeline").image_shape == (1, 8, 8)
    assert not list(two.rglob("*.tmp"))


def test_rows_of_a_draw_are_those_of_the_whole_draw(monkeypatch):
    draws = [
        lambda n, g: torch.randn((n, 2, 3), generator=g),
        lambda n, g: torch.randn(n, 2, generator=g),
        lambda n, g: torch.rand(n, generator=g),
        lambda n, g: torch.randint(50, (n,), generator=g),
        lambda n, g: torch.randint(10, 50, (n, 2), generator=g),
        lambda n, g: torch.multinomial(torch.ones(9), n, replacement=True, generator=g),
        lambda n, g: torch.multinomial(torch.ones(9), num_samples=n, replacement=True, generator=g),
        lambda n, g: torch.randn(size=(n, 2), generator=g),
    ]
    whole = [draw(7, seeded()) for draw in draws]
    for rank in range(3):
        monkeypatch.setattr(ranks, "here", lambda rank=rank: (rank, 3))
        mine = len(range(rank, 7, 3))
        with ranks.rows(mine, 7):
            assert all(torch.equal(draw(mine, seeded()), rows[rank::3]) for draw, rows in zip(draws, whole, strict=True))
            assert torch.equal(torch.randn(5, generator=seeded()), torch.randn(5, generator=seeded()))  # not a batch
            assert len(torch.randn(mine)) == mine  # dropout's, each rank's own
            with pytest.raises(ValueError, match="uniform_ cannot be shared by processes"):
                torch.empty(mine).uniform_(generator=seeded())


def test_one_process_needs_no_group(tmp_path):
    assert ranks.here() == (0, 1) and ranks.told("x") == "x"
    parts = torch.arange(7).split(3)
    assert torch.equal(ranks.dealt(parts, lambda part: part * 2), torch.arange(7) * 2)
    with ranks.joined():
        assert not torch.distributed.is_initialized()
