"""Figures as pure functions: data in, a matplotlib Figure out. Colour-blind-safe, pixels never smoothed."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from torch import Tensor

from cmlib.files import write_atomically

# Okabe & Ito 2008
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as PNG bytes; closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, atomically; closes it."""
    data = png(figure)
    write_atomically(path, lambda file: file.write(data))


def bundle(png: bytes, alt: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A picture as a notebook's output: PNG with alternative text, which matplotlib's own display leaves out."""
    return {"image/png": base64.b64encode(png).decode(), "text/plain": alt}, {"image/png": {"alt": alt}}


def display(figure: Figure, alt: str) -> None:
    """Show the figure in a notebook; `alt` tells what it shows to those who don't see it. 256 colours; closes it."""
    from IPython.display import display as show_bundle
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(figure, dpi=100))).convert("RGB").quantize(256).save(buffer, format="PNG", optimize=True)
    data, metadata = bundle(buffer.getvalue(), alt)
    show_bundle(data, metadata=metadata, raw=True)


def tell(text: str) -> None:
    """A sentence of a notebook that has measured numbers in it, as Markdown."""
    from IPython.display import Markdown
    from IPython.display import display as show_markdown

    show_markdown(Markdown(text))


def show(ax: Axes, image: Tensor, title: str = "") -> None:
    """Draw one image [C,H,W] in [-1, 1], nearest-neighbour."""
    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy()
    ax.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    if title:
        ax.set_title(title, fontsize=10)


