# %% [markdown]
# # Exercise 3 · The applied engineer: out of PyTorch, below 5 ms, within 5 %
#
# {badge}
#
# "Export the student to TorchScript, quantise it to FP16 with TensorRT, and serve it on an A10 with a latency target of less than 5 ms per inference, tracking that the
# reconstruction error stays within 5 % of the unquantised baseline." You export the course's student, time it without fooling yourself, and find out which numerical
# format breaks it, and where.
#
# **Goal.** A table of exports with a latency and a ratio of errors each, and a decision that you can defend.
#
# **Time to run** {times}. ONNX Runtime on the CPU is what is graded; TensorRT runs where there is a GPU. To write: about an hour and a half.
#
# **You need** lesson 4, and `pip install onnx onnxruntime onnxscript`.
#
# {rubric}
#
# Pictures, noise and levels are drawn from a seed that follows from your name. The grader runs your functions again, with a seed that you have not seen; it never grades how fast
# your machine is. Cells that are marked *leave this cell as it is* are put back before grading. You may add cells wherever you like.
# When you are done: restart the kernel, run all cells, save, and hand in this file.

# %% tags=["setup"]

# %% locked="imports"
import copy
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from cmlib import data, export, formats, plots
from cmlib.course import persona3
from cmlib.exercises import check
from cmlib.handin import HandIn

# %%
learner = ""  # your name, or what your instructor knows you by

# %% locked="start"
work = HandIn("03_applied_engineer", learner)
f = persona3.student()
x0, x_t, t, runs = persona3.start(work.seed)
ours = persona3.outputs(f, x_t, t)
scratch = tempfile.TemporaryDirectory()
print("noise levels σ = " + ", ".join(f"{s:.2f}" for s in t[:, 0].tolist()) + f"; {runs} calls to time")

# %% [markdown]
# ## 1. Export
#
# `export.save` writes a model, and what one must know to call it, into a folder; `export.load(folder)` reads the *file* back as a function of (x, t). `help(export.save)` tells the rest. What goes
# out must be f whole, with its scalings: the network alone is not the consistency function. PyTorch has deprecated `torch.jit`, which writes TorchScript; the brief asks for it, and
# runtimes still read it. And "FP16" here is rounding, not quantisation: no scale is fitted, each
# weight becomes the nearest 16-bit float. The scalings stay in 32 bits.

# %% answer="exported"
def exported(f, folder, format, precision):
    """f as a file in `folder` computes it: written in `format` ("torchscript" or "onnx") and `precision` ("fp32" or "fp16"), and read back."""
    ### BEGIN SOLUTION
    export.save(f, folder, format, precision)
    return export.load(folder)
    ### END SOLUTION


# %% grade="exports" points=3 about="what TorchScript in FP32 and in FP16, and ONNX make of your pictures"
def all_exports():
    functions = {how: exported(f, Path(scratch.name, *how), *how) for how in persona3.FORMATS}
    if None in functions.values():
        return None
    models.update({" ".join(how): g for how, g in functions.items()})
    return torch.stack([persona3.outputs(g, x_t, t) for g in functions.values()])


models = {}
work.hand_in("exports", all_exports)
### BEGIN HIDDEN TESTS
x0, x_t, t, _ = persona3.start(work.seed)
f = persona3.student()
right, mine = persona3.outputs(f, x_t, t), work["exports"]
assert mine.shape == (3, *right.shape), f"expected three times {list(right.shape)}"
moved = [(g - right).norm() / right.norm() for g in mine]
assert moved[0] < 1e-5, "TorchScript does not compute f"
assert 1e-6 < moved[1] < 2e-3, "TorchScript in FP16 should differ from f by a rounding; yours differs " + ("less" if moved[1] <= 1e-6 else "more")
assert moved[2] < 1e-5, "ONNX does not compute f"
### END HIDDEN TESTS

# %% [markdown]
# ## 2. INT8
#
# With 8 bits, rounding is not enough: the range of every tensor is measured on real inputs, and cut into 255 equal steps. The inputs must be what the model will meet: noisy images
# at *all* levels, which `formats.calibration(f, images)` makes of uint8 images. `formats.quantized(model, batches, operators)` puts these operators of an ONNX model, given as
# bytes, into INT8.

