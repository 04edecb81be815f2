# %% [markdown]
# # 5 · Training without a teacher: CT, iCT, ECT, SCT
#
# {badge}
#
# In lesson 4 a teacher took a small step along the ODE, and the student learned to give the same answer at both its ends. Here
# the teacher goes. What is left is the data, noise, and the student's own answer at a lower noise level: it learns from itself.
# Why does that not go in circles, what does it cost, and what have the papers done about the cost?
#
# **You will be able to**
# - replace the teacher's step by the data, with the score identity, its sign right;
# - read consistency training as temporal-difference learning, and say where truth enters;
# - say what the bootstrap converges to, and why the two noises of a pair must be one;
# - measure the variance of a target, and lower it with a stable target;
# - write each of CT, iCT, ECT and SCT as five choices.
#
# **Time to run** {times}.
#
# **You need** lessons 1 and 4: the probability-flow ODE, f and its boundary. No GPU, no download.

# %% tags=["setup"]

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import cmlib
from cmlib import compare, curricula, data, plots
from cmlib.consistency import ConsistencyFunction
from cmlib.continuous import jvp
from cmlib.exercises import check
from cmlib.objectives import (
    ECT,
    ICT,
    SCT,
    ConsistencyDistillation,
    ConsistencyTraining,
    ScoreCorrected,
    coupled,
)
from cmlib.ops import mse
from cmlib.oracle import Gaussian, GaussianMixture
from cmlib.process import EDM, ode_step
from cmlib.stable import gamma, stable_denoised, stable_score
from cmlib.train import fit
from cmlib.widgets import consistency_map

torch.manual_seed(0)
means = torch.tensor([[1.0, 0.5], [-1.0, 1.0], [0.0, -1.2]])
weights = torch.tensor([5.0, 3.0, 2.0])
mixture = GaussianMixture(means, 0.5, weights)  # points in the plane, everything known

# %% [markdown]
# ## The step that needed a teacher
#
# Consistency distillation makes its pair with one step of the ODE,
#
# $$\hat x_r = x_t + (r - t)\,\frac{x_t - D(x_t, t)}{t}, \qquad D(x_t, t) = \mathbb E[x_0 \mid x_t] = x_t + t^2\,\nabla\ln p_t(x_t).$$
#
# The teacher is there for D alone, which is an *average* of clean images. But in training we know one of the images it averages
# over: the $x_0$ that we made $x_t$ from. So put $x_0$ in the place of its average. In terms of the score,
#
# $$\nabla\ln p_t(x_t) = \mathbb E\!\left[\frac{x_0 - x_t}{t^2}\;\Big|\;x_t\right].$$
#
# This is the **score identity**, Tweedie's formula read backwards. What stands in the brackets is an unbiased estimate of the
# score: on average right, each time wrong.
#
# ### Your turn: the score from one image
# Return the estimate in the brackets. Mind the sign: which way does the score point?

# %% tags=["your-turn"]
def my_score_estimate(x_t, x0, t):  # [B,2], [B,2], a number -> [B,2]
    ...  # your code

check("05.score_identity", my_score_estimate);

# %% tags=["solution"]
# @title Solution
def solution(x_t, x0, t):
    return (x0 - x_t) / t**2

assert check("05.score_identity", solution)

# %% [markdown]
# Is it right on average? Make a million noisy points, keep those that landed near one place, and average.

# %%
t, place = 1.0, torch.tensor([[0.3, 0.6]])
x0 = mixture.sample(1_000_000, torch.Generator().manual_seed(1))
x_t = x0 + t * torch.randn_like(x0)
near = (x_t - place).norm(dim=1) < 0.06
estimates = (x0[near] - x_t[near]) / t**2
exact = mixture.score(place, torch.tensor([t]))[0]
mean, off = estimates.mean(0), (estimates - exact).norm(dim=1).mean()

plots.tell(
    f"{near.sum()} estimates: mean **({mean[0]:.2f}, {mean[1]:.2f})**, the score is"
    f" **({exact[0]:.2f}, {exact[1]:.2f})**; a single one is off by {off:.2f}, typically."
)
assert (estimates.mean(0) - exact).norm() < 0.15

# %% [markdown]
# ## One noise, two levels
#
# With $x_0$ for D, the step becomes remarkably simple. As $x_t = x_0 + t\,\varepsilon$, the slope $(x_t - x_0)/t$ is ε itself,
# and
#
# $$x_r = x_t + (r-t)\,\varepsilon = x_0 + r\,\varepsilon.$$
#
# That is consistency training (CT): the same image with the *same* noise at two levels, and no network in the pair at all. In
# the library it is `coupled`; here it is beside the ODE step.

# %%
x0 = mixture.sample(5, torch.Generator().manual_seed(2))
t, r = torch.full((5,), 1.5), torch.full((5,), 1.2)
x_t, _, x_r, _ = coupled(x0, t, r, torch.Generator().manual_seed(3), "shared")

torch.testing.assert_close(x_r, ode_step(lambda x, t: x0, x_t, t, r, "ddim"))

