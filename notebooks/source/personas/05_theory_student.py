# %% [markdown]
# # Exercise 5 · The theory student: does a score term make the gap smoother?
#
# {badge}
#
# A text adds $\gamma_t\,\nabla\ln p_t(x_t)$ to the loss, "derived from the cached teacher outputs", and promises a smoother self-consistency gap as a function of t.
# It gives the term with both signs, no formula for γ, and no meaning of smooth. You supply all three, and then measure.
#
# **Goal.** The score out of cached pairs, the γ that is exact for Gaussian data, a definition of smooth, and an outcome over three seeds, whichever way it goes.
#
# **Time to run** {times}. At profile ci training is very short; take the numbers that you argue with from cpu. To write: about two hours.
#
# **You need** lessons 2, 4 and 5.
#
# {rubric}
#
# Data and noise are drawn from a seed that follows from your name, so your numbers are yours alone. The grader runs your functions again, with a seed that you have
# not seen. Cells that are marked *leave this cell as it is* are put back before grading. You may add cells wherever you like.
# When you are done: restart the kernel, run all cells, save, and hand in this file.

# %% tags=["setup"]

# %% locked="imports"
import copy
from functools import partial

import torch

from cmlib import plots, profiles
from cmlib.course import persona4, persona5
from cmlib.evaluate import self_consistency_gap
from cmlib.exercises import check
from cmlib.handin import HandIn
from cmlib.objectives import ConsistencyDistillation, ScoreCorrected
from cmlib.ops import expand_like, indexed_normal, mse
from cmlib.train import fit

# %%
learner = ""  # your name, or what your instructor knows you by

# %% locked="start"
work = HandIn("05_theory_student", learner)
teacher, student = persona4.world()
cached = persona5.pairs(teacher, work.seed)
print(f"{len(cached['t'])} cached pairs, x_t at σ from {cached['t'][0]:.2f} to {cached['t'][-1]:.2f}, x_r at half of it")

# %% [markdown]
# ## 1. The score, from what the cache holds
#
# Along the probability-flow ODE, $\mathrm dx/\mathrm dt = -t\,\nabla\ln p_t(x)$ with x = x0 + t·ε. A cached DDIM pair is one Euler step of it, from $(x_t, t)$ to
# $(\hat x_r, r)$. Solve for the score. `expand_like(t, x)` gives levels [B] the shape that multiplies images [B,C,H,W].


# %% answer="score"
def score(x_t, t, x_r, r):
    """∇ln p_t(x_t) [B,C,H,W] from a DDIM step of the teacher from x_t at level t [B] to x_r at level r [B]."""
    ### BEGIN SOLUTION
    return (x_r - x_t) / expand_like(t * (t - r), x_t)
    ### END SOLUTION


check("p5.score", score);


# %% grade="scores" points=1 about="the score of the cached pairs"
def scaled_scores():
    found = score(**cached)
    return None if found is None else found * expand_like(cached["t"], found)


work.hand_in("scores", scaled_scores)
### BEGIN HIDDEN TESTS
teacher, _ = persona4.world()
p = persona5.pairs(teacher, work.seed)
right = (teacher.denoise(p["x_t"], p["t"]) - p["x_t"]) / expand_like(p["t"], p["x_t"])  # Tweedie, times t
assert work.close("scores", right, 0.01), (
    "times t, these are not the scores that the teacher's denoiser gives by Tweedie's formula"
)
### END HIDDEN TESTS

# %% [markdown]
# ## 2. γ
#
# $x + t^2\,\nabla\ln p_t(x)$ is the *mean* of all clean images that could be under x (Tweedie). The consistency function is where the ODE's path *ends*. They differ, so
# γ is not t². Find the γ(t, s) that makes
#
# $$f(x, t) = x + \gamma(t, s)\,\nabla\ln p_t(x)$$
#
# exact for Gaussian data N(μ, s²·I). Its score is $(\mu - x)/(s^2+t^2)$, and the ODE keeps $(x-\mu)/\sqrt{s^2+t^2}$ constant.


# %% answer="gamma"
def gamma(t, s):
    """γ for levels t [B] and data of standard deviation s (a number)."""
    ### BEGIN SOLUTION
    wide = (t**2 + s**2).sqrt()
    return wide * (wide - s)
    ### END SOLUTION


