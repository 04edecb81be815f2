# %% [markdown]
# # 2 · The teacher
#
# {badge}
#
# Lesson 1 ended with a wish: the score of real images. Here a network learns it, by the plainest of tasks: look at a noisy image, and say
# which noise was added. Such a network is the teacher of all that follows.
#
# **You will be able to**
# - say why a network that predicts noise knows the score and the average clean image;
# - say where the loss L_DDPM comes from, and write the whole training loop;
# - read a training curve against its baselines, and tell when it has reached its plateau;
# - say why a teacher needs many evaluations for one image, and what a single one gives.
#
# **Time to run** {times}.
#
# **You need** lesson 1. No GPU is needed; at profile `t4` a pretrained teacher is downloaded.

# %% tags=["setup"]

# %%
import copy
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import torch

from cmlib import data, pipeline, plots
from cmlib.exercises import check
from cmlib.objectives import Denoising
from cmlib.ops import indexed_normal, mse
from cmlib.oracle import GaussianMixture
from cmlib.process import DDPM
from cmlib.profiles import small_unet
from cmlib.train import fit, plateaued, step_seed
from cmlib.unet import UNet
from cmlib.widgets import jump_explorer

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
images, labels = data.load(profile.dataset)
held_out, held_labels = data.load(profile.dataset, "test", limit=1000)  # never trained on
shape = tuple(images.shape[1:])
chain = DDPM.linear()
plots.tell(f"**{len(images):,}** training images, **{len(held_out):,}** held out, of shape {list(shape)}.")

# %% [markdown]
# ## Three names for one answer
#
# A noisy image is a clean one and a noise: $x_n = \sqrt{\bar\alpha_n}\,x_0 + \sqrt{1-\bar\alpha_n}\,\varepsilon$. Who knows $x_n$ and one of the
# two knows the other. So a guess of the noise *is* a guess of the image.
#
# ### Your turn: from the noise to the image
# Solve for $x_0$.

# %% tags=["your-turn"]
def my_denoised(x, eps, alpha_bar):  # x_n and a guess of its noise [B,C,H,W], a number -> [B,C,H,W]
    ...  # your code

check("02.denoised", my_denoised);