# %% [markdown]
# ## A value function
#
# The loss asks f to agree with itself: $d\big(f(x_t, t),\; \mathrm{sg}\,f^-(x_r, r)\big)$, with sg a stop-gradient. Learning
# from one's own later guess is what reinforcement learning calls **temporal-difference (TD) learning**, and the translation is
# exact:
#
# | reinforcement learning | consistency training |
# |---|---|
# | state | $(x_t, t)$ |
# | policy and transition | fixed: the estimated ODE step to $(x_r, r)$ |
# | reward | 0 on the way; at r = 0, where the episode ends, the clean image |
# | discount | 1 |
# | value of a state | $f(x_t, t)$, the image that the path is worth |
# | TD target | $f^-(x_r, r)$; the reward itself where r = 0 |
# | semi-gradient: the target is held fixed | the stop-gradient on $f^-$ |
# | bootstrap divergence | the target moves along with f; hence an EMA, and small steps |
#
# The boundary f(x, 0) = x is the terminal reward, the one place where truth enters. From there it travels up, a level at a
# time. Nothing is *chosen* on the way, so this is the evaluation of a policy; Q-learning, which takes a maximum over actions,
# is something else.
#
# **Question.** A text states the loss as ‖f(x_t, t) − f(x_{t+δ}, t+δ)‖², and says nothing of a stop-gradient or a boundary.
# Which f minimises it?
#
# <details><summary>Answer</summary>
#
# Any constant: f = a grey image has loss zero. Self-consistency alone says nothing about images. The boundary excludes the
# constant, and the stop-gradient gives the arrow: the answer at the noisier point is corrected towards the one at the cleaner
# point, never the other way round, as a constant would be reached half from each side. It also matters *which* of the two is
# the target: the one closer to the reward knows more.
#
# </details>

# %% [markdown]
# ## Where the bootstrap ends
#
# Does this converge to the consistency function, as $x_0$ is not D? Before any network is trained we can answer *exactly*. In
# one dimension a table of values on a grid of x is enough, and Bayes' rule gives all probabilities. With squared error the best
# answer to random targets is their mean, so each level's table is
#
# $$f(x, t) = \mathbb E\big[f(x_r, r) \,\big|\, x_t = x\big].$$
#
# One sweep from r = 0 upwards solves it: no learning rate, no noise. There are two ways to draw the pair:
# - **shared**: $x_r = x_0 + r\,\varepsilon$ with the ε of $x_t$;
# - **chunk**: $x_t = x_r + \sqrt{t^2-r^2}\,\varepsilon'$, "another chunk of noise", as some texts say. Each of the two points
#   has the right distribution here, too.
#
# And we try one other distance, |·|, for which the best answer is not the mean but the **median**.

# %%
centres, shares = torch.tensor([[-1.0], [0.4], [1.2]]).double(), torch.tensor([5.0, 2.0, 3.0]).double()
line = GaussianMixture(centres, 0.3, shares)
x, T = torch.linspace(-10, 10, 401).double(), 3.0
squares = (x[:, None] - x) ** 2

def at(level):  # [401]
    return torch.full((401,), level).double()

def log_p(level):  # ln p_t on the grid, [401]
    return line.log_prob(x[:, None], at(level))

def value(f, points):  # a table of values, read between its entries
    return torch.from_numpy(np.interp(points, x, f))

def backup(f, r, t, pairs):  # the table at r -> the table at t
    if pairs == "chunk":
        return (log_p(r) - squares / (2 * (t**2 - r**2))).softmax(1) @ f  # rows: p(x_r | x_t)
    weights = (log_p(0.0) - squares / (2 * t**2)).softmax(1)  # rows: p(x0 | x_t)
    x_r = x[:, None] + (r - t) / t * (x[:, None] - x)
    if pairs == "shared":
        return (weights * value(f, x_r)).sum(1)
    # f grows with x, so the median of f is f of the median
    middle = (weights.cumsum(1) < 0.5).sum(1, keepdim=True)
    return value(f, x_r.gather(1, middle)[:, 0])

def sweep(n, pairs):  # n levels of noise above the data, up to T
    f, levels = x, EDM(0.0, T, rho=3).grid(n + 1).tolist()
    for r, t in zip(levels, levels[1:], strict=False):
        f = backup(f, r, t, pairs)
    return f

# %%
truth, denoised = (g(x[:, None], at(T))[:, 0] for g in (line.consistency, line.denoise))
p = log_p(T).exp() / log_p(T).exp().sum()
counts = [1, 2, 4, 8, 16, 32, 64]
names = {"shared": "one ε, squared error", "chunk": "fresh chunk, squared error", "median": "one ε, |·|"}
tables = {how: [sweep(n, how) for n in counts] for how in names}
rms = {how: torch.stack([(p * (f - truth) ** 2).sum().sqrt() for f in tables[how]]) for how in names}

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
left.plot(x, truth, color="black", lw=2, label="exact f")
left.plot(x, denoised, color="#999999", lw=4, label="denoiser D")
for how, colour, style in zip(names, plots.COLOURS, ("-", "--", "-."), strict=False):
    left.plot(x, tables[how][-1], style, color=colour, label=f"{names[how]}, {counts[-1]} levels")
    right.plot(counts, rms[how], style, marker="o", ms=4, color=colour, label=names[how])
left.set(xlim=(-8, 8), xlabel=f"x at t = {T:g}", ylabel="f(x, t)", title="What one evaluation answers")
left.legend(frameon=False, fontsize=7)
right.set(xscale="log", yscale="log", xlabel="number of levels N", title="More levels")
right.set_ylabel("RMS distance to the exact f")
right.set_xticks(counts, counts)
right.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
right.minorticks_off()
right.legend(frameon=False, fontsize=8)
right.grid(alpha=0.3)
plots.display(
    figure,
    "Left: with one noise the table lies near the exact step-like f, with fresh chunks on the smooth denoiser."
    " Right: only the error of one noise with squared error keeps falling with the number of levels.",
)
drift = float((tables["chunk"][-1] - denoised).abs().max())
plots.tell(
    f"From 1 level to {counts[-1]}: one ε goes from **{rms['shared'][0]:.2f}** to **{rms['shared'][-1]:.2f}**,"
    f" fresh chunks stay at **{rms['chunk'][-1]:.2f}**, nowhere further than {drift:.3f} from the denoiser;"
    f" |·| ends at **{rms['median'][-1]:.2f}**."
)
assert rms["shared"][-1] < 0.1 * rms["shared"][0] and (rms["shared"].diff() < 0).all()
assert drift < 0.03 and rms["median"][-1] > 2 * rms["shared"][-1]

