"""What each command of the command line does: arguments and profile in, a flat dict of metrics out."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cmlib import compare as comparing
from cmlib import data, evaluate, parity, pipeline, plots, protocol, ranks, recipes, report, sizing
from cmlib import demo as demo_run
from cmlib import export as exporting
from cmlib.cache import PairCache
from cmlib.consistency import ConsistencyFunction
from cmlib.files import sha256, write_json
from cmlib.ops import best_device, indexed_normal
from cmlib.process import DDPM
from cmlib.profiles import Profile, small_unet
from cmlib.serving import serve as serving
from cmlib.serving import site as sites
from cmlib.teacher import Teacher
from cmlib.unet import UNet, balanced, classes

Metrics = dict[str, Any]


def demo(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib demo`"""
    if profile.rough:
        print(f"Profile {profile.name}: a small cache and short training, so the students are worse than the README's.")
    metrics = demo_run.run(profile, args.out, args.seed, args.full, args.train_teacher)
    print("\n" + report.text(report.table(profile.dataset, metrics)) + "\n\n" + report.verdict(metrics))
    print(f"\nOpen {args.out / 'report.html'}")
    return metrics


def _teacher(args: Namespace, profile: Profile, images: Tensor | None = None) -> Teacher:
    teacher = pipeline.load_teacher(args.teacher or profile.teacher, None if images is None else tuple(images.shape[1:]))
    schedule = getattr(args, "schedule", None)
    return replace(teacher, process=_chain(schedule)) if schedule else teacher


def _chain(schedule: str) -> DDPM:
    return getattr(DDPM, schedule.replace("-", "_"))()


def _training_set(args: Namespace, profile: Profile) -> tuple[Profile, Tensor, Tensor | None]:
    """The images and labels that are held in memory; with --limit they are all that there is to stream."""
    profile = replace(profile, in_memory=None) if args.limit else profile
    return profile, *data.load(profile.dataset, limit=args.limit or profile.in_memory)