# %% tags=["solution"]
# @title Solution
def solution(x, eps, alpha_bar):
    return (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()

assert check("02.denoised", solution)

# %% [markdown]
# In the coordinates of σ, where $x = x_0 + \sigma\varepsilon$, it is shorter still. Take the average over all clean images that may lie behind $x$,
# on both sides, and use Tweedie's formula from lesson 1:
#
# $$\underbrace{\mathbb E[x_0\mid x]}_{D(x,\sigma)} = x - \sigma\,\mathbb E[\varepsilon\mid x]
#   = x + \sigma^2\,\nabla_x\ln p_\sigma(x).$$
#
# Average noise, average image, score: three names for one function.
#
# ### Your turn: from the noise to the score
# Return $\nabla_x \ln p_\sigma(x)$ in the coordinates of σ.

# %% tags=["your-turn"]
def my_score(eps, sigma):  # the average noise behind x [B,C,H,W], a number -> [B,C,H,W]
    ...  # your code

check("02.score", my_score);

# %% tags=["solution"]
# @title Solution
def solution(eps, sigma):
    return -eps / sigma

assert check("02.score", solution)

# %% [markdown]
# ## Why squared error finds the average
#
# A network that must name one answer, and pays the square of its error, pays least with the *average* of the right answers. So it is enough
# to ask for the noise that we added ourselves: nobody has to know the score in order to teach it.
#
# How well can it be done? Not perfectly, as different noises lead to one and the same $x$. Our oracle from lesson 1 knows the average
# exactly, so it shows the least loss that there is.

# %%
mixture = GaussianMixture(means=torch.tensor([[-1.0], [0.4], [1.2]]), std=0.12)
sigmas = torch.logspace(-2, 1.5, 30)
floor = []
for sigma in sigmas:
    clean, eps = mixture.sample(4_000), torch.randn(4_000, 1)
    level = sigma.expand(4_000)
    best = -sigma * mixture.score(clean + sigma * eps, level)
    floor.append(mse(best, eps).mean())
floor = torch.stack(floor)

lines = {"the exact average noise": (sigmas, floor), "zero, the lazy answer": (sigmas, torch.ones(30))}
plots.display(
    plots.curves(lines, "noise level σ", "mean squared error of ε", "Even the perfect answer has a loss"),
    "The exact answer's error falls from about that of answering zero to nearly nothing,"
    " with a bump where the three modes begin to overlap.",
)
assert floor[0] > 0.9 and floor[-1] < 0.01

# %% [markdown]
# **Question.** At which noise level is it harder to say the noise, and at which harder to say the image?
#
# <details><summary>Answer</summary>
#
# Little noise hides in the image: there the noise is hard to say, and no answer beats zero by much. Much noise *is* nearly all of $x$, so it is easy to
# say. (In between it is no straight way: at the bump the three modes begin to overlap, and which one it was becomes a question, too.) With the image it is the other way round, since the error of $D$ is σ times that of ε: $D - x_0 = -\sigma(\hat\varepsilon - \varepsilon)$. Asking for the
# noise at every level is therefore asking for the image with the weight $1/\sigma^2$: details count. And the thing asked for
# has the same size at every level, which suits a network.
#
# </details>

# %% [markdown]
# ## The loss
#
# Ho et al. did not begin with the score, but with likelihood: each reverse step $p_\theta(x_{n-1}\mid x_n)$ should be close to $q(x_{n-1}\mid x_n, x_0)$, which
# is known (lesson 3 derives it). Both are Gaussians of one variance $\varsigma_n^2$, and the KL divergence of such a pair
# is the squared distance of the means over $2\varsigma_n^2$. Both means are the same function of $x_n$ and of a noise, the true one or the guess,
#
# $$\mu = \frac{1}{\sqrt{\alpha_n}}\Big(x_n - \frac{\beta_n}{\sqrt{1-\bar\alpha_n}}\;\varepsilon\Big), \qquad \alpha_n = 1-\beta_n.$$
#
# So all that remains is the error of the guess, times a weight:
#
# $$\mathrm{KL} = \frac{\lVert\tilde\mu - \mu_\theta\rVert^2}{2\varsigma_n^2}
#   = \frac{\beta_n^2}{2\varsigma_n^2\,\alpha_n(1-\bar\alpha_n)}\,\lVert\varepsilon - \varepsilon_\theta(x_n, n)\rVert^2.$$
#
# They left the weight out, which made better images, and this is the loss of nearly all diffusion models:
#
# $$L_{\mathrm{DDPM}} = \mathbb E_{x_0,\,n,\,\varepsilon}\;
#   \big\lVert\varepsilon - \varepsilon_\theta\big(\sqrt{\bar\alpha_n}\,x_0 + \sqrt{1-\bar\alpha_n}\,\varepsilon,\; n\big)\big\rVert^2 .$$
#
# ### Your turn: the loss
# Return it for one batch, as a mean over images and pixels. `n` holds one index for each image, `alpha_bar` all ᾱ of the chain.

# %% tags=["your-turn"]
def my_loss(network, x0, eps, n, alpha_bar):  # function, images, noise, [B], [T] -> a number
    ...  # your code

check("02.loss", my_loss);

# %% tags=["solution"]
# @title Solution
def solution(network, x0, eps, n, alpha_bar):
    ab = alpha_bar[n].reshape(-1, 1, 1, 1)
    x_n = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    return (network(x_n, n) - eps).pow(2).mean()

assert check("02.loss", solution)

# %% [markdown]
# ## The whole training loop
#
# Here is all of it, in plain PyTorch: take images, a random index and a random noise for each, and let the network guess. (The network is a small U-Net;
# lesson 4 opens it.) The generator is seeded anew at every step, so that another run, or one that was interrupted, sees
# the same noise.

# %%
torch.manual_seed(0)
net = UNet.from_config(small_unet(shape, (16, 32), dropout=0.0)).to(device)
twin = copy.deepcopy(net)
updates = min(profile.distill_updates, 300)

optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-4), []
for step, batch in zip(range(updates), data.batches(images, 32), strict=False):
    generator = torch.Generator().manual_seed(step_seed(0, step, 0))
    x0 = batch["x0"].to(device)
    n = torch.randint(chain.T, (len(x0),), generator=generator).to(device)
    eps = torch.randn(x0.shape, generator=generator).to(device)
    loss = (net(chain.perturb(x0, eps, n), n) - eps).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

