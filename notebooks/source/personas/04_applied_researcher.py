# %% [markdown]
# # Exercise 4 · The applied researcher: a student that is its own teacher
#
# {badge}
#
# Consistency distillation asks the teacher where the path goes. You take the teacher away: the target becomes the student's own answer, two timesteps earlier,
# gradients are clamped at 1.0, and the claim to test is "validation MSE within 0.02 of the distilled baseline". Then you ask what that claim is worth.
#
# **Goal.** A fair ablation, one change against the baseline, with two rulers: the validation MSE and the distance between sets of images.
#
# **Time to run** {times}. At profile ci training is so short that only the method can be seen; take the numbers that you argue with from cpu. To write: about an
# hour and a half.
#
# **You need** lessons 4 and 5, and the Fréchet distance of lesson 6.
#
# {rubric}
#
# Digits and noise are drawn from a seed that follows from your name, so your numbers are yours alone. The grader runs your functions again, with a seed that you
# have not seen. Cells that are marked *leave this cell as it is* are put back before grading. You may add cells wherever you like.
# When you are done: restart the kernel, run all cells, save, and hand in this file.

# %% tags=["setup"]

# %% locked="imports"
import copy

import matplotlib.pyplot as plt
import torch

from cmlib import data, plots, profiles
from cmlib.course import persona4
from cmlib.exercises import check
from cmlib.handin import HandIn
from cmlib.objectives import ConsistencyDistillation
from cmlib.ops import expand_like, mse
from cmlib.pipeline import draw

# %%
learner = ""  # your name, or what your instructor knows you by

# %% locked="start"
work = HandIn("04_applied_researcher", learner)
teacher, student = persona4.world()
beginner = persona4.beginner(teacher)
process, images = teacher.process, data.load("digits")[0]
print(f"a chain of {process.T} timesteps, σ from {process.sigma_min:.2f} to {process.sigma_max:.1f}")

# %% [markdown]
# `student` comes with the course and is a good one-step sampler. `beginner` has the teacher's weights and has not been trained to jump: a fair stand-in for "the
# first hour of a run". Both are written f(x, t), with x = x0 + t·ε, and t the noise level.
#
# ## 1. Two timesteps earlier
#
# Take timestep n of the chain, and n − 2 with the *same* noise. `sigma(n)` gives the noise levels of timesteps n [B]; of n = −1, the clean image, it is 0. Below −1
# there is nothing: n − 2 stops at −1.


# %% answer="earlier"
def earlier(x0, eps, n, sigma):
    """x_t, t, x_r, r: images x0 [B,C,H,W] with noise eps at timesteps n [B], and two timesteps earlier."""
    ### BEGIN SOLUTION
    t, r = sigma(n), sigma((n - 2).clamp(min=-1))
    return x0 + expand_like(t, x0) * eps, t, x0 + expand_like(r, x0) * eps, r
    ### END SOLUTION


check("p4.earlier", earlier);
# %% grade="pairs" points=1 about="states two timesteps apart, with one noise"
batch = next(data.batches(images, 32, work.seed))["x0"]


def both_states():
    generator = torch.Generator().manual_seed(work.seed)
    n = torch.randint(process.T, (32,), generator=generator)
    n[0] = 1  # its target is the clean image
    found = earlier(batch, torch.randn(batch.shape, generator=generator), n, process.sigma)
    return found and torch.cat([found[0], found[2]])


work.hand_in("pairs", both_states)
### BEGIN HIDDEN TESTS
(teacher, _), generator = persona4.world(), torch.Generator().manual_seed(work.seed)
x0 = next(data.batches(data.load("digits")[0], 32, work.seed))["x0"]
late = torch.randint(teacher.process.T, (32,), generator=generator)
late[0] = 1
eps = torch.randn(x0.shape, generator=generator)
levels = teacher.process.sigma(torch.cat([late, torch.maximum(late - 2, -torch.ones_like(late))]))
right = x0.repeat(2, 1, 1, 1) + expand_like(levels, eps) * eps.repeat(2, 1, 1, 1)
assert work.close("pairs", right), "these are not the states at n and at n − 2 with one noise"
### END HIDDEN TESTS