# %% answer="in_int8"
def in_int8(model, f, images, operators):
    """The ONNX model (bytes) with `operators` in INT8, calibrated on what f meets with `images`: bytes."""
    ### BEGIN SOLUTION
    return formats.quantized(model, formats.calibration(f, images), operators)
    ### END SOLUTION


# %% grade="int8" points=2 about="what INT8 makes of them, with the scalings in 32 bits and in 8"
def both_int8():
    for name, operators in persona3.INT8.items():
        quantised = in_int8(Path(scratch.name, "onnx", "fp32", "model.onnx").read_bytes(), f, data.load("digits", limit=64)[0], operators)
        if quantised is None:
            return None
        path = Path(scratch.name, "int8.onnx")
        path.write_bytes(quantised)
        models[name] = export.Exported(formats.read_onnx(path), "cpu")
    return torch.stack([persona3.outputs(models[name], x_t, t) for name in persona3.INT8])


if "onnx fp32" in models:
    work.hand_in("int8", both_int8)
### BEGIN HIDDEN TESTS
x0, x_t, t, _ = persona3.start(work.seed)
right = persona3.outputs(persona3.student(), x_t, t)
assert work["int8"].shape == (2, *right.shape), f"expected two times {list(right.shape)}"
moved = [(g - right).norm() / right.norm() for g in work["int8"]]
assert 0.003 < moved[0] < 0.15, "INT8 of the multiplications moves f by a few hundredths; was it calibrated on noisy images of all levels?"
assert moved[1] > moved[0], "with the scalings in INT8, too, f is moved farther"
### END HIDDEN TESTS

# %% locked="moved"
expected = ("below 1e-5", "1e-6 to 2e-3", "below 1e-5", "0.003 to 0.15", "more than the line above")
handed_in = [g for name in ("exports", "int8") if name in work for g in work[name]]
for name, g, told in zip(models, handed_in, expected, strict=False):
    print(f"{name}: ‖Δ‖/‖f‖ = {float((g - ours).norm() / ours.norm()):.1e}, expected {told}")

# %% [markdown]
# ## 3. Within 5 %?
#
# The bar: the export's reconstruction error over the baseline's is at most 1.05. The error is the Euclidean distance to x0, averaged over pictures. Keep the noise levels apart.

# %% answer="error_ratio"
def error_ratio(theirs, ours, x0):
    """Mean distance to x0 of an export's pictures over that of the baseline's, all [L,B,C,H,W]: one ratio for each level, [L]."""
    ### BEGIN SOLUTION
    def error(pictures):
        return (pictures - x0).flatten(2).norm(dim=2).mean(1)

    return error(theirs) / error(ours)
    ### END SOLUTION


check("p3.error_ratio", error_ratio);

# %% grade="ratios" points=2 about="the ratio of errors of five exports at five noise levels"
def all_ratios():
    found = [error_ratio(theirs, ours, x0) for theirs in torch.cat([work["exports"], work["int8"]])]
    return None if found[0] is None else torch.stack([torch.as_tensor(ratio) for ratio in found])


if "exports" in work and "int8" in work:
    work.hand_in("ratios", all_ratios)
### BEGIN HIDDEN TESTS
x0, x_t, t, _ = persona3.start(work.seed)
handed_in = torch.cat([work["exports"], work["int8"]])
ours = persona3.outputs(persona3.student(), x_t, t)
assert (handed_in[0] - ours).norm() < 1e-4 * ours.norm(), "the first of the exports is not the one of your pictures"
errors = (torch.cat([handed_in, ours[None]]) - x0).flatten(3).norm(dim=3).mean(2)
assert work.close("ratios", errors[:-1] / errors[-1]), "these are not the ratios of the mean distances to x0, for 5 exports at 5 levels"
### END HIDDEN TESTS

