# %% [markdown]
# # 3 · Rollout caching
#
# {badge}
#
# A student learns from what its teacher does: here is a noisy image, there is what the teacher makes of it, δ steps lower. Each such pair costs
# evaluations of the teacher. So one lets the teacher walk once, keeps the pairs on disk, and trains from there.
#
# **You will be able to**
# - derive the reverse step of a DDPM, and tell it from the other three steps in use;
# - count what a cache saves, and say when it saves little;
# - say what δ trades, and why a small error may mean nothing;
# - build a cache that survives an interruption and a damaged file, and say what it costs in bytes and in hours.
#
# **Time to run** {times}.
#
# **You need** lessons 1 and 2.

# %% tags=["setup"]

# %%
import copy
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp

import torch

from cmlib import data, pipeline, plots
from cmlib.cache import PairCache
from cmlib.exercises import check
from cmlib.objectives import Denoising
from cmlib.ops import indexed_normal, mse
from cmlib.profiles import PROFILES
from cmlib.teacher import Teacher
from cmlib.train import fit
from cmlib.unet import UNet
from cmlib.widgets import delta_explorer

torch.manual_seed(0)
images, _ = data.load(profile.dataset)
shape = tuple(images.shape[1:])
teacher = pipeline.load_teacher(profile.teacher, shape)
chain, device = teacher.process, teacher.device
folder = Path(mkdtemp())

def at(n, count):  # one index for a whole batch
    return torch.full((count,), n, device=device)

# %% [markdown]
# ## The reverse step
#
# Suppose that we know $x_n$ and the clean $x_0$. Where was $x_r$, for an $r < n$? Two things speak about it, each a Gaussian:
#
# - coming from the image, $x_r$ lies around $\sqrt{\bar\alpha_r}\,x_0$ with variance $1-\bar\alpha_r$;
# - going on to $x_n = \sqrt{\alpha}\,x_r + \sqrt{1-\alpha}\,\varepsilon$, with $\alpha = \bar\alpha_n/\bar\alpha_r$, it lies around $x_n/\sqrt\alpha$ with
#   variance $(1-\alpha)/\alpha$.
#
# A product of Gaussians is one again. Its mean is the average of the two means, each weighted by the *inverse* of its variance:
#
# $$\frac{\sqrt{\bar\alpha_r}\,x_0\cdot\frac{1}{1-\bar\alpha_r} + \frac{x_n}{\sqrt\alpha}\cdot\frac{\alpha}{1-\alpha}}
#   {\frac{1}{1-\bar\alpha_r} + \frac{\alpha}{1-\alpha}},
# \qquad\text{and } (1-\alpha) + \alpha(1-\bar\alpha_r) = 1-\bar\alpha_n \text{ makes it simple.}$$
#
# ### Your turn: the posterior mean
# Multiply out, and return the mean of $q(x_r\mid x_n, x_0)$.

# %% tags=["your-turn"]
def my_posterior_mean(x_n, x0, ab_n, ab_r):  # [B,C,H,W], [B,C,H,W], ᾱ_n and ᾱ_r -> [B,C,H,W]
    ...  # your code

check("03.posterior_mean", my_posterior_mean);

# %% tags=["solution"]
# @title Solution
def solution(x_n, x0, ab_n, ab_r):
    alpha = ab_n / ab_r
    return (ab_r.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - ab_r) * x_n) / (1 - ab_n)

assert check("03.posterior_mean", solution)

# %% [markdown]
# Is it true? Walk one pixel forward many times, keep the walks that come to nearly the same $x_n$, and average where they were at r. And is the
# library's step, which takes a whole vector of indices at once, the one that everybody uses? Compare it with diffusers' `DDPMScheduler`, bit by bit.

# %%
n, r, pixel = 300, 200, 0.8
ab_n, ab_r = chain.alpha_bar[n], chain.alpha_bar[r]
x_r = ab_r.sqrt() * pixel + (1 - ab_r).sqrt() * torch.randn(1_000_000)
x_n = (ab_n / ab_r).sqrt() * x_r + (1 - ab_n / ab_r).sqrt() * torch.randn(1_000_000)
near = (x_n - 1.0).abs() < 0.02
formula = solution(torch.tensor(1.0), pixel, ab_n, ab_r)
plots.tell(
    f"{near.sum():,} walks came to 1.0; at r they averaged **{x_r[near].mean():.3f}**."
    f" The formula says **{formula:.3f}**."
)
assert abs(x_r[near].mean() - formula) < 0.03

