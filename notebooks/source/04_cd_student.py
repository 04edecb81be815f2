# %% [markdown]
# # 4 · The student: consistency distillation
#
# {badge}
#
# The teacher walks from noise to image in many steps. Now we train a network that jumps: one evaluation from any point of the
# teacher's path to its end. Most of the lesson is about what such a network must be asked for, as the most natural question
# to ask it turns out to be the wrong one.
#
# **You will be able to**
# - follow an image and its noise level through the U-Net, block by block;
# - build a network f with f(x, σ_min) = x that no training can break;
# - say what regression onto the teacher's next state learns, and catch it with a baseline;
# - derive the consistency distillation loss, train with it, and judge the result;
# - check a consistency function by the differential equation that it solves.
#
# **Time to run** {times}.
#
# **You need** lessons 1 to 3: noise level σ, the probability-flow ODE, the teacher, the pair cache.

# %% tags=["setup"]

# %%
import copy
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from cmlib import data, evaluate, plots
from cmlib.cache import PairCache
from cmlib.consistency import ConsistencyFunction, c_in, c_noise, c_out, c_skip
from cmlib.demo import one_step_identity
from cmlib.exercises import check
from cmlib.objectives import ConsistencyDistillation, both_branches
from cmlib.ops import expand_like, indexed_normal, mse, pseudo_huber
from cmlib.oracle import GaussianMixture
from cmlib.pipeline import Features, distill, draw, draw_teacher, load_teacher, shipped, shipped_student
from cmlib.recipes import LEVELS, first_student
from cmlib.unet import timestep_embedding
from cmlib.widgets import consistency_map, jump_explorer

torch.manual_seed(0)
images, labels = data.load(profile.dataset)
held_out, held_out_labels = data.load(profile.dataset, "test")
shape = tuple(images.shape[1:])
teacher = load_teacher(profile.teacher, shape)
chain, device = teacher.process, teacher.device

# %% [markdown]
# ## The network, block by block
#
# The student is a U-Net of the teacher's architecture, and starts from the teacher's weights: who can tell noise from image at every
# noise level has learned most of what a student needs. `first_student` copies them, and refits the time embedding: the teacher counts
# time in steps n, a student in noise levels.
#
# The network takes an image and one number, the noise level. Why must it know the level? Here the teacher denoises one image of
# σ = 1, while we tell it other levels.

# %%
sigma_max = float(
    chain.sigma(chain.grid(profile.rollout_steps)[-1:])
)  # where the teacher's rollouts start
student = first_student("endpoint-regression", teacher, sigma_max)
net = student.net

told = torch.tensor([0.2, 0.5, 1.0, 2.0, 5.0], device=device)
x0 = data.to_float(held_out[:1]).to(device)
x = (x0 + indexed_normal(0, [0], shape).to(device)).repeat(5, 1, 1, 1)  # noise of σ = 1
answers = teacher.denoise(x, told)
plots.display(
    plots.sheet(
        {"true σ = 1": torch.cat([x0, x[:1], answers])},
        ["clean", "noisy", *(f"told σ = {s:.1f}" for s in told.tolist())],
    ),
    "A digit denoised under five claimed noise levels: noise remains if it is too low,"
    " the image fades if it is too high.",
)
errors = [float(mse(a[None], x0).sqrt()) for a in answers]
plots.tell(
    "RMS distance to the clean image: "
    + ", ".join(f"told {s:.1f}: **{e:.2f}**" for s, e in zip(told, errors, strict=True))
)
assert min(errors[0], errors[-1]) > max(errors[1:4]), "the wrong level is the wrong answer"

# %% [markdown]
# ### The time embedding
#
# A single number is a poor input for a network: it must react to 0.02 against 0.03 and to 20 against 30. So the level first becomes a
# vector. The student's time is $c_{noise} = 250\,\ln\sigma$ (in ln σ, equal steps are equal factors), and the embedding holds its sines
# and cosines at frequencies from 1 down to 1/10,000, like the hands of a clock, from seconds to hours:
#
# $$\big[\sin(\omega_k\,c_{noise}),\; \cos(\omega_k\,c_{noise})\big], \qquad \omega_k = 10000^{-k/(K-1)}, \quad k = 0 \dots K-1.$$

# %%
dim = net.config["block_out_channels"][0]
near, wide = torch.logspace(0, 0.1, 400), torch.logspace(-2, 2, 4_001)
embedding = timestep_embedding(c_noise(near), dim, freq_shift=1)  # [400,dim]
likeness = F.cosine_similarity(timestep_embedding(c_noise(wide), dim, freq_shift=1), embedding[:1])

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained")
grid = left.pcolormesh(near, range(dim), embedding.T, cmap="cividis", rasterized=True)
left.set(
    xlabel="noise level σ",
    ylabel="component: sines, then cosines",
    title="The embedding, close to σ = 1",
)
figure.colorbar(grid, label="value")
right.plot(wide, likeness, color=plots.COLOURS[0], lw=1)
right.set(
    xscale="log",
    xlabel="noise level σ",
    ylabel="cosine similarity",
    title="How like σ = 1 another level looks",
)
plots.display(
    figure,
    "Left: stripes, fast for the first sines and cosines, constant for the last."
    " Right: similarity, 1 at σ = 1, lower elsewhere.",
)
assert likeness.argmax() == 2_000 and likeness[::500].sort().values[-2] < 0.95, (
    "no far level looks like σ = 1"
)