def teacher_train(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib teacher train` and `cmlib teacher finetune`"""
    profile, images, labels = _training_set(args, profile)
    held_out = data.load(profile.dataset, "test", limit=500)
    finetune = hasattr(args, "teacher")
    if finetune:
        start = _teacher(args, profile, images)
    else:
        unet = UNet(**small_unet(images.shape[1:], profile.widths, 0.1, profile.layers, profile.attention, profile.classes))
        start = Teacher(unet.to(best_device()), _chain(args.schedule or "linear"))
    refresh = (PairCache if args.resume else PairCache.open)(args.refresh) if finetune and args.refresh else None
    before = pipeline.epsilon_error(start.process, start.unet.eval(), *held_out)
    updates, lr = args.updates or profile.teacher_updates, args.lr or (2e-4 if finetune else profile.teacher_lr)
    settings = {"resume": args.resume, "patience": args.patience, "refresh": refresh, "precision": profile.precision}
    settings |= {"batches": pipeline.stream(profile, images, labels, args.seed, start.unet)}
    settings |= {"schedule": "constant" if finetune else "cosine", "every": 1_000 if profile.in_memory else None}
    teacher, history = pipeline.train_teacher(
        start, images, held_out, updates, lr, profile.batch_size, args.out, args.seed, **settings
    )
    if ranks.is_first():
        teacher.save_pretrained(args.out / "pipeline")
    last = history[-1]
    print(f"held-out ε-MSE {before:.4f} -> {last['held_out']:.4f} after {last['step']} updates, in {args.out / 'pipeline'}")
    return {
        "mse.held_out_before": before,
        "mse.held_out": last["held_out"],
        "updates": last["step"],
        "seconds.total": last["seconds"],
        "protocol.schedule": teacher.process.name,
    }


def teacher_eval(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib teacher eval`"""
    images, labels = data.load(profile.dataset, limit=profile.in_memory)
    held_out = data.load(profile.dataset, "test", limit=profile.in_memory)
    teacher = _teacher(args, profile, images)
    n = _samples(args, profile, images)
    fakes = pipeline.draw_teacher(teacher, n, args.steps, "ddim", tuple(images.shape[1:]), args.seed)
    shown = {f"DDIM-{args.steps}": _seen(profile, fakes), "real": _seen(profile, held_out[0])}
    plots.save(plots.samples(shown), args.out / "samples.png")
    few = held_out[0][:500], held_out[1] if held_out[1] is None else held_out[1][:500]
    found = {"mse.held_out": pipeline.epsilon_error(teacher.process, teacher.unet, *few)}
    features = pipeline.Features.of(profile.dataset, args.out, images, labels, held_out)
    found |= features.compare("real", held_out[0]) | features.compare(f"teacher_ddim{args.steps}", fakes)
    return _say({**found, **features.protocol, "protocol.n": n})


def _dataset(args: Namespace, profile: Profile, shape: tuple[int, ...]) -> str:
    """--dataset, or else the profile's, which goes by the machine; but for a student of other images the named set of them."""
    known = {"digits": (1, 8, 8), **{name: source.shape for name, source in data.SETS.items()}}
    fitting = [name for name, its in known.items() if its == shape]
    return profile.dataset if args.dataset or profile.dataset in fitting or not fitting else fitting[0]


def _samples(args: Namespace, profile: Profile, images: Tensor) -> int:
    """How many to draw: no more than a set that is whole in memory has, unless it is asked for."""
    return args.samples or (profile.samples if profile.in_memory else min(profile.samples, len(images)))


def _seen(profile: Profile, images: Tensor) -> Tensor:
    """The first 48 as floats, decoded where they are latents."""
    return data.to_float(data.pictures(profile.dataset, images[:48]))


def _say(metrics: Metrics) -> Metrics:
    for key, value in metrics.items():
        print(f"{key:40} {value:.5g}" if isinstance(value, float) else f"{key:40} {value}")
    return metrics


# ---- pair cache


def cache_build(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib cache build`"""
    teacher = _teacher(args, profile)
    source = args.source or profile.source
    solver = args.solver or ("posterior_mean" if source == "data" else profile.solver)
    images, _ = data.load(profile.dataset, limit=None if source == "data" else 1)
    cache = PairCache.build(
        args.out,
        teacher,
        args.pairs or profile.pairs,
        source=source,
        images=images if source == "data" else None,
        solver=solver,
        delta=args.delta,
        steps=args.steps or profile.rollout_steps,
        shape=(images.shape[1], images.shape[2], images.shape[3]),
        seed=args.seed,
        batch_size=args.batch_size,
    )
    return _say(_info(cache))


def _info(cache: PairCache) -> Metrics:
    size = sum(cache.path(s).stat().st_size for s in range(cache.n_shards) if cache.path(s).exists())
    return {"pairs": len(cache), "shards": cache.n_shards, "megabytes": size / 1e6} | {
        f"protocol.{k}": v for k, v in cache.key.items()
    }


def cache_info(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib cache info`"""
    return _say(_info(PairCache(args.cache)))


def cache_verify(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib cache verify`"""
    cache = PairCache(args.cache)
    damaged = cache.verify()
    if damaged:
        named = ", ".join(map(str, damaged[:10])) + (", …" if len(damaged) > 10 else "")
        bad = f"{len(damaged)} of {cache.n_shards} shards are damaged or missing"
        raise ValueError(f"{bad} ({named}); the same build repairs them")
    return _say({"shards.good": cache.n_shards, "shards.damaged": 0})


def cache_refresh(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib cache refresh`"""
    return _say(_info(PairCache(args.cache).refresh(_teacher(args, profile))))


# ---- students


def distill(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib distill`"""
    images = labels = None
    if not args.cache:
        profile, images, labels = _training_set(args, profile)
    plain = args.objective == "pair-regression"  # whose images are compared with the data set's
    teacher = _teacher(args, profile, data.load(profile.dataset, limit=1)[0] if plain else images)
    cache = PairCache.open(args.cache, teacher) if args.cache else None
    student: Any
    if plain and args.student:
        raise ValueError("pair-regression starts from the teacher's weights; leave --student out")
    if args.student:
        student = ConsistencyFunction.load(args.student).train()
        if student.image_shape != teacher.image_shape:
            raise ValueError(f"{args.student} makes images {student.image_shape}, the teacher {teacher.image_shape}")
    else:
        sigma_max = recipes.largest_sigma(teacher)
        if cache:  # the path's first state
            steps = cache.key.get("steps", profile.rollout_steps)
            sigma_max = float(teacher.process.sigma(teacher.process.grid(steps)[-1:]))
        student = recipes.first_student(args.objective, teacher, sigma_max)
    pairs: dict[str, Any] = {"cache": cache, "teacher": teacher, "images": images, "labels": labels}
    trained, history = pipeline.distill(
        args.objective, student, profile, args.out / "training", args.seed, args.updates, args.resume, **pairs
    )
    found = {"loss.first": history[0]["loss"], "loss.last": history[-1]["loss"], "seconds.total": history[-1]["seconds"]}
    if plain:
        assert cache is not None
        print("One reverse step, not a one-step sampler: no student.pt, only what the regression reached.")
        return _say(found | protocol.regression(trained, cache, teacher, profile, args.seed, args.out))
    if not isinstance(trained, ConsistencyFunction):
        print(f"{args.objective} makes no ConsistencyFunction: no student.pt, only the training's checkpoint and samples.")
        return _say(found)
    trained.save(args.out / "student.pt")
    trained.save(args.out / "student.safetensors")
    drawn = {f"{k} evaluation(s)": pipeline.draw(trained, 48, k, trained.image_shape, args.seed) for k in (1, 2)}
    plots.save(plots.samples({name: _seen(profile, images) for name, images in drawn.items()}), args.out / "samples.png")
    print(f"student in {args.out / 'student.pt'}")
    return _say(found)


def sample(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib sample`"""
    f = ConsistencyFunction.load(args.checkpoint).to(best_device())
    drawn = pipeline.draw(f, args.n, args.evaluations, f.image_shape, args.seed)
    images = data.pictures(_dataset(args, profile, f.image_shape), drawn)
    plots.save(plots.samples({f"{args.evaluations} evaluation(s)": data.to_float(images)}), args.out / "samples.png")
    exporting.save_npz(args.out / "samples.npz", images)
    print(f"{args.n} images in {args.out / 'samples.npz'} and samples.png")
    sigmas = " ".join(f"{sigma:.4g}" for sigma in f.levels(args.evaluations))
    return {"n": args.n, "evaluations": args.evaluations, "protocol.sigmas": sigmas}


def evaluate_student(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib evaluate`"""
    f = ConsistencyFunction.load(args.checkpoint).to(best_device())
    profile, images, labels = _training_set(args, profile)
    if f.image_shape != tuple(images.shape[1:]):
        raise ValueError(f"{args.checkpoint} makes images {f.image_shape}, the data set's are {tuple(images.shape[1:])}")
    held_out = data.load(profile.dataset, "test", limit=args.limit or profile.in_memory)
    teacher = _teacher(args, profile, images)
    n = _samples(args, profile, images)
    features = pipeline.Features.of(profile.dataset, args.out, images, labels, held_out)
    seeds = range(args.seed, args.seed + (args.seeds or (1 if profile.rough else 3)))
    told = {**features.protocol, "protocol.n": n, "protocol.seeds": " ".join(map(str, seeds))}
    told |= {"protocol.student": sha256(args.checkpoint), "protocol.teacher": teacher.hash()}
    if args.fid:
        told["protocol.fid"] = evaluate.FID.protocol(len(images))
    other = protocol.comparable(args.against, told) if args.against else None
    found: Metrics = features.compare("real", held_out[0])
    fid = evaluate.FID(images, decode=partial(data.pictures, profile.dataset)) if args.fid else None
    key = [told[f"protocol.{k}"] for k in ("student", "teacher", "n")]
    distances, figure = protocol.measured(protocol.generators(f, teacher, n), seeds, features, fid, key, args.out)
    plots.save(figure, args.out / "bias.png")
    found |= distances
    indices, distance = protocol.reconstruction(f, held_out, teacher, profile.timesteps, args.seed)
    sigma = teacher.process.sigma(indices)
    noise = indexed_normal(pipeline.SAMPLING_SEED + args.seed, range(64), f.image_shape, 7)
    with balanced(f, torch.arange(64)):
        levels, gap = evaluate.self_consistency_gap(f, teacher, noise, profile.rollout_steps, f.sigma_max)
    found_at = {"student": plots.binned(sigma, distance)}
    curve = plots.curves(found_at, "noise level σ", "‖f(x_t, t) − x0‖", "Distance to the image")
    plots.save(curve, args.out / "reconstruction.png")
    curve = plots.curves({"student": (levels, gap)}, "noise level σ", "RMS of f(x_t, t) − x_end", "Self-consistency gap")
    plots.save(curve, args.out / "gap.png")
    found |= {"distance.student": float(distance.mean()), "gap.student": float(gap.mean())}
    _say(found := found | told | {"protocol.timesteps": profile.timesteps, "protocol.n_distance": min(64, len(held_out[0]))})
    if other:
        print(f"\n{protocol.beside(found, other)}")
    return found


def compare(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib compare`"""
    seeds = range(args.seed, args.seed + args.seeds)
    budget = args.budget_images or profile.batch_size * profile.distill_updates
    names = args.objectives.split(",")
    found = comparing.run(names, seeds, budget, args.from_nothing, profile, _teacher(args, profile), args.out)
    write_json(args.out / "compare.json", found)
    plots.save(comparing.figure(found), args.out / "compare.png")
    print("\n" + comparing.markdown(found))
    flat = {f"{key}.{r['objective']}.{r['seed']}": r[key] for r in found["rows"] for key in comparing.MEASURES}
    return {**flat, **{f"protocol.{k.removeprefix('protocol.')}": v for k, v in found["protocol"].items()}}


def export(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib export`"""
    f = ConsistencyFunction.load(args.checkpoint)
    if classes(f):
        raise ValueError(f"{args.checkpoint} is class-conditional, and no format here takes labels; `cmlib sample` does")
    dataset = _dataset(args, profile, f.image_shape)
    held_out, _ = data.load(dataset, "test", limit=64)
    if f.image_shape != (its := tuple(held_out.shape[1:])):
        raise ValueError(f"{args.checkpoint} makes images {f.image_shape}, {dataset}'s are {its}; give its own --dataset")
    images = data.load(dataset, limit=256)[0] if args.precision == "int8" else None
    if args.format not in ("onnx", "triton", "diffusers"):
        f = f.to(best_device())
    told = exporting.save(f, args.out, args.format, args.precision, images)
    found = parity.measure(f, exporting.load(args.out), held_out, args.seed)
    found |= {"size.megabytes": (args.out / told["file"]).stat().st_size / 1e6}
    found |= {f"protocol.{k}": told[k] for k in ("format", "precision", "weights_sha256")} | {"protocol.dataset": dataset}
    write_json(args.out / "parity.json", found)
    print(parity.table(found) + f"\n\n{args.out / told['file']}, metadata.json and parity.json beside it")
    if args.format == "diffusers":
        print(f"ConsistencyModelPipeline.from_pretrained({str(args.out)!r}) loads it")
    if args.format == "torchscript":
        print("torch.jit is deprecated: it still loads everywhere, but torch-export and onnx are what comes next.")
    return found


def _page(args: Namespace, profile: Profile) -> Metrics:
    """The page in --out, and the model's entry in its settings."""
    if args.onnx and not args.onnx.is_dir():
        raise ValueError(f"--onnx {args.onnx} is no folder; give the folder of `cmlib export --format onnx`")
    student = args.checkpoint or args.onnx
    return sites.write(args.out, _dataset(args, profile, sites.shape_of(student)), student, args.teacher, args.assets)


def site(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib site`"""
    made = _page(args, profile)
    print(f"the page is in {args.out}, for any web server: python -m http.server --directory {args.out}")
    return {"protocol.model": made["name"], "levels": len(made["levels"]), "examples": made["examples"]}


def serve(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib serve`"""
    settings = {key: getattr(args, key) for key in ("port", "workers", "timeout", "queue", "tensorrt")}
    settings["host"] = serving.address(args.host, args.port)  # before anything is computed
    print("preparing the page …", flush=True)
    serving.start(args.out, _page(args, profile)["name"], **settings)
    return {f"protocol.{key}": value for key, value in settings.items()}


def grade(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib grade`"""
    from cmlib.grader import grading  # psutil, nbformat and nbgrader are the instructor's

    return grading.grade(args.folder, args.exercises, args.out)


def doctor(args: Namespace, profile: Profile) -> Metrics:
    """`cmlib doctor`"""
    if args.plan:
        print(f"On GPUs: {sizing.SHARE:.0%} of the maker's peak is assumed; this machine is measured.\n")
        return _say(sizing.table(args.plan, sizing.measured_rate()))
    return _say(sizing.machine())
