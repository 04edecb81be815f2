"""Explorers for notebooks: a few controls, one picture, one line that says in numbers what it shows. Core ipywidgets only.

Without a kernel (GitHub, nbconvert) an explorer is its picture as it was last; text readers get the line.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from cmlib import plots
from cmlib.data import to_float
from cmlib.ops import indexed_normal, mse
from cmlib.oracle import GaussianMixture
from cmlib.process import DDPM, EDM
from cmlib.teacher import Teacher


class Explorer:
    """`draw(**values)` makes the picture (PNG bytes) and the line of text anew whenever a control's value changes.

    `controls` name ipywidgets with a `value`, and `draw`'s arguments. A slider is moved by the arrow keys, too.
    """

    def __init__(self, draw: Callable[..., tuple[bytes, str]], controls: Mapping[str, Any]):
        from ipywidgets import HTML, Image, VBox

        self.draw, self.controls = draw, dict(controls)
        self.image, self.line = Image(format="png"), HTML()
        self.image.layout.max_width = "100%"
        self.image.layout.object_fit = "contain"
        for control in self.controls.values():
            control.style.description_width = "9em"
            control.layout.width = "34em"
            control.observe(self._update, names="value")
        self.box = VBox([*self.controls.values(), self.line, self.image])
        self._update()

    def _update(self, change: Any = None) -> None:
        self.image.value, self.text = self.draw(**{name: control.value for name, control in self.controls.items()})
        self.line.value = f'<div role="status">{self.text}</div>'

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The live widget where one can run, the picture elsewhere; written out, as ipywidgets 7 has no such method."""
        data, metadata = plots.bundle(self.image.value, self.text)
        live = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        return {**data, "application/vnd.jupyter.widget-view+json": live}, metadata


def slider(name: str, value: int, lo: int, hi: int) -> Any:
    """A slider over whole numbers that reports when it is let go."""
    from ipywidgets import IntSlider

    return IntSlider(value, lo, hi, description=name, continuous_update=False)


def sigma_slider(value: float, lo: float, hi: float) -> Any:
    """A slider over noise levels, even in ln σ."""
    from ipywidgets import FloatLogSlider

    low, high = float(np.log10(lo)), float(np.log10(hi))
    return FloatLogSlider(
        value,
        min=low,
        max=high,
        step=(high - low) / 60,
        description="noise level σ",
        readout_format=".3g",
        continuous_update=False,
    )


def choice(name: str, options: Sequence[Any], value: Any) -> Any:
    """A slider over a few values."""
    from ipywidgets import SelectionSlider

    return SelectionSlider(options=options, value=value, description=name, continuous_update=False)


def menu(name: str, options: Sequence[str]) -> Any:
    """A drop-down menu."""
    from ipywidgets import Dropdown

    return Dropdown(options=options, value=options[0], description=name)


def _canvas(width: float, height: float) -> tuple[Figure, FigureCanvasAgg]:
    figure = Figure(figsize=(width, height), dpi=80, layout="constrained")
    return figure, FigureCanvasAgg(figure)


def _animate(canvas: FigureCanvasAgg, moving: Sequence[Artist]) -> Callable[[], bytes]:
    """A function that gives the figure as PNG and draws only the `moving` artists anew: 30 ms instead of 200."""
    from PIL import Image

    for artist in moving:
        artist.set_animated(True)
    canvas.draw()
    still = canvas.copy_from_bbox(canvas.figure.bbox)

    def picture() -> bytes:
        canvas.restore_region(still)
        for artist in moving:
            canvas.figure.draw_artist(artist)
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(buffer, format="PNG")
        return buffer.getvalue()

    return picture


def _rmse(a: Tensor, b: Tensor) -> float:
    return float(mse(a, b).sqrt())


def jump_explorer(student: Any | None, teacher: Teacher, images: Tensor) -> Explorer:
    """One noisy image, the student's one jump, and the teacher's walk from the same point; `images` uint8 [N,C,H,W].

    `student` is a `ConsistencyFunction`, or None: then the teacher's denoiser jumps, to the average image. The seed chooses
    the image and its noise.
    """
    jumps, name = (teacher.denoise, "denoiser") if student is None else (student, "student")

    @torch.no_grad()
    def draw(sigma: float, steps: int, seed: int) -> tuple[bytes, str]:
        clean = to_float(images[seed % len(images)][None]).to(teacher.device)
        x = EDM().perturb(
            clean, indexed_normal(seed, [0], clean.shape[1:]).to(clean), torch.full((1,), sigma, device=clean.device)
        )
        jump = jumps(x, torch.full((1,), sigma, device=clean.device))
        walk = teacher.walk(x, sigma, steps)
        shown = x / (1 + sigma**2) ** 0.5
        panels = {"clean": clean, f"noisy, σ = {sigma:.3g}": shown, f"{name}: 1 jump": jump, f"teacher: {steps} steps": walk}
        text = (
            f"σ = {sigma:.3g}. RMS distance to the clean image: {name} {_rmse(jump, clean):.3f} with 1 evaluation, "
            f"teacher {_rmse(walk, clean):.3f} with {steps}; between the two {_rmse(jump, walk):.3f}."
        )
        return plots.strip({name: image[0] for name, image in panels.items()}), text

    limits = teacher.process if student is None else student
    lo, hi = max(limits.sigma_min, teacher.process.sigma_min), limits.sigma_max
    controls = {
        "sigma": sigma_slider(min(1.0, hi), lo, hi),
        "steps": choice("teacher's steps", [1, 2, 3, 5, 8, 12, 16], 12),
        "seed": slider("image and noise", 0, 0, 99),
    }
    return Explorer(draw, controls)


