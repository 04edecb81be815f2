"""Figures say what they show."""

import torch

from cmlib import plots


def test_jump_labels_every_noise_level_once_and_every_row():
    rows = {name: torch.zeros(2, 1, 8, 8) for name in ("noisy", "one jump")}
    figure = plots.jump([0.3, 80.0], rows)
    assert [ax.get_title() for ax in figure.axes] == ["σ = 0.3", "σ = 80", "", ""]
    assert [ax.get_ylabel() for ax in figure.axes] == ["noisy", "", "one jump", ""]
    plots.plt.close(figure)


def test_tile_keeps_pixels_and_order():
    images = torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2)
    sheet = plots.tile(images, columns=2)
    assert sheet.shape == (1, 5, 5)
    assert sheet[0, 0, 0] == 0 and sheet[0, 0, 3] == 1 and sheet[0, 3, 0] == 2
    assert bool((sheet[0, :, 2] == 1).all())


def test_binned_means_are_over_equal_groups():
    t, mean = plots.binned(torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([40.0, 10.0, 30.0, 20.0]), bins=2)
    assert t.tolist() == [1.5, 3.5] and mean.tolist() == [15.0, 35.0]


def test_small_multiples_take_a_logarithmic_axis_for_decades_only():
    for x, scale in ((torch.tensor([4e3, 3e4]), "linear"), (torch.tensor([0.01, 80.0]), "log")):
        figure = plots.small_multiples({"a": [(x, x)], "b": [(x, 2 * x)]}, 1.0, "level", "x", "y", "title")
        assert [ax.get_xscale() for ax in figure.axes] == [scale, scale]
        assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
        plots.plt.close(figure)