# %%
scheduler = teacher.scheduler()
indices = torch.tensor([chain.T - 1, 500, 20, 1, 0])
x, eps = torch.randn(2, 5, *shape)
mean, std = teacher.posterior(x, eps, indices, indices - 1)
for k, index in enumerate(indices.tolist()):
    one = slice(k, k + 1)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(k))
    theirs = scheduler.step(eps[one], index, x[one], generator=torch.Generator().manual_seed(k))
    assert torch.equal(mean[one] + std[one] * noise, theirs.prev_sample)
plots.tell(f"Bit for bit the same at n = {', '.join(map(str, indices.tolist()))}.")

# %% [markdown]
# ## Four steps
#
# Of course we don't know $x_0$. The teacher guesses it, and there are four ways on. Where one ends is called $\hat x_r$:
#
# | step | how | evaluations |
# |---|---|---|
# | **posterior mean** | the formula above, with the guess in place of $x_0$ | 1 |
# | **ancestral** | the same, plus fresh noise of the posterior's variance: DDPM's own sampler | 1 |
# | **DDIM** | no chance: move along the probability-flow ODE, with the slope at n | 1 |
# | **Heun** | the ODE, with the average of the slopes at both ends | 2 |
#
# DDIM is easily said: split $x_n$ into a guess of the image and a guess of the noise, and put the *same two* together again at level r.
#
# ### Your turn: the DDIM step
# Return $x_r$ from $x_n$ and the teacher's ε.

# %% tags=["your-turn"]
def my_ddim(x_n, eps, ab_n, ab_r):  # [B,C,H,W], [B,C,H,W], ᾱ_n and ᾱ_r -> [B,C,H,W]
    ...  # your code

check("03.ddim", my_ddim);

# %% tags=["solution"]
# @title Solution
def solution(x_n, eps, ab_n, ab_r):
    x0 = (x_n - (1 - ab_n).sqrt() * eps) / ab_n.sqrt()
    return ab_r.sqrt() * x0 + (1 - ab_r).sqrt() * eps

assert check("03.ddim", solution)

# %% [markdown]
# In lesson 1's coordinates, this is Euler's step of the ODE: there $x = D + \sigma\varepsilon$, so $\varepsilon = (x-D)/\sigma$, and the same two at a level
# σ' are $D + \sigma'\varepsilon = x + (\sigma'-\sigma)\,\frac{x - D}{\sigma}$.
#
# The four differ in what becomes of the noise. Take a large step, so that one sees it. The variance that $x_r$ *should* have follows from
# lesson 1: $\bar\alpha_r\operatorname{Var}(x_0) + 1 - \bar\alpha_r$.

# %%
n, r, count = 500, 400, 100
names = ("posterior mean", "ancestral", "DDIM", "Heun")
x0 = data.to_float(images[:count]).to(device)
noise, fresh = (indexed_normal(0, range(count), shape, k).to(device) for k in range(2))
x_n = chain.perturb(x0, noise, at(n, count))
after = {
    name: teacher.step(x_n, at(n, count), at(r, count), solver, fresh)
    for name, solver in zip(names, ("posterior_mean", "ancestral", "ddim", "heun"), strict=True)
}

columns = torch.stack([x0, x_n, *after.values()], dim=1)  # [count,6,C,H,W]
plots.display(
    plots.sheet({f"image {k}": columns[k] for k in range(3)}, ["clean", f"n = {n}", *names]),
    f"Three noisy images, and each after four kinds of step to r = {r}: only the posterior mean is calm.",
)
should = chain.alpha_bar[r] * x0.var() + 1 - chain.alpha_bar[r]
variances = {name: float(y.var()) for name, y in after.items()}
found = ", ".join(f"{name} **{v:.2f}**" for name, v in variances.items())
plots.tell(f"At r = {r} the variance should be **{should:.2f}**. It is: {found}.")
assert variances["posterior mean"] < 0.6 * should and abs(variances["DDIM"] / should - 1) < 0.15

# %% [markdown]
# The posterior mean is an average over all ways back, and averaging removes noise. So after a large step it is not where the chain is at r: the next step
# would find less noise than its index says. For δ = 1 the difference is small. The brief's cache takes this step; consistency
# distillation needs one of the two that follow the ODE.