# %% [markdown]
# ## 2. One update
#
# `frozen` is a copy of the student that is renewed now and then; its answer at the earlier state is the target, a constant. Where the chain has ended (r = 0), the
# target is the clean image `x_r` itself, the only place where truth comes in. Return the gradient of the mean squared error (`mse` gives one number an image) with
# respect to the parameters of `f`: `torch.autograd.grad(loss, list(f.parameters()))`.


# %% answer="gradient"
def gradient(f, frozen, x_t, t, x_r, r):
    """The gradient of the bootstrap's loss on one batch, a tensor for each parameter of f."""
    ### BEGIN SOLUTION
    with torch.no_grad():
        goal = torch.where(expand_like(r > 0, x_r), frozen(x_r, r), x_r)
    return torch.autograd.grad(mse(f(x_t, t), goal).mean(), list(f.parameters()))
    ### END SOLUTION


check("p4.gradient", gradient);

# %% [markdown]
# "Clamp gradients at 1.0" can be read in two ways. What is done in practice keeps the *direction*: if the norm of all gradients together exceeds the limit, all are
# scaled down by one factor.


# %% answer="clipped"
def clipped(gradients, limit):
    """The gradients, scaled so that their common norm is at most limit."""
    ### BEGIN SOLUTION
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    return tuple(g * min(1.0, limit / float(norm)) for g in gradients)
    ### END SOLUTION


check("p4.clipped", clipped);


# %% grade="update" points=2 about="the clamped gradient of one update"
def one_update():
    x_t, t, x_r, r = ConsistencyDistillation(teacher, process.sigma(torch.arange(process.T)), "ddim").pairs(
        {"x0": batch}, 0, torch.Generator().manual_seed(work.seed)
    )
    r[:4], x_r[:4] = 0.0, batch[:4]
    found = gradient(student, student, x_t, t, x_r, r)
    return found and torch.cat([g.flatten() for g in clipped([100 * g for g in found], 1.0)])[:50_000]


work.hand_in("update", one_update)
### BEGIN HIDDEN TESTS
teacher, f = persona4.world()
x0 = next(data.batches(data.load("digits")[0], 32, work.seed))["x0"]
levels = teacher.process.sigma(torch.arange(teacher.process.T))
x_t, t, x_r, r = ConsistencyDistillation(teacher, levels, "ddim").pairs({"x0": x0}, 0, torch.Generator().manual_seed(work.seed))
end = torch.arange(32) < 4
goal = torch.where(expand_like(end, x0), x0, f(x_r, r).detach())
all_of_it = 100 * torch.cat([g.flatten() for g in torch.autograd.grad(mse(f(x_t, t), goal).mean(), list(f.parameters()))])
right = (all_of_it / all_of_it.norm().clamp(min=1))[:50_000]
apart = (work["update"].flatten()[:50_000] - right).norm() / right.norm()
assert apart < 0.01, "this is not the clamped gradient of the loss with its target held constant"
### END HIDDEN TESTS

# %% [markdown]
# ## 3. The first ruler
#
# The validation MSE of distillation is its own loss on held-out digits: the teacher has made a step from `x_t` to `x_r`, and f should give the same answer at both.


# %% answer="validation"
def validation(f, x_t, t, x_r, r):
    """The mean of (f(x_t, t) − f(x_r, r))² over all pixels of all pairs."""
    ### BEGIN SOLUTION
    return mse(f(x_t, t), f(x_r, r)).mean()
    ### END SOLUTION


check("p4.validation", validation);
# %% grade="validation_mse" points=2 about="validation MSE of the identity, of a grey image, of the beginner and of the student"
held_out = persona4.held_out(teacher, work.seed)
known = {"identity": lambda x, t: x, "grey image": lambda x, t: 0 * x, "beginner": beginner, "student": student}


def first_ruler():
    with torch.no_grad():
        found = [validation(f, **held_out) for f in known.values()]
    return None if found[0] is None else 1000 * torch.tensor([float(error) for error in found])


work.hand_in("validation_mse", first_ruler)
if "validation_mse" in work:
    print("\n".join(f"{name:>10}: {m / 1000:.6f}" for name, m in zip(known, work["validation_mse"], strict=True)))
