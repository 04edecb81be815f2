# %% [markdown]
# # Exercise 2 · The CS student: half the steps, half the batch, one hour
#
# {badge}
#
# "Halve the teacher's rollouts to 500 steps and reduce the batch size to 32, so that the pipeline runs on an RTX 4070 within an hour while still letting you observe
# convergence in both teacher MSE and student validation loss." You do it, and then you find out what each half cost, what it saved, and whether your two curves have
# converged or only look as if.
#
# **Goal.** The price of halving in numbers, two learning curves, and a test that says whether they are flat.
#
# **Time to run** {times}. Profile `rtx4070` is this recipe on CIFAR-10. At ci training is a glimpse; argue from cpu or better. To write: about
# an hour and a half.
#
# **You need** lessons 2 and 3, and the first half of lesson 4.
#
# {rubric}
#
# The noise, the caches and the curves are drawn from a seed that follows from your name. The grader runs your functions again, with a seed that you have not seen.
# Cells that are marked *leave this cell as it is* are put back before grading. You may add cells wherever you like.
# When you are done: restart the kernel, run all cells, save, and hand in this file.

# %% tags=["setup"]

# %% locked="imports"
import copy
import tempfile
import time

import torch

from cmlib import data, plots, profiles
from cmlib.cache import PairCache
from cmlib.consistency import ConsistencyFunction
from cmlib.course import persona2
from cmlib.exercises import check
from cmlib.handin import HandIn
from cmlib.objectives import Denoising, EndpointRegression
from cmlib.ops import indexed_normal
from cmlib.pipeline import load_teacher, shipped
from cmlib.profiles import small_unet
from cmlib.recipes import first_student, largest_sigma
from cmlib.train import fit
from cmlib.unet import UNet

# %%
learner = ""  # your name, or what your instructor knows you by

# %% locked="start"
work = HandIn("02_cs_student", learner)
teacher, noise = persona2.start(work.seed)
T = teacher.process.T
print(f"a chain of T = {T} timesteps, and {len(noise)} draws of noise")

# %% [markdown]
# ## 1. Half the steps
#
# The chain has T timesteps, numbered T − 1 (nearly pure noise) down to 0 (nearly clean). A rollout of k steps visits every (T/k)-th of them, down to 0, and its last
# step leads from 0 to the image, which has the number −1.