# %% [markdown]
# ## Why cache at all
#
# Count the teacher's evaluations in the brief's recipe, once with a fresh pair for every example that the student sees, and once with a cache.
# Then the same with another target: the *end* of the teacher's walk, as some methods want it. A walk gives all its states at once, and each of them
# makes a pair with the end.

# %%
brief = PROFILES["t4"]
seen = brief.regression_updates * brief.batch_size
walk = brief.rollout_steps
rows = {
    "x̂_r, one step lower": (seen, brief.pairs),
    f"the end of {walk} steps, one state a walk": (seen * walk, brief.pairs * walk),
    f"the end of {walk} steps, every state": (seen, brief.pairs),
}
plots.tell(
    f"The student sees {brief.regression_updates:,} × {brief.batch_size} = **{seen:,}** examples;"
    f" the cache has {brief.pairs:,} pairs.\n\n"
    "| target | evaluations, fresh pairs | evaluations, cached | saved |\n|---|---|---|---|\n"
    + "\n".join(f"| {name} | {a:,} | {b:,} | **{a / b:.1f}×** |" for name, (a, b) in rows.items())
)
assert len({a / b for a, b in rows.values()}) == 1

# %% [markdown]
# What a cache saves is how often the student sees a pair again, whatever the target: here little, unless several students learn from it. With ends of
# walks, what saves most is in the first column of numbers: use *every* state of a walk, and its steps are shared. But the states of one walk make a poor batch: one
# has to keep and shuffle them, and for that one needs the cache. There is a price: a student that sees a pair twice may learn it by heart, and the walks in a cache are few.
# Consistency distillation, as its paper does it, makes its pairs afresh at every update, and keeps nothing.

# %% [markdown]
# ## What δ trades
#
# How far down should the target be? We compare one step of δ with a walk of small Heun steps over the same distance, which is nearly exact, and with the
# answer that costs nothing: $x_n$ itself, unchanged. That answer is the **identity map**, the baseline of this whole course.

# %%
n, some, fine = 500, 25, 5
x_n = chain.perturb(x0[:some], noise[:some], at(n, some))
deltas, exact, x = [10, 20, 40, 80, 160, 320], {}, x_n
for m in range(n, n - deltas[-1], -fine):
    x = teacher.step(x, at(m, some), at(m - fine, some), "heun")
    exact[n - m + fine] = x

errors = {"identity": [], "ddim": [], "heun": []}
for delta in deltas:
    for name, row in errors.items():
        y = x_n if name == "identity" else teacher.step(x_n, at(n, some), at(n - delta, some), name)
        row.append(float(mse(y, exact[delta]).mean()))

lines = {
    "x unchanged": (deltas, errors["identity"]),
    "one DDIM step": (deltas, errors["ddim"]),
    "one Heun step": (deltas, errors["heun"]),
    "the brief's bar, 0.01": (deltas, [0.01] * len(deltas)),
}
title = f"One step from n = {n} against a fine walk"
plots.display(
    plots.curves(lines, "δ, chain steps", "mean squared error", title, log_y=True),
    "All errors grow with δ. Heun's is lowest for small δ; x unchanged is under 0.01 up to large δ.",
)

# %%
grows = {name: row[1] / row[0] for name, row in errors.items()}
told = ", ".join(f"**{g:.0f}** times ({name})" for name, g in grows.items())
plots.tell(f"From δ = {deltas[0]} to {deltas[1]} the error grows {told}.")
plots.tell(
    "\n\n".join(
        f"At δ = {deltas[k]}, x unchanged is wrong by **{errors['identity'][k]:.1e}**,"
        f" DDIM {errors['ddim'][k]:.1e}, Heun {errors['heun'][k]:.1e}."
        for k in (0, -1)
    )
)
assert errors["identity"][0] < 0.01 and 3 < grows["identity"] < 6 and grows["ddim"] > 8
assert all(a < b for a, b in zip(errors["ddim"], errors["identity"], strict=True))

