# %% [markdown]
# # 6 · FID and honest evaluation
#
# {badge}
#
# A student makes images. Are they as good as its teacher's? The field answers with one number, the FID, and the brief that this course grew out of
# (lesson 2) asks for a student "within ±2" of its teacher. This lesson takes that number apart: what it measures, what moves it although no image got better, and what it
# cannot see. Then it measures teacher and student so that the comparison holds.
#
# **You will be able to**
# - compute a Fréchet distance by hand, and say what it compares;
# - predict its bias from the number of images, and remove it;
# - name what must be equal before two such numbers may be compared;
# - say with a spread how far a student is from its teacher, and what that costs in evaluations;
# - judge a claim such as "FID within ±2".
#
# **Time to run** {times}.
#
# **You need** covariance matrices and eigenvalues; lessons 1 and 4 for what teacher and student are. Nothing is trained, and nothing downloaded
# except by the last cell, at profile `t4`.
# On every machine this lesson measures the digits, whose teacher, student and features come with the course.

# %% tags=["setup"]

# %%
import json
import statistics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import cmlib
from cmlib import data, evaluate, plots
from cmlib.compare import spread  # "mean ± half the range"
from cmlib.consistency import ConsistencyFunction, sample
from cmlib.exercises import check
from cmlib.ops import indexed_normal
from cmlib.pipeline import SAMPLING_SEED, Features, draw, draw_teacher, load_teacher, shipped
from cmlib.widgets import fid_explorer

images, labels = data.load("digits")  # uint8 [1500,1,8,8], the training images
held_out, held_out_labels = data.load("digits", "test")  # 297 that neither teacher nor student has seen
shape = tuple(images.shape[1:])
teacher = load_teacher("digits_teacher")
student = ConsistencyFunction.load(shipped("digits_student.safetensors")).to(teacher.device)
features = Features.of("digits", Path(), images, labels, (held_out, held_out_labels))

def table(head, rows):
    cells = [head, ["---"] * len(head), *rows]
    plots.tell("\n".join("| " + " | ".join(row) + " |" for row in cells))

# %% [markdown]
# ## A distance between two clouds
#
# A generated image has no partner among the real ones, so no pixel-by-pixel error can grade it. What can be compared is one *set* with
# another: two clouds of points. How far is one cloud from the other? Pair the points, each with one of the other cloud, so that the mean
# squared distance of the pairs is as small as it can be. That smallest value is the distance between the clouds.
#
# On a line the best pairing is known: smallest with smallest, and so on in order. For two Gaussians, the k-th point of one is then the k-th
# of the other, shifted and stretched, and the mean squared distance is
#
# $$(m-m')^2 + (s-s')^2.$$

# %%
line = torch.Generator().manual_seed(0)
a = 1.0 + 0.5 * torch.randn(100_000, generator=line)
b = 3.0 + 2.0 * torch.randn(100_000, generator=line)
paired = (a.sort().values - b.sort().values).pow(2).mean()

by_formula = (1 - 3) ** 2 + (0.5 - 2) ** 2
plots.tell(f"Paired in order: **{paired:.2f}**. The formula: (1 − 3)² + (0.5 − 2)² = **{by_formula:.2f}**.")
assert abs(paired - 6.25) < 0.15

# %% [markdown]
# In many dimensions nobody tries all pairings. One fits a Gaussian to each cloud, that is, one takes its mean vector and its covariance matrix, and uses
# the formula for Gaussians. As $(s-s')^2 = s^2 + s'^2 - 2ss'$, it reads with matrices
#
# $$d^2 = \lVert \mu-\mu'\rVert^2 + \operatorname{tr}\left(\Sigma + \Sigma' - 2\,(\Sigma\Sigma')^{1/2}\right),$$
#
# the **Fréchet distance** of two Gaussians (squared, to be exact; everybody leaves the word out). The root is the matrix's: the matrix whose
# square is $\Sigma\Sigma'$. Only its trace is needed, and a trace is the sum of the eigenvalues: take the roots of the eigenvalues
# of $\Sigma\Sigma'$, which are real and not negative, and add them up. For the same reason $\Sigma'\Sigma$ does as well.
#
# ### Your turn: the Fréchet distance
# From two sets of features, a row each. `torch.cov(x.T)` is the covariance, `torch.linalg.eigvals(m).real` are eigenvalues (clamp what
# rounding makes negative).

# %% tags=["your-turn"]
def my_frechet(real, fake):  # [N,d], [M,d] -> a number
    ...  # your code

check("06.frechet", my_frechet);

# %% tags=["solution"]
# @title Solution
def solution(real, fake):
    a, b = torch.cov(real.T), torch.cov(fake.T)
    root = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return (real.mean(0) - fake.mean(0)).pow(2).sum() + a.trace() + b.trace() - 2 * root

assert check("06.frechet", solution)