# %% [markdown]
# Keep the fast hands in mind: when σ changes by one per cent they turn by more than two radians. They will come back at the end of the lesson.
#
# ### One forward pass
#
# Two linear layers turn the embedding into a vector for all blocks. The image goes down to coarser maps with more channels and up again.
# On the way up each block also takes the map that left the same resolution on the way down, concatenated: count the channels.

# %%
seen, parts = [], ("TimeEmbedding", "ResnetBlock", "Attention", "Downsample", "Upsample")


def note(name):
    return lambda module, given, out: seen.append((name, [*given[0].shape], [*out.shape]))


named = [
    (n, m) for n, m in net.named_modules() if type(m).__name__ in parts or n in ("conv_in", "conv_out")
]
hooks = [module.register_forward_hook(note(name)) for name, module in named]
with torch.no_grad():
    out = net(x[:1], c_noise(told[:1]))
for hook in hooks:
    hook.remove()

rows = [f"| `{name}` | {given} | {made} |" for name, given, made in seen]
plots.tell("\n".join(["| block | takes | gives |", "|---|---|---|", *rows]))
count = sum(p.numel() for p in net.parameters())
plots.tell(
    f"**{count / 1e6:.2f}** million weights. What comes out has the shape"
    f" of what went in, {[*out.shape]}."
)
assert out.shape == x[:1].shape

# %% [markdown]
# ### One residual block
#
# All of them are alike. Some texts say that the time vector is concatenated to each block's input. In this U-Net, as in Ho et al.'s, a linear
# layer makes one number for each channel from it, and this is *added* to the whole map, between the two convolutions. By hand:

# %%
block = net.down_blocks[0].resnets[0]
with torch.no_grad():
    temb = F.silu(net.time_features(c_noise(told[:1])))  # [1,4·width]
    before = net.conv_in(x[:1])  # [1,C,H,W]

    h = block.conv1(F.silu(block.norm1(before)))
    h = h + block.time_emb_proj(temb)[:, :, None, None]  # the noise level enters here
    h = before + block.conv2(
        F.silu(block.norm2(h))
    )  # and what came in is added: the block learns a change

    torch.testing.assert_close(h, block(before, temb), rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## The boundary, by construction
#
# At the end of a path there is nowhere to go, so a consistency function has $f(x, \sigma_{min}) = x$. That looks like a detail.
#
# **Question.** Find a function that is perfectly self-consistent, the same along every path, and useless.
#
# <details><summary>Answer</summary>
#
# f(x, σ) = 0, or any other constant. It agrees with itself everywhere. So self-consistency alone says nothing about images; the boundary is the
# only place where f is told what an image is. From there, consistency carries it up the path to the noise. A training that could forget
# the boundary could collapse to the constant.
#
# </details>
#
# So we don't ask the network for the boundary, we build it in. (t is σ from here on, as in the papers, and r < t a lower noise level. The boundary is
# at $\sigma_{min}$, not at 0, as the teacher's chain ends there, with noise that no eye sees; the papers, too, stop just above 0.)
#
# $$f(x, t) = c_{skip}(t)\,x + c_{out}(t)\,F\big(c_{in}(t)\,x,\; c_{noise}(t)\big), \qquad c_{skip}(\sigma_{min}) = 1,\quad c_{out}(\sigma_{min}) = 0.$$
#
# Which functions? Think in variances, with data of standard deviation $\sigma_d$, so that $x = x_0 + t\,\varepsilon$ has $\sigma_d^2 + t^2$:
#
# - $c_{in} = 1/\sqrt{t^2+\sigma_d^2}$ gives the network an input of variance 1.
# - What is left to the network is $x_0 - c_{skip}\,x$, of variance $(1-c_{skip})^2\sigma_d^2 + c_{skip}^2t^2$. This is least at
#   $c_{skip} = \sigma_d^2/(t^2+\sigma_d^2)$, and then it is $\sigma_d^2t^2/(t^2+\sigma_d^2)$. The root of that is $c_{out}$,
#   so that F has variance 1, too.
#
# That is Karras et al.'s choice, with its boundary at t = 0. For ours put $t - \sigma_{min}$ for t where it decides
# about the boundary: in $c_{skip}$, and in the numerator of $c_{out}$.
#
# ### Your turn: the boundary
# Return $c_{skip}$, $c_{out}$ and $c_{in}$.

# %% tags=["your-turn"]
def my_boundary(t, sigma_min, sigma_data):  # [B], a number, a number -> three times [B]
    ...  # your code

check("04.boundary", my_boundary);

# %% tags=["solution"]
# @title Solution
def solution(t, sigma_min, sigma_data):
    skip = sigma_data**2 / ((t - sigma_min) ** 2 + sigma_data**2)
    out = sigma_data * (t - sigma_min) / (t**2 + sigma_data**2).sqrt()
    return skip, out, 1 / (t**2 + sigma_data**2).sqrt()

assert check("04.boundary", solution)

# %% [markdown]
# `ConsistencyFunction` is these four functions around a network. We take $\sigma_d = 1$: then $c_{in}$ scales a noisy image exactly as the
# teacher's chain does, and the teacher's weights fit. Here they are, and the proof that the boundary needs no training.

# %%
t = torch.logspace(-2, 2, 200)
lines = {
    "c_skip": c_skip(t, student.sigma_min, 1.0),
    "c_out": c_out(t, student.sigma_min, 1.0),
    "c_in": c_in(t, 1.0),
}
plots.display(
    plots.curves(
        {name: (t, v) for name, v in lines.items()},
        "noise level σ",
        "factor",
        "Around and through the network",
    ),
    "c_skip falls from 1 to 0 around σ = 1, c_out rises from 0 to 1; c_in falls from 1 towards 0.",
)


class Wild(nn.Module):
    def forward(self, x, time):
        return 1_000 * torch.randn_like(x)  # no network could be worse


wild = ConsistencyFunction(Wild(), student.sigma_min)
x_low = data.to_float(images[:8])
assert torch.equal(wild(x_low, torch.full((8,), wild.sigma_min)), x_low), (
    "f(x, σ_min) = x, whatever the network does"
)

# %% [markdown]
# ## The distance
#
# Every loss below compares two images. The squared error lets a few bad images pull hardest. Consistency models do better with the
# pseudo-Huber distance, a square near zero and a length far away,
#
# $$d(a, b) = \sqrt{\lVert a-b\rVert^2 + c^2} - c.$$
#
# Its gradient is never longer than 1, so no *image* in the batch outvotes the others. The norm is that of the whole image. A root of
# each pixel is another distance (some well-known code has it): it forgives *pixels*, so an error that sits in one pixel costs less
# than an equal one that is spread.
#
# ### Your turn: pseudo-Huber
# Return the distance of each image in the batch.

# %% tags=["your-turn"]
def my_huber(a, b, c):  # [B,C,H,W], [B,C,H,W], a number -> [B]
    ...  # your code

check("04.huber", my_huber);

# %% tags=["solution"]
# @title Solution
def solution(a, b, c):
    return ((a - b).pow(2).flatten(1).sum(1) + c**2).sqrt() - c

assert check("04.huber", solution)

# %%
spread = torch.full((1, *shape), 1.0)
spread /= spread.norm()  # an error of length 1, in all pixels
spike = torch.zeros(1, *shape).flatten(1)
spike[0, 0] = 1.0  # the same length, in one pixel
spike, zero, c = spike.view(1, *shape), torch.zeros(1, *shape), 0.03 * spread.numel() ** 0.5

whole = [float(pseudo_huber(e, zero, c)) for e in (spread, spike)]
pixels = [float((e**2 + c**2).sqrt().sub(c).sum()) for e in (spread, spike)]  # the root of each pixel
plots.tell(
    f"An error of length 1, spread or in one pixel. Of the whole image:"
    f" **{whole[0]:.3f}** and **{whole[1]:.3f}**."
    f" Pixel by pixel: **{pixels[0]:.3f}** and **{pixels[1]:.3f}**."
)
assert abs(whole[0] - whole[1]) < 1e-4 < abs(pixels[0] - pixels[1])

# %% [markdown]
# ## The natural question, and why it is the wrong one
#
# Now to the training. We need the teacher's paths; `PairCache` of lesson 3 keeps them: each state $x_t$, the next one
# $\hat x_r$ (r < t), and where the path ends. A second, small cache, which no student trains on, is for measuring.

# %% tags=["budget"]
folder = Path(tempfile.mkdtemp())
how = {
    "source": "rollout",
    "solver": "ddim",
    "steps": profile.rollout_steps,
    "shape": shape,
    "batch_size": 500,
}
cache = PairCache.build(folder / "cache", teacher, profile.pairs // 12, **how)
fresh = next(
    PairCache.build(folder / "fresh", teacher, 20 * profile.rollout_steps, seed=1, **how).loader(
        20 * profile.rollout_steps
    )
)
plots.tell(
    f"**{len(cache) // profile.rollout_steps:,}** paths of {profile.rollout_steps} steps,"
    f" **{len(cache):,}** pairs."
)

# %% [markdown]
# The natural idea, which some texts call consistency distillation: the cache holds $x_t$ and the teacher's answer $\hat x_r$, so regress
# one onto the other,
#
# $$L = \big\lVert \hat x_r - f_\theta(x_t, t)\big\rVert^2.$$
#
# Let us try it, and give it every advantage. Neighbours in a path differ little, so our learner starts as the identity map and learns only the
# *change*. Both sides are in the chain's units, $x/\sqrt{1+t^2}$, as the cache stores them. Here is the whole training:

# %% tags=["budget"]
class StepStudent(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = copy.deepcopy(net)
        for weight in self.net.conv_out.parameters():
            nn.init.zeros_(weight)

    def forward(self, x, t):
        x = expand_like(c_in(t, 1.0), x) * x
        return x + self.net(x, c_noise(t))


stepper = StepStudent(net).train()
optimizer = torch.optim.AdamW(stepper.parameters(), lr=1e-3)
for _, batch in zip(
    range(profile.regression_updates // 6), cache.loader(profile.batch_size), strict=False
):
    batch = {name: v.to(device) for name, v in batch.items()}
    goal = batch["x_r"] / expand_like((1 + batch["r"] ** 2).sqrt(), batch["x_r"])
    loss = mse(stepper(batch["x_t"], batch["t"]), goal).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
stepper.eval();
# %% [markdown]
# How good is it? The mean squared error alone doesn't say. Beside it stands the **identity baseline**, what one scores by returning
# $x_t$ unchanged, and the **skill** $= 1 - \mathrm{MSE}/\mathrm{MSE}_{identity}$: 1 is perfect, 0 is no better than doing nothing.

# %%
error = evaluate.pair_error(stepper, fresh)
mean, drawn = one_step_identity(teacher, held_out[:300], seed=0).values()
plots.tell(
    f"On fresh paths: MSE **{error['model']:.2g}**, identity **{error['identity']:.2g}**,"
    f" skill **{error['skill']:.2f}**."
)
plots.tell(
    "Between neighbours of the whole chain (δ = 1) the identity map itself scores"
    f" **{mean:.1g}** against the teacher's mean step and"
    f" **{drawn:.2g}** against a random one."
    " A bar such as “MSE below 0.01” is met by doing nothing."
)
assert 0 < error["skill"] < 1 and mean < 0.001

# %% [markdown]
# It learns. But what? A regression's best answer is the mean of its target given its input,
# $\mathbb E[\hat x_r \mid x_t]$. The teacher's step is deterministic, so that is $\hat x_r$ itself: **one step of the teacher**. Hence the
# best possible learner of this loss, from pure noise, in one evaluation:

# %%
n = (
    chain.grid(profile.rollout_steps)[-2:].flip(0).to(device)
)  # the first two nodes of a rollout, from the top
z = indexed_normal(5, range(8), shape).to(device)
at, to = n[:1].expand(8), n[1:].expand(8)
with torch.no_grad():
    jump = stepper(sigma_max * z, torch.full((8,), sigma_max, device=device))
best, walked = teacher.step(z, at, to, "ddim"), teacher.sample(z, profile.rollout_steps)
rows = {"noise": z, "learner, 1 jump": jump, "best possible": best, "teacher's walk": walked}
plots.display(
    plots.sheet(rows, [f"{k + 1}" for k in range(8)]),
    "Four rows: noise, the learner's jump and the best possible one, all three the same noise;"
    " the teacher's digits.",
)
alike = [
    float(torch.corrcoef(torch.stack([v.flatten(), z.flatten()]))[0, 1]) for v in (jump, best, walked)
]
plots.tell(
    f"Correlation with the noise that went in: learner **{alike[0]:.2f}**,"
    f" best possible **{alike[1]:.2f}**, walk **{alike[2]:.2f}**."
)
assert min(alike[:2]) > 0.95 > 0.7 > alike[2], "one jump from noise gives noise"

# %% [markdown]
# One jump from noise gives noise, and *better training would only bring it closer to the third row*. (Repeated at every level the learner is the teacher
# again, at the teacher's price.)
#
# **Question.** How far must r be below t, so that this regression does teach a jump to the image?
#
# <details><summary>Answer</summary>
#
# All the way: r = 0. Then the target is the end of the path. It is a good loss, and comes next. What it costs is a whole rollout for
# each independent target, computed before training, while $\hat x_r$ next door costs one step.
#
# </details>
#
# ## Endpoint regression
#
# $$L = d\big(f_\theta(x_t, t),\; x_{end}\big).$$
#
# The end of a deterministic path is a function of any point of it, and this function is f. So the minimiser is right. Luhman and Luhman trained the
# first one-step student so, in 2021, from pure noise only. Its weakness is the cache: few paths, seen again and again, invite learning by heart.
#
# `distill` is `train.fit` with a recipe's settings: the same ten lines, an EMA of the weights, checkpoints. Every so many updates
# it calls `measure`; there we keep samples, and measure how far f is from the ends of the fresh paths.

# %% tags=["budget"]
fresh = {name: v.to(device) for name, v in fresh.items()}
shown = []


@torch.no_grad()
def watch(average):
    shown.append(draw(average, 12, 1, shape, seed=0))
    return {"gap": float(mse(average(fresh["x_t"], fresh["t"]), fresh["x_end"]).mean().sqrt())}


start = watch(student)
updates = profile.endpoint_updates // 3
endpoint, history = distill(
    "endpoint-regression",
    student,
    profile,
    folder / "endpoint",
    updates=updates,
    cache=cache,
    every=min(500, -(-updates // 3)),
    measure=watch,
)
endpoint_names = [f"endpoint, {row['step']}" for row in history]
plots.tell(
    f"RMS distance from the ends of fresh paths: at the start **{start['gap']:.2f}**, "
    + ", ".join(f"after {row['step']} updates **{row['gap']:.2f}**" for row in history)
)
assert history[-1]["gap"] < start["gap"]

# %% [markdown]
# ## Consistency distillation
#
# Now the idea of Song et al. We want $f(x_t, t) = f(x_r, r)$ for any two points of a path. To ask for that we need *two points of one path*,
# and no rollout to get them:
#
# 1. **One point.** Noise an image, $x_t = x_0 + t\,\varepsilon$. That is a typical point at level t, as SDE and ODE have the same densities (lesson 1).
# 2. **Its neighbour.** One ODE step of the teacher, $\hat x_r = x_t + (r-t)\,\dfrac{x_t - D(x_t,t)}{t}$, to the next level of a grid.
# 3. **Agree.** Both must have the same answer:
#
# $$L_{CD} = d\big(f_\theta(x_t, t),\; f_{\theta^-}(\hat x_r, r)\big).$$
#
# Compare with the regression above: the target is not the next state, but *the student's own answer at the next state*. That is the whole
# difference between noise and an image. Two branches then, and they are not equals:
#
# - The right one is a **target**: no gradient flows into it (stop-gradient). Knowledge must travel upwards, from low noise, where the boundary gives
#   the truth, to high noise. With a gradient on both sides, the loss could also fall by making the good answer agree with the bad one.
# - It comes from a slower copy, an **EMA** of the weights, $\theta^- \leftarrow \mu\,\theta^- + (1-\mu)\,\theta$. A student that runs after its own last
#   answer may run away. (Not always needed: the paper's authors take μ = 0 on CIFAR-10, and 0.95 on ImageNet.)
#
# ### Your turn: the target
# Return the target for a batch, with an Euler step of the teacher. `expand_like(v, x)` makes v [B] broadcast against images.

# %% tags=["your-turn"]
def my_target(
    f_ema, denoise, x_t, t, r
):  # f_ema(x, t), denoise(x, t), [B,C,H,W], [B], [B] -> [B,C,H,W]
    ...  # your code

check("04.target", my_target);

# %% tags=["solution"]
# @title Solution
def solution(f_ema, denoise, x_t, t, r):
    slope = (x_t - denoise(x_t, t)) / expand_like(t, x_t)
    return f_ema(x_t + expand_like(r - t, x_t) * slope, r)

assert check("04.target", solution)

# %% [markdown]
# The library's objective is that, with Heun's step where wanted. On one batch, from the same random numbers, the two agree; and no gradient
# flows into the target, not even where both branches are the same network.

# %%
levels = chain.sigma(
    torch.linspace(0, float(chain.index(torch.tensor(sigma_max))), LEVELS)
)  # 18 of the chain's, ascending
euler = ConsistencyDistillation(teacher, levels, "ddim")
batch = {"x0": data.to_float(images[:16]).to(device)}
loss, logs = euler(endpoint, endpoint, batch, 0, torch.Generator().manual_seed(0))

x_t, t, x_r, r = euler.pairs(batch, 0, torch.Generator().manual_seed(0))
with torch.no_grad():
    by_hand = mse(endpoint(x_t, t), solution(endpoint, teacher.denoise, x_t, t, r))
torch.testing.assert_close(loss.detach(), by_hand, rtol=1e-3, atol=1e-5)

x0_hat, goal = both_branches(student, student, x_t, t, x_r, r)
assert x0_hat.requires_grad and not goal.requires_grad

# %% [markdown]
# Now train: Heun steps, the pseudo-Huber distance, a target EMA, real images for $x_0$. It starts from the endpoint student, as consistency
# distillation alone is slow at first: at the beginning only the lowest levels have a true target.

# %% tags=["budget"]
updates = profile.distill_updates // 3
trained, history = distill(
    "consistency-distillation",
    copy.deepcopy(endpoint),
    profile,
    folder / "cd",
    updates=updates,
    teacher=teacher,
    images=images,
    every=min(500, -(-updates // 2)),
    measure=watch,
)
plots.tell(
    "RMS distance from the ends of fresh paths: "
    + ", ".join(f"after {row['step']} updates **{row['gap']:.2f}**" for row in history)
)

# %% [markdown]
# So few updates hardly move this gap, and hardly change how the rows below look (profile `cpu`). The distances between sets of images, in the results,
# tell more.
#
# Below, each column starts from one noise. At the bottom stand the teacher's fifty steps from it, and, where the course ships one, a student of
# the same recipe that was trained for longer. Look down a column: with that student, the last two rows hold the *same* image, though that
# noise was in no training set. What a student learns is not the look of digits, it is the teacher's map from noise to digits.

# %%
longer = shipped_student(profile.dataset, teacher) or trained
LONGER = "distilled" if longer is trained else "trained longer"
names = [
    "start: the teacher's weights",
    *endpoint_names,
    *(f"then distilled, {row['step']}" for row in history),
]
rows = dict(zip(names, shown, strict=True))
ours, theirs = draw(longer, 12, 1, shape, 0), draw_teacher(teacher, 12, 50, "ddim", shape, 0)
rows |= {LONGER: ours, "teacher, 50 steps": theirs}

figure, axes = plt.subplots(len(rows), 1, figsize=(8.5, 0.6 * len(rows)), layout="constrained")
for ax, (name, made) in zip(axes, rows.items(), strict=True):
    plots.show(ax, plots.tile(data.to_float(made), 12))
    ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
figure.suptitle("One evaluation from the same twelve noises, as training goes on", fontsize=10)
plots.display(
    figure,
    "Rows of twelve images: noise at the start, then blurs that turn into digits;"
    " the last two rows show the same digits.",
)


def distance(a, b):
    return float(mse(data.to_float(a), data.to_float(b)).mean().sqrt())


plots.tell(
    f"RMS distance of the last two rows: **{distance(ours, theirs):.2f}**;"
    f" with one of them moved on by one image: **{distance(ours, theirs.roll(1, 0)):.2f}**."
)
if longer is not trained:
    trained_with = json.loads(shipped(f"{profile.dataset}_student.json").read_text())
    plots.tell(
        f"Its longer training: **{trained_with['pairs']:,}** cached pairs, **{trained_with['endpoint_updates']:,}** updates of"
        f" endpoint regression, **{trained_with['distill_updates']:,}** of consistency distillation; ours had {len(cache):,}, {profile.endpoint_updates // 3:,}"
        f" and {updates:,}."
    )
assert distance(ours, theirs) < distance(ours, theirs.roll(1, 0))

# %% [markdown]
# ## The equation that f solves
#
# Let r come close to t. "The same along every path" becomes "the derivative along the path is zero":
#
# $$\frac{\mathrm d}{\mathrm dt} f(x_t, t) = \frac{\partial f}{\partial t} + \nabla_x f\cdot\frac{\mathrm dx}{\mathrm dt} = 0, \qquad
# \frac{\mathrm dx}{\mathrm dt} = \frac{x - D(x,t)}{t}.$$
#
# $\mathrm dx/\mathrm dt$ is the velocity of the *ODE*. Some texts say that the forward SDE gives it, but in these coordinates the SDE has no drift at all,
# only noise. We measure by central differences on the 2-D oracle, whose f is known, and per unit of ln t, so that all levels compare.

# %%
def change(f, x, t, velocity, h=1e-3, along_t=1, along_x=1):
    """df/d ln t at (x, t): all of it, or only through t, or only through x."""
    dx, dt = along_x * h * expand_like(t, x) * velocity, along_t * h * t
    return (f(x + dx, t + dt) - f(x - dx, t - dt)) / (2 * h)


def rms(v):
    return v.pow(2).flatten(1).mean(1).sqrt()


mixture = GaussianMixture(torch.tensor([[-1.0, -0.5], [0.2, 1.0], [1.0, -0.6]]), 0.15)
sigmas = torch.tensor([0.1, 0.3, 1.0, 3.0], dtype=torch.float64)
t = sigmas.repeat_interleave(50)
clean = mixture.sample(50, torch.Generator().manual_seed(0)).repeat(4, 1)
x = clean + t[:, None] * indexed_normal(1, range(200), (2,))
f, D = mixture.consistency, mixture.denoise
at = (x, t, (x - D(x, t)) / t[:, None])

quantities = [change(f, *at, along_x=0), change(f, *at, along_t=0), change(f, *at), change(D, *at)]
through_t, through_x, both, of_D = (rms(v.view(4, -1)) for v in quantities)
table = [
    "| σ | f, through t alone | f, through x alone | **f, both** | **denoiser D, both** |",
    "|---|---|---|---|---|",
]
for s, *values in zip(sigmas, through_t, through_x, both, of_D, strict=True):
    table.append(f"| {s} | {values[0]:.3f} | {values[1]:.3f} | {values[2]:.0e} | {values[3]:.3f} |")
plots.tell("\n".join(table))
assert both.max() < 1e-5 < 0.01 < min(v.min() for v in (through_t, through_x, of_D))

# %% [markdown]
# The two parts are far from zero, and cancel. So the SDE's "velocity" of zero would leave the first column. And the **denoiser D is not a consistency
# function**: along a path its answer changes, from the average of all images to one of them. Move through the levels and see: first the
# exact f, whose stars stand still, then D, whose stars wander from the middle of the data to their ends.

# %%
consistency_map(mixture, sigma_max=2.0)

# %%
consistency_map(mixture, mixture.denoise, sigma_max=2.0, name="D")

# %% [markdown]
# ### Optional: do students solve it?
# (The results are in the section after this one.)
#
# Is the equation true for our students? We have two ways to ask. **One level apart**: the difference between neighbours of the 18 training
# levels, $f(x_t,t) - f(\hat x_r,r)$, which is what the loss sees. **Infinitely close**: the equation itself, on the teacher's velocity. Both per unit of ln t.

# %%
r, t = (v.to(device).repeat_interleave(8) for v in (levels[1:-1], levels[2:]))  # 8 images at each
x0 = data.to_float(held_out[:8]).to(device).repeat(LEVELS - 2, 1, 1, 1)
x = x0 + expand_like(t, x0) * indexed_normal(3, range(len(x0)), shape).to(device)
x_r, velocity = teacher.ode_step(x, t, r, "heun"), (x - teacher.denoise(x, t)) / expand_like(t, x)
per_level = expand_like((t / r).log(), x)

candidates = {
    "denoiser D": teacher.denoise,
    "endpoint student": endpoint,
    "distilled": trained,
    LONGER: longer,
}
apart, close = {}, {}
with torch.no_grad():
    for name, f in candidates.items():
        apart[name] = rms(((f(x, t) - f(x_r, r)) / per_level).view(LEVELS - 2, -1)).cpu()
        close[name] = rms(change(f, x, t, velocity, h=0.002).view(LEVELS - 2, -1)).cpu()

figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
for ax, title, found in zip(
    axes, ("One training level apart", "Infinitely close: the equation"), (apart, close), strict=True
):
    for (name, values), colour, style in zip(
        found.items(), plots.COLOURS, ["-", "--", "-.", ":"], strict=False
    ):
        ax.plot(levels[2:], values, style, color=colour, label=name)
    ax.set(xscale="log", yscale="log", xlabel="noise level σ", title=title)
    ax.grid(alpha=0.3)
axes[0].set_ylabel("RMS change of the answer\nper unit of ln σ")
axes[0].legend(frameon=False, fontsize=8)
plots.display(
    figure,
    "Change of the answer along the teacher's path over noise levels, for D and three students,"
    " at two distances.",
)
means = {name: (float(apart[name].mean()), float(close[name].mean())) for name in candidates}
plots.tell(
    "Means, one level apart and infinitely close: "
    + "; ".join(f"{k} **{a:.2f}**, **{b:.2f}**" for k, (a, b) in means.items())
)
if longer is not trained:
    assert 2 * means[LONGER][0] < min(means["denoiser D"][0], means[LONGER][1])

# %% [markdown]
# Both answers are honest. One level apart, where it was trained, the longer-trained student hardly changes. But at single points it does *not*
# solve the equation. How can a function be nearly constant over a level and yet be steep? By wobbling. Its time input has hands that turn
# many times between two training levels, and nothing in the loss sees what happens there. Let us look there:

# %%
with torch.no_grad():
    # levels around σ = 1, closer than two training levels; the path is nearly straight over so little
    level = torch.logspace(-0.05, 0.05, 200, device=device)
    point = x0[:1] + indexed_normal(4, [0], shape).to(device)
    velocity = point - teacher.denoise(point, torch.ones(1, device=device))  # at σ = 1
    answer = longer(point + expand_like(level - 1, point) * velocity, level).cpu()
moved = answer - answer.mean(0)
slope = moved.diff(dim=0) / expand_like(level.cpu().log().diff(), moved)

figure, ax = plt.subplots(figsize=(6, 2.8), layout="constrained")
ax.plot(
    level.cpu(), moved.flatten(1)[:, :: moved[0].numel() // 8], color=plots.COLOURS[0], alpha=0.7, lw=1
)
ax.set(
    xlabel="noise level σ",
    ylabel="pixel − its mean",
    title="Some pixels of one answer along a short path",
)
plots.display(
    figure, "Pixels of the answer wobble a little around their means, several times along the path."
)
plots.tell(
    f"The whole image moves by **{rms(moved).max():.3f}** at most (RMS),"
    f" with a slope of **{rms(slope).mean():.2f}** on average."
)
if longer is not trained:
    assert 10 * rms(moved).max() < rms(slope).mean()

# %% [markdown]
# A wobble that no eye sees, and a steep slope. For jumping it does no harm. For methods that train on the derivative itself it does, which is one of the reasons
# why sCM's authors replaced this time input; and a residual means little without its step size. Remember also that f = 0 solves the equation perfectly. It
# says something only together with the boundary.
#
# ## One evaluation, two, fifty
#
# A consistency model can spend a second evaluation: jump, add noise of a middle level to the answer, jump again. `levels` says where.
# Now to the results: `fd`, a Fréchet distance between sets of images in the features of a small classifier (lesson 6 takes it apart). It
# depends on how many images are compared, so all have the same number. For orientation stand there
# the training images themselves, drawn at random: they don't score 0 either, as every draw has its scatter, and what comes near them can't be told
# from them.

# %%
N = min(profile.samples // 2, 500)
features = Features.of(profile.dataset, folder, images, labels, (held_out, held_out_labels))
with torch.no_grad():
    steps = stepper(
        sigma_max * indexed_normal(8, range(N), shape).to(device),
        torch.full((N,), sigma_max, device=device),
    )
sets = {
    ("training images, drawn again", 0): images[
        torch.randint(len(images), (N,), generator=torch.Generator().manual_seed(0))
    ],
    ("teacher, DDIM", 50): draw_teacher(teacher, N, 50, "ddim", shape, 0),
    ("regression onto the next state", 1): data.to_uint8(steps).cpu(),
}
for name, f in {"endpoint student": endpoint, "distilled": trained, LONGER: longer}.items():
    sets |= {(name, k): draw(f, N, k, shape, 0) for k in (1, 2)}
fd = {key: features.distance(made) for key, made in sets.items()}

table = [f"| N = {N} | evaluations | fd_{features.dataset} |", "|---|---|---|"]
plots.tell(
    "\n".join(table + [f"| {name} | {k} | {distance:.1f} |" for (name, k), distance in fd.items()])
)
plots.tell(
    f"The second evaluation of the longer-trained student is at σ = **{longer.levels(2)[1]:.2f}**."
)

assert fd["distilled", 2] < fd["distilled", 1], "a short run gains much by a second evaluation"
if longer is not trained:
    assert (
        fd[LONGER, 1]
        < 1.6 * fd["teacher, DDIM", 50]
        < fd["regression onto the next state", 1] / 5
    )
panels = {"Training images": images, "Teacher, 50 evaluations": sets["teacher, DDIM", 50]}
panels |= {f"{name}, {k}": sets[name, k] for name in dict.fromkeys(("distilled", LONGER)) for k in (1, 2)}
plots.display(
    plots.samples(
        {name: data.to_float(made[:36]) for name, made in panels.items()}, columns=12, rows=3
    ),
    "Training images, the teacher's, and two students' in one and in two evaluations.",
)

# %% [markdown]
# Try it. Choose a noise level and an image: the student's jump stands beside the teacher's walk from the same point. At high σ neither
# finds the clean image back; which is no fault, as it is not in the noise. They should find the *same* image.

# %%
jump_explorer(longer, teacher, held_out)

# %% [markdown]
# **Question.** Why does a second evaluation help the student of the short run so much, and the longer-trained one so little?
#
# <details><summary>Answer</summary>
#
# At high noise the short run has not yet learned to tell all paths apart, and its jump is partly the average of several. Added noise of a middle level
# hides such faults and keeps the coarse shape. From there few images are possible, and even a poor student jumps well. A
# well-trained student has less to repair.
#
# </details>
#
# ## Larger, and in colour
#
# Nothing here knows about digits. Two more pairs of teacher and student come with the course, of 32×32 images: clothes (Fashion-MNIST) and CIFAR-10.
# One CPU core trained each teacher from nothing in an hour and a half, and each student from its teacher's weights in less than two. The students' objective, SCT, is
# lesson 5's: a bootstrap like this lesson's, which asks the training images where a path leads instead of the teacher. Every column starts from one noise.

# %%
for name in ("fashion_mnist", "cifar10"):
    walker = load_teacher(f"{name}_teacher")
    jumper = shipped_student(name, walker)
    rows = {"teacher, 50 steps": draw_teacher(walker, 12, 50, "ddim", walker.image_shape, 0)}
    rows |= {f"student, {k}": draw(jumper, 12, k, walker.image_shape, 0) for k in (1, 2)}
    figure, axes = plt.subplots(len(rows), 1, figsize=(8.5, 0.8 * len(rows)), layout="constrained")
    for ax, (row, made) in zip(axes, rows.items(), strict=True):
        plots.show(ax, plots.tile(data.to_float(made), 12))
        ax.set_ylabel(row, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(f"{name}: fifty evaluations, one, and two", fontsize=10)
    plots.display(figure, f"Three rows of twelve images of {name}; down a column all three agree in coarse shape.")
    ours, theirs = rows["student, 1"], rows["teacher, 50 steps"]
    assert distance(ours, theirs) < distance(ours, theirs.roll(1, 0)), "the teacher's own image, not just any"

# %% [markdown]
# Clothes come in one evaluation, in outline the teacher's own from that noise. CIFAR-10's teacher has garish colours and hardly any things: 1.8 million weights saw
# 5,000 batches of 64, where the DDPM of Ho et al. has 35.7 million and saw 800,000 of 128. A likely reason for the colours is the start of its walk, where every error of ε
# is divided by √ᾱ ≈ 0.008. Its student has the colours right. Distillation learns a teacher's map, faults and all; this student asked the images, saw 4,500 batches more, and
# starts at less noise, σ = 80. The README has the distances.
#
# ## The verdict
#
# - Regression onto the teacher's next state gives no one-step sampler, however low its error.
# - The short run of this notebook is on its way. The longer-trained student of the same recipe makes in **one** evaluation images whose distance is
#   close to that of the teacher's **fifty**, as the table says. Whether “close” is more than chance at this N is a question for lesson 6.
# - What was saved at sampling was paid before: rollouts, training, and a teacher to begin with.
#
# ## What you learned
#
# - The noise level enters as sines and cosines, and is added to every residual block, one number a channel.
# - The boundary is built in, not trained: $c_{skip} = 1$ and $c_{out} = 0$ at $\sigma_{min}$. Without it a constant would do.
# - Put a baseline beside every error. The identity map meets a bar of 0.01.
# - Consistency distillation asks for equal answers at two points of one path. The target is the student's own, at less noise, from an EMA, without gradient.
# - The exact f solves ∂f/∂t + ∇f·dx/dt = 0 on the ODE's velocity. The denoiser does not; a trained student does so from level to level only.
#
# | what | where | in `cmlib` |
# |---|---|---|
# | the U-Net, its time embedding | Ho et al. 2020 (2006.11239), app. B; Vaswani et al. 2017 (1706.03762), sec. 3.5 | `unet` |
# | f = c_skip·x + c_out·F; the four functions | Song et al. 2023 (2303.01469), eq. 5, app. C; Karras et al. 2022 (2206.00364), table 1 | `consistency` |
# | pseudo-Huber of the whole image | Song & Dhariwal 2023 (2310.14189), sec. 3.3 | `ops.pseudo_huber` |
# | endpoint regression | Luhman & Luhman 2021 (2101.02388) | `objectives.EndpointRegression` |
# | the loss; its EMA target; the algorithm | Song et al. 2023, eq. 7; eq. 8; Alg. 2 | `objectives.ConsistencyDistillation` |
# | the derivative along the path as a loss | Song et al. 2023, app. B.1 | `continuous` |
# | time inputs without fast hands | Lu & Song 2024 (2410.11081), sec. 4.1 | not used here |
# | several evaluations | Song et al. 2023, Alg. 1 | `consistency.sample` |
#
# **Next**: take the teacher away. Lesson 5, `05_ct_sct_variants.ipynb`, lets the student find its paths in the data alone.