# %% [markdown]
# The distance itself grows like δ, so its square like δ². The error of DDIM, an Euler step, grows like δ², so its square like δ⁴. That is
# the trade: a small δ gives a target that is nearly right and says nearly nothing, since x unchanged is nearly right, too. A large δ says
# much, and is wrong. And a better solver (Heun) helps while steps are small, but not when they are large;
# in theory its error grows like δ³, so its square 64-fold when δ doubles, which would take a network smoother than this one.
#
# **Question.** The brief expects a validation error below 0.01 against targets at δ = 1. What does a student have to learn for that?
#
# <details><summary>Answer</summary>
#
# Nothing. In the figure, x unchanged stays below 0.01 at ten times that δ. A squared error means something only beside the identity map's. The
# library therefore reports the *skill*, 1 − error/error of the identity, which is 0 for a student that has learned nothing.
#
# </details>
#
# Explore it. Choose the ancestral step, too: its target has fresh noise in it, which nobody can foresee, so there even a perfect
# student has an error, and at δ = 1 it is about the brief's bar.

# %%
delta_explorer(teacher, images[:100])

# %% [markdown]
# ## Two sources
#
# Where do the noisy states come from? The cache knows two ways.
#
# - **`data`**: noise a real image to a random index, and take one step. The states are right, as lesson 1 makes them; where their paths
#   end, nobody knows.
# - **`rollout`**: start from noise, and let the teacher walk all the way. The states are the teacher's own, errors included, and the end of each path comes for free.
#
# | who | states | target | kept |
# |---|---|---|---|
# | the brief | data | x̂ at n − 1, posterior mean | on disk |
# | consistency distillation (Song et al. 2023, Algorithm 2) | data | the student's own answer one ODE step lower (lesson 4) | nothing |
# | Luhman & Luhman 2021 | rollout, its first state only | the end of the path | on disk |
# | CMT (Hu et al. 2025) | rollout, all states | the end of the path | |
#
# ## Build one
#
# `PairCache.build` does the work in shards of a thousand pairs. First the brief's kind, small. From here on t and r are noise levels, as in the papers:
# a pair, as one reads it, holds x in lesson 1's coordinates, $t = \sigma$ of x_t and r < t of x̂_r, and the chain index n of x_t.

# %% tags=["budget"]
def rough(value):  # one figure: it was timed, on one machine
    return f"{float(f'{value:.1g}'):g}"

began = time.perf_counter()
arguments = {"pairs": 3_000, "source": "data", "images": images, "solver": "posterior_mean", "delta": 1}
cache = PairCache.build(folder / "data", teacher, **arguments)
per_pair = (time.perf_counter() - began) / len(cache)

pair = cache[123]
plots.tell(
    f"**{len(cache):,}** pairs in {cache.n_shards} shards, {rough(1e3 * per_pair)} ms a pair."
    f" A pair holds {', '.join(pair)}."
)
assert not cache.verify() and int(pair["n"]) >= 0 and float(pair["r"]) < float(pair["t"])

# %% [markdown]
# And the other kind: each walk gives as many pairs as it has steps. Here is one of them, read back from disk and scaled to the chain's units, with the end
# that all its states share.

# %% tags=["budget"]
steps = profile.rollout_steps
walks = PairCache.build(
    folder / "rollout", teacher, 20 * steps, "rollout", solver="ddim", steps=steps, shape=shape
)