# %% locked="ratio_table"
if "ratios" in work:
    rows = ["| export | " + " | ".join(f"σ = {s:.2f}" for s in t[:, 0].tolist()) + " | all levels together |", "|---|" + 6 * "---|"]
    whole = (ours - x0).flatten(2).norm(dim=2).mean()
    for name, row, theirs in zip(models, work["ratios"].tolist(), torch.cat([work["exports"], work["int8"]]), strict=True):
        together = float((theirs - x0).flatten(2).norm(dim=2).mean() / whole)
        rows.append(f"| {name} | " + " | ".join(f"**{r:.3f}**" if r > persona3.BAR else f"{r:.3f}" for r in (*row, together)) + " |")
    plots.tell("\n".join([*rows, "", f"Ratio of reconstruction errors; bold: over {persona3.BAR}. How far the outputs themselves moved, ‖Δ‖/‖f‖:"]))
    moved = (torch.cat([work["exports"], work["int8"]]) - ours).flatten(2).norm(dim=2) / ours.flatten(1).norm(dim=1)
    lines = {name: (t[:, 0], row.clamp(min=1e-8)) for name, row in zip(models, moved, strict=True)}
    figure = plots.curves(lines, "noise level σ", "‖Δ‖ / ‖f‖, at least 1e-8", "What each format does to f", log_y=True)
    figure.axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    plots.display(
        figure,
        "The relative change of f's output over the noise level, a line for each export: FP32 around 1e-7, FP16 1e-4, INT8 of the multiplications 1e-2, of everything about 1.",
    )

# %% locked="pictures"
if "int8" in work:
    panels = {"x0": x0[0], "noisy": x_t[0], "f": ours[0]} | {name: models[name](x_t[0], t[0]) for name in persona3.INT8}
    figure = plots.sheet({name: images[:6].clamp(-1, 1) for name, images in panels.items()}, [""] * 6)
    plots.display(figure, "Six digits under little noise, as the student and both INT8 models denoise them.")

# %% [markdown]
# ## 4. Below 5 ms?
#
# A GPU returns from a call before the work is done. So: start the clock, call, *wait* until the device is done, stop the clock; one number for each call. On a CPU, waiting does nothing. The self-check
# has a GPU to pretend with.

# %% answer="timed"
def timed(call, wait, clock, n):
    """Seconds that each of n calls takes, one after the other, until wait() says that its work is done; clock() tells the time: a list."""
    ### BEGIN SOLUTION
    seconds = []
    for _ in range(n):
        begin = clock()
        call()
        wait()
        seconds.append(clock() - begin)
    return seconds
    ### END SOLUTION


check("p3.timed", lambda seconds: timed(*persona3.pretend(seconds), len(seconds)));

# %% [markdown]
# A mean hides the request that hung. Report the median, p50, and the time that 95 of 100 calls stay below, p95, in milliseconds, after leaving out the first calls: they allocate, compile and
# fill caches. Interpolate linearly between neighbours, as `np.percentile` and `torch.quantile` do.

# %% answer="percentiles"
def percentiles(seconds, warm_up):
    """(p50, p95) in milliseconds of a tensor of seconds [n], without the first `warm_up`."""
    ### BEGIN SOLUTION
    p50, p95 = 1e3 * np.percentile(seconds[warm_up:].numpy(), (50, 95))
    return p50, p95
    ### END SOLUTION


check("p3.percentiles", percentiles);