recent = sum(losses[-10:]) / 10
plots.tell(
    f"Answering zero costs 1. Our network began at **{losses[0]:.2f}**;"
    f" the last ten of {updates} updates average **{recent:.2f}**."
)
assert recent < 0.7

# %% [markdown]
# `train.fit` is that loop, plus what a long run needs: warm-up, a moving average of the weights, checkpoints from which a killed run goes on
# exactly, half precision, a stop at the first NaN. What is trained is the *objective* that one hands to it; here it is `Denoising`, the loss above. Same
# start, same seed: the losses must agree.

# %%
_, history = fit(
    twin, Denoising(chain), lambda start: data.batches(images, 32, 0, start), steps=10,
    lr=1e-3, schedule="constant", every=1,
)  # fmt: skip
apart = max(abs(row["loss"] / loss - 1) for row, loss in zip(history, losses, strict=False))
plots.tell(f"Over ten updates the two runs' losses differ by at most **{apart:.1g}**, relatively.")
assert apart < (1e-3 if device == "cpu" else 0.05)

# %% [markdown]
# ## A teacher that took longer
#
# A good teacher takes many times as many updates as we have patience for. Such a one comes with the course, or, at profile `t4`, from the hub:
# `load_teacher` reads any folder or hub id that diffusers' `DDPMPipeline` can. How good is it, on images that it has never seen?

# %%
teacher = pipeline.load_teacher(profile.teacher, shape)
device = teacher.device
errors = {
    "the teacher": pipeline.epsilon_error(teacher.process, teacher.unet, held_out),
    "our network": pipeline.epsilon_error(chain, net.eval(), held_out),
    "answering zero": 1.0,
}
millions = sum(p.numel() for p in teacher.unet.parameters()) / 1e6
plots.tell(
    f"Teacher `{profile.teacher}`, {millions:.2f} million parameters."
    f" Held-out errors: {', '.join(f'{name} **{error:.3f}**' for name, error in errors.items())}."
)
assert errors["the teacher"] < errors["our network"] < 1

# %% [markdown]
# One number hides where it is good. Here it is by noise level, as an error of the noise and as an error of the image. Each has the lazy answers
# beside it: zero for the noise, which is $x$ itself for the image; and the mean of all training images.

# %%
x0 = data.to_float(held_out[:50]).to(device)
mean_image = data.to_float(images[:2000]).mean(0, keepdim=True).to(device)
noise = indexed_normal(0, range(len(x0)), shape).to(device)
levels = torch.logspace(-1.9, 2.1, 11)
of_eps, of_image = [], []
for sigma in levels.tolist():
    level = torch.full((len(x0),), sigma, device=device)
    denoised = teacher.denoise(x0 + sigma * noise, level, clip=False)
    of_image.append(mse(denoised, x0).mean().cpu())
    of_eps.append(of_image[-1] / sigma**2)