path = [walks[k] for k in range(0, steps, -(-steps // 7))]
states = torch.stack([p["x_t"] / (1 + p["t"] ** 2) ** 0.5 for p in path] + [path[0]["x_end"]])
plots.display(
    plots.sheet({"one walk": states}, [f"n = {int(p['n'])}" for p in path] + ["its end"]),
    "States of one walk of the teacher, from noise to an image, and the image where it ends.",
)
assert all(torch.equal(p["x_end"], path[0]["x_end"]) for p in path)

# %% [markdown]
# ## Break it
#
# A long build gets killed: Colab disconnects, a laptop sleeps. Let us see. Here is a teacher who gives up after a few evaluations.

# %%
@dataclass(eq=False)
class Tired(Teacher):
    left: int = 10

    def eps(self, x, n):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().eps(x, n)

def quote(error):  # without the name of the temporary folder
    return f"> {error}".replace(str(folder), "…")

tired = Tired(teacher.unet, chain, teacher.clip, teacher.variance_type)
try:
    PairCache.build(folder / "killed", tired, **arguments)
except KeyboardInterrupt:
    there = len(list((folder / "killed").glob("shard-*.pt")))
    plots.tell(f"Interrupted; {there} shards are there. Opening says:")
try:
    PairCache.open(folder / "killed")
except ValueError as error:
    plots.tell(quote(error))

# %% [markdown]
# Nothing is lost: call `build` again, with the same arguments, and it goes on. As all noise is drawn from (seed, number of the pair), the result is the
# same, bit for bit, as if nothing had happened.

# %%
resumed = PairCache.build(folder / "killed", teacher, **arguments)
same = [resumed.path(k).read_bytes() == cache.path(k).read_bytes() for k in range(cache.n_shards)]
plots.tell(f"{sum(same)} of {len(same)} shards equal those of the cache that was built in one go.")
assert all(same)

# %% [markdown]
# Worse than a missing file is a wrong one. Flip one bit in the middle of a shard. PyTorch loads it without a word.

# %%
path = cache.path(1)
good = torch.load(path, weights_only=True)
raw = bytearray(path.read_bytes())
raw[len(raw) // 2] ^= 1
path.write_bytes(raw)

bad = torch.load(path, weights_only=True)
changed = sum(int((good[name] != bad[name]).sum()) for name in good)
plots.tell(
    f"torch.load: no error, **{changed}** wrong number. `verify` names the shards **{cache.verify()}**."
    " Reading one of their pairs:"
)
try:
    PairCache.open(folder / "data")[1_000]
except ValueError as error:
    plots.tell(quote(error))
assert cache.verify() == [1]

cache = PairCache.build(folder / "data", teacher, **arguments)
plots.tell(f"Built again: `verify` names {cache.verify()}.")
assert not cache.verify()

# %% [markdown]
# ## Stream it
#
# Training takes shuffled batches from `loader`. It never ends; `start` begins in the middle, which is how an interrupted training goes on with the
# batch that it would have seen next. And reading costs next to nothing, beside the teacher:

# %%
batches = cache.loader(batch_size=64, seed=0)
began = time.perf_counter()
first = [next(batches) for _ in range(30)]
per_read = (time.perf_counter() - began) / (30 * 64)
later = next(cache.loader(batch_size=64, seed=0, start=20))

plots.tell(
    f"Making a pair took about {rough(1e6 * per_pair)} µs, reading one {rough(1e6 * per_read)} µs."
)
assert torch.equal(later["x_t"], first[20]["x_t"])

# %% [markdown]
# ## Refresh it
#
# Suppose that the teacher is trained on, as in the brief's recipe. Then all targets are out of date, and a cache that says nothing about it is a trap. This one
# knows its teacher by a hash of the weights. It refuses another teacher, and `refresh` computes the targets anew from the *same* noisy images.

# %%
unet, _ = fit(
    copy.deepcopy(teacher.unet).requires_grad_(True), Denoising(chain),
    lambda start: data.batches(images, 64, 0, start), steps=10,
)  # fmt: skip
newer = replace(teacher, unet=unet.to(device))
try:
    PairCache.open(folder / "data", newer)
except ValueError as error:
    plots.tell(quote(error))

old, cache = cache[0], cache.refresh(newer)
moved = (cache[0]["x_r"] - old["x_r"]).abs().max()
plots.tell(f"After the refresh x_t is the same, and x̂ of the first pair has moved by **{moved:.1e}**.")
assert torch.equal(cache[0]["x_t"], old["x_t"]) and moved > 0
PairCache.open(folder / "data", newer);

# %% [markdown]
# ## What it costs
#
# ### Your turn: bytes
# A pair is stored as two images of float16, two levels of int16 and one int64 that says from which image it came. How many bytes is that?

# %% tags=["your-turn"]
def my_bytes(shape):  # (C, H, W) -> bytes a pair
    ...  # your code

check("03.bytes", my_bytes);

# %% tags=["solution"]
# @title Solution
def solution(shape):
    return 2 * 2 * shape[0] * shape[1] * shape[2] + 2 + 2 + 8

assert check("03.bytes", solution)

# %% [markdown]
# Now the brief's cache: 200,000 pairs at 3×32×32. Its bytes follow from the formula. For its hours we build the network of the brief's teacher (with
# random weights, as its speed is all that we want to know), and time it here.

# %%
levels = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
config = {**teacher.unet.config, "sample_size": 32, "in_channels": 3, "out_channels": 3}
config |= {"block_out_channels": brief.widths, "layers_per_block": 2, "norm_num_groups": 32}
config["down_block_types"] = levels
config["up_block_types"] = tuple(name.replace("Down", "Up") for name in levels[::-1])
theirs = replace(teacher, unet=UNet.from_config(config).to(device))

for _ in range(2):  # the first time is slower
    began = time.perf_counter()
    theirs.eps(torch.zeros(4, 3, 32, 32, device=device), at(0, 4)).cpu()
    seconds = (time.perf_counter() - began) / 4

measured = sum(cache.path(k).stat().st_size for k in range(cache.n_shards)) / len(cache)
size = solution((3, 32, 32))
plots.tell(
    f"Here a pair takes **{measured:.0f}** bytes on disk, {solution(shape)} by the formula,"
    f" and {rough(1e3 * per_pair)} ms to make.\n\n"
    f"The brief's cache: {brief.pairs:,} × {size:,} bytes = **{brief.pairs * size / 1e9:.2f} GB**,"
    f" and {brief.pairs:,} × about {rough(1e3 * seconds)} ms, that is **{rough(brief.pairs * seconds / 3600)} hours** here."
)
assert abs(measured / solution(shape) - 1) < 0.05

# %% [markdown]
# Is float16 good enough? Compare the rounding with what a pair is about, the difference between its two images. And with two other ways to store it.

# %%
batch = next(cache.loader(batch_size=2_000))
scale_t, scale_r = ((1 + batch[level] ** 2).sqrt().reshape(-1, 1, 1, 1) for level in ("t", "r"))
signal = mse(batch["x_t"] / scale_t, batch["x_r"] / scale_r).mean()

noise = torch.randn_like(batch["x_t"])
exact = chain.perturb(data.to_float(images[batch["index"]]), noise, batch["n"])
rounding = {
    "float16": mse(exact.half().float(), exact).mean(),
    "bfloat16": mse(exact.bfloat16().float(), exact).mean(),
    "float16 of x0 + σ·ε": mse((exact * scale_t).half().float(), exact * scale_t).mean(),
}
plots.tell(
    f"Mean squared difference of the two images of a pair: **{signal:.1e}**. Rounding adds "
    + ", ".join(f"{name} **{float(v):.1e}**" for name, v in rounding.items())
    + "."
)
assert rounding["float16"] < 0.01 * signal < rounding["bfloat16"] < rounding["float16 of x0 + σ·ε"]

# %% [markdown]
# **Question.** `loader` gives the coordinates of σ, in which the students of lesson 4 work. Why doesn't the cache store those?
#
# <details><summary>Answer</summary>
#
# A float16 number is right to a fixed number of *digits*. In the coordinates of σ, values grow with the noise up to
# hundreds, and a rounding that is small beside them is large beside an image. In the chain's coordinates all values are
# about 1 in size. bfloat16 has fewer digits still; its rounding is no longer negligible beside what a pair at δ = 1 has to say.
#
# </details>

# %%
shutil.rmtree(folder)

# %% [markdown]
# ## What you learned
#
# - The reverse step weighs two Gaussians. Its mean loses noise; a step of the ODE does not.
# - A cache saves as often as a pair is seen again. Where targets are ends of walks, it lets every state of a walk be used.
# - A small δ: a right target that says little. A large δ: much, and wrong. Never read an error without the identity map's beside it.
# - A cache must survive interruptions, find damage, and know its teacher. Noise by (seed, number) makes all three easy to test.
#
# | what | where | in `cmlib` |
# |---|---|---|
# | the posterior | Ho et al. 2020 (arXiv 2006.11239), eq. 6–7 | `teacher.Teacher.posterior` |
# | DDIM; Heun | Song et al. 2020 (2010.02502), eq. 12; Karras et al. 2022 (2206.00364), Algorithm 1 | `process.ode_step` |
# | pairs from data and one ODE step | Song et al. 2023 (2303.01469), Algorithm 2 | `objectives.ConsistencyDistillation` |
# | pairs from rollouts | Luhman & Luhman 2021 (2101.02388); CMT (2509.24526) | `objectives.EndpointRegression` |
# | the cache | the brief, step 2 | `cache.PairCache` |
# | skill against the identity map | | `evaluate.pair_error` |
#
# **Next**: pairs in hand, a student. Lesson 4, `04_cd_student.ipynb`, trains two of them: the brief's, and the one that works.