### BEGIN HIDDEN TESTS
teacher, good = persona4.world()
p, new = persona4.held_out(teacher, work.seed), persona4.beginner(teacher)
with torch.no_grad():
    networks = [mse(g(p["x_t"], p["t"]), g(p["x_r"], p["r"])).mean() for g in (new, good)]
right = 1000 * torch.stack([mse(p["x_t"], p["x_r"]).mean(), torch.zeros(()), *networks])
assert work.close("validation_mse", right), "these are not 1000 times the four validation errors"
### END HIDDEN TESTS

# %% [markdown]
# ## 4. The ablation
#
# Everything is the same but where the earlier state comes from: a step of the teacher (DDIM, what a cache would hold), or the data, with no teacher. The loop is
# yours: `gradient`, `clipped`, and a copy that is renewed.

# %% locked="train"
DISTILLATION = ConsistencyDistillation(teacher, process.sigma(torch.arange(process.T)), "ddim")


def train(f, bootstrap, updates, seed, renew=5, lr=2e-4):
    f = copy.deepcopy(f).requires_grad_(True)
    frozen, optimizer = copy.deepcopy(f), torch.optim.AdamW(f.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    for k, batch in zip(range(updates), data.batches(images, 32, seed), strict=False):
        if bootstrap:
            n = torch.randint(process.T, (32,), generator=generator)
            pair = earlier(batch["x0"], torch.randn(batch["x0"].shape, generator=generator), n, process.sigma)
        else:
            pair = DISTILLATION.pairs(batch, k, generator)
        if pair is None or (found := gradient(f, frozen, *pair)) is None or (small := clipped(found, 1.0)) is None:
            return None
        for p, g in zip(f.parameters(), small, strict=True):
            p.grad = g
        optimizer.step()
        if (k + 1) % renew == 0:
            frozen.load_state_dict(f.state_dict())
    return f.requires_grad_(False)


# %% grade="bootstrapped" points=1 about="what the student answers after ten updates of your loop"
def after_ten():
    f = train(student, True, 10, work.seed)
    return f and f(held_out["x_t"][:64], held_out["t"][:64])


work.hand_in("bootstrapped", after_ten)
### BEGIN HIDDEN TESTS
from cmlib.objectives import BootstrapRegression

teacher, good = persona4.world()
f, row = copy.deepcopy(good).requires_grad_(True), BootstrapRegression(teacher.process)
old, step, generator = copy.deepcopy(f), torch.optim.AdamW(f.parameters(), 2e-4), torch.Generator().manual_seed(work.seed)
for k, batch in zip(range(10), data.batches(data.load("digits")[0], 32, work.seed), strict=False):
    step.zero_grad()
    row(f, old, batch, k, generator)[0].mean().backward()
    torch.nn.utils.clip_grad_norm_(f.parameters(), 1.0)
    step.step()
    if k == 4:
        old = copy.deepcopy(f)
p = persona4.held_out(teacher, work.seed)
with torch.no_grad():
    right, before = f(p["x_t"][:64], p["t"][:64]), good(p["x_t"][:64], p["t"][:64])
assert work["bootstrapped"].shape == right.shape, "expected 64 images"
apart = (work["bootstrapped"] - right).norm() / (right - before).norm()
assert apart < 0.2, (
    "ten updates with the right gradient lead elsewhere; the library's name for this objective is BootstrapRegression"
)
### END HIDDEN TESTS

# %% [markdown]
# Now the runs. Beside the student, distilled and bootstrapped further, stands the beginner after as many bootstrap updates, and the second ruler: `fd_digits`, the
# Fréchet distance of images made in one evaluation. It compares at equal N alone.

# %% locked="experiment"
profile = profiles.select()
updates, seeds = min(profile.distill_updates // 6, 200), range(1 if profile.rough else 3)
runs = {
    "student, distilled": (student, False),
    "student, bootstrapped": (student, True),
    "beginner, bootstrapped": (beginner, True),
}


def experiment():
    """{name: [networks, one a seed]}; the beginner is trained once."""
    trained = {
        name: [train(f, own, updates, work.seed % 1000 + s) for s in (seeds if f is student else [0])]
        for name, (f, own) in runs.items()
    }
    return {"student, as it came": [student], "beginner, as it came": [beginner]} | trained


features = persona4.features()
found, pictures = {}, {}
if "bootstrapped" in work and "validation_mse" in work:
    for name, networks in experiment().items():
        sets = [draw(f, profile.samples, 1, (1, 8, 8), 0) for f in networks]
        with torch.no_grad():
            errors = [float(validation(f, **held_out)) for f in networks]
        found[name], pictures[name] = (torch.tensor(errors), torch.tensor([features.distance(s) for s in sets])), sets[0][:10]
    with torch.no_grad():
        same = float(validation(known["identity"], **held_out))
    noise = data.to_uint8(torch.randn(profile.samples, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    found["identity"], pictures["identity"] = (torch.tensor([same]), torch.tensor([features.distance(noise)])), noise[:10]


# %% locked="table"
def pm(v, digits):
    return f"{v.mean():.{digits}f}" + (f" ± {(v.max() - v.min()) / 2:.{digits}f}" if len(v) > 1 else "")


if found:
    base = found["student, distilled"][0].mean()
    head = f"| {updates} updates | validation MSE | within {persona4.BAR} of distillation | fd_digits, N={profile.samples} |"
    rows = [head, "|---|---|---|---|"]
    for name, (m, fd) in found.items():
        rows.append(f"| {name} | {pm(m, 6)} | {'yes' if m.mean() - base < persona4.BAR else 'no'} | {pm(fd, 1)} |")
    plots.tell("\n".join(rows))

# %% locked="picture"
if found:
    figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (name, (m, fd)), colour, marker in zip(found.items(), plots.COLOURS, "o^sDvP", strict=False):
        ax.plot(m, fd, marker, color=colour, label=name)
    ax.axvline(base + persona4.BAR, color="black", linestyle="--", label="the bar")
    ax.set(xscale="log", yscale="log", xlabel="validation MSE", ylabel="fd_digits, one evaluation", title="Two rulers")
    ax.legend(frameon=False, fontsize=8)
    plots.display(
        figure, "Distance of images against validation error: all points lie left of the bar, those with the worst images too."
    )
    rows = {name: data.to_float(p) for name, p in pictures.items()}
    plots.display(
        plots.sheet(rows, [""] * 10),
        "Ten images from each, made in one evaluation; those of the identity and of the beginners are noise.",
    )

# %% [markdown]
# ## 5. Report
#
# A few sentences each. A person reads them. Use your own numbers.

# %% [markdown] manual="report" points=2 about="is the bootstrap within 0.02 of distillation, and what happened to the distance"
# **Is the bootstrap's validation MSE within 0.02 of distillation's, and what is the effect on the distance of images?** Give both differences, with their scatter
# between seeds where you have several, and say what this budget cannot show.
#
# <!-- BEGIN SOLUTION -->
# Yes: the difference of the two validation errors is smaller than 0.02 by orders of magnitude. The distances of the two students at one evaluation differ by what the
# table shows; where that is no more than the scatter between seeds, this run finds no effect. Both started from a good student and were trained for few updates, so
# it shows that the bootstrap does not destroy a good student at once, not that it would make one; the beginner shows how far the same updates get from nothing.
# <!-- END SOLUTION -->

# %% [markdown] manual="worth" points=2 about="what the bar of 0.02 is worth, argued with the identity and the beginner"
# **What does "within 0.02" prove?** Argue with the identity, the grey image and the beginner, and name a ruler that would tell a good student from these.
#
# <!-- BEGIN SOLUTION -->
# Next to nothing. The identity map passes, because neighbouring states hardly differ; a grey image has an error of exactly 0, because self-consistency is met by any
# constant; the beginner, whose images are noise, has a lower error than the good student. The error of two neighbours says nothing about where the path ends. Useful
# rulers look at the end: the distance of sets of images, at equal N and beside real images, or the distance of f(x_t, t) from where the teacher's ODE ends.
# <!-- END SOLUTION -->
