# %% [markdown]
# # 1 · The forward process
#
# {badge}
#
# A diffusion model learns to undo noise, and a consistency model learns to undo all of it in one jump. Both need to know
# exactly what they undo. This lesson is about that: how an image becomes noise.
#
# **You will be able to**
# - write down q(x_n | x_0), the image after n steps of noise, and say why one formula replaces n steps;
# - read a noise schedule, and translate between a chain index n and a noise level σ;
# - say what the score is, and move a point along the probability-flow ODE with it;
# - say what a consistency model is, as a property of that ODE.
#
# **Time to run** {times}.
#
# **You need** Gaussians and variances, a little PyTorch. No GPU, no download, and nothing is trained here.

# %% tags=["setup"]

# %%
import matplotlib.pyplot as plt
import torch

from cmlib import data, plots
from cmlib.exercises import check
from cmlib.ops import indexed_normal
from cmlib.oracle import Gaussian, GaussianMixture
from cmlib.process import DDPM
from cmlib.widgets import schedule_explorer

torch.manual_seed(0)
images, labels = data.load("digits")
x0 = data.to_float(images[:1])  # [1,1,8,8], pixels in [-1, 1]

# %% [markdown]
# ## One step
#
# A step shrinks the image a little and adds a little Gaussian noise:
#
# $$x_n = \sqrt{1-\beta_n}\;x_{n-1} + \sqrt{\beta_n}\;\varepsilon_n, \qquad \varepsilon_n \sim \mathcal N(0, I).$$
#
# Why shrink? Variances of independent things add, and a factor $a$ multiplies a variance by $a^2$. So if $x_{n-1}$ has variance 1,
# then $x_n$ has $(1-\beta_n) + \beta_n = 1$ again. Without shrinking, the noise would pile up and the numbers with it.
#
# Let us do it the slow way first: one pixel, many copies, step after step.

# %%
chain = DDPM.linear()  # the schedule of Ho et al. 2020
n, pixel = 300, 0.8
x = torch.full((20_000,), pixel)
for beta in chain.betas[: n + 1]:
    x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn_like(x)

mean, variance = x.mean(), x.var()
plots.tell(f"At n = {n} the pixel {pixel} has mean **{mean:.3f}** and variance **{variance:.3f}**.")

# %% [markdown]
# ## All steps at once
#
# Put one step into the next, with $\alpha = 1-\beta$ (the papers count steps from 1, the library's index n from 0):
#
# $$x_2 = \sqrt{\alpha_2}\left(\sqrt{\alpha_1}\,x_0 + \sqrt{1-\alpha_1}\,\varepsilon_1\right) + \sqrt{1-\alpha_2}\,\varepsilon_2.$$
#
# The image is multiplied by $\sqrt{\alpha_1\alpha_2}$. The two noises are independent, so together they are one Gaussian of variance
# $\alpha_2(1-\alpha_1) + (1-\alpha_2) = 1 - \alpha_1\alpha_2$. The same happens at every further step. With
# $\bar\alpha_n = \prod_{m\le n}(1-\beta_m)$,
#
# $$q(x_n \mid x_0) = \mathcal N\!\left(\sqrt{\bar\alpha_n}\,x_0,\; (1-\bar\alpha_n)\,I\right).$$
#
# ### Your turn: what is left of the image
# Return $\bar\alpha$ for every step, from all the β.

# %% tags=["your-turn"]
def my_alpha_bar(betas):  # [T] -> [T]
    ...  # your code

check("01.alpha_bar", my_alpha_bar);

# %% tags=["solution"]
# @title Solution
def solution(betas):
    return torch.cumprod(1 - betas, dim=0)

assert check("01.alpha_bar", solution)

# %% [markdown]
# ### Your turn: jump to step n
# Return $x_n$ from the clean image, unit noise and the number $\bar\alpha_n$. Watch which of the two factors needs a root.

# %% tags=["your-turn"]
def my_marginal(x0, eps, alpha_bar):  # [B,C,H,W], [B,C,H,W], a number -> [B,C,H,W]
    ...  # your code

check("01.marginal", my_marginal);

# %% tags=["solution"]
# @title Solution
def solution(x0, eps, alpha_bar):
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps

assert check("01.marginal", solution)

# %% [markdown]
# The library has it as `perturb`. Does the jump agree with the slow walk above?

# %%
ab = chain.alpha_bar[n]
plots.tell(f"The formula says mean **{ab.sqrt() * pixel:.3f}** and variance **{1 - ab:.3f}**.")

assert abs(x.mean() - ab.sqrt() * pixel) < 0.03 and abs(x.var() - (1 - ab)) < 0.03
eps = indexed_normal(0, [0], x0.shape[1:])
torch.testing.assert_close(chain.perturb(x0, eps, torch.tensor([n])), ab.sqrt() * x0 + (1 - ab).sqrt() * eps)