# %% [markdown]
# Three different ends, each worth a thought.
#
# **One ε.** At a single level this *is* the denoiser. With N levels, the target of a step scatters by an amount of order t − r
# about the ODE's point. That makes an error of order $(t-r)^2$ a step, and the sum over N steps goes to zero. In the limit, f
# is the consistency function.
#
# **Fresh chunks** never leave the denoiser, with any number of levels. Now $x_r$ given $x_t$ is a step of the *reverse
# diffusion*, which scatters by $\sqrt{t^2 - r^2}$. Such errors are of order t − r a step, and they add up (the
# $\mathrm dW^2 = \mathrm dt$ of Itô). Shorter: the mean of a mean is a mean,
# $\mathbb E[\mathbb E[x_0|x_r]\,|\,x_t] = \mathbb E[x_0|x_t]$. So "another chunk of noise" is not just a noisier way to the
# same end. It is an elaborate way to train a denoiser.
#
# **The distance** is part of the fixed point as well. The median of the targets is not their mean, its displacement is of order
# t − r, and that adds up, too: here f follows an ODE of medians. With few levels it even comes closer, as a median is a
# plausible point where a mean is a blur; with more it turns round, and stays away. iCT and ECT use such distances (of whole
# images) because they train more stably, and pay with this bias. It vanishes where the target does not scatter. Keep that in
# mind for SCT.

# %% [markdown]
# ## The variance of the target
#
# Even where the scatter averages out, a network has to average it, from batches. How large is it? Fix many $x_t$, draw what
# else is random, and take the variance of $x_r$. With $V = \mathrm{tr\,Cov}[x_0|x_t]$ in d dimensions, theory says
#
# $$\mathrm{Var}_\text{shared} = \left(1-\tfrac rt\right)^2 V, \qquad
# \mathrm{Var}_\text{chunk} = \left(1-\tfrac{r^2}{t^2}\right)^2 V + d\,r^2\left(1-\tfrac{r^2}{t^2}\right).$$
#
# ### A stable target
# The scatter comes from using one image for D. The batch has more images, and each might have been the source of $x_t$, some
# more likely than others. By Bayes' rule, $x_i$ has the weight $w_i \propto \exp(-\lVert x_t - x_i\rVert^2/2t^2)$, so use
#
# $$\hat x_0 = \sum_i w_i\,x_i, \qquad \sum_i w_i = 1.$$
#
# Xu et al. call it the **stable target**, and it is what turns ECT into stable consistency tuning (SCT). If the true source is
# one of the M references, $\hat x_0$ is exactly the mean of $x_0$ given $x_t$ *and* the references. Hence it is still right on
# average, and varies less than one image does (the theorem of Rao and Blackwell). Without the source among the references it
# would be biased. It needs no network.
#
# ### Your turn: the stable target
# Return $\hat x_0$ for each $x_t$. (At small t all of the exponentials may round to 0. PyTorch has a function for that.)

# %% tags=["your-turn"]
def my_stable_target(x_t, references, t):  # [B,d], [M,d], a number -> [B,d]
    ...  # your code

check("05.stable_target", my_stable_target);

# %% tags=["solution"]
# @title Solution
def solution(x_t, references, t):
    away = (x_t[:, None] - references).pow(2).sum(-1)  # [B,M]
    return (-away / (2 * t**2)).softmax(1) @ references

assert check("05.stable_target", solution)

# %% [markdown]
# The library's is `stable_denoised`. Now measure: 40 points $x_t$, 60 draws each, of the source (from the exact posterior, so
# that $x_t$ stays where it is) and of the other references.

# %%
STATES, DRAWS = 40, 60
everyone = mixture.sample(20_000, torch.Generator().manual_seed(5))

def targets(t, ratio=0.8):  # -> {name: x_r [STATES,DRAWS,2]}, and V
    generator = torch.Generator().manual_seed(6)
    r, clean = ratio * t, mixture.sample(STATES, generator)
    x = clean + t * torch.randn(STATES, 2, generator=generator)
    posterior = (-torch.cdist(x, everyone).pow(2) / (2 * t**2)).softmax(1)
    source = everyone[torch.multinomial(posterior, DRAWS, replacement=True, generator=generator)]
    V = posterior @ everyone.pow(2).sum(1) - (posterior @ everyone).pow(2).sum(1)
    x = x[:, None].expand(-1, DRAWS, -1)
    chunk = r * (1 - ratio**2) ** 0.5 * torch.randn(x.shape, generator=generator)
    away = x - source
    found = {"fresh chunk": source + ratio**2 * away + chunk, "one ε": source + ratio * away}
    for size in (16, 256):
        others = mixture.sample(STATES * DRAWS * (size - 1), generator).view(-1, size - 1, 2)
        references = torch.cat([source.reshape(-1, 1, 2), others], dim=1)
        one = torch.vmap(lambda x, refs, level=t: stable_denoised(x[None], torch.tensor([level]), refs)[0])
        x0_hat = one(x.reshape(-1, 2), references).view_as(x)
        found[f"stable, {size} references"] = x + (ratio - 1) * (x - x0_hat)
    n = torch.ones(STATES * DRAWS)
    found["exact step"] = mixture.ode_step(x.reshape(-1, 2), t * n, r * n).view_as(x)
    return found, V.mean()

def variance(x_r):
    return x_r.var(1).sum(-1).mean()