of_eps, of_image = torch.stack(of_eps), torch.stack(of_image)
of_mean = mse(mean_image, x0).mean().cpu().expand(11)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
axes[0].loglog(levels, of_eps, color=plots.COLOURS[0], label="the teacher")
axes[0].loglog(levels, torch.ones(11), "--", color=plots.COLOURS[1], label="zero")
axes[1].loglog(levels, of_image, color=plots.COLOURS[0], label="the teacher")
axes[1].loglog(levels, levels**2, "--", color=plots.COLOURS[1], label="x itself")
axes[1].loglog(levels, of_mean, ":", color=plots.COLOURS[2], label="the mean image")
axes[1].set_ylim(top=10 * float(of_image.max()))
for ax, what in zip(axes, ("noise ε", "image"), strict=True):
    ax.set(xlabel="noise level σ", ylabel="mean squared error", title=f"Error of the {what}")
    ax.legend(frameon=False)
plots.display(
    figure,
    "The error of the noise falls with σ; that of the image rises, at last above the mean image's.",
)

# %%
plots.tell(
    f"At σ = {levels[-1]:.0f} the noise is right to **{of_eps[-1] ** 0.5:.3f}** (RMS). Times σ, that is"
    f" **{of_image[-1] ** 0.5:.2f}** in the image; the mean image is wrong by **{of_mean[-1] ** 0.5:.2f}**."
)
assert of_eps[0] < 1 and of_eps[-1] < 0.001 and of_image[3] < levels[3] ** 2

# %% [markdown]
# Look at the right end. The best answer there is the mean image, but the teacher misses it, though its noise is nearly right: times σ, a small error of the
# noise is a large one of the image. Remember this; the students of lesson 4 are built so that it doesn't happen to them.

# %% [markdown]
# ## Fine-tuning
#
# This course grew out of a **brief**, a recipe for a one-step student: fine-tune a DDPM teacher of CIFAR-10 on a "cosine-linear" schedule, cache
# 200,000 of its pairs at δ = 1, one step apart (lesson 3), regress the student onto them in 5,000 updates of 64 to a mean squared error below 0.01
# (lesson 4), and expect an FID within ±2 of the teacher's (lesson 6). The lessons follow it, and say where it goes wrong.
#
# So suppose that we want the teacher on that schedule. The network knows noise levels by their index, and on the new chain an index means another noise level. So the error is high at first, and training should bring it down.
#
# Before we train, a baseline that costs nothing: leave the network as it is, and *translate* each new index into the old one of the same σ.

# %%
new = DDPM.cosine_linear()

class Translated(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, n):
        return self.unet(x, teacher.process.index(new.sigma(n)))

before = pipeline.epsilon_error(new, teacher.unet, held_out)
translated = pipeline.epsilon_error(new, Translated(teacher.unet), held_out)
plots.tell(f"On the new chain its error is **{before:.4f}**; with translated indices **{translated:.4f}**.")
assert translated < before

# %% [markdown]
# Three things make a fine-tuning careful.
#
# - **Warm-up.** Adam divides each step by the gradient's recent size, which at first it does not know. So the step size begins near 0 and
#   rises linearly to its peak.
# - **A moving average** (EMA) of the weights. Single updates are noisy; their average is better, and it is what we keep.
# - **The plateau.** Stop when the *held-out* error has brought nothing new for a few evaluations. The training error is no guide, as it falls
#   by memorising, too.

# %%
def measure(step, average):
    parts = {"held_out": held_out, "train": images[: len(held_out)]}
    return {name: pipeline.epsilon_error(new, average, part) for name, part in parts.items()}

live = copy.deepcopy(teacher.unet).requires_grad_(True)
average, history = fit(
    live, Denoising(new), lambda start: data.batches(images, 32, 0, start), updates,
    lr=2e-4, schedule="constant", warmup=updates // 4, ema=0.99,
    every=40, on_every=measure,
    stop=lambda history: plateaued([row["held_out"] for row in history], patience=2),
)  # fmt: skip