def schedule_explorer(image: Tensor, T: int = 1000) -> Explorer:
    """ᾱ, σ and the signal-to-noise ratio of three schedules along the chain, and one image [C,H,W] in [-1, 1] at step n."""
    chains = {chain.name: chain for chain in (DDPM.linear(T), DDPM.cosine_linear(T), DDPM.cosine(T))}
    eps = indexed_normal(0, [0], image.shape)[0]
    quantities: dict[str, Callable[[DDPM], Tensor]] = {
        "signal kept ᾱ": lambda c: c.alpha_bar,
        "noise level σ = √((1−ᾱ)/ᾱ)": lambda c: c.sigma(torch.arange(T)),
        "SNR = 1/σ²": lambda c: c.sigma(torch.arange(T)) ** -2,
    }
    figure, canvas = _canvas(10, 2.5)
    axes = figure.subplots(1, 4, width_ratios=[1, 1, 1, 0.8])
    dots, curves = [], []
    for ax, (title, of) in zip(axes, quantities.items(), strict=False):
        for chain, colour, style in zip(chains.values(), plots.COLOURS, ["-", "--", "-."], strict=False):
            ax.plot(of(chain).numpy(), style, color=colour, label=chain.name, alpha=0.6, lw=1)
        curves.append(ax.plot([0], [1], color="black", lw=2)[0])
        dots.append(ax.plot([0], [1], "o", color="black", ms=7)[0])
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("chain index n")
        ax.set_yscale("linear" if ax is axes[0] else "log")
    axes[0].legend(frameon=False, fontsize=7)
    plots.show(axes[3], image, "x at n")
    picture = _animate(canvas, [*curves, *dots, *axes[3].images, axes[3].title])

    def draw(schedule: str, n: int) -> tuple[bytes, str]:
        chain = chains[schedule]
        for of, curve, dot in zip(quantities.values(), curves, dots, strict=True):
            curve.set_data(range(T), of(chain).numpy())
            dot.set_data([n], [float(of(chain)[n])])
        noisy = chain.perturb(image[None], eps[None], torch.tensor([n]))[0]
        axes[3].images[0].set_data(((noisy.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).squeeze(-1).numpy())
        axes[3].set_title(f"x at n = {n}", fontsize=10)
        ab, sigma = float(chain.alpha_bar[n]), float(chain.sigma(torch.tensor([n])))
        return picture(), f"{schedule}, n = {n}: ᾱ = {ab:.4g}, σ = {sigma:.4g}, SNR = {sigma**-2:.4g}."

    return Explorer(draw, {"schedule": menu("β schedule", list(chains)), "n": slider("chain index n", T // 4, 0, T - 1)})


def delta_explorer(teacher: Teacher, images: Tensor, predict: Callable[[Tensor, int, int], Tensor] | None = None) -> Explorer:
    """A cached pair: x_n, the teacher's x̂ δ steps lower, their difference, and the error of answering x_n unchanged.

    `predict(x_n, n, r)` is a student's answer to the same question, in the chain's coordinates; `images` uint8.
    """

    @torch.no_grad()
    def draw(n: int, delta: int, solver: str, seed: int) -> tuple[bytes, str]:
        delta = min(delta, n + 1)
        clean = to_float(images[seed % len(images)][None]).to(teacher.device)
        at, to = torch.tensor([n], device=clean.device), torch.tensor([n - delta], device=clean.device)
        noise = [indexed_normal(seed, [0], clean.shape[1:], k).to(clean) for k in range(2)]
        x = teacher.process.perturb(clean, noise[0], at)
        target = teacher.step(x, at, to, solver, noise[1])
        identity = float(mse(x, target))
        panels = {f"x at n = {n}": x, f"x̂ at n − δ = {n - delta}": target, "difference": target - x}
        text = f"n = {n}, δ = {delta}, {solver}: the identity map's MSE is {identity:.3g}"
        if predict is not None:
            answer = predict(x, n, n - delta)
            panels["student's answer"] = answer
            text += (
                f", the student's {float(mse(answer, target)):.3g}, its skill {1 - float(mse(answer, target)) / identity:.3g}"
            )
        return plots.strip({name: image[0] for name, image in panels.items()}), text + "."

    controls = {
        "n": slider("chain index n", teacher.process.T // 2, 0, teacher.process.T - 1),
        "delta": choice("δ, chain steps", [1, 2, 5, 10, 20, 50, 100, 200, 500], 1),
        "solver": menu("reverse step", ["posterior_mean", "ancestral", "ddim"]),
        "seed": slider("image and noise", 0, 0, 99),
    }
    return Explorer(draw, controls)


def consistency_map(
    mixture: GaussianMixture,
    f: Callable[[Tensor, Tensor], Tensor] | None = None,
    sigma_max: float = 5.0,
    paths: int = 12,
    levels: int = 30,
    name: str = "f",
) -> Explorer:
    """ODE paths of 2-D data, and where f, called `name`, sends every path's points at a noise level; the exact f if none."""
    grid, states = _paths(mixture, sigma_max * indexed_normal(0, range(paths), (2,)), sigma_max, levels)
    with torch.no_grad():
        ends = (f or mixture.consistency)(states.flatten(0, 1), grid.repeat_interleave(paths)).view_as(states)
    figure, canvas = _canvas(5.6, 4.8)
    ax = figure.subplots()
    ax.plot(*mixture.sample(400, torch.Generator().manual_seed(0)).T.numpy(), ".", color="#BBBBBB", ms=3, label="data")
    for k in range(paths):
        ax.plot(*states[:, k].T.numpy(), color=plots.COLOURS[5], lw=1, label="ODE path" if k == 0 else None)
    arrows = [ax.plot([], [], ":", color=plots.COLOURS[1], lw=1)[0] for _ in range(paths)]
    points = ax.plot([], [], "o", color=plots.COLOURS[0], ms=6, label="x on its path")[0]
    marks = ax.plot([], [], "*", color=plots.COLOURS[1], ms=11, label=f"{name}(x, σ)")[0]
    ax.set(xlabel="first coordinate", ylabel="second coordinate", aspect="equal", title=f"Where {name} sends the points")
    ax.legend(frameon=False, fontsize=8)
    picture = _animate(canvas, [*arrows, points, marks, ax.title])

    def draw(level: int) -> tuple[bytes, str]:
        points.set_data(*states[level].T.numpy())
        marks.set_data(*ends[level].T.numpy())
        for k, arrow in enumerate(arrows):
            arrow.set_data(*torch.stack([states[level, k], ends[level, k]]).T.numpy())
        ax.set_title(f"Where {name} sends the points at σ = {grid[level]:.3g}")
        gap = (ends[level] - states[0]).norm(dim=1)
        text = f"σ = {grid[level]:.3g}: {name} lands {gap.mean():.2g} from the path's end on average, {gap.max():.2g} at most."
        return picture(), text

    named = [(f"{level:.3g}", k) for k, level in enumerate(grid.tolist())]
    return Explorer(draw, {"level": choice("noise level σ", named, levels - 1)})


def _paths(mixture: GaussianMixture, x: Tensor, sigma_max: float, levels: int, fine: int = 8) -> tuple[Tensor, Tensor]:
    """Ascending noise levels from 0 [levels], and the ODE's states there [levels,paths,2], by `fine` Heun steps a level."""
    steps = torch.cat([torch.zeros(1), EDM(0.02, sigma_max).grid((levels - 1) * fine)])
    states = [x]
    for t, r in zip(steps.flip(0), steps.flip(0)[1:], strict=False):
        states.append(mixture.ode_step(states[-1], t.expand(len(x)), r.expand(len(x)), "heun"))
    return steps[::fine], torch.stack(states[::-1])[::fine]


def fid_explorer(n: Sequence[int], distances: Mapping[str, np.ndarray], name: str = "Fréchet distance") -> Explorer:
    """Distance against the number of images N: `distances[generator]` is [repeats, len(n)], measured beforehand."""
    figure, canvas = _canvas(6, 3.4)
    ax = figure.subplots()
    for (label, values), colour, style in zip(distances.items(), plots.COLOURS, ["-", "--", "-.", ":"], strict=False):
        ax.fill_between(n, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)
        ax.plot(n, values.mean(0), style, color=colour, label=label)
    marker = ax.axvline(n[-1], ymax=0.6, color="black", lw=1)
    ax.set(xlabel="number of images N", ylabel=name, xscale="log")
    ax.set_title("The same images,\ncounted differently", fontsize=9)  # two lines, as `draw` writes them
    ax.set_xticks(n, [str(v) for v in n])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    picture = _animate(canvas, [marker, ax.title])

    def draw(at: int) -> tuple[bytes, str]:
        marker.set_xdata([n[at], n[at]])
        told = [f"{label} {v[:, at].mean():.3g} ± {np.ptp(v[:, at]) / 2:.2g}" for label, v in distances.items()]
        half = (len(told) + 1) // 2
        ax.set_title(f"N = {n[at]}: {'; '.join(told[:half])};\n{'; '.join(told[half:])}", fontsize=9)
        worse = [f"{label} {v[:, at].mean() - v[:, -1].mean():+.3g}" for label, v in distances.items()]
        return picture(), f"N = {n[at]}: {', '.join(told)}; against N = {n[-1]}: {', '.join(worse)}."

    return Explorer(draw, {"at": choice("images N", [(str(v), k) for k, v in enumerate(n)], len(n) - 1)})