# %% [markdown]
# ## Schedules
#
# A schedule is the list of the β. What counts is the $\bar\alpha$ that it gives: how fast the image fades. Three are in use here:
# **linear** (β grows evenly), **cosine** (made so that $\bar\alpha$ follows a squared cosine), and **cosine-linear** (β goes from the
# linear one's first value to its last along a cosine ramp).

# %%
chains = [DDPM.linear(), DDPM.cosine_linear(), DDPM.cosine()]
steps = torch.linspace(0, chain.T - 1, 7).long()
rows = {c.name: c.perturb(x0.repeat(7, 1, 1, 1), eps.repeat(7, 1, 1, 1), steps) for c in chains}
plots.display(
    plots.sheet(rows, [f"n = {k}" for k in steps.tolist()]),
    "One digit at seven steps under three schedules: the linear one destroys it first, the cosine one last.",
)

# %% [markdown]
# Now look at all of them. Choose a schedule, then move along the chain (click the slider and use the arrow keys). The black line is
# the chosen schedule, the dot is where you are.

# %%
schedule_explorer(x0[0])

# %% [markdown]
# **Question.** Find the step at which you stop recognising the digit, under the linear and under the cosine schedule. The steps differ a
# lot. What is the same?
#
# <details><summary>Answer</summary>
#
# σ (nearly). Whether you recognise the digit depends on how much noise there is relative to the image, and on nothing else.
# The index n is only a name for a noise level, and each schedule gives different names. The linear chain spends many steps where nothing
# is left to see; that is why Nichol and Dhariwal made the cosine one.
#
# </details>

# %% [markdown]
# ## What σ means
#
# So let us name a noise level by what it is. Divide $x_n$ by $\sqrt{\bar\alpha_n}$, and the image has its full size again:
#
# $$\frac{x_n}{\sqrt{\bar\alpha_n}} = x_0 + \sigma_n\,\varepsilon.$$
#
# σ is the standard deviation of the noise in the units of the pixels. Its square is one over the signal-to-noise ratio (for data
# of unit variance). The papers on consistency models work in these coordinates, after Karras et al. (EDM).
#
# ### Your turn: σ
# Return $\sigma_n$ from $\bar\alpha_n$.

# %% tags=["your-turn"]
def my_sigma(alpha_bar):  # a number in (0, 1) -> a number
    ...  # your code

check("01.sigma", my_sigma);

# %% tags=["solution"]
# @title Solution
def solution(alpha_bar):
    return ((1 - alpha_bar) / alpha_bar).sqrt()

assert check("01.sigma", solution)

# %% [markdown]
# `to_edm` converts a state and its index; `index` is the way back, and takes fractional indices where σ lies between two steps.

# %%
at = torch.tensor([n])
x_edm, sigma = chain.to_edm(chain.perturb(x0, eps, at), at)