# %% answer="visited"
def visited(T, steps):
    """The timesteps that a rollout of `steps` steps starts its steps from, a whole stride T // steps apart: [steps], descending to 0."""
    ### BEGIN SOLUTION
    return torch.arange(steps).flip(0) * (T // steps)
    ### END SOLUTION


check("p2.visited", visited);

# %% [markdown]
# `teacher.step(x, n, r, "ddim")` takes states x [B,C,H,W] from timesteps n [B] to r [B], along the teacher's ODE. No randomness is left after the first noise, so two
# rollouts from the same noise differ by their steps alone.

# %% answer="roll_out"
def roll_out(teacher, noise, timesteps):
    """All states of a DDIM rollout from `noise` [B,C,H,W], the noise itself first and the image last: [len(timesteps) + 1,B,C,H,W]."""
    ### BEGIN SOLUTION
    states = [noise]
    for n, r in zip(timesteps, [*timesteps[1:], torch.tensor(-1)], strict=True):
        states.append(teacher.step(states[-1], n.expand(len(noise)), r.expand(len(noise)), "ddim"))
    return torch.stack(states)
    ### END SOLUTION


# %% grade="fine" points=1 about="a rollout of 1000 steps from your noise"
fine, *coarser = persona2.STEPS


def paths(*numbers):
    """Rollouts of so many steps, one after the other."""
    found = [roll_out(teacher, noise, visited(T, steps)) for steps in numbers]
    return None if found[0] is None else torch.cat(found)


work.hand_in("fine", paths, fine)
### BEGIN HIDDEN TESTS
wrong = persona2.fault(*persona2.start(work.seed), work["fine"], persona2.STEPS[:1])
assert not wrong, wrong
### END HIDDEN TESTS

# %% grade="coarse" points=2 about="rollouts of 500, 100 and 50 steps from the same noise"
work.hand_in("coarse", paths, *coarser)
### BEGIN HIDDEN TESTS
wrong = persona2.fault(*persona2.start(work.seed), work["coarse"], persona2.STEPS[1:])
assert not wrong, wrong
### END HIDDEN TESTS

# %% locked="rollouts_checked"
for name, steps in (("fine", persona2.STEPS[:1]), ("coarse", persona2.STEPS[1:])):
    if name in work:
        wrong = persona2.fault(teacher, noise, work[name], steps)
        print(f"✗ {name}: {wrong}" if wrong else f"✓ {name}: right")

# %% [markdown]
# ## 2. What halving cost
#
# Where do the rollouts end? Compare each with the finest one, of 1000 steps: the root of the mean squared difference over both images, one number a rollout.

# %% answer="compare"
def differences(ends):
    """How far the images ends[1], ends[2], … [B,C,H,W] are from ends[0], as root mean squares: [len(ends) - 1]."""
    ### BEGIN SOLUTION
    return torch.stack([(end - ends[0]).pow(2).mean().sqrt() for end in ends[1:]])
    ### END SOLUTION


check("p2.differences", differences);

# %% grade="differences" points=2 about="how far the coarser rollouts end from the finest"
if "fine" in work and "coarse" in work:
    ends = [work["fine"][-1], *(path[-1] for path in work["coarse"].split([steps + 1 for steps in coarser]))]
    work.hand_in("differences", differences, ends)
### BEGIN HIDDEN TESTS
noise, sizes = persona2.start(work.seed)[1], [steps + 1 for steps in persona2.STEPS[1:]]
reference, paths = work["fine"], work["coarse"].split(sizes)
assert torch.allclose(reference[0], noise, atol=1e-5), "the rollouts do not start from your noise"
right = torch.stack([(path[-1] - reference[-1]).pow(2).mean().sqrt() for path in paths])
assert right.min() > 1e-4, "the rollouts all end at the same images: they do not differ in their steps"
assert work.close("differences", right, 1e-4), "these are not the root mean squares of the differences between your images"
### END HIDDEN TESTS

# %% locked="steps_figure"
if "differences" in work:
    found = dict(zip(coarser, work["differences"].tolist(), strict=True))
    apart = float((ends[0] - ends[0].roll(1, 0)).pow(2).mean().sqrt())
    plots.display(
        plots.sheet({f"{k} steps": end for k, end in zip(persona2.STEPS, ends, strict=True)}, [f"noise {i + 1}" for i in range(len(noise))]),
        "Two digits from two draws of noise, a row each for 1000, 500, 100 and 50 steps; the rows look alike.",
    )
    plots.tell(
        "A first-order solver's error is in proportion to its step, 1/k. Then the differences from 1000 steps, 1/k − 1/1000, are as 1 : 9 : 19. Measured: "
        + " : ".join(f"**{d / found[500]:.1f}**" for d in found.values())
        + f". Half the steps moved the images by **{found[500]:.4f}** a pixel; two of them are {apart:.2f} apart."
    )

# %% [markdown]
# ## 3. What halving saved
#
# The recipe's own cache has no rollout in it: it adds noise to an image and takes *one* reverse step, so there is nothing to halve. Real rollouts give a pair
# at each step, x at one timestep and at the next. How many rollouts fill a cache, and how often is the teacher evaluated?

# %% answer="price"
def cost(pairs, steps):
    """(number of trajectories, number of evaluations an image) of a cache of `pairs` pairs from DDIM rollouts of `steps` steps."""
    ### BEGIN SOLUTION
    return pairs // steps, pairs
    ### END SOLUTION


check("p2.cost", cost);

# %% grade="cost" points=1 about="trajectories and evaluations of a cache"
def all_costs():
    found = [cost(pairs, steps) for pairs in (200_000, 1000 * (work.seed % 1000 + 1)) for steps in (1000, 500, 50)]
    return None if found[0] is None else found


work.hand_in("cost", all_costs)
### BEGIN HIDDEN TESTS
right = [(pairs // steps, pairs) for pairs in (200_000, 1000 * (work.seed % 1000 + 1)) for steps in (1000, 500, 50)]
assert work.close("cost", torch.tensor(right), 0), "a step of a trajectory gives one pair and takes one evaluation"
### END HIDDEN TESTS

# %% locked="cost_table"
if "cost" in work:
    rows = [f"| {k} | {n:g} | {evaluations:g} |" for k, (n, evaluations) in zip((1000, 500, 50), work["cost"].tolist(), strict=False)]
    plots.tell("\n".join(["| steps | trajectories in 200,000 pairs | evaluations |", "|---|---|---|", *rows]))

# %% [markdown]
# ## 4. The student, batch 32
#
# Two students learn from caches with *the same number of pairs*: rollouts of 500 steps and of 50. Both learn where each path ends, x_end, in batches of 32. Validation is on
# rollouts from other noise, never seen in training. A random tenth of the pairs would be no validation: its neighbours on the same path, with the same x_end, are in training.

# %% answer="loss"
@torch.no_grad()
def validation(f, x_t, t, x_end):
    """Mean over pixels and pairs of the squared difference between the jump of f from (x_t, t) and x_end [B,C,H,W]: one number."""
    ### BEGIN SOLUTION
    return (f(x_t, t) - x_end).pow(2).mean()
    ### END SOLUTION


check("p2.validation", validation);

# %% grade="validation" points=2 about="the validation loss of the course's student on your pairs"
shipped_student = ConsistencyFunction.load(shipped("digits_student.safetensors"))
work.hand_in("validation", lambda: validation(shipped_student, *persona2.pairs(teacher, noise, 20)))
### BEGIN HIDDEN TESTS
f = ConsistencyFunction.load(shipped("digits_student.safetensors"))
x_t, t, x_end = persona2.pairs(*persona2.start(work.seed), 20)
with torch.no_grad():
    right = (f(x_t, t) - x_end).pow(2).mean()
assert work.close("validation", right, 1e-4), "this is not the mean squared difference from where the paths end"
### END HIDDEN TESTS

# %% locked="students"
profile = profiles.select()
big = load_teacher(profile.teacher)  # on a GPU where there is one
updates = 2 * profile.regression_updates // (6 if profile.rough else 3)
n_pairs = profile.pairs if torch.cuda.is_available() else min(profile.pairs // 2, 20_000)
size = 8 if profile.rough else 32  # trajectories to validate on
fresh = indexed_normal(work.seed + 1, range(size), big.image_shape).to(big.device)
unseen = persona2.pairs(big, fresh, 10)


def train_student(steps):
    """(validation losses, the same on its own training pairs, number of trajectories) of a student on rollouts of `steps` steps."""
    with tempfile.TemporaryDirectory() as folder:
        cache = PairCache.build(folder, big, n_pairs, "rollout", solver="ddim", steps=steps, shape=big.image_shape, seed=work.seed % 2**31)
        batch = next(cache.loader(10 * size, seed=1))
        seen = [batch[k].to(big.device) for k in ("x_t", "t", "x_end")]
        _, history = fit(
            first_student("endpoint-regression", big, largest_sigma(big)),
            EndpointRegression(),
            lambda start: cache.loader(32, work.seed, start),
            updates,
            lr=5e-4,
            warmup=updates // 10,
            every=max(1, updates // 8),
            on_every=lambda step, f: {"unseen": float(validation(f, *unseen)), "seen": float(validation(f, *seen))},
            name=f"student, {steps} steps",
        )
        return history, len(cache) // steps


if "validation" in work:
    students = {steps: train_student(steps) for steps in (500, 50)}
    plots.display(
        plots.curves(
            {
                f"{steps} steps, {n} trajectories: {kind}": tuple(torch.tensor([[h["step"], h[kind]] for h in history]).T)
                for steps, (history, n) in students.items()
                for kind in ("unseen", "seen")
            },
            "updates of 32 pairs",
            "mean squared error to x_end",
            f"{n_pairs} pairs, two ways to spend them",
            log_x=False,
            log_y=True,
        ),
        "Validation loss and loss on training pairs of both students over the updates.",
    )
    for steps, (history, n) in students.items():
        last = history[-1]
        plots.tell(f"Rollouts of {steps} steps: **{n}** trajectories, loss **{last['seen']:.3f}** on their own pairs, **{last['unseen']:.3f}** on others.")
    flat = float((unseen[2] - unseen[2].mean(0)).pow(2).mean())
    plots.tell(f"Always answering with the mean image scores **{flat:.3f}**, so that is what not learning looks like.")

# %% [markdown]
# ## 5. The teacher, batch 32
#
# The same on the teacher's side: a network trained from nothing, its MSE on held-out images with noise that never changes. It can never reach 0: nobody can tell the
# noise from the picture exactly. The course's teacher, trained for long, shows about how low it gets.

# %% locked="teacher"
if "validation" in work:
    digits = data.load("digits")[0]
    network = UNet(**small_unet((1, 8, 8), profile.widths if profile.dataset == "digits" else (32, 64), dropout=0.1))
    _, taught = fit(
        network,
        Denoising(teacher.process),
        lambda start: data.batches(digits, 32, work.seed % 2**31, start),
        updates,
        lr=1e-3,
        warmup=updates // 4,
        every=max(1, updates // 8),
        on_every=lambda step, average: {"held_out": persona2.teacher_error(teacher.process, average)},
        name="teacher",
    )
    floor = persona2.teacher_error(teacher.process, teacher.unet)
    seen_updates = torch.tensor([h["step"] for h in taught])
    plots.display(
        plots.curves(
            {
                "from nothing, batch 32": (seen_updates, torch.tensor([h["held_out"] for h in taught])),
                "the course's teacher": (seen_updates, torch.full((len(taught),), floor)),
            },
            "updates of 32 digits",
            "held-out mean squared error of ε",
            "The teacher's MSE has a floor, and it is not 0",
            log_x=False,
        ),
        "The held-out error of a teacher in training falls towards that of the course's teacher, far above 0.",
    )

# %% [markdown]
# ## 6. Flat, or still falling?
#
# Say it with a rule, not by eye. A curve has converged once its last `patience` values brought no *relative* progress above `tolerance`: their best is not below
# (1 − tolerance) times the best of all values before them. With `patience` values or fewer, nothing is known: False.

# %% answer="rule"
def converged(values, patience=5, tolerance=1e-3):
    """Whether a learning curve, a list of numbers, is flat by the rule above."""
    ### BEGIN SOLUTION
    return len(values) > patience and min(values[-patience:]) > min(values[:-patience]) * (1 - tolerance)
    ### END SOLUTION


check("p2.converged", converged);

# %% grade="converged" points=2 about="which of 24 learning curves are flat"
def all_flags():
    flags = [converged(curve) for curve in persona2.learning_curves(work.seed)]
    return None if flags[0] is None else [float(flag) for flag in flags]


work.hand_in("converged", all_flags)
### BEGIN HIDDEN TESTS
from cmlib.train import plateaued

right = torch.tensor([float(plateaued(curve)) for curve in persona2.learning_curves(work.seed)])
assert work.close("converged", right, 0), "some of these curves are judged wrong"
### END HIDDEN TESTS

# %% locked="verdicts"
if "converged" in work and "validation" in work:
    curves = {"teacher MSE": [h["held_out"] for h in taught]}
    curves |= {f"student on {steps} steps, validation": [h["unseen"] for h in history] for steps, (history, _) in students.items()}
    for name, values in curves.items():
        told = "has converged" if converged(values) else "has not converged"
        plots.tell(f"{name}: from {values[0]:.3f} to {values[-1]:.3f} in {updates} updates, **{told}**.")

# %% [markdown]
# ## 7. The hour
#
# On a GPU, this cell times one evaluation of the teacher and one update at the batch of your profile (`CMLIB_PROFILE=rtx4070`), and says how long the cache
# and the training would take. Elsewhere it does nothing.

# %% locked="hour"
def seconds(work_once, n=20):
    """A call's time on a GPU, after a warm-up."""
    work_once()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(n):
        work_once()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / n


if torch.cuda.is_available():
    x = torch.randn(profile.batch_size, *big.image_shape, device=big.device)
    learning = copy.deepcopy(big.unet).requires_grad_(True)
    levels = torch.full((len(x),), 500, device=big.device)
    evaluation, update = seconds(lambda: big.eps(x, levels)), seconds(lambda: learning(x, levels).pow(2).mean().backward())
    rollouts, training = profile.pairs / len(x) * evaluation / 60, profile.endpoint_updates * update / 60
    plots.tell(f"On {torch.cuda.get_device_name()}, fp32: the cache takes **{rollouts:.1f}** minutes, {profile.endpoint_updates} updates **{training:.1f}**; the profile has {profile.minutes:g}.")
else:
    print("no GPU here: not measured")

# %% [markdown]
# ## 8. Explain
#
# A few sentences each. A person reads them. Use your own numbers, and say at which profile you took them.

# %% [markdown] manual="explain_halving" points=2 about="what halving cost, what it saved, and what it changed in the cache"
# **What did halving the rollouts cost, and what did it save?** Once for a fixed number of *trajectories*, once for a fixed number of *pairs*. Would you go on to 50 steps?
#
# <!-- BEGIN SOLUTION -->
# It cost next to nothing: the images moved by a small fraction of the distance between two digits, and the error grows only in proportion to the step. For a fixed
# number of trajectories it halves the evaluations. For a fixed number of pairs it saves no evaluation at all, but the same pairs come from twice as many
# trajectories, so the student sees twice as many different images. With few trajectories it learns those by heart: its loss on its own pairs falls and
# that on others stays behind. I would go on to 50 steps, as long as the solver's error stays far below the student's.
# <!-- END SOLUTION -->

# %% [markdown] manual="explain_convergence" points=2 about="whether both curves have converged, and what a flat curve would and would not mean"
# **Have the teacher's MSE and the student's validation loss converged?** `fit` lowers the learning rate to 0 along a cosine: what does that do to the end of a curve? Why does neither end at 0, and why
# is a validation loss below 0.01 no evidence by itself?
#
# <!-- BEGIN SOLUTION -->
# By the rule, curves that still fell by more than a thousandth over the last five measurements have not converged; at ci that is to be expected, as the run is only a
# glimpse. As the learning rate goes to 0, the weights stop moving and any curve flattens at its end, converged or not: only a longer run, which stays higher for longer, tells whether more was to be had.
# The teacher's MSE ends at the noise that nobody can predict; the student's ends where its network and its few trajectories let it, and at high noise, where a small change of the noise
# means another digit, it stays largest. 0.01 says nothing without a baseline: between neighbouring timesteps, copying the input scores less.
# <!-- END SOLUTION -->

# %% [markdown] manual="explain_hour" points=2 about="what batch 32 does to time, memory and the curves, and what one would have to measure on a 4070"
# **What does a batch of 32 instead of 64 change**, at the same number of updates: in time, in memory, in how noisy the curves are? What would you have to measure before you say "within
# an hour on an RTX 4070"?
#
# <!-- BEGIN SOLUTION -->
# Activations take half the memory, which is what makes it fit into 12 GB; weights and the optimiser's state stay the same. An update takes less time, at most half, as a small batch
# uses a GPU worse; the same updates see half as many examples, and gradients are noisier, so the curve is noisier and wants a smaller learning rate or more updates. To claim an hour I
# would time one evaluation and one update at batch 32 on that card, after a warm-up and with synchronisation, multiply by their numbers, add the evaluation of the results, and then run it once.
# <!-- END SOLUTION -->