t, ratio = 1.5, 0.8
found, V = targets(t)
rest = 1 - ratio**2
theory = {"one ε": (1 - ratio) ** 2 * V, "fresh chunk": rest**2 * V + 2 * (ratio * t) ** 2 * rest}
rows = [f"| target at t = {t}, r = {ratio * t:.1f} | variance, measured | theory |", "|---|---|---|"]
for name, x_r in found.items():
    rows.append(f"| {name} | {variance(x_r):.5f} | {f'{theory[name]:.5f}' if name in theory else ''} |")
plots.tell("\n".join(rows))

for name in theory:
    assert abs(variance(found[name]) / theory[name] - 1) < 0.15
stable = [variance(found[name]) for name in ("one ε", "stable, 16 references", "stable, 256 references")]
assert stable[0] > 3 * stable[1] > 12 * stable[2]
off = (found["stable, 16 references"].mean(1) - found["exact step"][:, 0]).norm(dim=1).mean()
assert off < 0.05, "the stable target is right on average"

# %% [markdown]
# This is what it looks like from one $x_t$: the cloud of targets that the network is given, and the one it should find.

# %%
figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), sharex=True, sharey=True, layout="constrained")
for ax, (name, x_r), colour in zip(axes, found.items(), plots.COLOURS, strict=False):
    centre = found["exact step"][1, 0]
    ax.plot(*(x_r[1] - centre).T, ".", color=colour, ms=5, alpha=0.6, label="targets x_r")
    ax.plot(0, 0, "+", color="black", ms=12, label="the ODE's x_r")
    ax.set(xlabel="first coordinate", aspect="equal", xlim=(-2.2, 2.2), ylim=(-2.2, 2.2))
    ax.set_title(name, fontsize=10)
axes[0].set_ylabel("second coordinate")
axes[0].legend(frameon=False, fontsize=7)
figure.suptitle(f"Sixty targets for one x_t, seen from the ODE's (t = {t}, r = {ratio * t:.1f})")
plots.display(
    figure,
    "Clouds of targets around the ODE's point: wide with fresh chunks, smaller with one noise,"
    " tiny with 256 references.",
)

# %% [markdown]
# And over noise levels. On the right, the same question on real images, where nobody knows the posterior: how many of the
# references share the weight, $1/\sum_i w_i^2$? Where it is 1, the stable target is the source image and nothing is gained.

# %%
levels = torch.logspace(-1, 1.3, 7)
over = [{name: variance(x_r) for name, x_r in targets(float(level))[0].items()} for level in levels]
digits = data.to_float(data.load("digits")[0]).flatten(1)  # [N,64]

def sharing(size, level, n=200):
    x = digits[:n] + level * torch.randn(n, 64, generator=torch.Generator().manual_seed(7))
    return 1 / (-torch.cdist(x, digits[:size]).pow(2) / (2 * level**2)).softmax(1).pow(2).sum(1)

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.5), layout="constrained")
for name, colour, style in zip(list(over[0])[:4], plots.COLOURS, ("-", "--", "-.", ":"), strict=False):
    left.plot(levels, [row[name] for row in over], style, color=colour, label=name)
left.set(xscale="log", yscale="log", xlabel="noise level t", title="Points in the plane")
left.set_ylabel("variance of x_r at r = 0.8·t")
for size, colour, style in ((len(digits), plots.COLOURS[0], "-"), (200, plots.COLOURS[1], "--")):
    share = [sharing(size, float(level)).mean() for level in levels]
    right.plot(levels, share, style, color=colour, label=f"{size:,} references")
right.set(xscale="log", yscale="log", xlabel="noise level t, pixels in [−1, 1]", title="Digits")
right.set_ylabel("references that share the weight")
for ax in (left, right):
    ax.legend(frameon=False, fontsize=8)
    ax.grid(alpha=0.3)
plots.display(
    figure,
    "Left: variance of four targets against noise level; references help more the larger it is."
    " Right: on digits the weight is on one reference at small noise and on hundreds at large noise.",
)
gain = {size: over[-1]["one ε"] / over[-1][f"stable, {size} references"] for size in (16, 256)}
plots.tell(
    f"At t = {levels[-1]:.0f} the references are all alike, and the variance falls as one over their number:"
    f" by **{gain[16]:.0f}** with 16, by **{gain[256]:.0f}** with 256."
)
assert 12 < gain[16] < 21 and 180 < gain[256] < 350

# %% [markdown]
# **Question.** On digits, the references don't help at small t. Why is that no loss? And what if the reference is the whole
# training set?
#
# <details><summary>Answer</summary>
#
# At small t there is nothing to reduce: near the data only one image can have been the source, so one image's target hardly
# scatters.
#
# With the whole training set, the target doesn't scatter at all: it is the exact denoiser of the training set, for one pass
# over the set a step. The ODE of *that* score ends in training images, one and all. This is no fault of SCT: the mean that CT
# and ECT learn from single images is the same. What keeps all of them from reciting the training set is that a network can't
# follow a score so sharp.
#
# </details>

# %% [markdown]
# ## The score term, sign and all
#
# A related idea is to tell f directly where the score points:
#
# $$f(x, t) \approx x + \gamma_t\,\nabla\ln p_t(x).$$
#
# You may find it printed as $(f - x)/\gamma_t \approx -\nabla\ln p_t$, which has the wrong sign: f moves *up* the score. And
# which γ? With $\gamma_t = t^2$ the right-hand side is Tweedie's denoiser, the mean, which f is not. For Gaussian data of
# standard deviation $\sigma_d$ the path is known, and f is exactly of this form with $S = \sqrt{t^2+\sigma_d^2}$ and
#
# $$\gamma_t = S\,(S - \sigma_d) \;\longrightarrow\; \tfrac12 t^2 \quad (t \to 0).$$
#
# The limit holds for any data: integrate $\mathrm dx/\mathrm dt = -t\,\nabla\ln p_t$ from t to 0 with the score held fixed.
# Half of Tweedie's step. All candidates against the exact f of our mixture:

