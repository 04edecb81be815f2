"""What `test_ranks.py` compares: run in one process, or by torchrun in two, each of which leaves its `rank-….pt`."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import torch
from PIL import Image

from cmlib import cli, data, evaluate, pipeline, ranks, recipes
from cmlib.cache import PairCache
from cmlib.objectives import ICT, Denoising, ScoreCorrected
from cmlib.ops import seed_everything
from cmlib.process import DDPM, EDM
from cmlib.profiles import CI
from cmlib.recipes import CACHED, OBJECTIVES, first_student, recipe
from cmlib.teacher import Teacher, warm_start
from cmlib.train import fit
from cmlib.unet import UNet
from tests.small import UNET, seeded

STEPS, SHAPE, BATCH = 20, (1, 8, 8), 9  # which two ranks share as 5 and 4
NAMES = (*OBJECTIVES, "denoising", "ict-corrected", "sct-batch", "consistency-distillation-fly")
NET = UNET | {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


def make_teacher(seed: int = 0) -> Teacher:
    torch.manual_seed(seed)
    return Teacher(UNet(**NET), DDPM.linear())


def trained(name: str, teacher: Teacher, images: torch.Tensor, cache: PairCache) -> dict[str, torch.Tensor]:
    """20 steps of one objective: the loss of each five, a sheet of samples, f and the average's weights at the end."""
    batches = partial(data.batches, images, BATCH, 0)
    if name in CACHED:
        batches = partial(cache.loader, BATCH, 0)
    start, settings = (make_teacher().unet, {"steps": STEPS}) if name == "denoising" else (None, {})
    if name == "denoising":
        model, objective = start.requires_grad_(True), Denoising(teacher.process)
    else:
        base = name.removesuffix("-corrected").removesuffix("-batch").removesuffix("-fly")
        model = first_student(base, teacher, 20.0).requires_grad_(True)
        given = None if name in CACHED else images
        objective, settings = recipe(base, CI, STEPS, model, SHAPE, teacher, given)
        if name == "sct-batch":
            objective = replace(objective, reference="batch")
        if name == "ict-corrected":
            objective = ScoreCorrected(ICT(STEPS, EDM(model.sigma_min, 20.0)), teacher.score)

    def sheet(step, average):
        return {"pixels": float(pipeline.draw(average, 3, 1, SHAPE, 0, batch=1).float().mean())}

    x, t = torch.randn(6, *SHAPE, generator=seeded(3)), torch.logspace(-1, 1, 6)
    x = x * (1 + t[:, None, None, None])
    with torch.no_grad():
        before = copy.deepcopy(model).eval()(x, t)
    average, history = fit(
        model, objective, batches, every=5, ema=0.9, name=name, on_every=None if name == "denoising" else sheet, **settings
    )
    with torch.no_grad():
        found = {"f": average.eval()(x, t), "before": before}
    found |= {"loss": torch.tensor([row["loss"] for row in history]), "step": torch.tensor([row["step"] for row in history])}
    return found | {"average": torch.cat([p.flatten() for p in average.parameters()])}