# %% [markdown]
# The library's `frechet_distance` is these lines in float64. Here it is against a case that one can do by heart: N(0, I) and N(m, s²I) in d dimensions
# are at $d\,m^2 + d\,(1-s)^2$.

# %%
def white(n, d, seed):
    """n points whose mean is exactly 0 and whose covariance is exactly I."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T

fd = evaluate.frechet_distance
found = fd(white(400, 5, 0), 0.7 + 1.5 * white(300, 5, 1))
by_heart = 5 * 0.7**2 + 5 * 0.5**2
plots.tell(f"The library: **{found:.4f}**. By heart: 5·0.7² + 5·0.5² = **{by_heart:.4f}**.")
assert abs(found - 3.7) < 1e-6 and abs(fd(white(400, 5, 0), white(300, 5, 1))) < 1e-6

# %% [markdown]
# ## Why features
#
# The distance looks at means and covariances and at nothing else. On raw pixels that is easily fooled. Draw points from the Gaussian that
# has the pixel mean and the pixel covariance of the digits:

# %%
pixels = data.to_float(images).flatten(1).double()
values, vectors = torch.linalg.eigh(torch.cov(pixels.T))
z = torch.randn(len(pixels), 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
cloud = pixels.mean(0) + z @ (vectors * values.clamp(min=0).sqrt()).T
cloud_images = data.to_uint8(cloud.float().view(-1, *shape))

both = {"digits": images, "a Gaussian with their mean and covariance": cloud_images}
plots.display(
    plots.samples({name: data.to_float(drawn) for name, drawn in both.items()}),
    "48 real digits, clear, and 48 images of the Gaussian: blurred blots, hardly a digit among them.",
)

# %% [markdown]
# So one does not compare pixels. One shows both sets to a classifier and compares what its last hidden layer says, where a
# one and a seven lie far apart and two sevens lie close. **FID** is the Fréchet distance on 2,048 features of one certain network, Inception-v3
# trained on ImageNet. Ours has 64 features of a small classifier of digits: call it `fd_digits`, never FID.

# %%
def look(drawn):
    """Features [N,64] of uint8 images."""
    return evaluate.features(features.classifier, drawn)

reference = features.reference  # look(images)
moved = held_out.roll(1, 3)
some = len(held_out)  # equally many of each
rows = {
    "other real digits": (data.to_float(held_out).flatten(1).double(), held_out),
    "the same, moved by a pixel": (data.to_float(moved).flatten(1).double(), moved),
    "the Gaussian": (cloud[:some], cloud_images[:some]),
}
far = {name: (fd(pixels, raw), fd(reference, look(drawn))) for name, (raw, drawn) in rows.items()}
table(
    ["against the training images", "on pixels", "`fd_digits`"],
    [[name, f"{on_pixels:.2f}", f"{on_features:.0f}"] for name, (on_pixels, on_features) in far.items()],
)
assert far["the Gaussian"][0] < 1.2 * far["other real digits"][0], "pixels can't tell it from digits"
assert far["the Gaussian"][1] > 5 * far["other real digits"][1], "features can"

# %% [markdown]
# On pixels the Gaussian is as good as real digits are. The features see through it. They have a blind spot of their own: real digits moved by one
# pixel of eight, which the classifier never saw in training, come out as far off as what is no digit at all.
#
# **Question.** Could a cloud of images that are no digits have distance 0 in the features, too?
#
# <details><summary>Answer</summary>
#
# Yes: any set whose features have the right mean and covariance. It is harder to make than in pixels, but the hole is the same. It also depends
# on the network: what its features ignore, the distance ignores. Features of ImageNet's classes look at textures and objects; for faces
# or X-rays they may miss what counts. Kynkäänniemi et al. 2023 (arXiv 2203.06026) lower FID by choosing images that share ImageNet's
# classes, without making any of them better.
#
# </details>

# %% [markdown]
# ## The images to be judged
#
# Now the generators. Each draws the same number of images, from the same noise, under three seeds. Beside teacher and student stand four
# that tell what a number means:
#
# - the **memoriser** hands out training images, drawn at random with repetition: its images are perfect, and it is useless;
# - the **short walk**: the teacher with a third of its steps;
# - the **denoiser**: the teacher asked once, for the average image behind pure noise. At so high a σ it does not get it: times σ, the small error
#   of its ε leaves noisy blots (lesson 2);
# - the **identity map** returns the noise itself.

# %%
n, seeds = min(profile.samples, len(images)), range(3)
steps = profile.rollout_steps
TEACHER, SHORT = f"teacher, DDIM-{steps}", f"teacher, DDIM-{steps // 3}"
ONE, TWO = "student, 1 evaluation", "student, 2 evaluations"

def noise(seed):
    return student.sigma_max * indexed_normal(SAMPLING_SEED + seed, range(n), shape)

@torch.no_grad()
def denoise(x, t):
    return teacher.denoise(x.to(teacher.device), t.to(teacher.device)).cpu()

def denoised(seed):
    return data.to_uint8(denoise(noise(seed), torch.full((n,), student.sigma_max)))

def memorised(seed):
    return images[torch.randint(len(images), (n,), generator=torch.Generator().manual_seed(seed))]

makers = {
    "memoriser": (0, memorised),
    TEACHER: (steps, lambda seed: draw_teacher(teacher, n, steps, "ddim", shape, seed)),
    SHORT: (steps // 3, lambda seed: draw_teacher(teacher, n, steps // 3, "ddim", shape, seed)),
    TWO: (2, lambda seed: draw(student, n, 2, shape, seed)),
    ONE: (1, lambda seed: draw(student, n, 1, shape, seed)),
    "denoiser": (1, denoised),
    "identity map": (0, lambda seed: data.to_uint8(noise(seed))),
}
sets = {name: [make(seed) for seed in seeds] for name, (_, make) in makers.items()}
seen = {name: [look(drawn) for drawn in three] for name, three in sets.items()}
scores = {name: [fd(reference, f) for f in three] for name, three in seen.items()}

shown = (TEACHER, SHORT, TWO, ONE, "denoiser", "identity map")
plots.display(
    plots.samples({name: data.to_float(sets[name][0]) for name in shown}),
    "Samples: the teacher's and the student's are clear, the denoiser's noisy blots, the identity map's noise.",
)

# %% [markdown]
# ## From numbers to bytes
#
# A network returns floats around [−1, 1]. Real images are bytes. Before they are compared, both must be bytes, made in the same way; a sloppy
# conversion is one reason why two people get two numbers for one model.
#
# ### Your turn: to bytes
# Return the grey levels 0 … 255 of images in [−1, 1], which may stick out a little.

# %% tags=["your-turn"]
def my_to_uint8(x):  # float, any shape -> uint8, the same shape
    ...  # your code

check("06.to_uint8", my_to_uint8);

# %% tags=["solution"]
# @title Solution
def solution(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

assert check("06.to_uint8", solution)

# %% [markdown]
# What does a mistake cost? The same images of the student, converted in four ways:

# %%
draws = [indexed_normal(SAMPLING_SEED, range(n), shape, k) for k in range(2)]
raw = sample(student, draws, student.levels(2), student.sigma_min, clip=False).cpu()
ways = {
    "clamped and rounded": data.to_uint8,
    "clamped and cut off": lambda x: ((x.clamp(-1, 1) + 1) * 127.5).to(torch.uint8),
    "taken for [0, 1]": lambda x: (x.clamp(0, 1) * 255).round().to(torch.uint8),
    "not clamped": lambda x: ((x + 1) * 127.5).round().long().remainder(256).to(torch.uint8),
}
by_way = {name: fd(reference, look(convert(raw))) for name, convert in ways.items()}
for name, value in by_way.items():
    plots.tell(f"- {name}: `fd_digits` **{value:.2f}**")

assert by_way["not clamped"] > 100 and by_way["taken for [0, 1]"] > 40
assert abs(by_way["clamped and cut off"] - by_way["clamped and rounded"]) < 1

# %% [markdown]
# The wrong range and the missing clamp are disasters. Cutting off instead of rounding darkens every image by half a grey level on average;
# these features hardly notice, others may. Nobody has to find out: round.

# %% [markdown]
# ## The bias
#
# Take real digits and other real digits, two halves of one shuffled pile. Nothing separates them but chance, so the true distance is 0. Measured
# with N images a side, it is not.
#
# How large must it be? With N images, the mean misses by a variance $\lambda_i/N$ along each eigenvector of Σ, in all $\operatorname{tr}\Sigma/N$.
# The covariance misses by some Δ, and for small Δ the second term of the distance is $\tfrac12\sum_{ij}\Delta_{ij}^2/(\lambda_i+\lambda_j)$. (In one
# dimension: $s'^2 = s^2 + \Delta$ makes $(s-s')^2 \approx (\Delta/2s)^2 = \Delta^2/4\lambda$, with $\lambda = s^2$.) For Gaussian features $\mathbb E\,\Delta_{ij}^2 = \lambda_i\lambda_j(1+\delta_{ij})/N$. Together
#
# $$\mathbb E\,d^2 \approx \frac cN, \qquad c = \operatorname{tr}\Sigma + \frac12\sum_{ij}\frac{\lambda_i\lambda_j\,(1+\delta_{ij})}{\lambda_i+\lambda_j},$$
#
# and as both sides have an error, $c\,(1/N + 1/M)$. For d equal eigenvalues that is $c = \operatorname{tr}\Sigma\,(1+\frac{d+1}4)$: the more features,
# the more bias.

# %%
def bias_coefficient(f):
    """c of the bias c/N, from features [N,d]."""
    eigenvalues = torch.linalg.eigvalsh(torch.cov(f.double().T)).clamp(min=1e-9)
    pairs = eigenvalues * eigenvalues[:, None] / (eigenvalues + eigenvalues[:, None])
    return float(eigenvalues.sum() + (pairs.sum() + pairs.diagonal().sum()) / 2)

pile = torch.cat([reference, look(held_out)])  # all 1,797 real digits
sizes = [150, 200, 300, 450, 898]
shuffle = torch.Generator().manual_seed(0)

def halves(size):
    order = torch.randperm(len(pile), generator=shuffle)
    return fd(pile[order[:size]], pile[order[-size:]])

chance = np.array([[halves(size) for size in sizes] for _ in range(12)])  # [12,5]
c = bias_coefficient(pile)
inverse = 1 / np.array(sizes)

figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
style = {"fmt": "o", "color": plots.COLOURS[0], "label": "measured, mean ± standard deviation"}
ax.errorbar(inverse, chance.mean(0), chance.std(0), **style)
ends = np.array([0, inverse[0]])
ax.plot(ends, 2 * c * ends, "--", color=plots.COLOURS[1], label="predicted, c·(1/N + 1/N)")
ax.set(xlabel="1/N, N images a side", ylabel="fd_digits", title="Real digits against real digits")
ax.legend(frameon=False)
plots.display(figure, "The distance of two halves of the real digits follows the predicted line in 1/N.")

plots.tell(
    f"c = **{c:.0f}**. With N = {sizes[-1]} a side, real digits are **{chance[:, -1].mean():.1f}** from real digits;"
    f" predicted {2 * c / sizes[-1]:.1f}."
)
ratio = chance[:, 2:].mean(0) / (2 * c * inverse[2:])
assert (abs(ratio - 1) < 0.35).all() and (chance > 0).all()

# %% [markdown]
# The formula has no free parameter. FID has 2,048 features and a bias to match: published numbers use 50,000 images, and a number from
# 10,000 is larger for the same model.
#
# Here are the generators against the training images, at several N; shading is the range over three seeds. Move N: the title says
# what each generator has there.

# %%
counts = [n // 10, n // 6, n // 4, n // 3, n // 2, 2 * n // 3, n]
against_n = {
    name: np.array([[fd(reference, f[:count]) for count in counts] for f in seen[name]])
    for name in (TEACHER, TWO, ONE, "memoriser")
}
explorer = fid_explorer(counts, against_n, "fd_digits")
explorer.controls["at"].value = counts.index(n // 3)
explorer

# %% [markdown]
# **Question.** Find how much a generator loses by being counted with a third of the images. How does it compare with the difference between
# teacher and student at equal N? What follows for a paper that counts its own model with 50,000 images and the other with 10,000?
#
# <details><summary>Answer</summary>
#
# Losing two thirds of the images costs more than lies between teacher and student, and not one image got worse. A comparison at unequal N says
# nothing, or rather it says who counted more. (Chong & Forsyth 2020 go further: c depends on the generator's own Σ, so that even at equal
# N the bias does not cancel exactly.)
#
# </details>

# %% [markdown]
# ### Your turn: infinitely many images
# As the bias is c/N, the distance of infinitely many images can be had: fit a line through the distances as a function of 1/N, and read it off at
# 1/N = 0 (Chong & Forsyth 2020 call it $\mathrm{FID}_\infty$). `np.polyfit(x, y, 1)` returns slope and intercept.

# %% tags=["your-turn"]
def my_limit(n, distance):  # tensors [k], [k] -> a number
    ...  # your code

check("06.limit", my_limit);

# %% tags=["solution"]
# @title Solution
def solution(n, distance):
    return np.polyfit(1 / n, distance, 1)[1]

assert check("06.limit", solution)

# %% [markdown]
# The library's `frechet_limit` takes all the images there are, cuts them into 1, 2, 3, … parts, and averages over the parts. For the
# memoriser we know the answer: more and more of its images have the training images' mean and covariance, so its limit is 0.

# %%
limits = {name: evaluate.frechet_limit(reference, torch.cat(three)) for name, three in seen.items()}
rows = []
for name, (limit, slope) in limits.items():
    own = bias_coefficient(torch.cat(seen[name]))
    middle = statistics.mean(scores[name])
    rows.append([name, f"{middle:.1f}", f"{limit:.1f}", f"{slope:.0f}", f"{own:.0f}"])
    assert limit < middle
table(["generator", f"`fd_digits`, N = {n}", "limit", "slope", "c of its own features"], rows)

share = bias_coefficient(reference) / len(reference)
plots.tell(f"The bias from having only {len(reference)} reference images: c/{len(reference)} = **{share:.1f}**.")
assert abs(limits["memoriser"][0]) < 4

# %% [markdown]
# Where a generator's cloud is like the reference, its slope is near its c; the formula was made for equal clouds.
#
# **Question.** The limit takes away the bias of the generated images, not that of the reference. A perfect generator of *new* digits would
# keep the last number. What does it mean if a generator's limit lies below it?
#
# <details><summary>Answer</summary>
#
# That its images resemble these training images more than other real digits do. It has learned some of what is accidental about
# them, and the distance rewards it. The memoriser is the extreme case. A distance to the training set cannot tell learning from remembering;
# a reference of images that the model has not seen can, if there are enough of them. (But read it with care: the memoriser's limit, which should be
# 0, shows how far one can be off by chance.)
#
# </details>

# %% [markdown]
# ## The protocol
#
# So a distance is a number *about* a model, a number of images, a reference, features and a rounding. The same images of the student, seen from
# four references:

# %%
references = {
    "all training images": images,
    "their first half": images[:750],
    "their second half": images[750:],
    "held-out images": held_out,
}
seen_from = {name: [fd(look(real), f) for f in seen[TWO]] for name, real in references.items()}
rows = []
for name, real in references.items():
    rows.append([name, f"{len(real)}", f"{c / len(real):.1f}", spread(seen_from[name])])
table(["reference", "its M", "c/M", f"`fd_digits` of the student, N = {n}"], rows)

assert min(seen_from["held-out images"]) > max(seen_from["all training images"])

# %% [markdown]
# Four numbers for one set of images (± is half the range over the seeds). Much of their difference is bias again, c/M from the M reference images; and the
# training images are the ones that the models know. None of the four is wrong; they answer different questions. So write down with
# each number what it belongs to, and let the computer refuse to subtract what does not belong together. `Features` keeps its part
# of the protocol for you.

# %%
def result(name, size, protocol=features.protocol):
    return {"fd": fd(reference, seen[name][0][:size]), "protocol": {**protocol, "protocol.n": size}}

def difference(a, b):
    """fd of a minus fd of b; raises ValueError where they were measured differently."""
    keys = a["protocol"].keys() | b["protocol"].keys()
    differ = sorted(k for k in keys if a["protocol"].get(k) != b["protocol"].get(k))
    if differ:
        raise ValueError(f"not comparable, these differ: {', '.join(differ)}")
    return a["fd"] - b["fd"]

apart = difference(result(TWO, n), result(TEACHER, n))
plots.tell(f"Student minus teacher, equal protocols, seed 0: **{apart:.1f}**.")
try:
    difference(result(TWO, n), result(TEACHER, n // 2))
except ValueError as error:
    print(error)
else:
    raise AssertionError("unequal N must be refused")
for key, value in features.protocol.items():
    print(f"{key:20} {value}")

# %% [markdown]
# ## Second opinions
#
# **KID** asks the same question without fitting a Gaussian. It compares all pairs of features by a kernel $k(x,y) = (x\cdot y/d+1)^3$:
# real with real, fake with fake, real with fake. By leaving each image's pair with itself out, it has no bias at any N, if the two sets are
# independent; so it may come out below 0 when their distributions are equal. What remains is scatter. (Here they are not independent: the memoriser's
# images *are* in the reference, and teacher and student were trained on it. So theirs may lie below 0 on average, too.)

# %%
few = n // 5
for name, metric in {"`fd_digits`": fd, "KID": evaluate.kernel_distance}.items():
    small = [metric(reference, part) for f in seen[TWO] for part in f.split(few)]
    whole = statistics.mean(metric(reference, f) for f in seen[TWO])
    middle, error = statistics.mean(small), statistics.stdev(small) / len(small) ** 0.5
    plots.tell(f"- {name}: **{middle:.0f} ± {error:.0f}** (standard error) at N = {few}, **{whole:.0f}** at N = {n}")
    assert (abs(middle - whole) < 4 * error) == (name == "KID"), "KID has no bias, fd_digits has one"

# %% [markdown]
# **Precision** and **recall** split the one number into two. Put a ball around each real image, out to its third-nearest real neighbour: precision
# is the share of fakes in some ball. Exchange the roles: recall is the share of reals in some ball around a fake. Low precision means
# bad images, low recall means missing ones.

# %%
rows, quality = [], {}
for name, (evaluations, _) in makers.items():
    quality[name] = [evaluate.precision_recall(reference, f) for f in seen[name]]
    precision, recall = np.mean(quality[name], axis=0)
    kid = statistics.mean(evaluate.kernel_distance(reference, f) for f in seen[name])
    numbers = [spread(scores[name]), f"{kid:.0f}", f"{precision:.2f}", f"{recall:.2f}"]
    rows.append([name, str(evaluations), *numbers])
table(["generator", "evaluations", "`fd_digits`", "KID", "precision", "recall"], rows)
plots.tell(f"N = {n}, mean of three seeds, ± half their range.")

assert all(precision == 1 for precision, _ in quality["memoriser"])
assert min(scores, key=lambda name: statistics.mean(scores[name])) == "memoriser"
assert statistics.mean(scores["memoriser"]) < 2 * bias_coefficient(reference) / n
assert statistics.mean(scores[ONE]) < statistics.mean(scores["denoiser"]) / 5

# %% [markdown]
# **Question.** The identity map makes pure noise. Why is its recall not 0?
#
# <details><summary>Answer</summary>
#
# Because its features lie far from each other, the balls around them are huge, and real images fall into them by accident. Recall
# is only worth reading next to precision. (Naeem et al. 2020, arXiv 2002.09797, repair this by counting balls around real images only.)
#
# </details>

# %% [markdown]
# ## What no distance sees
#
# The memoriser's score is the bias of the count and nothing else, its precision is perfect, its recall high. By this table it is the best generator.
# One look at each image's nearest training image gives it away.

# %%
def nearest(drawn):
    """Distance to the nearest training image in pixels [N], and which it is [N]."""
    flat = [data.to_float(x).flatten(1) for x in (drawn, images)]
    found = torch.cdist(*flat, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    return found.values, found.indices

judged = {"memoriser": sets["memoriser"][0], TEACHER: sets[TEACHER][0], TWO: sets[TWO][0]}
rows = []
for name, drawn in {"held-out real images": held_out, **judged}.items():
    gap = nearest(drawn)[0]
    rows.append([name, f"{gap.median():.2f}", f"{(gap == 0).float().mean():.0%}"])
table(["", "distance to the nearest training image, median", "exact copies"], rows)

pairs = {}
for name in ("memoriser", TWO):
    pairs[name] = data.to_float(judged[name][:8])
    pairs["nearest to " + name.split(",")[0]] = data.to_float(images[nearest(judged[name][:8])[1]])
plots.display(
    plots.sheet(pairs, [""] * 8),
    "Eight images and their nearest training images: the memoriser's are identical, the student's similar.",
)
assert nearest(judged["memoriser"])[0].max() == 0 and nearest(judged[TWO])[0].min() > 0

# %% [markdown]
# The student is no copier: it keeps about the distance that real images keep from each other.
#
# ## What quality costs
#
# A student is there to be fast. Nearly all the time goes into network evaluations, so count those; the clock should say the same.

# %%
def seconds(make):
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        make()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)

jump = seconds(lambda: draw(student, 1, 1, shape, 0))
walk = seconds(lambda: draw_teacher(teacher, 1, steps, "ddim", shape, 0))
plots.tell(
    f"For one image, the teacher makes **{steps}** times as many evaluations as one jump of the student,"
    f" and takes about **{float(f'{walk / jump:.1g}'):g}** times as long."
)

figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for names, colour, marker in (((ONE, TWO), plots.COLOURS[0], "o-"), ((SHORT, TEACHER), plots.COLOURS[1], "s--")):
    x, y = [makers[name][0] for name in names], np.array([scores[name] for name in names])
    bars = [y.mean(1) - y.min(1), y.max(1) - y.mean(1)]
    ax.errorbar(x, y.mean(1), bars, fmt=marker, color=colour, capsize=3, label=names[0].split(",")[0])
ax.axhline(statistics.mean(scores["memoriser"]), color="black", ls=":", label="memoriser: the bias at this N")
ax.set(xlabel="network evaluations an image", ylabel=f"fd_digits, N = {n}", title="Quality against cost")
ax.set(xscale="log", yscale="log")
ax.set_xticks([1, 2, steps // 3, steps], [1, 2, steps // 3, steps])
ax.minorticks_off()
ticks = [t for t in (2, 3, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500) if ax.get_ylim()[0] < t < ax.get_ylim()[1]]
ax.set_yticks(ticks, ticks)
ax.legend(frameon=False)
plots.display(
    figure,
    "The student lies near the teacher at a fraction of its evaluations; the teacher with fewer steps is worse.",
)
assert statistics.mean(scores[TWO]) < statistics.mean(scores[SHORT])

# %% [markdown]
# ## The brief's other yardstick
#
# The brief's step 5 also asks for the Euclidean distance of $f(x_t, t)$ to the clean image $x_0$, at 256 random timesteps an image. That sounds
# like a test of a one-step model. Put baselines beside it: the denoiser, and a "model" that always answers with the mean of all training images.

# %%
mean_image = data.to_float(images).mean(0, keepdim=True)
answers = {
    "student, one jump": student,
    "teacher's denoiser, once": denoise,
    "always the mean image": lambda x, t: mean_image.expand_as(x),
}
error = {
    name: evaluate.reconstruction_error(
        f, held_out[:64], teacher.process, profile.timesteps, sigma_max=student.sigma_max
    )
    for name, f in answers.items()
}
lines = {
    name: plots.binned(teacher.process.sigma(index).clamp(max=student.sigma_max), distance, 12)
    for name, (index, distance) in error.items()
}
title = f"Distance to the clean image, {profile.timesteps} timesteps an image"
plots.display(
    plots.curves(lines, "noise level σ", "‖f(x, σ) − x0‖, all pixels", title),
    "At small σ student and denoiser are near 0; at large σ the student is further off than the mean image.",
)
average = {name: float(distance.mean()) for name, (_, distance) in error.items()}
told = ", ".join(f"{name} **{value:.2f}**" for name, value in average.items())
plots.tell(f"Averaged over timesteps: {told}.")

assert average["teacher's denoiser, once"] < average["student, one jump"]
assert 0.85 < average["student, one jump"] / average["always the mean image"] < 1.15

# %% [markdown]
# By the average, the student is hardly better than a constant picture, and worse than a denoiser, which answers with averages. Is the student bad? No:
# the yardstick is. At large σ the noise hides which digit it was. A sampler must answer with *some* digit, usually another one, and its
# squared distance to $x_0$ is about twice that of the mean image. This distance rewards blur. Only at small σ, where $x_0$ can
# still be seen, does it say something about a sampler.
#
# What a consistency model promises is another thing: the same answer all along a path of the teacher's ODE. The
# **self-consistency gap** measures that.

# %%
start = indexed_normal(SAMPLING_SEED, range(64), shape, 7)
answers = {**answers, "identity map": lambda x, t: x}
del answers["always the mean image"]
gaps = {name: evaluate.self_consistency_gap(f, teacher, start, steps) for name, f in answers.items()}
title = "Self-consistency gap along the teacher's paths"
plots.display(
    plots.curves(gaps, "noise level σ", "RMS of f(x, σ) − end of the path", title, log_y=True),
    "The identity map's gap grows with σ, the denoiser's stays below it, the student's is smallest at large σ.",
)
at_top = {name: float(gap[sigma > 1].mean()) for name, (sigma, gap) in gaps.items()}
told = ", ".join(f"{name} **{value:.2f}**" for name, value in at_top.items())
plots.tell(f"Mean gap above σ = 1: {told}.")
assert at_top["student, one jump"] < 0.6 * at_top["teacher's denoiser, once"] < at_top["identity map"]

# %% [markdown]
# Here the order is right: from high noise, one jump of the student ends near where the teacher's whole walk ends, the denoiser does not. (At the left
# end the denoiser's line drops out of the chart, to 0: the walk's last step *is* the denoiser. At the right end it rises, as a small error of ε there
# is multiplied by a large σ.)
#
# ## The verdict: "FID within ±2 of the teacher"
#
# Is our student within ±2? Teacher and student start from the same noise under the same seed, so compare seed by seed, and give the mean of the three differences
# an interval (95 %; with three values Student's t is 4.3). It is within ±2 if the whole interval is, outside if none of it is,
# and otherwise we do not know.

# %%
def verdict(values, baseline):
    gaps = [mine - theirs for mine, theirs in zip(values, baseline, strict=True)]
    middle, half = statistics.mean(gaps), 4.3 * statistics.stdev(gaps) / len(gaps) ** 0.5
    if max(abs(middle - half), abs(middle + half)) <= 2:
        return middle, half, "within ±2"
    if middle - half > 2:
        return middle, half, "worse by more than 2"
    if middle + half < -2:
        return middle, half, "better by more than 2"
    return middle, half, "not decided by three seeds"

def row(name, values, baseline):
    middle, half, words = verdict(values, baseline)
    return [name, f"{middle:+.1f} ± {half:.1f}", words]

rows = [row(name, scores[name], scores[TEACHER]) for name in scores if name != TEACHER]
table([f"against {TEACHER}", "difference", "verdict"], rows)

own = max(scores[TEACHER]) - min(scores[TEACHER])
plots.tell(
    f"Between seeds the teacher differs from itself by **{own:.1f}**."
    f" Its bias at N = {n} is about **{limits[TEACHER][1] / n:.1f}**."
)
assert verdict(scores["denoiser"], scores[TEACHER])[2] == "worse by more than 2"
assert own > 2, "the teacher does not stay within ±2 of itself"

# %% [markdown]
# One run against one run could have come out either way: the teacher alone moves by more than 2 when only its seed changes. More seeds
# would decide: an interval from k seeds shrinks as 1/√k, and t falls towards 2. And "±" counts a student that is *better* by more than 2 as a failure.
#
# And the brief's own student, the regression onto the teacher's next state $\hat x_r$ of lesson 4? A checkout of the course keeps the results of `cmlib demo` under
# three seeds (`benchmarks/demo_seeds.py`): its students trained anew each time, all images measured under one protocol.

# %%
kept = Path(cmlib.__file__).parents[1] / "benchmarks" / "results" / "demo_seeds.json"
runs = json.loads(kept.read_text()) if kept.exists() else []
if runs:
    names = {
        "the brief's regression, 1 evaluation": "regression_1",
        "student of the demo, 1 evaluation": "student_1",
        "student of this lesson, 1 evaluation": "shipped_student_1",
        "student of this lesson, 2 evaluations": "shipped_student_2",
    }
    fd_of = {key: [run[f"fd_digits.{key}"] for run in runs] for key in (*names.values(), "teacher_ddim50")}
    rows = [row(name, fd_of[key], fd_of["teacher_ddim50"]) for name, key in names.items()]
    table([f"against the teacher's 50 steps, N = {runs[0]['protocol.n']}", "difference", "verdict"], rows)
    assert min(fd_of["regression_1"]) - max(fd_of["teacher_ddim50"]) > 100
else:
    plots.tell("Those results come with a checkout of the course, not with this installation.")

# %% [markdown]
# The brief's student misses by hundreds: from noise it makes noise, one step less of it. The consistency models come near. For the one that
# trained longer, even these runs do not settle on which side of 2 it lies.
#
# Of course `fd_digits` is not FID, and 2 here is not 2 there. So what does ±2 mean in FID? These are published numbers for unconditional
# CIFAR-10, all with 50,000 images. (The distilled ones come from other, better teachers than DDPM; the brief has its teacher from DDPM.)

# %%
ddpm = 3.17  # Ho et al. 2020, table 1: 1,000 evaluations
published = {  # FID at 1 and at 2 evaluations
    "progressive distillation (2202.00512)": (8.34, 5.58),  # as printed in CM, table 1
    "CT (2303.01469)": (8.70, 5.83),
    "CD with LPIPS (2303.01469)": (3.55, 2.93),
    "iCT (2310.14189)": (2.83, 2.46),
    "ECT, 400,000 updates (2406.14548)": (3.60, 2.11),
    "sCT (2410.11081)": (2.85, 2.06),
}
rows = []
for name, pair in published.items():
    inside = ["yes" if abs(value - ddpm) <= 2 else "no" for value in pair]
    rows.append([name, *(f"{value:.2f}" for value in pair), ", ".join(inside)])
table(["published FID", "1 evaluation", "2 evaluations", "within ±2 of DDPM's"], rows)
plots.tell(f"±2 around {ddpm} is from {ddpm - 2:.2f} to {ddpm + 2:.2f}: **{2 / ddpm:.0%}** of the number itself.")

# %% [markdown]
# On CIFAR-10 the claim is neither empty nor sharp: progressive distillation and CT fail it, everything else in the table passes, and among those
# it tells nothing apart. They earned it with hundreds of thousands of updates; the brief's 5,000 updates of 64 images and its regression onto $\hat x_r$ (lesson 4) are
# far from there.
#
# A claim that can be checked reads like this: *FID at 1 evaluation minus the teacher's at 50, both with 50,000 images, against the
# 50,000 training images, rounded to uint8, EMA weights, mean and range over three seeds.* Then give the student two evaluations, precision and
# recall, and the nearest neighbours beside it.
#
# ## FID itself
#
# Where torch-fidelity and its Inception weights are installed, this cell computes the first number that any FID deserves: real images against
# other real images, at the N that you will use. For your own student: `cmlib evaluate --checkpoint student.pt --fid`.

# %%
many = profile.samples
real, _ = data.load(profile.dataset, "train", many)
other, _ = data.load(profile.dataset, "test", many)
try:
    fid = evaluate.FID(real)
    for part in other.split(100):
        fid.add(part)
    plots.tell(
        f"FID of {len(other)} real images of {profile.dataset} against {len(real)} others: **{fid.distance():.1f}**."
    )
except ValueError as error:
    print(error)

# %% [markdown]
# ## What you learned
#
# - FID is the Fréchet distance of two Gaussians fitted to features: means, covariances, and the trace of a matrix root. What the features miss, it
#   misses; a memoriser it loves.
# - It is biased by c/N, and c follows from the covariance. Compare at equal N, or extrapolate to 1/N = 0. KID has no such bias.
# - A number belongs to a protocol: N, reference, features, rounding, weights, seeds. Different protocols are not subtracted.
# - Distance to $x_0$ rewards blur. The self-consistency gap and a distance between sets grade a sampler.
# - A difference without a spread is no result. *One* run cannot decide "within ±2" where the teacher alone scatters by more; an interval
#   over paired seeds can.
#
# | what | where | in `cmlib` |
# |---|---|---|
# | Fréchet distance of Gaussians | Dowson & Landau 1982; Heusel et al. 2017 (arXiv 1706.08500), eq. 6 | `evaluate.frechet_distance` |
# | its bias, and the limit of many images | Chong & Forsyth 2020 (1911.07023) | `evaluate.frechet_limit` |
# | KID | Bińkowski et al. 2018 (1801.01401), eq. 4 | `evaluate.kernel_distance` |
# | precision and recall | Kynkäänniemi et al. 2019 (1904.06991), eq. 1–2 | `evaluate.precision_recall` |
# | resizing and rounding move FID | Parmar et al. 2022 (2104.11222) | `data.to_uint8` |
# | self-consistency | Song et al. 2023 (2303.01469), sec. 3 | `evaluate.self_consistency_gap` |
# | FID of the course's models | | `cmlib evaluate --fid`, `pipeline.Features` |
#
# **Next**: this is the last lesson. `07_failure_clinic.ipynb` shows what breaks a consistency model, and where to look first. Compare the objectives of lesson 5
# under one budget with `cmlib compare`, or go back to `01_forward_process.ipynb` and find out how much shorter it has become.