torch.testing.assert_close(x_edm, x0 + sigma * eps, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(chain.index(sigma), torch.tensor([float(n)]), rtol=0, atol=0.01)
one = torch.ones(1)
plots.tell(
    f"The linear chain runs from σ = **{chain.sigma_min:.3g}** to **{chain.sigma_max:.0f}**; at n = {n}, σ = {sigma.item():.2f}."
    f" It reaches σ = 1 at n = **{chain.index(one).item():.0f}**,"
    f" the cosine chain at n = **{chains[2].index(one).item():.0f}**."
)

# %% [markdown]
# ## From steps to time
#
# Make the steps ever smaller: give the n-th of them $\beta_n = \beta(t)\,\mathrm dt$. As
# $\sqrt{1-\beta\,\mathrm dt} \approx 1 - \tfrac12\beta\,\mathrm dt$, the chain becomes a **stochastic differential equation** (SDE):
#
# $$\mathrm dx = -\tfrac12\beta(t)\,x\,\mathrm dt + \sqrt{\beta(t)}\,\mathrm dW.$$
#
# In the coordinates of σ nothing shrinks, and it is simpler still. Take σ itself as the time: over a step from σ to σ' noise of variance
# $\sigma'^2 - \sigma^2$ is added, and as $\mathrm d\sigma^2 = 2\sigma\,\mathrm d\sigma$, this is $\mathrm dx = \sqrt{2\sigma}\,\mathrm dW$, noise alone.
#
# To see what happens we need data whose distribution we know at *every* noise level. A Gaussian mixture is such data: adding noise to
# $\mathcal N(\mu, s^2)$ gives $\mathcal N(\mu, s^2+\sigma^2)$. `GaussianMixture` is our **oracle**: nothing about it is learned.

# %%
mixture = GaussianMixture(means=torch.tensor([[-1.0], [0.4], [1.2]]), std=0.12)
clean = mixture.sample(4_000, torch.Generator().manual_seed(0))  # [4000,1]
sigmas = torch.logspace(-2, 0.5, 120)  # ascending

walk = [clean + sigmas[0] * torch.randn_like(clean)]
for before, after in zip(sigmas, sigmas[1:], strict=False):
    walk.append(walk[-1] + (after**2 - before**2).sqrt() * torch.randn_like(clean))
walk = torch.stack(walk)  # [120,4000,1]

expected = (clean.var() + sigmas[-1] ** 2).sqrt()
plots.tell(
    f"At σ = {sigmas[-1]:.2f} their standard deviation is **{walk[-1].std():.2f}**;"
    f" variances add up to **{expected:.2f}**."
)
assert abs(walk[-1].std() / expected - 1) < 0.05

# %% [markdown]
# ## The score
#
# The **score** is $\nabla_x \ln p_\sigma(x)$, the direction in which noisy data gets denser. It is all that one needs to go back
# from noise, and what a diffusion model learns.
#
# ### Your turn: the score of a Gaussian
# Data $\mathcal N(\mu, s^2)$, noise of level σ added to it. Differentiate the log-density of the sum.

# %% tags=["your-turn"]
def my_score(x, mean, std, sigma):  # any shape, numbers -> x's shape
    ...  # your code

check("01.score", my_score);

# %% tags=["solution"]
# @title Solution
def solution(x, mean, std, sigma):
    return (mean - x) / (std**2 + sigma**2)

assert check("01.score", solution)

# %% [markdown]
# The oracle agrees, and so does autograd, which differentiates the log-density and knows no formula of ours. And there is a gift, **Tweedie's
# formula**: the score tells the average clean image behind a noisy one,
#
# $$D(x, \sigma) = \mathbb E[x_0 \mid x] = x + \sigma^2\,\nabla_x \ln p_\sigma(x).$$
#
# Some texts print it with a minus sign. Here is the test: average the clean points behind all the noisy ones near some x.

# %%
point = torch.linspace(-3, 3, 50)[:, None].requires_grad_()
level = torch.full((50,), 0.5)
mixture.log_prob(point, level).sum().backward()
torch.testing.assert_close(mixture.score(point.detach(), level), point.grad, rtol=1e-3, atol=1e-4)

single = Gaussian(torch.zeros(1), 0.5)
torch.testing.assert_close(single.score(point.detach(), level), -point.detach() / (0.5**2 + 0.5**2))

# %%
x0s = mixture.sample(400_000, torch.Generator().manual_seed(1))
noisy = x0s + 0.5 * torch.randn_like(x0s)
near = (noisy - 0.1).abs() < 0.02
told = mixture.denoise(torch.tensor([[0.1]]), torch.tensor([0.5])).item()

plots.tell(
    f"The {near.sum()} clean points behind x = 0.1 at σ = 0.5 average **{x0s[near].mean():.3f}**,"
    f" Tweedie's formula says **{told:.3f}**."
)
assert abs(x0s[near].mean() - told) < 0.05

# %% [markdown]
# **Question.** Is the average clean image a good guess of the clean image when σ is large?
#
# <details><summary>Answer</summary>
#
# In squared error it is the best there is, and yet it may be like no image at all. At large σ any data point may lie behind x, so the
# average is a grey blur between all of them. That is why one evaluation of a denoiser makes no image, and why diffusion models take
# many small steps. A consistency model does jump in one evaluation, but not to the average: to the end of a path. Which path comes next.
#
# </details>

# %% [markdown]
# ## The probability-flow ODE
#
# The SDE moves each point at random. There is also a *deterministic* motion under which the whole cloud has the same density at every σ.
# Three lines give it. $p_\sigma$ is the data's density blurred by $\mathcal N(0, \sigma^2)$, so it spreads like heat,
# $\partial p/\partial(\sigma^2) = \tfrac12\nabla^2 p$, or $\partial_\sigma p = \sigma\,\nabla\cdot(\nabla p) = \nabla\cdot(p\;\sigma\nabla\ln p)$. Mass that moves with
# a velocity v obeys $\partial_\sigma p = -\nabla\cdot(p\,v)$. Compare the two, and use Tweedie's formula for the last step:
#
# $$\frac{\mathrm dx}{\mathrm d\sigma} = v = -\sigma\,\nabla_x \ln p_\sigma(x) = \frac{x - D(x,\sigma)}{\sigma}.$$
#
# This is the **probability-flow ODE**. Read it downwards: as σ falls, points move *along* the score, to the data.
#
# ### Your turn: the velocity
# Return dx/dσ from the score.

# %% tags=["your-turn"]
def my_velocity(x, score, sigma):  # x and score of one shape, a number -> that shape
    ...  # your code

check("01.velocity", my_velocity);

# %% tags=["solution"]
# @title Solution
def solution(x, score, sigma):
    return -sigma * score

assert check("01.velocity", solution)

# %% [markdown]
# Start from the cloud at the highest σ and follow the ODE down. `ode_step` takes one step; `heun` uses the velocity at both its ends.

# %%
paths = [walk[-1]]
for t, r in zip(sigmas.flip(0), sigmas.flip(0)[1:], strict=False):
    paths.append(mixture.ode_step(paths[-1], t.expand(4_000), r.expand(4_000), "heun"))
paths = torch.stack(paths[::-1])  # ascending in σ, as `walk` is

x_axis = torch.linspace(-6, 6, 300)
density = [mixture.log_prob(x_axis[:, None], s.expand(300)).exp() for s in sigmas]
density = torch.stack(density, dim=1)  # [300,120]
shown = {"SDE: each point at random": walk[:, :8, 0], "ODE: no chance": paths[:, :8, 0]}
plots.display(
    plots.flow(sigmas, x_axis, density, shown, "Two motions, one density (grey)"),
    "Eight points over noise levels: jagged under the SDE, smooth under the ODE, in the same grey density.",
)

# %% [markdown]
# The paths look nothing alike, the clouds are the same. Here they are at three noise levels, against the exact density.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
for ax, k in zip(axes, (20, 84, 105), strict=True):
    reach = 3 * float(walk[k].std())
    for cloud, name, colour in ((walk, "SDE", plots.COLOURS[0]), (paths, "ODE", plots.COLOURS[1])):
        style = {"histtype": "step", "density": True, "color": colour, "label": name}
        ax.hist(cloud[k, :, 0], bins=50, range=(-reach, reach), **style)
    line = torch.linspace(-reach, reach, 200)
    ax.plot(line, mixture.log_prob(line[:, None], sigmas[k].expand(200)).exp(), "k:", label="exact")
    ax.set(title=f"σ = {sigmas[k]:.2g}", xlabel="x", yticks=[])
axes[0].set_ylabel("density")
axes[0].legend(frameon=False, fontsize=8)
plots.display(figure, "At three noise levels both clouds' histograms lie on the exact density.")

quantiles = torch.linspace(0.05, 0.95, 19)
apart = (walk[84, :, 0].quantile(quantiles) - paths[84, :, 0].quantile(quantiles)).abs().max()
assert apart < 0.15, "the two clouds must agree"

# %% [markdown]
# ## What a consistency model is
#
# ODE paths never cross: from a point there is one way to go. So each point (x, σ) belongs to one path, and each path has one end. The
# function that answers with the end is the **consistency function** f(x, σ). It is the same all along a path, and at σ = 0 it is x itself.
#
# A teacher computes f by walking. A consistency model is a network that has learned the answer. The oracle knows it exactly:

# %%
far = (paths[-1, :, 0] - 5).abs().argmin()  # a path that comes from about 5
path, at = paths[19::20, far], sigmas[19::20]  # at six noise levels, [6,1]
ends = mixture.consistency(path, at)
for name, values in (("x goes", path), ("f(x, σ) is", ends)):
    told = ", ".join(f"{v:.2f}" for v in values[:, 0].flip(0).tolist())
    plots.tell(f"Down the path {name} {told}.")

assert float(ends.max() - ends.min()) < 0.02, "f is constant along a path"
assert torch.equal(mixture.consistency(path, torch.zeros(6)), path), "f(x, 0) = x"

# %% [markdown]
# ## What you learned
#
# - Noise of n steps is noise of one: $x_n = \sqrt{\bar\alpha_n}\,x_0 + \sqrt{1-\bar\alpha_n}\,\varepsilon$. Roots, because variances add.
# - A schedule only says which noise level σ has which index. σ is the noise in units of the pixels.
# - The score gives the average clean image (Tweedie, with a plus) and the velocity of an ODE that has the SDE's densities.
# - A consistency function maps any point of an ODE path to the path's end.
#
# | what | where | in `cmlib` |
# |---|---|---|
# | one step; all steps at once | Ho et al. 2020 (arXiv 2006.11239), eq. 2; eq. 4 | `process.DDPM.perturb` |
# | cosine schedule | Nichol & Dhariwal 2021 (2102.09672), eq. 17 | `process.DDPM.cosine` |
# | the SDE; its probability-flow ODE | Song et al. 2021 (2011.13456), eq. 11; eq. 13 | `process.DDPM.velocity` |
# | both in σ; score from a denoiser | Karras et al. 2022 (2206.00364), eq. 1; eq. 3 | `process.EDM`, `process.ode_step` |
# | Tweedie's formula | Efron 2011, eq. 1.4 | `oracle.GaussianMixture.denoise` |
# | consistency function | Song et al. 2023 (2303.01469), sec. 3 | `oracle.GaussianMixture.consistency` |
#
# **Next**: nobody hands us the score of real images. Lesson 2, `02_teacher.ipynb`, gets it from a network.