# %%
x = [0] + [row["step"] for row in history]
start = {"held_out": before, "train": pipeline.epsilon_error(new, teacher.unet, images[: len(held_out)])}
figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name, colour, mark in (("held_out", plots.COLOURS[0], "o-"), ("train", plots.COLOURS[1], "s--")):
    y = [start[name], *(row[name] for row in history)]
    ax.plot(x, y, mark, color=colour, label=name.replace("_", " "))
ax.axhline(translated, color="black", linestyle=":", label="translated, not trained (held out)")
ax.set(xlabel="updates", ylabel="mean squared error of ε", title="Fine-tuning to another schedule")
ax.legend(frameon=False)
plots.display(figure, "Both errors fall steeply at first, then flatten near the translated teacher's.")

ended = history[-1]["step"]
stopped = "it stopped at its plateau" if ended < updates else "that was all we gave it"
live_error = pipeline.epsilon_error(new, live.eval(), held_out)
last = history[-1]
plots.tell(
    f"{ended} updates; {stopped}. Held out: **{before:.4f}** before, **{last['held_out']:.4f}** after"
    f" (**{live_error:.4f}** without the moving average), {translated:.4f} by translation."
    f" On training images **{last['train']:.4f}**. Answering zero: 1."
)
assert last["held_out"] < before and last["train"] < 1.05 * last["held_out"]

# %% [markdown]
# **Question.** Was the fine-tuning worth it?
#
# <details><summary>Answer</summary>
#
# Compare with the right thing. Against the teacher *before*, the gain looks great. Against the translated teacher there is little or none: training
# has mostly taught the network the new names of noise levels that it knew. Without that baseline we would have been proud of
# nothing. So from here on the teacher stays as it came, and noise levels are named by σ, which is the same on every chain.
#
# </details>

# %% [markdown]
# ## From noise to images
#
# Now let the teacher walk: from noise, along the probability-flow ODE, in k steps (this is DDIM). Each step is one evaluation of the network. We
# measure a **Fréchet distance** between the generated images and the training images: small is good. Lesson 6 says what it is; for now you need to
# know one thing, that not even real images score zero. So we draw training images again, at random, and score them, too.

# %%
count = min(profile.samples, 1_500) // 2
kept = Path(mkdtemp())  # where no classifier is shipped, one is trained
features = pipeline.Features.of(profile.dataset, kept, images, labels, (held_out, held_labels))
fd = f"fd_{features.dataset}"
steps = {"50 steps": 50, "10 steps": 10, "5 steps": 5, "2 steps": 2, "1 step": 1}
sets = {name: pipeline.draw_teacher(teacher, count, k, "ddim", shape, seed=0) for name, k in steps.items()}
sets["noise itself"] = data.to_uint8(indexed_normal(1, range(count), shape))
again = torch.randint(len(images), (count,), generator=torch.Generator().manual_seed(0))
sets["training images again"] = images[again]
distances = {name: features.distance(fakes) for name, fakes in sets.items()}
plots.display(
    plots.bars(distances, f"{fd}, N = {count} (lower is better)", "The teacher's images by steps"),
    "With 50 steps the distance is near that of training images; with 1 step it is near noise's.",
)
others = []
for seed in range(1, 6):
    again = torch.randint(len(images), (count,), generator=torch.Generator().manual_seed(seed))
    others.append(features.distance(images[again]))
plots.tell(f"Five more draws of training images: from **{min(others):.1f}** to **{max(others):.1f}**.")
order = [distances[name] for name in steps]
assert order[0] < order[1] < order[2] < min(order[3:])

# %%
shown = {name: data.to_float(sets[name][:8]) for name in steps}
plots.display(
    plots.sheet(shown, [""] * 8),
    "Eight images in each of five rows: sharp at 50 steps, much alike and blurred at 2, noise at 1.",
)