# %% grade="latency" points=3 about="raw timings of the ONNX model at batch 1, and their p50 and p95"
def latency(g, x=x_t[4, :1], level=t[4, :1]):
    """Raw seconds of a warm-up and of your number of calls, then p50 and p95."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = timed(lambda: g(x, level), wait, time.perf_counter, persona3.WARM_UP + runs)
    found = None if seconds is None else percentiles(torch.as_tensor(seconds, dtype=torch.float64), persona3.WARM_UP)
    return None if found is None else torch.tensor([*seconds, *found], dtype=torch.float64)


if "onnx fp32" in models:
    work.hand_in("latency", latency, models["onnx fp32"])
### BEGIN HIDDEN TESTS
runs, mine = persona3.start(work.seed)[3], work["latency"]
assert mine.shape == (persona3.WARM_UP + runs + 2,), f"expected {persona3.WARM_UP + runs} raw times, then p50 and p95"
raw = mine[:-2]
assert bool((raw > 0).all()) and len(raw.unique()) > 5, "these are not times of single calls"
right = 1e3 * np.percentile(raw[persona3.WARM_UP :].numpy(), (50, 95))
assert np.allclose(mine[-2:].numpy(), right, rtol=1e-3), "p50 and p95 are not those of the raw times after the warm-up, in milliseconds"
### END HIDDEN TESTS

# %% locked="latency_table"
if "latency" in work:
    rows = ["| batch 1, one call | p50 / ms | p95 / ms | p95 below 5 ms |", "|---|---|---|---|"]
    for name, g in {"eager PyTorch": export.Exported(f, "cpu"), **models}.items():
        p50, p95 = latency(g)[-2:].tolist()
        rows.append(f"| {name} | {p50:.2f} | {p95:.2f} | {'yes' if p95 < persona3.TARGET else 'no'} |")
    plots.tell("\n".join([*rows, "", "Times of the machine that ran this cell, and of whatever else ran on it. It is no A10."]))

# %% [markdown]
# ## 5. TensorRT
#
# An engine is compiled on the GPU that will run it. Its precision comes from the model: newer versions have no FP16 switch any more, so the model goes in with its network in float16 already. Where there is
# no GPU, or no `tensorrt`, the cell says so.

# %% locked="tensorrt"
try:
    fast = copy.deepcopy(f).to("cuda" if torch.cuda.is_available() else "cpu")
    export.save(fast, Path(scratch.name, "tensorrt"), "tensorrt", "fp16")
    engine = export.load(Path(scratch.name, "tensorrt"))
except ValueError as error:
    print(error)
else:
    if "latency" in work and "ratios" in work:
        p50, p95 = latency(engine)[-2:].tolist()
        worst = float(torch.as_tensor(error_ratio(persona3.outputs(engine, x_t, t), ours, x0)).max())
        plots.tell(f"TensorRT FP16 on {torch.cuda.get_device_name()}: p50 **{p50:.2f}** ms, p95 **{p95:.2f}** ms, both copies included; largest ratio **{worst:.3f}**.")

# %% [markdown]
# ## 6. Decide
#
# A few sentences each. A person reads them. Use your own numbers.

# %% [markdown] manual="explain_formats" points=2 about="which exports you would ship, which you would not, and why INT8 breaks where it breaks"
# **Which of the five would you ship, and which not?** At which noise level does the one that fails fail, and why there, when FP16 passes everywhere?
#
# <!-- BEGIN SOLUTION -->
# TorchScript and ONNX compute f to the last digits, and FP16 moves it by less than a thousandth: a 16-bit float keeps three digits of a number of any size. INT8 has 255 equal steps for the whole range of a
# tensor. Inside the network the values have one scale, so INT8 of the multiplications stays within 5 %. The scalings handle x_t itself, whose range at σ = 80 is hundreds wide: one step is wider than the whole
# image, so the picture is rounded away before the network sees it, and one and the same digit comes out for every picture. The ratio is worst at low noise, where the baseline's error is tiny. I would ship FP16, or INT8 with float scalings if
# it were faster on the target.
# <!-- END SOLUTION -->

# %% [markdown] manual="explain_bar" points=2 about="what a ratio of 1.00 proves, and what it does not"
# **Would a ratio of 1.00 over all levels together prove that the export is right?** Compare the column "all levels together" with the others, and with how far the outputs moved.
#
# <!-- BEGIN SOLUTION -->
# No. At high noise the student guesses, and any other digit is about as far from x0 as its own: INT8 of everything passes the bar at the highest of my levels, although its output has nothing to do with the
# picture. These levels also have the largest errors, so they dominate an average: a failure of many times at low noise looks small there. One must look level by level, and at ‖Δ‖/‖f‖, which compares with the
# baseline's output instead of with x0.
# <!-- END SOLUTION -->

# %% [markdown] manual="explain_latency" points=2 about="what 5 ms covers, and what you would measure on the A10"
# **"Less than 5 ms per inference": of what?** Say what your p95 covers and what it does not, why you would not report the mean, and what you would measure before you promise it for an A10.
#
# <!-- BEGIN SOLUTION -->
# Of one model call at batch 1, from an image in memory to one in memory. A request also waits in a queue, is parsed, and travels; HTTP alone can cost as much as the target. A mean is carried by the many fast calls and hides
# the few slow ones that users feel. My numbers are of this CPU, with other work on it, and of 8×8 images: they say nothing on an A10. There I would build the engine on that card, warm up, synchronise, time
# at least some hundred calls at batch 1 with the real image size, copies included, under the load that is expected, and report p50 and p95 for the model and for the request apart.
# <!-- END SOLUTION -->
