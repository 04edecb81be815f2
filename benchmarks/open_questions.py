"""Five open questions of consistency training, each a small study: what changes, against the same run without it.

    python -m benchmarks.open_questions            # about 40 minutes on one core; goes on with the studies already kept
    python -m benchmarks.open_questions spacing    # one of them

Writes benchmarks/results/open_questions.json and a figure a study beside it; studies kept from other versions or sizes are made
anew. What a study can say is bound by its size: points in a few dimensions, or 8×8 digits from random weights, two seeds,
minutes of training. Runs of one seed share their start, batches and noise, so each is read against its own twin.
"""

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from cmlib import __version__, data, evaluate, pipeline, plots
from cmlib.compare import spread
from cmlib.consistency import ConsistencyFunction, c_out, c_skip
from cmlib.files import write_json
from cmlib.objectives import ECT, SCT, both_branches
from cmlib.ops import expand_like, indexed_normal
from cmlib.oracle import GaussianMixture
from cmlib.pipeline import SAMPLING_SEED
from cmlib.profiles import CPU
from cmlib.recipes import first_student, largest_sigma
from cmlib.train import fit
from cmlib.unet import UNet
from tests.small import seeded

RESULTS = Path(__file__).parent / "results"
SEEDS = 2

# ---- spacing: does the best gap between the two points of a pair depend on the data's dimension?
# The same triangle of means in every dimension and the same variance in all, 4 between the components and 0.5 within.

DIMENSIONS, GAPS = (2, 8, 32), (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)
POINT_UPDATES, POINT_BATCH = 1500, 128


class Perceptron(nn.Module):
    """F(x, t) for points [B,d]."""

    def __init__(self, d: int, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d + 9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, d))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        u = t[:, None] / 1000
        angles = u * torch.arange(1, 5) * torch.pi / 2
        return self.layers(torch.cat([x, u, angles.sin(), angles.cos()], dim=1))


class Spaced(ECT):
    """ECT with one gap throughout: r = (1 − gap)·t."""

    def times(self, n: int, step: int, generator: Any) -> tuple[Tensor, Tensor]:
        t = super().times(n, step, generator)[0]
        return t, (1 - self.q) * t


def spacing(seed: int) -> dict[str, list[float]]:
    """‖f(z, 80) − truth‖/‖truth‖ of one jump, for each dimension and gap."""
    found: dict[str, list[float]] = {}
    for d in DIMENSIONS:
        angles = torch.tensor([0.0, 2.0, 4.0]) * math.pi / 3
        means = F.pad(2 * torch.stack([angles.cos(), angles.sin()], dim=1), (0, d - 2))
        mixture = GaussianMixture(means, (0.5 / d) ** 0.5)
        z = 80.0 * torch.randn(2_000, d, generator=seeded(3))
        top = torch.full((2_000,), 80.0)
        truth = mixture.consistency(z, top)
        for gap in GAPS:
            torch.manual_seed(seed)
            f: Any = ConsistencyFunction(Perceptron(d), 0.0, 80.0, sigma_data=(4.5 / d) ** 0.5)
            stream = partial(_points, mixture, seed)
            objective = Spaced(POINT_UPDATES, stages=1, q=gap)
            f, _ = fit(f, objective, stream, POINT_UPDATES, lr=1e-3, weight_decay=0.0, ema=0.99, seed=seed, name=f"{d}, {gap}")
            with torch.no_grad():
                found.setdefault(str(d), []).append(float((f(z, top) - truth).norm() / truth.norm()))
    return found


def _points(mixture: GaussianMixture, seed: int, start: int) -> Iterator[dict[str, Tensor]]:
    for k in range(start, POINT_UPDATES):
        yield {"x0": mixture.sample(POINT_BATCH, seeded(10**6 * seed + k))}