# %% [markdown]
# With many steps, sharp images; with two, blurs that are much alike; with one, noise. Two surprises in the chart: two steps score worse than noise,
# as the distance compares how much images differ, too, and these hardly do; and fifty steps can score like real images or better, as another draw of
# those moves the number by as much. The noise has a dull reason: the usual spacing of k steps over
# the chain takes the indices 0, T/k, 2T/k, …, so for k = 1 the only index is 0. The teacher was told "almost no noise here", and
# took almost none away. Whoever needs few steps must start at the top.
#
# But the blur has a deep reason. Two steps are one jump from the middle of the chain, and a last touch at index 0.

# %% [markdown]
# ## Why one evaluation gives a blur
#
# One evaluation of a denoiser gives $D(x,\sigma)$, the *average* of all clean images that may lie behind x. The law of total variance says what an
# average loses:
#
# $$\underbrace{\operatorname{Var}(x_0)}_{\text{contrast of the images}} = \underbrace{\operatorname{Var}(D)}_{\text{contrast of the averages}}
#   + \underbrace{\mathbb E\lVert x_0 - D\rVert^2}_{\text{the error}}.$$
#
# The best guess in squared error has less contrast than the images have, by exactly its error. Let us test this, beside the walk from the same points.

# %%
sigma, some = 2.0, data.to_float(images[:150]).to(device)
x = some + sigma * indexed_normal(3, range(len(some)), shape).to(device)
once = teacher.denoise(x, torch.full((len(x),), sigma, device=device))
walked = teacher.walk(x, sigma, 12)

def contrast(y):
    return float(y.var(0).mean())

def error(y):
    return float(mse(y, some).mean())

plots.tell(f"At σ = {sigma:.0f} the images' variance is **{contrast(some):.3f}**.")
both = contrast(once) + error(once)
plots.tell(f"One evaluation: variance {contrast(once):.3f} + error {error(once):.3f} = **{both:.3f}**.")
plots.tell(f"A walk of 12 steps: variance **{contrast(walked):.3f}**, error **{error(walked):.3f}**.")
assert abs(both - contrast(some)) < 0.1 * contrast(some)
assert error(once) < error(walked) and contrast(once) < 0.9 * contrast(walked)

# %% [markdown]
# So the blur is *closer* to the true image than the walk's sharp picture is. It has to be: the walk commits itself to one of the
# possible images, and often to another than the one that we began with. Who wants the smallest squared error gets a blur; who wants an image must commit.
#
# See for yourself. Move the noise level with the arrow keys, and compare the denoiser's one jump with the walk. Where do they begin to differ?
# Where does the walk end at an image that is sharp, and is another one?

# %%
jump_explorer(None, teacher, held_out)

# %% [markdown]
# ## What you learned
#
# - Average noise, average image and score are one function. Squared error on noise that we added ourselves teaches it.
# - $L_{\mathrm{DDPM}}$ is a loop of ten lines. Its loss does not go to 0, not even for a perfect network: read it against baselines.
# - A small error of the noise is σ times as large in the image.
# - A number needs the right baseline: the fine-tuned teacher against the translated one, a Fréchet distance against drawn-again training images.
# - One evaluation gives the average, a blur. A consistency model will give the walk's *end* in one evaluation.
#
# | what | where | in `cmlib` |
# |---|---|---|
# | the loss; with its weight | Ho et al. 2020 (arXiv 2006.11239), eq. 14; eq. 12 | `objectives.Denoising` |
# | squared error on added noise learns the score | Vincent 2011, sec. 4 | `teacher.Teacher.score` |
# | errors of ε grow with σ in the image | Karras et al. 2022 (2206.00364), sec. 5 | `teacher.Teacher.denoise` |
# | DDIM | Song et al. 2020 (2010.02502), eq. 12 | `teacher.Teacher.step` |
# | spacing of few steps | Lin et al. 2023 (2305.08891), sec. 3.3 | `process.DDPM.grid` |
# | Fréchet distance | Heusel et al. 2017 (1706.08500), eq. 6 | `evaluate.frechet_distance` |
#
# **Next**: walking costs evaluations, and a student that learns from walks needs many. Lesson 3, `03_rollout_caching.ipynb`, walks once and keeps it.
