# %% [markdown]
# # Exercise 1 · The curious generalist: what does one jump see?
#
# {badge}
#
# You take a digit that no network has seen, bury it in noise at five timesteps, and let the course's student jump back: one evaluation
# each, no walk. Then you find out, with numbers, when the network still reads your digit and when it makes one up.
#
# **Goal.** Five reconstructions, measured, and an explanation of them in your own words.
#
# **Time to run** {times}; the same on every profile, as the student comes with the course. To write: about an hour.
#
# **You need** lesson 1, and the first half of lesson 4.
#
# {rubric}
#
# The digit, the noise and the timesteps are drawn from a seed that follows from your name, so your numbers are yours alone. The grader
# runs your functions again, with a seed that you have not seen: write functions that work for any. Cells that are marked *leave this cell
# as it is* are put back before grading. You may add cells wherever you like.
# When you are done: restart the kernel, run all cells, save, and hand in this file.

# %% tags=["setup"]

# %% locked="imports"
import torch

from cmlib import plots
from cmlib.course import persona1
from cmlib.exercises import check
from cmlib.handin import HandIn

# %%
learner = ""  # your name, or what your instructor knows you by

# %% locked="start"
work = HandIn("01_curious_generalist", learner)
x0, noise, steps, sigmas = persona1.start(work.seed)
f = persona1.student()
print("timesteps n = " + ", ".join(map(str, steps)) + "; noise levels σ = " + ", ".join(f"{s:.2f}" for s in sigmas))
plots.display(plots.sheet({"x0": x0}, ["your digit"]), "Your digit, eight by eight pixels.")

# %% [markdown]
# ## 1. Bury it
#
# At noise level σ the noisy picture is $x_t = x_0 + \sigma\,\varepsilon$, with ε from a standard normal. Pixels of $x_0$ lie in [−1, 1]: at σ = 1 the
# noise is about as strong as the picture, at σ = 60 it is all that one sees.

# %% answer="noisy"
def noisy(x0, eps, sigma):
    """The picture x0 [B,C,H,W] with noise eps [B,C,H,W] of standard deviation sigma (a number)."""
    ### BEGIN SOLUTION
    return x0 + sigma * eps
    ### END SOLUTION


check("p1.noisy", noisy);

# %% grade="noisy_pictures" points=2 about="your digit under noise at five timesteps"
def buried(which):
    """x0 at the five noise levels, with one of the draws of noise; None while `noisy` is not written."""
    found = [noisy(x0, e[None], s) for e, s in zip(noise[which], sigmas, strict=True)]
    return None if found[0] is None else torch.cat(found)


work.hand_in("noisy_pictures", buried, 0)
### BEGIN HIDDEN TESTS
x0, noise, _, sigmas = persona1.start(work.seed)
right = x0 + torch.tensor(sigmas).reshape(5, 1, 1, 1) * noise[0]
assert work.close("noisy_pictures", right), "these are not x0 + σ·ε at the five noise levels"
### END HIDDEN TESTS

# %% [markdown]
# ## 2. Jump
#
# `f(x, t)` takes noisy pictures and one noise level for each of them, and returns clean ones. That is the jump: one call.

# %% answer="jump"
def jump(f, x, sigma):
    """The clean pictures that f makes of noisy pictures x [B,C,H,W], all at the noise level sigma (a number)."""
    ### BEGIN SOLUTION
    return f(x, torch.full((len(x),), sigma))
    ### END SOLUTION


check("p1.jump", jump);

# %% grade="reconstructions" points=4 about="the student's reconstructions at five timesteps"
def reconstruct(which):
    """The five reconstructions of x0 from one of the draws of noise."""
    if (pictures := buried(which)) is None:
        return None
    with torch.no_grad():
        found = [jump(f, x[None], s) for x, s in zip(pictures, sigmas, strict=True)]
    return None if found[0] is None else torch.cat(found)


work.hand_in("reconstructions", reconstruct, 0)
### BEGIN HIDDEN TESTS
f, (x0, noise, _, sigmas) = persona1.student(), persona1.start(work.seed)
t = torch.tensor(sigmas)
with torch.no_grad():
    right = f(x0 + t.reshape(5, 1, 1, 1) * noise[0], t)
assert work.close("reconstructions", right), "these are not what one evaluation of f returns at the five noise levels"
### END HIDDEN TESTS

# %% locked="picture"
if "reconstructions" in work:
    plots.display(
        plots.sheet(
            {
                "noisy": torch.cat([x0, work["noisy_pictures"].clamp(-1, 1)]),
                "one jump": torch.cat([x0, work["reconstructions"].clamp(-1, 1)]),
                "other noise": torch.cat([x0, reconstruct(1).clamp(-1, 1)]),
            },
            ["your digit", *(f"n = {n}" for n in steps)],
        ),
        "Your digit under more and more noise, what one jump makes of it, and of other noise.",
    )

# %% [markdown]
# ## 3. Measure
#
# Looking is not enough. Measure how far each reconstruction is from your digit: the root of the mean squared difference over all pixels, one
# number a picture.