def tile(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """One picture [C,H',W'] of images [N,C,H,W] in rows of `columns`, white lines between."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    sheet = torch.ones(c, rows * (h + gap) - gap, columns * (w + gap) - gap)
    for i, image in enumerate(images.detach().cpu()):
        y, x = divmod(i, columns)
        sheet[:, y * (h + gap) : y * (h + gap) + h, x * (w + gap) : x * (w + gap) + w] = image
    return sheet


def strip(panels: Mapping[str, Tensor], size: int = 150) -> bytes:
    """PNG of one image [C,H,W] in [-1, 1] a panel, side by side under their names, nearest-neighbour; 10 ms, no axes."""
    from PIL import Image, ImageDraw, ImageFont

    head, gap = 20, 8
    sheet = Image.new("RGB", (len(panels) * (size + gap) - gap, size + head), "white")
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 12)
    for k, (name, image) in enumerate(panels.items()):
        pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        sheet.paste(picture.resize((size, size), Image.Resampling.NEAREST), (k * (size + gap), head))
        ImageDraw.Draw(sheet).text((k * (size + gap) + size / 2, 2), name, fill="black", font=font, anchor="ma")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def samples(sets: Mapping[str, Tensor], columns: int = 12, rows: int = 4) -> Figure:
    """One panel of samples for each named set of images, two panels a row."""
    height = -(-len(sets) // 2)
    figure, axes = plt.subplots(height, 2, figsize=(9, 0.35 * (rows + 1) * height), squeeze=False, layout="constrained")
    for ax in axes.flat[len(sets) :]:
        ax.axis("off")
    for ax, (name, images) in zip(axes.flat, sets.items(), strict=False):
        show(ax, tile(images[: columns * rows], columns), name)
    return figure


def sheet(rows: Mapping[str, Tensor], columns: Sequence[str]) -> Figure:
    """A labelled row for each set of images [N,C,H,W], a titled column for each image in it."""
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(1.35 * len(columns) + 1.4, 1.45 * len(rows)), squeeze=False)
    for row, (name, images) in enumerate(rows.items()):
        line = axes[row]
        for ax, image, title in zip(line, images, columns, strict=True):
            show(ax, image, title if row == 0 else "")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    figure.tight_layout()
    return figure


def jump(sigmas: Sequence[float], rows: Mapping[str, Tensor]) -> Figure:
    """One image at several noise levels: a labelled row each (noisy, one jump, teacher's walk, …), a column a level."""
    return sheet(rows, [f"σ = {sigma:.3g}" for sigma in sigmas])


def flow(sigma: Tensor, x: Tensor, density: Tensor, paths: Mapping[str, Tensor], title: str) -> Figure:
    """Paths [len(sigma),P] of one coordinate over noise levels, on the density [len(x),len(sigma)] scaled to 1 at each."""
    figure, axes = plt.subplots(
        1, len(paths), figsize=(4.2 * len(paths), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (name, lines), colour in zip(axes[0], paths.items(), COLOURS, strict=False):
        ax.pcolormesh(sigma, x, density / density.max(0).values, cmap="Greys", vmax=1.6, rasterized=True)
        ax.plot(sigma, lines, color=colour, lw=1)
        ax.set(xlabel="noise level σ", title=name, xscale="log", ylim=(float(x[0]), float(x[-1])))
    axes[0][0].set_ylabel("x = x0 + σ·ε")
    figure.suptitle(title)
    return figure


def curves(
    lines: Mapping[str, tuple[Tensor, Tensor]],
    xlabel: str,
    ylabel: str,
    title: str,
    log_x: bool = True,
    log_y: bool = False,
) -> Figure:
    """Labelled lines over a shared axis."""
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for (name, (x, y)), colour, style in zip(lines.items(), COLOURS, ["-", "--", "-.", ":", "-", "--", "-."], strict=False):
        ax.plot(np.asarray(x), np.asarray(y), style, color=colour, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if log_x:
        ax.set_xscale("log")
    if log_y:
        ax.set_yscale("log")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return figure


def binned(t: Tensor, value: Tensor, bins: int = 20) -> tuple[Tensor, Tensor]:
    """Mean of `value` in `bins` groups of equal size along t: (mean t, mean value)."""
    order = t.argsort()
    groups = order.tensor_split(bins)
    return torch.stack([t[g].float().mean() for g in groups]), torch.stack([value[g].mean() for g in groups])


def bars(values: Mapping[str, float], xlabel: str, title: str) -> Figure:
    """Horizontal bars on a log axis, the figure printed at each."""
    figure, ax = plt.subplots(figsize=(6.4, 0.42 * len(values) + 1.1), layout="constrained")
    names = list(values)[::-1]
    drawn = ax.barh(names, [values[n] for n in names], color=[COLOURS[0] if "student" in n else "#999999" for n in names])
    ax.bar_label(drawn, fmt=lambda value: f"{value:.3g}" if value < 1000 else f"{value:,.0f}", padding=3)
    ax.set_xscale("log")
    ax.set(xlabel=xlabel, title=title)
    ax.margins(x=0.15)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def small_multiples(
    curves: Mapping[str, Sequence[tuple[Tensor, Tensor]]], level: float, level_name: str, xlabel: str, ylabel: str, title: str
) -> Figure:
    """A panel a name, its curves (one a seed) in colour over everyone's in grey, and a dashed line at `level`.

    The y axis is logarithmic, and the x axis where it spans two decades or more.
    """
    over = np.concatenate([np.asarray(x) for lines in curves.values() for x, _ in lines])
    wide = over.max() >= 100 * over.min() > 0
    columns = min(5, len(curves))
    height = -(-len(curves) // columns)
    size = (1.9 * columns + 0.8, 1.9 * height + 0.8)
    figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained")
    for ax in axes.flat[len(curves) :]:
        ax.axis("off")
    for ax, (name, mine) in zip(axes.flat, curves.items(), strict=False):
        for x, y in (line for lines in curves.values() for line in lines):
            ax.plot(np.asarray(x), np.asarray(y), color="#cccccc", linewidth=0.7)
        for x, y in mine:
            ax.plot(np.asarray(x), np.asarray(y), color=COLOURS[0], linewidth=1.5)
        ax.axhline(level, color=COLOURS[1], linestyle="--", linewidth=1)
        if wide:
            ax.set(xscale="log", yscale="log")
        else:
            ax.set(yscale="log", xlim=(0, None))
            ax.xaxis.set_major_locator(MaxNLocator(3))
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.3)
    axes[0, 0].annotate(
        level_name, (0.04, level), xycoords=("axes fraction", "data"), color=COLOURS[1], fontsize=8, va="bottom"
    )
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    return figure
