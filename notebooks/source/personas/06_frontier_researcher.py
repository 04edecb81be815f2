# %% [markdown]
# # Exercise 6 · The frontier researcher: does it stay stable without a teacher?
#
# {badge}
#
# Consistency training learns from its own answers. SCT steadies the targets with a score that is estimated from the batch, and the claim to test is that training then
# stays stable on faces of 64×64, "measured by the drift of the self-consistency gap over 10,000 updates".
#
# **Goal.** The stable step, a gap that needs no teacher, a number for its drift, and an answer over three seeds that a collapse could not fake.
#
# **Time to run** {times}. Without a GPU the runs are far shorter than 10,000 updates, the network is tiny, and the faces are drawn: that shows the method, and no more.
# On a GPU, at profile t4, they have 10,000 (not measured yet). To write: about two hours.
#
# **You need** lesson 5, and the part on collapse in lesson 7.
#
# {rubric}
#
# Faces and noise are drawn from a seed that follows from your name, so your numbers are yours alone. The grader runs your functions again, with a seed that you have
# not seen. Cells that are marked *leave this cell as it is* are put back before grading. You may add cells wherever you like.
# When you are done: restart the kernel, run all cells, save, and hand in this file.

# %% tags=["setup"]

# %% locked="imports"
import tempfile
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from cmlib import data, plots, profiles
from cmlib.course import persona6
from cmlib.exercises import check
from cmlib.handin import HandIn
from cmlib.objectives import ECT, SCT
from cmlib.ops import expand_like, indexed_normal
from cmlib.train import fit

# %%
learner = ""  # your name, or what your instructor knows you by

# %% [markdown]
# Real faces: put a hub id of CelebA-HQ (for example `jxie/celeba-hq`) or a folder into `source`. Empty, the course draws faces and writes them in the hub's layout, one
# parquet file with a column of images. `limit` is how many are used. The graded numbers come from drawn faces in any case.

# %%
source = ""
limit = 48

# %% locked="start"
work = HandIn("06_frontier_researcher", learner)
faces = persona6.drawn(16, work.seed)  # uint8 [16,3,256,256]
folder = source or persona6.draw_into(Path(tempfile.mkdtemp()), limit, 0)
large = data.load(folder, "train", limit)[0]
print(f"{len(large)} {'faces from ' + source if source else 'drawn faces'} of {large.shape[-1]} pixels")

# %% [markdown]
# ## 1. Sixty-four pixels
#
# Make square pictures smaller by a whole factor: each new pixel is the mean of its block, rounded. Taking every fourth pixel instead would turn hair into stripes.