def spacing_figure(runs: list[dict[str, list[float]]]) -> Figure:
    figure, ax = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for d, colour in zip(DIMENSIONS, plots.COLOURS, strict=False):
        errors = torch.tensor([run[str(d)] for run in runs])
        ax.plot(GAPS, errors.mean(0), "o-", color=colour, label=f"{d} dimensions")
        ax.fill_between(GAPS, errors.amin(0), errors.amax(0), color=colour, alpha=0.2)
    ax.set(xscale="log", ylim=(0, None), xlabel="gap (t − r)/t, the same all through training")
    ax.set_ylabel("relative error of one jump")
    ax.set_xticks(GAPS, [f"1/{1 / gap:.0f}" if gap < 1 else "1" for gap in GAPS], minor=False)
    ax.minorticks_off()
    ax.set_title("Noise spacing on mixtures of three components", fontsize=11)
    ax.legend()
    ax.grid(alpha=0.3)
    return figure


# ---- four additions to SCT on digits from random weights: do they help it on its way? Drift takes longer: `audit drift`

UPDATES, BATCH, POINTS = 600, 64, 4


class Extra(SCT):
    """SCT plus a term of its own."""

    def extra(self, f: Any, x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor, x0_hat: Tensor, x0: Tensor) -> Tensor:
        """The term [B], right after f's passes at (x_r, r) and (x_t, t)."""
        raise NotImplementedError

    def __call__(self, f: Any, target: Any, batch: dict, step: int, generator: Any) -> tuple[Tensor, dict]:
        x_t, t, x_r, r = self.pairs(batch, step, generator)
        x0_hat, goal = both_branches(f, target, x_t, t, x_r, r)
        loss = self.compare(x_t, t, x0_hat, x_r, r, goal)
        return loss + self.extra(f, x_t, t, x_r, r, x0_hat, batch["x0"]), {"t": t}


class AuxiliaryHead(Extra):
    """A consistency function h of 4×4 images on the middle block, with f's boundary: 0.1·‖h(x_t, t) − sg h(x_r, r)‖/(t − r)."""

    def extra(self, f: Any, x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor, x0_hat: Tensor, x0: Tensor) -> Tensor:
        def h(x: Tensor, s: Tensor, state: Tensor) -> Tensor:
            skip, out = c_skip(s, 0.0, f.sigma_data), c_out(s, 0.0, f.sigma_data)
            return expand_like(skip, x) * F.avg_pool2d(x, 2) + expand_like(out, x) * f.net.auxiliary(state)

        at_r, at_t = f.net.mid_block.resnets[1].states
        return 0.1 * self.weight(t, r) * self.distance(h(x_t, t, at_t), h(x_r, r, at_r).detach())


class Critic(Extra):
    """A discriminator of f's images beside it, hinge loss and R1 penalty; f's term is −0.1·D(f(x_t, t))."""

    def __post_init__(self) -> None:
        super().__post_init__()
        convolutions = [nn.Conv2d(1, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU()]
        self.critic = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 1))
        self.optimizer = torch.optim.Adam(self.critic.parameters(), lr=2e-4, betas=(0.0, 0.99))

    def extra(self, f: Any, x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor, x0_hat: Tensor, x0: Tensor) -> Tensor:
        self.critic.requires_grad_(True)
        real = x0.detach().requires_grad_(True)
        scores = self.critic(real)
        slope = torch.autograd.grad(scores.sum(), real, create_graph=True)[0]
        hinge = F.relu(1 - scores).mean() + F.relu(1 + self.critic(x0_hat.detach())).mean()
        self.optimizer.zero_grad()
        (hinge + slope.pow(2).sum((1, 2, 3)).mean()).backward()
        self.optimizer.step()
        self.critic.requires_grad_(False)
        return -0.1 * self.critic(x0_hat).flatten()


class Remembers(nn.Module):
    """A residual block that keeps its last two states."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.states = block, []

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        out = self.block(x, temb)
        self.states = [*self.states[-1:], out]
        return out


class Clock(nn.Module):
    """The time embedding, which keeps what it said."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding

    def forward(self, emb: Tensor) -> Tensor:
        self.now = self.embedding(emb)
        return self.now