# %%
t_test = torch.logspace(-2, np.log10(80), 1_500)
level, generator = t_test[:, None], torch.Generator().manual_seed(10)
x_test = mixture.sample(1_500, generator) + level * torch.randn(1_500, 2, generator=generator)
f_test = mixture.consistency(x_test, t_test)

def error(f):  # noise levels, and the RMS distance to the exact f at each
    with torch.no_grad():
        squared = (f(x_test, t_test).cpu() - f_test).pow(2).sum(1)
    middle, mean = plots.binned(t_test, squared, 12)
    return middle, mean.sqrt()

g = gamma(level, 1.0)
candidates = {
    "x − γ·score: the wrong sign": lambda x, t: x - g * mixture.score(x, t),
    "γ = 0: x itself": lambda x, t: x,
    "γ = t²: Tweedie's denoiser": mixture.denoise,
    "γ = t²/2": lambda x, t: x + level**2 / 2 * mixture.score(x, t),
    "γ = S(S − σ_d)": lambda x, t: x + g * mixture.score(x, t),
}
baseline = {name: error(f) for name, f in candidates.items()}
plots.display(
    plots.curves(baseline, "noise level t", "RMS distance to the exact f", "f from the score alone", log_y=True),
    "Distance to the exact f against noise level: the wrong sign is worse than doing nothing,"
    " gamma S(S − σ_d) is best overall.",
)
small = [float(baseline[name][1][1]) for name in baseline]
plots.tell(
    f"At t = {baseline['γ = t²/2'][0][1]:.3f} the wrong sign is off by **{small[0]:.1e}**,"
    f" x itself by **{small[1]:.1e}**, Tweedie by **{small[2]:.1e}**, γ = t²/2 by **{small[3]:.1e}**."
)
assert small[3] < 0.1 * small[1] and small[0] > 1.5 * small[1] and 0.7 < small[2] / small[1] < 1.4

# %% [markdown]
# So the term is a good anchor at small t and a biased one above, and the library's `ScoreCorrected` weights it accordingly, by
# $\sigma_d^2/(t^2+\sigma_d^2)$, when it adds it to any other objective. It is not what the SCT paper does: there, the score
# identity makes the *target*, as above. Whether the term helps, we measure below.

# %% [markdown]
# ## Five choices
#
# All of the family is one line, and a member of it is five choices:
#
# $$w(t, r)\; d\big(f(x_t, t),\; \mathrm{sg}\,f^-(x_r, r)\big).$$
#
# | | pair $(x_t, x_r)$ | levels (t, r) | target network $f^-$ | distance d | weight w |
# |---|---|---|---|---|---|
# | CD (lesson 4) | teacher's ODE step | neighbours of N fixed levels | EMA, or f itself | any | 1 |
# | CT, 2023 | one ε | neighbours of N(k) levels, uniform | EMA with μ(k) | any; LPIPS for images | 1 |
# | iCT, 2023 | one ε | neighbours of N(k) levels, log-normal | f itself | pseudo-Huber | 1/(t − r) |
# | ECT, 2024 | one ε | t log-normal, r(t, stage) | f itself | norm, or pseudo-Huber | 1/(t − r) |
# | SCT, 2024 | stable target | as ECT, closing smoothly | f itself | norm, or pseudo-Huber | 1/(t − r) |
# | sCM, MeanFlow | r → t | t alone; t and r | f itself | squared | see the end |
#
# Each row repairs something in the row above. CT needs ever closer levels, since its bias falls with N, but close levels carry
# truth slowly; hence **curricula**, coarse first. Its EMA lags behind; iCT found that the target should be f itself. LPIPS (learned
# perceptual image patch similarity) compares features of a network trained on ImageNet, as FID does (lesson 6), and flatters it;
# hence pseudo-Huber. A uniform choice of levels wastes work at high noise; hence the log-normal one. ECT drops the grid: it draws
# t, and at stage a = 0, 1, 2, … puts r below it,
#
# $$r = \max\big(0,\; t\,(1 - q^{-(a+1)}\,n(t))\big), \qquad n(t) = 1 + 8\,\mathrm{sigmoid}(-t).$$
#
# At r = 0 the target is the clean image, as a denoiser's is (with the norm its best answer is a median, with the square the mean), so a pretrained diffusion model stands just before stage 0. With q = 2 that stage still is
# denoising below t ≈ 2, where $n(t) \ge 2$. SCT lowers the variance.
#
# ### Your turn: ECT's gap
# Return ECT's r.

# %% tags=["your-turn"]
def my_r(t, stage, q):  # [B], a whole number, a number -> [B]
    ...  # your code

check("05.ect_r", my_r);

# %% tags=["solution"]
# @title Solution
def solution(t, stage, q):
    gap = q ** -(stage + 1) * (1 + 8 * torch.sigmoid(-t))
    return (t * (1 - gap)).clamp(min=0)

assert check("05.ect_r", solution)

# %% [markdown]
# ### Your turn: the loss of one pair
# Distance and weight of ECT: the norm of the whole image's difference, divided by t − r. One number a sample.

# %% tags=["your-turn"]
def my_loss(x0_hat, goal, t, r):  # [B,C,H,W], [B,C,H,W], [B], [B] -> [B]
    ...  # your code

check("05.loss", my_loss);