# %% answer="shrink"
def shrink(images, side):
    """uint8 [N,C,H,H] -> uint8 [N,C,side,side], block means; H is a multiple of side."""
    ### BEGIN SOLUTION
    n, c, h, _ = images.shape
    blocks = images.float().reshape(n, c, side, h // side, side, h // side)
    return blocks.mean((3, 5)).round().to(torch.uint8)
    ### END SOLUTION


check("p6.shrink", shrink);
# %% grade="small_faces" points=1 about="sixteen faces of 64×64"
work.hand_in("small_faces", shrink, faces, 64)
### BEGIN HIDDEN TESTS
right = torch.nn.functional.avg_pool2d(persona6.drawn(16, work.seed).float(), 4).round()
assert work["small_faces"].dtype == torch.uint8, "expected uint8"
assert work.close("small_faces", right, 1.0), "these are not the rounded means of blocks of 4×4 pixels"
### END HIDDEN TESTS

# %% locked="look"
if "small_faces" in work:
    train = shrink(large, 64)
    plots.display(plots.sheet({"64 × 64": data.to_float(train[:8])}, [""] * 8), "Eight faces of 64 by 64 pixels.")

# %% [markdown]
# ## 2. A step without a teacher
#
# The ODE's step from $x_t$ to $r<t$ needs the mean of all clean images under $x_t$. SCT estimates it over a reference batch $x_i$ that contains the source:
# $\hat x_0=\sum_i w_i x_i$ with $w_i \propto \exp(-\lVert x_t-x_i\rVert^2/2t^2)$, and then $x_r = x_t + (r-t)\,(x_t-\hat x_0)/t$. All exponentials may round to 0.


# %% answer="stable_step"
def stable_step(x_t, t, r, reference):
    """x_r [B,C,H,W] from x_t at levels t [B] down to r [B]; reference [M,C,H,W] are clean images."""
    ### BEGIN SOLUTION
    away = (x_t.flatten(1)[:, None] - reference.flatten(1)).pow(2).sum(-1)
    weights = (-away / (2 * t[:, None] ** 2)).softmax(1)
    x0_hat = (weights @ reference.flatten(1)).view_as(x_t)
    return x_t + expand_like((r - t) / t, x_t) * (x_t - x0_hat)
    ### END SOLUTION


check("p6.stable_step", stable_step);


# %% grade="steps" points=2 about="the stable step from sixteen noisy faces"
def steps():
    small = shrink(faces, 64)
    if small is None:
        return None
    reference, x_t, t, r = persona6.states(small, work.seed)
    found = stable_step(x_t, t, r, reference)
    return None if found is None else (found / expand_like(t, found))[..., ::2, ::2]


work.hand_in("steps", steps)
### BEGIN HIDDEN TESTS
from cmlib.stable import stable_denoised

little = torch.nn.functional.avg_pool2d(persona6.drawn(16, work.seed).float(), 4).round()
known, x, high, low = persona6.states(little, work.seed)
right = x + expand_like((low - high) / high, x) * (x - stable_denoised(x, high, known))
assert work.close("steps", (right / expand_like(high, x))[..., ::2, ::2], 0.02), "these are not SCT's steps from t to r"
### END HIDDEN TESTS

# %% [markdown]
# ## 3. A gap without a teacher
#
# Without a teacher nobody knows where a path ends. But two points of one path must have one answer: the gap is the root of the mean squared difference of f at
# $(x_t, t)$ and at $(x_r, r)$, over all pixels and pairs.


# %% answer="gap"
def gap(f, x_t, t, x_r, r):
    """RMS of f(x_t, t) − f(x_r, r), a number."""
    ### BEGIN SOLUTION
    return (f(x_t, t) - f(x_r, r)).pow(2).mean().sqrt()
    ### END SOLUTION


check("p6.gap", gap);


# %% grade="first_gap" points=1 about="the gap of an untrained student on your pairs"
def first_gap():
    small = shrink(faces, 64)
    if small is None:
        return None
    reference, x_t, t, r = persona6.states(small, work.seed)
    x_r = stable_step(x_t, t, r, reference)
    with torch.no_grad():
        return None if x_r is None else gap(persona6.student(work.seed).eval(), x_t, t, x_r, r)


work.hand_in("first_gap", first_gap)
### BEGIN HIDDEN TESTS
from cmlib.stable import stable_denoised

little = torch.nn.functional.avg_pool2d(persona6.drawn(16, work.seed).float(), 4).round()
known, x, high, low = persona6.states(little, work.seed)
lower = x + expand_like((low - high) / high, x) * (x - stable_denoised(x, high, known))
f = persona6.student(work.seed).eval()
with torch.no_grad():
    right = (f(x, high) - f(lower, low)).square().mean() ** 0.5
apart = (work["first_gap"].double() - right).abs().max() / right
assert apart < 0.01, "this is not the RMS difference of f's two answers"
### END HIDDEN TESTS

# %% [markdown]
# ## 4. Drift
#
# Training first closes the gap. What happens then? Take the second half of the record (from entry N // 2 on), and fit a straight line to ln gap over the updates by
# least squares: the drift is its slope **per 1,000 updates**. 0.1 means that the gap grows by about a tenth every 1,000 updates; a negative drift still falls.


# %% answer="drift"
def drift(updates, gaps):
    """Least-squares slope of ln gap, per 1,000 updates, over the second half of the record; both [N]."""
    ### BEGIN SOLUTION
    x, y = updates[len(updates) // 2 :] / 1000, gaps[len(gaps) // 2 :].log()
    return ((x - x.mean()) * y).sum() / (x - x.mean()).pow(2).sum()
    ### END SOLUTION


check("p6.drift", drift);
# %% grade="drifts" points=2 about="the drift of a record that is yours"
work.hand_in("drifts", drift, *persona6.curve(work.seed))
### BEGIN HIDDEN TESTS
k, record = (v[len(v) // 2 :].double() for v in persona6.curve(work.seed))
line = torch.stack([k / 1000, torch.ones_like(k)], 1)
right = torch.linalg.lstsq(line, record.log()[:, None]).solution[0, 0]
assert work.close("drifts", right), "this is not the slope of ln gap per 1,000 updates over the second half"
### END HIDDEN TESTS

# %% [markdown]
# ## 5. The experiment
#
# From nothing, without a teacher: ECT, whose pair is one image with one noise, and SCT, with your step over the batch. Nothing else differs: `smooth=False` leaves out SCT's
# curriculum. Three seeds each. A student that answers one grey image whatever it is asked has no gap at all, so the *spread* of its answers over different noise stands
# beside it.

# %% locked="experiment"
profile, on_gpu = profiles.select(), torch.cuda.is_available()
updates = 2 * profile.distill_updates if on_gpu else profile.distill_updates // 3  # 10,000 at t4
widths, size = ((64, 128, 128, 256), 64) if on_gpu else ((8, 8, 16, 16), 4)
records = {}
if "first_gap" in work and "drifts" in work:
    reference, x_t, t, r = persona6.states(train, work.seed)
    x_r, noise = stable_step(x_t, t, r, reference), 160 * indexed_normal(work.seed, range(8), (3, 64, 64))

    def measure(step, f):
        """The gap of f on pairs that never change, and the spread of its answers to pure noise."""
        device = next(f.parameters()).device
        with torch.no_grad():
            found = gap(f, *(v.to(device) for v in (x_t, t, x_r, r)))
            answers = f(noise.to(device), torch.full((8,), 160.0, device=device))
        return {"gap": float(found), "spread": float(answers.std(0).mean())}

    for name, objective in {"ECT": ECT(updates, 4), "SCT": SCT(updates, 4, smooth=False)}.items():
        for seed in range(3):
            f, history = fit(
                persona6.student(seed, widths), objective, partial(data.batches, train, size, seed), updates, lr=1e-3,
                grad_clip=1.0, warmup=updates // 20, ema=0.9, seed=seed, every=max(1, updates // 10), on_every=measure, name=name,
            )  # fmt: skip
            records.setdefault(name, []).append(
                {key: torch.tensor([float(row[key]) for row in history]) for key in ("step", "gap", "spread")}
            )

# %% locked="table"
if records:
    rows = [f"| {updates} updates | drift per 1,000 updates, seed by seed | last gap | last spread |", "|---|---|---|---|"]
    for name, runs in records.items():
        each = ", ".join(f"{float(drift(run['step'], run['gap'])):+.2f}" for run in runs)
        last = (sum(float(run[key][-1]) for run in runs) / 3 for key in ("gap", "spread"))
        rows.append(f"| {name} | {each} | " + " | ".join(f"{v:.3f}" for v in last) + " |")
    plots.tell("\n".join(rows))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for ax, key, title in zip(axes, ("gap", "spread"), ("Self-consistency gap", "Spread of answers"), strict=True):
        for (name, runs), colour, style in zip(records.items(), plots.COLOURS, ("-", "--"), strict=False):
            for k, run in enumerate(runs):
                ax.plot(run["step"], run[key], style, color=colour, label=None if k else name)
        ax.set(xlabel="updates", ylabel=key, title=title)
        ax.legend(frameon=False)
    plots.display(figure, "Gap and spread against updates, solid for ECT and dashed for SCT, three seeds each.")

# %% [markdown]
# ## 6. Conclude
#
# A person reads these. Use your own numbers.

# %% [markdown] manual="stable" points=2 about="is training stable, argued with drift, seeds and spread, and what this budget cannot show"
# **Does it stay stable without a teacher, and does SCT change the drift?** Argue with the drifts of all seeds and with the spread. How many updates did you have, and what
# can they not show?
#
# <!-- BEGIN SOLUTION -->
# Stable means here: no drift that is positive in all seeds, and a spread that does not go to 0. I compare the two rows seed by seed: SCT changes the drift only if its three
# lie apart from ECT's three. The record is as long as the table's head says; below 10,000 updates the gap is mostly still being learned, the curriculum closes its
# pairs as it goes, and so a slope over the second half is a statement about learning rather than about late drift. Drawn faces and a tiny network say nothing about CelebA-HQ.
# <!-- END SOLUTION -->

# %% [markdown] manual="collapse" points=2 about="which failures a falling gap hides, and what replaces the teacher as a source of truth"
# **When is a falling gap bad news, and what keeps f from it?** What plays the teacher's part in SCT, and where does truth come in?
#
# <!-- BEGIN SOLUTION -->
# A constant answer has gap 0, so a gap that falls together with the spread is a collapse. The boundary f(x, 0) = x keeps f from it, with the stop-gradient: where r = 0 the
# target is the clean image, and from there truth travels up to larger t. If the high levels are never reached, f may agree with itself and be wrong. In SCT the weighted mean
# over the references takes the place of the teacher's denoiser: right on average with the source among them, less scattered than one image. It is no other network.
# With a small reference and little noise its weight is on one image, and the step is ECT's.
# <!-- END SOLUTION -->