check("p5.gamma", gamma);


# %% grade="jumps" points=2 about="the consistency function of Gaussian data, by your γ"
def jumps():
    data, x, t, s = persona5.gaussian(work.seed)
    found = gamma(t, s)
    return None if found is None else x + expand_like(found, x) * data.score(x, t)


work.hand_in("jumps", jumps)
### BEGIN HIDDEN TESTS
law, states, levels, _ = persona5.gaussian(work.seed)
assert work.close("jumps", law.consistency(states, levels)), "this is not where the ODE ends for Gaussian data"
### END HIDDEN TESTS

# %% [markdown]
# ## 3. The correction
#
# For images the identity is exact at small t only, so the term is weighted down above the data's own scale:
# $\displaystyle \frac{s^2}{t^2+s^2}\cdot\frac1d\,\big\lVert f(x_t, t) - (x_t + \gamma\,\nabla\ln p_t)\big\rVert^2$. `mse` gives one number an image.


# %% answer="correction"
def correction(x0_hat, x_t, t, score, s):
    """The weighted term [B] for the answers x0_hat = f(x_t, t) [B,C,H,W]; score as you computed it, s a number."""
    ### BEGIN SOLUTION
    guess = x_t + expand_like((t**2 + s**2).sqrt() * ((t**2 + s**2).sqrt() - s), x_t) * score
    return s**2 / (t**2 + s**2) * mse(x0_hat, guess)
    ### END SOLUTION


check("p5.correction", correction);


# %% grade="corrections" points=2 about="the correction of the course's student on the cached pairs"
def corrections():
    slope = score(**cached)
    with torch.no_grad():
        return (
            None if slope is None else correction(student(cached["x_t"], cached["t"]), cached["x_t"], cached["t"], slope, 0.5)
        )


work.hand_in("corrections", corrections)
### BEGIN HIDDEN TESTS
teacher, f = persona4.world()
with torch.no_grad():
    logs = ScoreCorrected(ConsistencyDistillation())(f, f, persona5.pairs(teacher, work.seed), 0, torch.Generator())[1]
assert work.close("corrections", logs["correction"]), "this is not the weighted term of the student's answers"
### END HIDDEN TESTS

# %% [markdown]
# ## 4. What smooth means
#
# The gap is ‖f(x_t, t) − x_end‖ (RMS) along the teacher's paths. On a log-log plot its slope is $\mathrm d\ln\text{gap}/\mathrm d\ln t$. Call the gap smooth where that
# slope changes little from one interval of the grid to the next, and measure **roughness**: the mean absolute change of the slope. A straight line, however steep,
# has roughness 0, and so has half of it: a smaller gap must not pass for a smoother one.


# %% answer="roughness"
def roughness(t, gap):
    """Mean |change of slope| of ln gap over ln t between neighbouring intervals; t and gap [N], N levels in order."""
    ### BEGIN SOLUTION
    slope = gap.log().diff() / t.log().diff()
    return slope.diff().abs().mean()
    ### END SOLUTION


check("p5.roughness", roughness);
# %% grade="smoothness" points=1 about="the gap of the course's student, and its roughness"
noise = indexed_normal(work.seed, range(32), teacher.image_shape)


def gap_and_roughness():
    t, gap = self_consistency_gap(student, teacher, noise, 20)
    found = roughness(t, gap)
    return None if found is None else torch.cat([gap, torch.as_tensor(found).reshape(1)])


work.hand_in("smoothness", gap_and_roughness)
### BEGIN HIDDEN TESTS
teacher, f = persona4.world()
levels, g = self_consistency_gap(f, teacher, indexed_normal(work.seed, range(32), (1, 8, 8)), 20)
steep = (g[1:] / g[:-1]).log() / (levels[1:] / levels[:-1]).log()
right = torch.cat([g, (steep[1:] - steep[:-1]).abs().mean()[None]])
assert work.close("smoothness", right), "this is not the student's gap with its mean absolute change of slope"
### END HIDDEN TESTS

# %% [markdown]
# ## 5. The experiment
#
# Two students start from the teacher's weights and train on the same cached rollouts in the same order: one by consistency distillation, one with the correction on
# top. A seed means other rollouts in another order. The score comes from the cache, as in your first function. The library's names are `ConsistencyDistillation` and `ScoreCorrected`.