# %% tags=["solution"]
# @title Solution
def solution(x0_hat, goal, t, r):
    return (x0_hat - goal).flatten(1).norm(dim=1) / (t - r)

assert check("05.loss", solution)

# %% [markdown]
# All schedules of the table in one picture, from `cmlib.curricula`. Each is a pure function of the step, so a run can be
# stopped and resumed.

# %%
K = 1_000
steps, t = range(K), torch.logspace(-2, np.log10(80), 300)
figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(9.5, 6.2), layout="constrained")
a.plot(steps, [curricula.ct_levels(k, K) for k in steps], color=plots.COLOURS[0], label="CT")
a.plot(steps, [curricula.ict_levels(k, K) for k in steps], "--", color=plots.COLOURS[1], label="iCT")
a.set(yscale="log", xlabel="step k of 1,000", ylabel="N(k)", title="How many levels")
b.plot(steps, [1 / (1 - curricula.ct_mu(k, K)) for k in steps], color=plots.COLOURS[0], label="CT")
b.plot(steps, [1.0 for _ in steps], "--", color=plots.COLOURS[1], label="iCT, ECT, SCT: f itself, μ = 0")
b.set(yscale="log", xlabel="step k of 1,000", ylabel="1/(1 − μ(k)), steps", title="How far the target lags")
grid, fine = EDM().grid(151), EDM().grid(1_281)
c.plot(grid[1:], 1 / 150 / grid.log().diff(), color=plots.COLOURS[0], label="CT, N = 151: uniform")
law = curricula.lognormal_bins(fine) / fine.log().diff()
c.plot(fine[1:], law, "--", color=plots.COLOURS[1], label="iCT, N = 1,281")
normal = torch.distributions.Normal(-1.1, 2.0)
c.plot(t, normal.log_prob(t.log()).exp(), ":", color=plots.COLOURS[2], lw=2, label="ECT, SCT")
c.set(xscale="log", xlim=(0.002, 80), ylim=(0, 0.3), xlabel="noise level t", ylabel="p(ln t)")
c.set_title("Where it trains")
for stage in range(8):
    d.plot(t, curricula.ect_r(t, stage) / t, color=plt.cm.viridis(stage / 8), label=f"stage {stage}")
d.set(xscale="log", xlabel="noise level t", ylabel="r/t", title="How close the pair is: ECT, q = 2")
for ax in (a, b, c, d):
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=7, ncols=2 if ax is d else 1)
plots.display(
    figure,
    "Four schedules: levels grow in both CT and iCT; CT's target lags ever more; iCT and ECT train around t = 0.3"
    " and CT more at high noise; ECT's r over t rises from 0 towards 1, stage by stage.",
)
assert [curricula.ict_levels(k, 8_000) for k in (0, 1_000, 7_999)] == [11, 21, 1_281]

# %% [markdown]
# ## The loop
#
# Here is ECT complete, with a small network for points in the plane. Note the line with `where`: at r = 0 the target is the
# data. It is the only line in which a target is known, not guessed.

# %%
class Net(nn.Module):  # F(x, t): three layers on x and on sinusoids of the time input
    def __init__(self, width=64):
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, 5) * torch.pi / 2000)
        sizes = [11, width, width, width]
        hidden = [m for i, o in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(i, o), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x, t):
        angles = t[:, None] * self.frequencies
        return self.layers(torch.cat([x, t[:, None] / 1000, angles.sin(), angles.cos()], dim=1))

def student(seed):
    torch.manual_seed(seed)
    return ConsistencyFunction(Net(), sigma_min=0.0, sigma_max=80.0, sigma_data=1.0)

def batches(start):  # 256 points a step, the same for every objective
    for k in range(start, 10**9):
        yield {"x0": mixture.sample(256, torch.Generator().manual_seed(k))}