def streamed(out: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ten steps on a folder of four files, of which each of two ranks reads two."""
    folder = out / f"set-{ranks.here()[0]}"
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [Image.fromarray(image[0].numpy()) for image in images]}, features=features)
    for k in range(4):
        table.shard(4, k).to_parquet(str(folder / f"train-{k:05d}-of-00004.parquet"))
    teacher = make_teacher()
    batches = partial(data.stream, str(folder), 8, 0)
    average, history = fit(teacher.unet.requires_grad_(True), Denoising(teacher.process), batches, 10, every=5, lr=1e-3)
    weights = torch.cat([p.flatten() for p in average.parameters()])
    return {"average": weights, "loss": torch.tensor([row["loss"] for row in history])}


class Corner(torch.nn.Module):
    """Features for FID: four pixels."""

    num_features = 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 3:5, 3:5].flatten(1).double()


@contextmanager
def small_batches() -> Iterator[list[int]]:
    """A few images are several batches inside; how many of each deal are this rank's."""
    functions, dealt, mine = (pipeline.draw, pipeline.draw_teacher, evaluate.features), ranks.dealt, []
    before = [function.__defaults__ for function in functions]

    def noted(parts, work):
        mine.append(len(parts[ranks.here()[0] :: ranks.here()[1]]))
        return dealt(parts, work)

    try:
        ranks.dealt = noted
        for function in functions:
            function.__defaults__ = (10, *function.__defaults__[1:])
        yield mine
    finally:
        ranks.dealt = dealt
        for function, values in zip(functions, before, strict=True):
            function.__defaults__ = values


def command_line(out: Path) -> None:
    """teacher -> cache -> student -> samples -> evaluation, as a user runs them."""

    def run(*args) -> None:
        assert cli.main([*map(str, args), "--profile", "ci"]) == 0, args

    if ranks.here()[1] > 1:
        run("teacher", "train", "--updates", 2, "--limit", 100, "--out", out / "teacher")
    run("cache", "build", "--pairs", 400, "--steps", 10, "--batch-size", 20, "--out", out / "rollouts")
    run("distill", "--objective", "endpoint-regression", "--cache", out / "rollouts", "--updates", 3, "--out", out / "student")
    shipped = ("--checkpoint", pipeline.shipped("digits_student.safetensors"))
    run("sample", *shipped, "--n", 25, "--evaluations", 2, "--out", out / "samples")
    run("evaluate", *shipped, "--samples", 30, "--limit", 100, "--out", out / "evaluation")


def everything(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Leaves a cache and the command line's folders in `out`."""
    torch.set_num_threads(1)
    seed_everything(0)
    images = torch.randint(0, 256, (64, *SHAPE), dtype=torch.uint8, generator=seeded(1))
    teacher = make_teacher()
    cache = PairCache.build(out / "cache", teacher, 240, "rollout", solver="ddim", steps=5, shape=SHAPE, batch_size=8)
    pairs = PairCache.build(out / "images", teacher, 3000, "data", images, batch_size=100)
    ranks.gathered(torch.zeros(1))  # neither refreshes before both have opened it
    pairs.refresh(make_teacher(1))
    start = warm_start(teacher, 20.0)  # once for all: fitting the time embedding costs more than the training
    recipes.warm_start = lambda teacher, sigma_max: copy.deepcopy(start)
    found = {name: trained(name, teacher, images, cache) for name in NAMES}
    classifier = evaluate.Classifier.load(pipeline.shipped("digits_classifier.safetensors"))
    fakes = pipeline.draw(first_student("ict", teacher, 20.0), 51, 2, SHAPE, 0, batch=10)
    drawn = evaluate.features(classifier, fakes, batch_size=10)
    real = evaluate.features(classifier, data.load("digits", limit=200)[0])
    fid = evaluate.FID(images, Corner())
    if ranks.is_first():
        fid.add(fakes)  # as the one batch of `images` is the first rank's, the second has nothing
    found["sampling"] = {
        "fid": torch.tensor(fid.distance(), dtype=torch.float64),
        "images": fakes,
        "teacher": pipeline.draw_teacher(teacher, 11, 4, "ancestral", SHAPE, 0, batch=3),
        "fd": torch.tensor(evaluate.frechet_distance(real, drawn), dtype=torch.float64),
    }
    recipes.warm_start = warm_start
    found["streamed"] = streamed(out, images)
    with small_batches() as mine:
        command_line(out)
    found["dealt"] = {"least": torch.tensor(min(mine))}
    return found


if __name__ == "__main__":
    with ranks.joined():
        folder = Path(sys.argv[1])
        torch.save(everything(folder), folder / f"rank-{ranks.here()[0]}.pt")