# %% answer="distance"
def distance(a, b):
    """Root of the mean squared difference of pictures a and b [B,C,H,W], one number a picture: [B]."""
    ### BEGIN SOLUTION
    return (a - b).pow(2).flatten(1).mean(1).sqrt()
    ### END SOLUTION


check("p1.distance", distance);

# %% grade="errors" points=2 about="how far each reconstruction is from your digit"
if "reconstructions" in work:
    work.hand_in("errors", distance, work["reconstructions"], x0.expand(5, -1, -1, -1))
if "errors" in work:
    print("error: " + ", ".join(f"n = {n}: {e:.2f}" for n, e in zip(steps, work["errors"], strict=True)))
### BEGIN HIDDEN TESTS
f, (x0, noise, _, sigmas) = persona1.student(), persona1.start(work.seed)
t = torch.tensor(sigmas)
with torch.no_grad():
    right = (f(x0 + t.reshape(5, 1, 1, 1) * noise[0], t) - x0).pow(2).mean((1, 2, 3)).sqrt()
assert work.close("errors", right), "these are not the distances of the five reconstructions"
### END HIDDEN TESTS

# %% [markdown]
# Now an experiment: keep your digit and draw *other* noise. If the network reads the digit, the two reconstructions agree; if it makes one up,
# they follow the noise and part. One pair of draws scatters, so the cell below takes the mean over eight other draws. As a yardstick it also
# prints how far your digit is from other digits on average.

# %% answer="spread"
def spread(f, x0, sigma, first, second):
    """How far two reconstructions of x0 are apart, made from two draws of noise [1,C,H,W] at one sigma: [1]."""
    ### BEGIN SOLUTION
    return distance(jump(f, noisy(x0, first, sigma), sigma), jump(f, noisy(x0, second, sigma), sigma))
    ### END SOLUTION


check("p1.spread", spread);

# %% grade="spreads" points=3 about="how far the reconstructions from two draws of noise are apart, on average"
def spreads():
    """At each level the mean distance of the first draw's reconstruction to that of every other draw."""
    pairs = [(s, first[None], other[None]) for s, first, *others in zip(sigmas, *noise, strict=True) for other in others]
    with torch.no_grad():
        found = [spread(f, x0, *pair) for pair in pairs]
    return None if found[0] is None else torch.tensor([float(apart) for apart in found]).reshape(5, -1).mean(1)


if "reconstructions" in work:
    work.hand_in("spreads", spreads)
if "spreads" in work:
    print("apart: " + ", ".join(f"n = {n}: {e:.2f}" for n, e in zip(steps, work["spreads"], strict=True)))
    print(f"your digit and others: {persona1.others(x0):.2f}")
### BEGIN HIDDEN TESTS
f, (x0, noise, _, sigmas) = persona1.student(), persona1.start(work.seed)
t = torch.tensor(sigmas)
with torch.no_grad():
    first, *others = (f(x0 + t.reshape(5, 1, 1, 1) * e, t) for e in noise)
right = torch.stack([(first - other).pow(2).mean((1, 2, 3)).sqrt() for other in others]).mean(0)
assert work.close("spreads", right), "these are not the mean distances between the pairs"
### END HIDDEN TESTS

# %% [markdown]
# ## 4. Explain
#
# A few sentences each. A person reads them. Use your own numbers.

# %% [markdown] manual="explain_jump" points=2 about="what one jump does, and what a walk of many steps would do instead"
# **What does the network do in one jump, and what would a teacher that walks do instead?** (Where does the walk start, where does it end,
# and what has the student been trained to say along it?)
#
# <!-- BEGIN SOLUTION -->
# The teacher walks: from the noisy picture it takes many small steps along the probability-flow ODE, each to slightly less noise, and asks
# the network again at every step. The path ends at a clean picture. The student was trained to give that end of the path from any point on
# it, so it says at once where the walk would end. It has no second look: one evaluation is all it has.
# <!-- END SOLUTION -->

# %% [markdown] manual="explain_numbers" points=2 about="from which timestep on the network makes a digit up, argued from the two rows of numbers"
# **From which of your timesteps on does the network make a digit up instead of reading yours?** Argue with both rows of numbers, and with the
# yardstick.
#
# <!-- BEGIN SOLUTION -->
# At the first timesteps both the error and the distance between reconstructions are small against the distance to other digits, so the network reads
# the digit through the noise. The distance grows with n until it is near the yardstick, and stays there. From that timestep on, reconstructions have no
# more in common with each other than any two digits have: there the network follows the noise. An error is of one draw and scatters; a small one at high
# noise is luck, as other noise gives another digit. So I judge by the trend of the errors, and by the mean over eight draws.
# <!-- END SOLUTION -->

# %% [markdown] manual="explain_limit" points=2 about="why no training can make the last reconstruction right"
# **Could a perfectly trained student bring your digit back from the last timestep?** Say why, or why not.
#
# <!-- BEGIN SOLUTION -->
# No. At the last timestep the noise is far stronger than the picture, so nearly the same noisy picture could have come from any digit. What is
# lost cannot be trained back: a perfect student returns the end of the path through that point, which is some digit, chosen by the noise.
# <!-- END SOLUTION -->
