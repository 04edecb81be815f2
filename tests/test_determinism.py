"""The table in docs/determinism.md: its tests exist, and the lines that no other file tests."""

import re
from pathlib import Path

import torch

from cmlib import pipeline
from cmlib.consistency import ConsistencyFunction
from cmlib.unet import UNet
from tests.small import UNET

ROOT = Path(__file__).resolve().parent.parent


def student() -> ConsistencyFunction:
    torch.manual_seed(0)
    return ConsistencyFunction(UNet(**UNET), 0.01, 20.0).eval()


def test_each_line_of_the_table_names_tests_that_exist():
    table = [line for line in (ROOT / "docs" / "determinism.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(table) > 10
    for line in table:
        names = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)
        assert names, f"no test holds: {line}"
        for file, name in names:
            assert f"def {name}(" in (ROOT / file).read_text(), (file, name)


def test_batch_size_of_sampling_moves_an_image_by_a_grey_level_at_most():
    f = student()
    for evaluations in (1, 2):
        whole = pipeline.draw(f, 40, evaluations, (1, 8, 8), 0, batch=40)
        assert len(whole.unique(dim=0)) == 40
        for batch in (1, 7, 16):
            again = pipeline.draw(f, 33, evaluations, (1, 8, 8), 0, batch=batch)
            assert int((whole[:33].int() - again.int()).abs().max()) <= 1


def test_the_same_seed_twice_is_the_same_bits_and_another_is_not():
    f = student()
    first, again, other = (pipeline.draw(f, 12, 2, (1, 8, 8), seed, batch=5) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