class TimeAware(nn.Module):
    """Attention with a learned map of the time embedding added to its input, 0 at the start."""

    def __init__(self, attention: nn.Module, channels: int, clock: Clock, width: int):
        super().__init__()
        self.attention, self.map = attention, nn.Linear(width, channels)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)
        self.clock = [clock]  # in a list: not a part of this module

    def forward(self, x: Tensor) -> Tensor:
        told = self.map(F.silu(self.clock[0].now))[:, :, None, None]
        return self.attention(x + told) - told  # its residual without what the attention was told


def auxiliary_head(net: Any) -> None:
    net.mid_block.resnets[1] = Remembers(net.mid_block.resnets[1])
    net.auxiliary = nn.Conv2d(net.config["block_out_channels"][-1], 1, 1)


def spectral(net: Any) -> None:
    for layer in (net.time_embedding.linear_1, net.time_embedding.linear_2):
        spectral_norm(layer)


def time_aware(net: Any) -> None:
    width, channels = 4 * net.config["block_out_channels"][0], net.config["block_out_channels"][-1]
    net.time_embedding = Clock(net.time_embedding)
    for block in (net.down_blocks[-1], net.mid_block, net.up_blocks[0]):
        block.attentions = nn.ModuleList(TimeAware(a, channels, net.time_embedding, width) for a in block.attentions)


Study = tuple[type[SCT], Callable[[Any], None], str]
ADDITIONS: dict[str, Study] = {
    "plain": (SCT, lambda net: None, "SCT"),
    "spectral": (SCT, spectral, "spectral norm on the time embedding"),
    "auxiliary": (AuxiliaryHead, auxiliary_head, "an auxiliary consistency head"),
    "attention": (SCT, time_aware, "time-aware attention"),
    "critic": (Critic, lambda net: None, "a discriminator"),
}