# %% locked="experiment"
profile = profiles.select()
updates, curves = profile.distill_updates // 6, {}
objectives = {"distilled": ConsistencyDistillation(), "with the score term": ScoreCorrected(ConsistencyDistillation())}
if "smoothness" in work and "corrections" in work:
    beginner = persona4.beginner(teacher)
    for seed in range(3):
        stream = partial(persona5.batches, persona5.rollouts(teacher, work.seed + seed), seed)
        for name, objective in objectives.items():
            f, _ = fit(
                copy.deepcopy(beginner), objective, stream, updates, lr=3e-4, grad_clip=1.0, ema=0.9, seed=seed, name=name
            )
            curves.setdefault(name, []).append(self_consistency_gap(f.eval(), teacher, noise, 20))
    curves["before training"] = [self_consistency_gap(beginner, teacher, noise, 20)]

# %% locked="table"
rows = [f"| {updates} updates | roughness, seed by seed | mean | mean gap | gap at t < 0.5 |", "|---|---|---|---|---|"]
for name, runs in curves.items():
    rough = torch.tensor([float(roughness(t, gap)) for t, gap in runs])
    gaps, low = (torch.stack([gap[t < top].mean() for t, gap in runs]).mean() for top in (100, 0.5))
    rows.append(f"| {name} | {', '.join(f'{r:.3f}' for r in rough)} | {rough.mean():.3f} | {gaps:.3f} | {low:.4f} |")
if curves:
    plots.tell("\n".join(rows))
    panels = plots.small_multiples(curves, 0.1, "0.1", "noise level t", "RMS of f(x_t, t) − x_end", "The self-consistency gap")
    plots.display(
        panels, "The self-consistency gap against t on log axes, a panel a student, three seeds each, over all others in grey."
    )

# %% [markdown]
# ## 6. Derive, and conclude
#
# A person reads these.

# %% [markdown] manual="derive" points=2 about="the term with its sign and γ, derived from the cached pair"
# **Derive the term**: from the ODE to the score of a cached pair, and from Gaussian data to γ. Which sign is right, and what does γ tend to for t → 0? Why must a
# posterior-mean or an ancestral cache not be put into your first function?
#
# <!-- BEGIN SOLUTION -->
# One Euler step of dx/dt = −t·∇ln p from t to r is x̂_r = x_t + (t − r)·t·∇ln p, hence ∇ln p = (x̂_r − x_t)/(t(t − r)). The step goes towards the data, and so does the
# score: f(x, t) = x + γ·∇ln p with γ > 0; the form with (f − x)/γ = −∇ln p has the sign wrong. For N(μ, s²I) with S = √(s² + t²), f = μ + (s/S)(x − μ) =
# x + (1 − s/S)(μ − x) and ∇ln p = (μ − x)/S², so γ = S²(1 − s/S) = S(S − s). For t → 0 it tends to t²/2, for any data, by integrating the ODE with a constant score:
# half of Tweedie's t². A posterior mean moves about twice as far for a small step as the ODE, as it also undoes the noise of the step, and an ancestral sample has
# fresh noise on top: in both, (x̂_r − x_t)/(t(t − r)) is not the score.
# <!-- END SOLUTION -->

# %% [markdown] manual="outcome" points=2 about="is the corrected gap smoother, over three seeds; the size of the gap kept apart from its smoothness"
# **Is the corrected gap smoother?** Compare the two differences: between the two means, and between seeds. Keep "smaller" apart from "smoother", and look at the row
# before training. Say what would change your mind.
#
# <!-- BEGIN SOLUTION -->
# Read from the table: the claim holds in this run only if the corrected students' three roughnesses all lie below the distilled students' three, and it is refuted if they
# all lie above; if they overlap, three seeds do not tell. A smaller gap at small t, where the term is exact and acts at once, is another claim, and the last column
# is what speaks to it. The row before training says what training itself
# did to the roughness, which is the yardstick, and the outcome may turn with the length of training. The term pulls towards x + γ·∇ln p, which for digits is not the end
# of the path at medium t, so a bend where its weight fades, near t = s, is to be expected.
# Longer training, another weight, or another definition of smooth could change the outcome; the definition was fixed before the runs.
# <!-- END SOLUTION -->