updates = min(4 * profile.distill_updates, 2_000)
f = student(0)
optimizer = torch.optim.Adam(f.parameters(), lr=1e-3)
for k, batch in zip(range(updates), batches(0), strict=False):
    x0, generator = batch["x0"], torch.Generator().manual_seed(k + 10**9)
    eps, t = torch.randn(256, 2, generator=generator), curricula.lognormal(256, generator)
    r = curricula.ect_r(t, stage=8 * k // updates)
    x_t, x_r = x0 + t[:, None] * eps, x0 + r[:, None] * eps
    with torch.no_grad():
        goal = torch.where(r[:, None] > 0, f(x_r, r), x0)  # truth enters where r = 0
    loss = ((f(x_t, t) - goal).norm(dim=1) / (t - r)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

by_hand, denoiser = error(f)[1], baseline["γ = t²: Tweedie's denoiser"][1]
plots.tell(
    f"After {updates} updates, from pure noise: **{by_hand[-1]:.2f}** from the exact f."
    f" The denoiser: {denoiser[-1]:.2f}."
)
assert by_hand[-1] < 0.85 * denoiser[-1]

# %% [markdown]
# Now all of them, by the library's objectives and `train.fit`: same network, data, step size and number of updates, two seeds.
# The SCT here closes its gap in ECT's stages, so that it differs from ECT in the target alone.
# Distillation by the *exact* teacher is there to compare with, and the denoiser is what all would be without the bootstrap.

# %%
references = mixture.sample(500, torch.Generator().manual_seed(77))
EXACT = EDM(0.002, 80.0).grid(24)
runs = {
    "CT, fresh chunks": (ConsistencyTraining(updates, s1=20, coupling="chunk"), 2e-3),
    "CT": (ConsistencyTraining(updates, s1=20), 2e-3),
    "iCT": (ICT(updates), 2e-3),
    "ECT": (ECT(updates), 2e-3),
    "SCT, the batch": (SCT(updates, smooth=False), 2e-3),
    "SCT, 500 references": (SCT(updates, reference=references, smooth=False), 2e-3),
    "ECT, squared error": (ECT(updates, distance=mse), 2e-3),
    "ECT + score term": (ScoreCorrected(ECT(updates), stable_score(references), sigma_data=1.0), 2e-3),
    "CD, exact teacher": (ConsistencyDistillation(mixture, EXACT, mu=0.95), 2e-3),
}
settings = {"weight_decay": 0.0, "ema": 0.99}
trained = {name: [] for name in runs}
for name, (objective, lr) in runs.items():
    for seed in (0, 1):
        settings |= {"lr": lr, "seed": seed, "name": f"{name}, seed {seed}"}
        trained[name].append(fit(student(seed), objective, batches, updates, **settings)[0].cpu())

# %%
errors = {name: torch.stack([error(f)[1] for f in fs]) for name, fs in trained.items()}  # [seeds,levels]
middle = error(mixture.denoise)[0]
low, mid, high = middle < 0.3, (middle > 0.3) & (middle < 5), middle > 20

def over_levels(found, where):  # [seeds]
    return found[:, where].pow(2).mean(1).sqrt()

def cell(found, where):
    of = over_levels(found, where)
    return f"{of.mean():.3f} ± {(of.max() - of.min()) / 2:.3f}"

order = sorted(errors, key=lambda name: float(over_levels(errors[name], mid).mean()))
rows = {"*the denoiser*": denoiser[None], **{name: errors[name] for name in order}}
table = [f"| {updates} updates | t < 0.3 | 0.3 < t < 5 | t > 20 |", "|---|---|---|---|"]
for name, found in rows.items():
    table.append(f"| {name} | {cell(found, low)} | {cell(found, mid)} | {cell(found, high)} |")
plots.tell("\n".join(table))

shown = {name: (middle, errors[name].mean(0)) for name in list(runs)[:6]}
shown["the denoiser"] = middle, denoiser
plots.display(
    plots.curves(shown, "noise level t", "RMS distance to the exact f", f"After {updates} updates", log_y=True),
    "Distance to the exact f against noise level: at high noise fresh chunks coincide with the denoiser,"
    " the others lie below.",
)
chunk = errors["CT, fresh chunks"].mean(0)
assert abs(chunk[high].mean() / denoiser[high].mean() - 1) < 0.1, "fresh chunks train a denoiser"
for name, found in errors.items():
    assert name == "CT, fresh chunks" or found[:, mid].mean() < 0.8 * chunk[mid].mean(), name

# %% [markdown]
# Each number is the RMS distance to the exact f, the mean of the seeds ± half their range. How to read it:
#
# - **Fresh chunks** lie on the denoiser at high noise, as the grid foretold.
# - **CT and CD** learn from an EMA, which lags. In the shortest run (profile `ci`), truth has hardly reached the highest noise
#   with them; in a longer one it has.
# - **SCT against ECT** is the clean comparison, as the target alone differs. In a longer run (profile `cpu`) the lower variance of
#   the target shows in all three ranges of the table; the shortest only begins to show it. At the left end of the figure there is
#   nothing to gain, and ECT even lies lower. The 500 references don't contain the source (the
#   batch does), and they are the same 500 at every step. So that f learns the ODE of these 500 points and not the mixture's, which costs
#   accuracy in every range: more references are better only if they stand for the data.
# - **iCT and ECT with another distance**: another step size would move them. Read nothing into their order.
# - **The denoiser** wins at the smallest t, where it is nearly f: it is exact here, while each network has a small error of its own.
#   In the longer run it beats CT and fresh chunks in the whole first range.
# - **The score term** changes little: where it is exact, at small t, the boundary has already done the work.
# - **An exact teacher** helps less than one may expect: its few levels and its lagging target count, too.
#
# And how not to: one step size for all, two coordinates, a short budget, two seeds. It shows mechanisms; it says nothing about
# images.

# %% [markdown]
# Where does a trained student send the points of a path? If it were consistent, all points of a path would go to the path's
# end. Lower the noise level with the arrow keys, and watch the arrows shrink and the stars come to rest.

# %%
consistency_map(mixture, trained["SCT, the batch"][0], sigma_max=3.0)

# %% [markdown]
# ## The limit r → t
#
# Curricula close the pair. Why not take the limit? A difference of outputs becomes a derivative along the path,
# $\mathrm df/\mathrm dt = \partial_t f + \nabla f\cdot \mathrm dx/\mathrm dt$, and a **Jacobian-vector product** (JVP) gives it
# in one forward pass, with tangent (ε, 1). sCM (continuous-time consistency models, simplified) trains on it. First check that it is the limit, where f is a formula: for
# Gaussian data.

# %%
gaussian = Gaussian(torch.tensor([0.3, -0.7]), 0.5)
exact_f = gaussian.consistency
x0 = gaussian.sample(200, torch.Generator().manual_seed(20)).double()
eps, t = torch.randn(200, 2).double(), torch.full((200,), 1.0).double()
x_t = x0 + t[:, None] * eps
_, along_pair = jvp(exact_f, (x_t, t), (eps, torch.ones_like(t)))
gaps = {}
for gap in (0.1, 0.01, 0.001):
    difference = (exact_f(x_t, t) - exact_f(x0 + (t - gap)[:, None] * eps, t - gap)) / gap
    gaps[gap] = float((difference - along_pair).norm(dim=1).mean())
_, along_ode = jvp(exact_f, (x_t, t), ((x_t - gaussian.denoise(x_t, t)) / t[:, None], torch.ones_like(t)))

told = ", ".join(f"**{v:.2g}** at t − r = {k}" for k, v in gaps.items())
plots.tell(f"Distance of (f(x_t, t) − f(x_r, r))/(t − r) to the JVP: {told}.")
plots.tell(
    f"The JVP's size: **{along_pair.norm(dim=1).mean():.2g}** along the pair (x0, ε),"
    f" **{along_ode.norm(dim=1).mean():.0e}** along the ODE."
)
assert gaps[0.001] < 0.15 * gaps[0.01] < 0.03 * gaps[0.1]
assert along_ode.norm(dim=1).max() < 1e-4 < along_pair.norm(dim=1).mean()

# %% [markdown]
# Along the ODE the derivative of the exact f is zero: the PDE of lesson 4. Along a single pair it isn't. It is the TD error,
# which is zero on average only, since ε is the ODE's slope on average only. That is the score identity for the third time.
#
# **MeanFlow** takes the same limit for another quantity, the mean velocity $u = (z_\tau - z_\rho)/(\tau - \rho)$ between two points of one
# *ODE path*, in the coordinates $z = (1-\tau)\,x_0 + \tau\,\varepsilon$, where τ, from 0 to 1, is no σ but the noise's share. Differentiate
# $(\tau-\rho)\,u$ by τ, and you have its identity, $u = v - (\tau-\rho)\,\mathrm du/\mathrm d\tau$ with v the velocity at τ. At ρ = 0,
# $u = (z - f)/\tau$, so the exact f must obey it:

# %%
def u(z, tau):  # z = x/(1 + σ) at τ = σ/(1 + σ)
    sigma = tau / (1 - tau)
    return (z - exact_f(z * (1 + sigma)[:, None], sigma)) / tau[:, None]

tau = t / (1 + t)
z = x_t / (1 + t)[:, None]
v = (z - gaussian.denoise(x_t, t)) / tau[:, None]
mean_velocity, du = jvp(u, (z, tau), (v, torch.ones_like(tau)))
h = 1e-4
finite = (u(z + h * v, tau + h) - u(z - h * v, tau - h)) / (2 * h)

worst = float((mean_velocity - (v - tau[:, None] * du)).abs().max())
plots.tell(
    f"du/dτ by JVP and by a finite difference differ by at most {float((du - finite).abs().max()):.0e};"
    f" the identity holds to **{worst:.0e}**."
)
torch.testing.assert_close(du, finite, rtol=1e-4, atol=1e-4)
assert worst < 1e-4

# %% [markdown]
# `cmlib.continuous.SCM` and `MeanFlow` train on these. The limit has no discretisation error, hence no curriculum of levels;
# the price is a derivative through the network, which sCM tames by normalising it and by warming it up.

# %% [markdown]
# ## On images
#
# The same comparison on digits, from the teacher's weights, under one budget, is a command:
# `cmlib compare --seeds 3 --budget-images 32000`. It takes hours on a laptop. This cell shows its result, where it
# was run.

# %%
places = ("benchmarks/results/compare_digits.json", "runs/compare/compare.json")
results = [Path(cmlib.__file__).resolve().parents[1] / place for place in places]
found = next((json.loads(path.read_text()) for path in results if path.exists()), None)
if found:
    plots.tell(compare.markdown(found))
    alt = "Fréchet distance at one evaluation against images seen, a panel for each objective."
    plots.display(compare.figure(found), alt)
    plots.tell(
        "Three things to look at before the ranking. The **start**: from the teacher's weights, ECT's first stage is close"
        " to what the student already is. The **spread**: with one seed there is none, and then there is no ranking. The"
        " **forward passes**: a teacher costs some for every pair, a stable target none. Lesson 6 says what such a distance"
        " can and can't tell."
    )
else:
    plots.tell("There is no result here yet. Run the command, then this cell again.")

# %% [markdown]
# ## What you learned
#
# - One image's $(x_0 - x_t)/t^2$ is an unbiased score. With it in the ODE step, a pair is one image and *one* noise at two
#   levels.
# - This is TD learning: f is a value, the boundary its terminal reward.
# - With one noise the bootstrap ends at the consistency function as levels close; with fresh chunks, at the denoiser, always.
#   The distance is part of the answer, too.
# - Averaging over references lowers the target's variance, as one over their number at high noise, and leaves its mean.
# - CT, iCT, ECT and SCT differ in five choices; sCM and MeanFlow are the limit.
#
# | what | where | in `cmlib` |
# |---|---|---|
# | score identity; CT and its loss | Song et al. 2023 (arXiv 2303.01469), lemma 1; alg. 3, eq. 10 | `objectives.coupled`, `ConsistencyTraining` |
# | one noise: when CT's loss is CD's | Song et al. 2023, theorem 2 | `objectives.coupled` |
# | N(k), p(t), pseudo-Huber, no EMA | Song & Dhariwal 2023 (2310.14189), sec. 3 | `ICT`, `curricula.ict_levels`, `lognormal_bins` |
# | r(t, stage), tuning a diffusion model | Geng et al. 2024 (2406.14548) | `ECT`, `curricula.ect_r` |
# | stable target | Xu et al. 2023 (2302.00670) | `stable.stable_denoised` |
# | MDP and TD; SCT | Wang, Geng & Li 2024 (2410.18958) | `SCT` |
# | the limit | Lu & Song 2024 (2410.11081), alg. 1; Geng et al. 2025 (2505.13447), eq. 6 | `continuous.SCM`, `MeanFlow` |
# | the score term | no paper: the course's correction of it | `stable.gamma`, `ScoreCorrected` |
#
# **Next**: which student is better, and how sure can one be? Lesson 6, `06_fid_evaluation.ipynb`.