def addition(name: str, seed: int) -> dict[str, list[float]]:
    """fd_digits at one and two evaluations, recall at one, and the gap of f along the teacher's paths up to its σ_max, at
    POINTS points of training."""
    images, labels = data.load("digits")
    with tempfile.TemporaryDirectory() as folder:
        features = pipeline.Features.of("digits", Path(folder), images, labels, data.load("digits", "test"))
    teacher = pipeline.load_teacher(CPU.teacher, tuple(images.shape[1:]))
    kind, change, label = ADDITIONS[name]
    torch.manual_seed(seed)
    net = UNet.from_config(cast(UNet, teacher.unet).config)
    change(net)
    like = first_student("sct", teacher, largest_sigma(teacher))
    f = ConsistencyFunction(net, 0.0, like.sigma_max, like.sigma_data, like.rho)
    found: dict[str, list[float]] = {"fd_1": [], "fd_2": [], "recall": [], "gap": []}

    def measure(step: int, average: Any) -> None:
        with torch.no_grad():
            drawn = [pipeline.draw(average, CPU.samples, k, teacher.image_shape, seed) for k in (1, 2)]
            for k in (1, 2):
                found[f"fd_{k}"].append(features.distance(drawn[k - 1]))
            seen = evaluate.features(features.classifier, drawn[0])
            found["recall"].append(evaluate.precision_recall(features.reference, seen)[1])
            noise = indexed_normal(SAMPLING_SEED + seed, range(64), teacher.image_shape, 7)
            gap = evaluate.self_consistency_gap(average, teacher, noise, 30, f.sigma_max)[1]
            found["gap"].append(float(gap.mean()))

    stream = partial(data.batches, images, BATCH, seed)
    settings: dict[str, Any] = {"lr": 1e-3, "optimizer": "radam", "warmup": UPDATES // 20, "seed": seed, "name": label}
    objective = kind(UPDATES, stages=4, reference=data.to_float(images))
    fit(f, objective, stream, UPDATES, every=UPDATES // POINTS, on_every=measure, **settings)
    return found


def addition_figure(name: str, plain: list[dict], runs: list[dict]) -> Figure:
    updates = [UPDATES * (k + 1) // POINTS for k in range(POINTS)]
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), layout="constrained", sharex=True)
    titles = {"fd_1": "fd_digits, 1 evaluation", "fd_2": "fd_digits, 2 evaluations", "gap": "self-consistency gap"}
    for ax, (measure, title) in zip(axes, titles.items(), strict=True):
        for label, group, colour, style in (("SCT", plain, plots.COLOURS[0], "-"), ("with it", runs, plots.COLOURS[1], "--")):
            for k, run in enumerate(group):
                ax.plot(updates, run[measure], style, marker="o", markersize=3, color=colour, label=None if k else label)
        ax.set(yscale="linear" if measure == "gap" else "log", xlabel="updates")
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.suptitle(f"SCT on digits from random weights, and with {ADDITIONS[name][2]}; a line a seed", fontsize=11)
    return figure


def markdown(kept: dict[str, Any]) -> str:
    """Both tables: the error of one jump by gap and dimension, and each addition to SCT after the last update."""
    lines = ["| dimensions | " + " | ".join(f"gap {gap:g}" for gap in GAPS) + " |", "|---" * (1 + len(GAPS)) + "|"]
    for d in map(str, DIMENSIONS):
        lines.append(
            f"| {d} | " + " | ".join(spread([run[d][k] for run in kept["spacing"]], 2) for k in range(len(GAPS))) + " |"
        )
    lines += [
        "",
        "| SCT on digits, from random weights | `fd_digits`, 1 evaluation | ÷ alone, seed by seed | 2 evaluations | recall"
        " | self-consistency gap |",
        "|---|---|---|---|---|---|",
    ]
    for name, (_, _, label) in ADDITIONS.items():
        ratios = [run["fd_1"][-1] / twin["fd_1"][-1] for run, twin in zip(kept[name], kept["plain"], strict=True)]
        measures = (("fd_1", 0), ("fd_2", 0), ("recall", 2), ("gap", 3))
        values = [spread([run[key][-1] for run in kept[name]], digits) for key, digits in measures]
        values.insert(1, "" if name == "plain" else f"{statistics.mean(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        lines.append(f"| {'alone' if name == 'plain' else 'with ' + label} | {' | '.join(values)} |")
    seeds, updates = len(kept["plain"]), f"{POINT_UPDATES:,} updates of {POINT_BATCH} points, {UPDATES} of {BATCH} digits"
    return "\n".join([*lines, "", f"{updates}; {seeds} seed(s), mean ± half the range."])


def main(names: list[str]) -> None:
    path = RESULTS / "open_questions.json"
    made_with = {"cmlib": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    made_with["sizes"] = f"{POINT_UPDATES} updates of {POINT_BATCH} points, {UPDATES} of {BATCH} digits"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("made_with") != made_with:
        if kept and set(names) != {"spacing", *ADDITIONS}:
            raise SystemExit(f"{path} was made with {kept['made_with']}; run all studies, or none, with {made_with}")
        kept = {"made_with": made_with}
    for seed in range(SEEDS):
        for name in names:
            if len(kept.setdefault(name, [])) == seed:
                kept[name].append(spacing(seed) if name == "spacing" else addition(name, seed))
                write_json(path, kept)
    for name in names:
        if name == "spacing":
            plots.save(spacing_figure(kept[name]), RESULTS / "open_spacing.png")
        elif name != "plain":
            plots.save(addition_figure(name, kept["plain"], kept[name]), RESULTS / f"open_{name}.png")
    if set(kept) == {"made_with", "spacing", *ADDITIONS}:
        print(markdown(kept))


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["spacing", *ADDITIONS]
    main(chosen if "plain" in chosen or chosen == ["spacing"] else ["plain", *chosen])
