"""Image sets: digits out of the wheel, folders in the hub's layout, and bad input."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from cmlib import data


def folder(tmp_path, pictures, split="train", **columns):
    """A folder that `datasets.load_dataset` reads, with one parquet file."""
    features = datasets.Features({"picture": datasets.Image(), **{k: datasets.Value("int64") for k in columns}})
    table = datasets.Dataset.from_dict({"picture": pictures, **columns}, features=features)
    tmp_path.mkdir(exist_ok=True)
    table.to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    return str(tmp_path)


def picture(mode="RGB", size=(6, 6), value=7):
    return Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).convert(mode)


def test_digits_are_all_there_once():
    train, test = data.load("digits"), data.load("digits", "test")
    assert train[0].shape == (1500, 1, 8, 8) and test[0].shape == (297, 1, 8, 8) and train[0].dtype == torch.uint8
    from sklearn.datasets import load_digits

    ours = torch.cat([train[0], test[0]]).flatten(1).double().sum(1).sort().values
    theirs = torch.from_numpy(np.round(load_digits().images * 255 / 16)).flatten(1).sum(1).sort().values
    torch.testing.assert_close(ours, theirs)
    assert train[0].max() == 255 and train[0].min() == 0


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("RGBA", 3)])
def test_any_folder_with_an_image_column(tmp_path, mode, channels):
    images, labels = data.load(folder(tmp_path / "a set, ünïcode", [picture(mode)] * 3, label=[1, 2, 3]))
    assert images.shape == (3, channels, 6, 6) and images.unique().tolist() == [7] and labels.tolist() == [1, 2, 3]


def test_named_sets_are_looked_for_in_the_datasets_folder(tmp_path, monkeypatch):
    folder(tmp_path / "fashion_mnist", [picture("L", (28, 28), 9)] * 2)
    monkeypatch.setenv("CMLIB_DATASETS", str(tmp_path))
    images, labels = data.load("fashion_mnist")
    assert images.shape == (2, 1, 32, 32) and labels is None
    assert images[0, 0, 2:30, 2:30].unique().tolist() == [9] and images[0, 0, :2].unique().tolist() == [0]
    monkeypatch.delenv("CMLIB_DATASETS")
    assert data.resolve("cifar10") == "uoft-cs/cifar10"


@pytest.mark.parametrize(
    ("pictures", "match"), [([picture(), picture(size=(5, 6))], "mixes image sizes"), ([picture(size=(5, 6))], "square")]
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, pictures, match):
    with pytest.raises(ValueError, match=match):
        data.load(folder(tmp_path, pictures))


def test_bad_sets_are_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"cannot load data set 'no/such'.*CMLIB_DATASETS"):
        data.load("no/such")
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        data.load(folder(tmp_path / "a", [picture()]), "test")
    with pytest.raises(ValueError, match="split must be"):
        data.load("digits", "validation")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "b.parquet"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b.parquet").rename(tmp_path / "b" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="no image column; its columns are text"):
        data.load(str(tmp_path / "b"))


def test_limit():
    assert len(data.load("digits", limit=5)[0]) == 5


def test_uint8_round_trip_is_exact_and_rounds():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(levels)), levels)
    assert data.to_uint8(torch.tensor([0.0, 5.0, -5.0])).tolist() == [128, 255, 0]


def test_batches_visit_every_image_once_an_epoch_and_resume_anywhere():
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 1, 2, 2)
    stream = data.batches(images, 3, seed=4)
    seen = [next(stream)["index"].tolist() for _ in range(12)]
    assert sorted(len({i for part in seen[k : k + 3] for i in part}) for k in (0, 3, 6, 9)) == [9] * 4
    for start in (1, 3, 7):
        resumed = data.batches(images, 3, seed=4, start=start)
        assert [next(resumed)["index"].tolist() for _ in range(3)] == seen[start : start + 3]
    assert seen[:3] != seen[3:6]
