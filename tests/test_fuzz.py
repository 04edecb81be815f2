"""Bad input, drawn by hypothesis: one clear line, exit 2, nothing half-written, and never a traceback."""

import argparse
import contextlib
import io
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from cmlib import cli, data, evaluate, files, profiles
from cmlib import commands as commands_module
from cmlib.cache import PairCache
from cmlib.consistency import EMA, ConsistencyFunction, sample
from cmlib.ops import indexed_normal
from cmlib.process import DDPM, EDM, ode_step
from cmlib.serving import serve
from cmlib.teacher import Teacher
from cmlib.train import fit
from cmlib.unet import UNet
from tests.small import UNET

few = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TINY = replace(profiles.CI, name="tiny", widths=(8, 16), samples=20, timesteps=1, batch_size=8, distill_updates=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher, a student and a cache that are good, and files that are not."""
    here = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    teacher = Teacher(UNet(**UNET), DDPM.linear())
    teacher.save_pretrained(here / "teacher")
    ConsistencyFunction(UNet(**UNET), 0.01, 20.0).save(here / "student.pt")
    ConsistencyFunction(UNet(**UNET | {"sample_size": 16}), 0.01, 20.0).save(here / "wide.pt")
    PairCache.build(here / "cache", teacher, 20, "rollout", solver="ddim", steps=5, shape=(1, 8, 8))
    (here / "empty").write_bytes(b"")
    (here / "text").write_text("not what you think, σ")
    torch.save({"ema": {}, "config": {"unet": None}}, here / "hollow.pt")
    (here / "folder").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(profiles.PROFILES, "tiny", TINY)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("CMLIB_PROFILE", "tiny")
        patch.setattr(serve, "address", lambda host, port: host)
        patch.setattr(serve, "start", lambda *_, **settings: pytest.fail(f"a server would start with {settings}"))
        yield here


# ---- the command line

GOOD = {  # commands that run, fast, if no option is bad
    "teacher train": "--updates 1 --limit 8",
    "teacher finetune": "--updates 1 --limit 8 --teacher {here}/teacher",
    "teacher eval": "--teacher {here}/teacher --steps 2 --samples 10",
    "cache build": "--teacher {here}/teacher --pairs 10 --steps 5",
    "cache verify": "{here}/cache",
    "cache refresh": "{here}/cache --teacher {here}/teacher",
    "cache info": "{here}/cache",
    "distill": "--teacher {here}/teacher --updates 1 --limit 8",
    "sample": "--checkpoint {here}/student.pt --n 2",
    "evaluate": "--checkpoint {here}/student.pt --teacher {here}/teacher --samples 10 --limit 20",
    "compare": "--teacher {here}/teacher --objectives ect --budget-images 8 --seeds 1",
    "export": "--checkpoint {here}/student.pt",
    "serve": "--checkpoint {here}/student.pt",
    "site": "--checkpoint {here}/student.pt",
    "grade": "{here}/folder",
    "doctor": "",
    "demo": "--quick",
}
WORD = st.text(st.characters(exclude_categories=("Cs", "Nd"), exclude_characters="\0"), max_size=12).filter(
    lambda word: not (word.startswith("-") or word.strip().lower() in ("inf", "infinity", "nan") or Path(word).exists())
)
BAD = {
    int: st.one_of(st.integers(max_value=0).map(str), WORD, st.sampled_from(["1.5", "1e3", "nan", "0x10", "9" * 30])),
    float: st.one_of(st.sampled_from(["nan", "inf", "-inf", "-1", "0", "1e400", "-1e-300"]), WORD),
    Path: st.sampled_from(["{here}/nowhere", "{here}/empty", "{here}/text", "{here}/folder", "/dev/null", "{here}/hollow.pt"]),
    None: st.one_of(WORD, st.sampled_from(["{here}/empty", "{here}/text", "{here}/folder", "no/such", "a/b/c"])),
}
MAY_BE_ANY = {"seed": "-1", "patience": "-1"}  # whose 0 is good
LEFT_OUT = ("help", "out", "function", "exercises", "schedule", "host")  # --out is fuzzed by itself; a host asks the network


def commands(parser: argparse.ArgumentParser, name: str = ""):
    """(command, its parser), leaves only."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield name.strip(), parser
    for group in groups:
        for word, sub in group.choices.items():
            yield from commands(sub, f"{name} {word}")


READS_IMAGES = ("teacher train", "teacher finetune", "teacher eval", "cache build", "distill", "evaluate", "export", "serve")
OPTIONS = [
    (name, action)
    for name, sub in commands(cli.parser())
    for action in sub._actions
    if name in GOOD and action.nargs != 0 and action.dest not in LEFT_OUT and (action.dest != "dataset" or name in READS_IMAGES)
]


def run(*arguments: str) -> tuple[int, list[str]]:
    """Exit code, and the lines that cmlib itself wrote to stderr."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.main(list(arguments))
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, [line for line in err.getvalue().splitlines() if "cmlib: " in line]


def refused(here: Path, *arguments: str) -> str:
    """Runs into a new folder, in which a refusal leaves nothing; the line."""
    out = Path(tempfile.mkdtemp(dir=here)) / "out"
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file() and p.suffix != ".lock"}
    code, lines = run(*arguments, "--out", str(out))
    assert code == 2 and len(lines) == 1 and lines[0].startswith("cmlib: "), (arguments, code, lines)
    assert len(lines[0]) > 20 and "Traceback" not in lines[0]
    assert not [p for p in out.rglob("*") if p.is_file() and p.suffix != ".lock"], arguments
    assert {p: p.read_bytes() for p in before} == before
    return lines[0]


def test_all_options_are_in_the_list():
    names = {name for name, _ in commands(cli.parser())}
    assert set(GOOD) == names, "give a new command its line in GOOD"
    assert len(OPTIONS) > 90 and {name for name, action in OPTIONS if not action.option_strings} >= {"cache verify", "grade"}


@pytest.mark.parametrize(("name", "action"), OPTIONS, ids=lambda part: part if isinstance(part, str) else part.dest)
@settings(few, max_examples=2)
@given(data=st.data())
def test_a_bad_value_of_any_option_is_one_line(place, name, action, data):
    if action.dest in MAY_BE_ANY:
        value = data.draw(st.one_of(st.just(MAY_BE_ANY[action.dest]), WORD, st.just("9" * 30)))
    elif action.choices or action.dest in ("profile", "objectives"):
        value = data.draw(WORD)
    elif action.dest == "folder":  # any folder and any zip, as a checkpoint is, may be graded
        value = data.draw(st.sampled_from(["{here}/nowhere", "{here}/empty", "{here}/text"]))
    else:
        value = data.draw(BAD[action.type])
    if action.dest in ("dataset", "objectives", "profile", "teacher") and not value.strip():
        value = "ø"
    value = value.format(here=place) if "{here}" in value else value
    good = [part.format(here=place) for part in GOOD[name].split()]
    if not action.option_strings:
        refused(place, *name.split(), value, *good[1:])
    else:
        good = [] if action.dest == "onnx" else good  # in place of a checkpoint
        refused(place, *name.split(), *good, f"{action.option_strings[-1]}={value}")


@few
@given(
    words=st.lists(
        st.one_of(WORD, st.sampled_from(["--", "-", "--n", "cache", "build", "--out", "\n", "--profile=ci"])), max_size=5
    )
)
def test_words_in_any_order_are_a_line_or_help(place, words):
    with contextlib.chdir(place):
        code, lines = run("sample", *words)
    assert code == 2 and len(lines) == 1


@pytest.mark.parametrize("name", ["empty", "text", "empty/below", "folder\0x"])
def test_a_folder_that_cannot_be_is_one_line(place, name):
    code, lines = run("doctor", "--out", str(place / name))
    assert code == 2 and len(lines) == 1


@pytest.mark.parametrize(
    "more", [("sample", "--n", "9" * 15), ("teacher eval", "--samples", "9" * 18), ("cache build", "--batch-size", "9" * 18)]
)
def test_more_than_any_run_has(place, more):
    name, option, value = more
    code, lines = run(
        *[part.format(here=place) for part in f"{name} {GOOD[name]}".split()], option, value, "--out", str(place / "m")
    )
    assert code == 2 and len(lines) == 1


def test_what_nobody_foresaw_is_one_line_and_a_file(place, monkeypatch):
    def fail(args, profile):
        raise RuntimeError("a bug\nof ours")

    monkeypatch.setattr(commands_module, "doctor", fail)
    code, lines = run("doctor", "--out", str(place / "bug"))
    assert code == 1 and len(lines) == 1 and "unforeseen RuntimeError: a bug of ours" in lines[0]
    assert "Traceback" in (place / "bug" / "traceback.txt").read_text()


# ---- pictures

MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"]


@st.composite
def picture_folders(draw):
    """[(mode, width, height)] of a training set; most are no set that one can train on."""
    square = draw(st.booleans())
    side = draw(st.sampled_from([1, 3, 8, 12]))
    rows = draw(st.integers(0, 4))
    mode = st.just(draw(st.sampled_from(MODES))) if draw(st.booleans()) else st.sampled_from(MODES)
    sides = st.just(side) if square else st.sampled_from([1, 7, 8, 9])
    return [(draw(mode), draw(sides), side) for _ in range(rows)], draw(st.sampled_from([None, None, "cut", "text"]))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(folder=picture_folders())
@example(folder=([("L", 8, 8)], None))
@example(folder=([("RGBA", 8, 8)] * 3, None))
@example(folder=([("L", 8, 8), ("RGB", 8, 8)], None))
@example(folder=([], None))
def test_any_folder_of_pictures_trains_or_is_one_line(place, folder, monkeypatch):
    """Grey, palette, RGBA and 16 bit; one image, none; sizes that are mixed, not square, or odd; files that are damaged."""
    pictures, broken = folder
    root = Path(tempfile.mkdtemp(dir=place))
    rng = np.random.Generator(np.random.Philox(0))
    for split in ("train", "test"):
        (root / split).mkdir()
        for k, (mode, width, height) in enumerate(pictures):
            pixels = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            name = root / split / f"{k}.{'tiff' if mode in ('F', 'CMYK', 'I;16') else 'png'}"
            (pixels.convert("I").convert("I;16") if mode == "I;16" else pixels.convert(mode)).save(name)
            if broken and k == 0:
                name.write_bytes(name.read_bytes()[:20] if broken == "cut" else b"a caption")
    out = root / "out"
    code, lines = run("teacher", "train", "--dataset", str(root), "--updates", "1", "--out", str(out))
    assert code in (0, 2) and len(lines) == code // 2, lines
    sizes = {(w, h) for _, w, h in pictures}
    if code == 0:
        assert not broken and len(sizes) == 1 and len(set(next(iter(sizes)))) == 1
        images, _ = data.load(str(root))
        assert images.dtype == torch.uint8 and len(images) == len(pictures) and images.shape[1] in (1, 3)
        Teacher.from_pretrained(out / "pipeline")
    else:
        assert not (out / "metrics.json").exists() and not list(out.rglob("*.tmp"))
        assert broken or not pictures or sizes != {(8, 8)} or len({m in ("1", "L", "I;16") for m, _, _ in pictures}) > 1, lines
    shutil.rmtree(root)


# ---- functions


def tensors():
    shape = st.integers(0, 5).flatmap(lambda n: st.lists(st.sampled_from([0, 1, 2, 3, 7, 8]), min_size=n, max_size=n))
    dtype = st.sampled_from([torch.uint8, torch.int16, torch.float16, torch.float32, torch.float64, torch.bool])
    fill = st.sampled_from([0.0, 1.0, float("nan"), float("inf")])
    return st.builds(lambda s, d, v: torch.full(s, v if d.is_floating_point else 1, dtype=d), shape, dtype, fill)


def is_clear(error: Exception) -> bool:
    return (
        isinstance(error, (ValueError, TypeError, IndexError)) and 10 < len(str(error)) < 400 and "\n" not in str(error).strip()
    )


def clear_or_fine(call):
    """What it returns, or None if it raised a ValueError, TypeError or IndexError of one line; anything else is a failure."""
    try:
        return call()
    except Exception as error:
        if not is_clear(error):
            raise
    return None


@few
@given(images=tensors(), pairs=st.integers(-2, 30), delta=st.integers(-2, 2000), batch=st.integers(-1, 40))
def test_a_cache_of_anything(place, images, pairs, delta, batch):
    teacher, folder = Teacher.from_pretrained(place / "teacher"), Path(tempfile.mkdtemp(dir=place)) / "c"
    built = clear_or_fine(lambda: PairCache.build(folder, teacher, pairs, images=images, delta=delta, batch_size=batch))
    if built is None:
        assert not folder.exists()
    else:
        assert images.dtype == torch.uint8 and images.shape[1:] == (1, 8, 8) and built.verify() == []


@few
@given(images=tensors(), size=st.integers(-2, 9), start=st.integers(-2, 5))
def test_batches_of_anything(place, images, size, start):
    good = size >= 1 and start >= 0
    cache = PairCache.open(place / "cache")
    assert (clear_or_fine(lambda: next(cache.loader(size, 0, start))) is not None) == good
    some = images.ndim > 0 and len(images) > 0
    assert (clear_or_fine(lambda: next(data.batches(images, size, 0, start))) is not None) == (good and some)
    assert (clear_or_fine(lambda: data.load("digits", limit=start)) is not None) == (start >= 1)


@few
@given(a=tensors(), b=tensors())
def test_distances_of_anything(a, b):
    """Finite numbers, or a line: a distance is never NaN."""
    for measure in (evaluate.frechet_distance, evaluate.kernel_distance, evaluate.precision_recall):
        found = clear_or_fine(lambda measure=measure: measure(a, b))
        assert found is None or np.isfinite(found).all()


@few
@given(n=st.integers(-3, 60), sigmas=st.lists(st.floats(), max_size=4), noise=tensors())
def test_samples_of_anything(n, sigmas, noise):
    torch.manual_seed(0)
    f = ConsistencyFunction(UNet(**UNET), 0.01, 20.0).eval()
    levels = clear_or_fine(lambda: f.levels(n))
    assert (levels is not None) == (1 <= n <= 40)
    images = clear_or_fine(lambda: sample(f, [noise] * len(sigmas), sigmas))
    assert images is None or bool(images.isfinite().all())


@few
@given(seed=st.integers(-(2**70), 2**70), index=st.lists(st.integers(-5, 2**40), max_size=3), stream=st.integers(-2, 9))
def test_noise_of_anything(seed, index, stream):
    drawn = clear_or_fine(lambda: indexed_normal(seed, index, (2,), stream))
    assert (drawn is not None) == (0 <= seed < 2**64 and all(i >= 0 for i in index) and stream >= 0)


@few
@given(betas=tensors(), steps=st.integers(-3, 2000), decay=st.floats(), sigma=st.floats(), larger=st.floats())
@example(betas=torch.ones(1), steps=0, decay=0.0, sigma=5.0, larger=2.0)
def test_processes_of_anything(betas, steps, decay, sigma, larger):
    assert (clear_or_fine(lambda: EDM(sigma, larger)) is not None) == (0 <= sigma < larger < float("inf"))
    assert (clear_or_fine(lambda: EDM().grid(steps)) is not None) == (steps >= 1)
    chain = clear_or_fine(lambda: DDPM(betas))
    assert chain is None or bool(chain.alpha_bar.isfinite().all())
    assert (clear_or_fine(lambda: DDPM.linear().grid(steps)) is not None) == (1 <= steps <= 1000)
    assert (clear_or_fine(lambda: EMA(torch.nn.Linear(1, 1), decay)) is not None) == (0 <= decay < 1)
    x, t = torch.zeros(1, 1), torch.ones(1)
    assert clear_or_fine(lambda: ode_step(lambda x, t: x, x, t, 0 * t, "euler")) is None


@few
@given(
    n=st.integers(-1, 1200),
    r=st.integers(-3, 1200),
    solver=st.sampled_from(["ddim", "heun", "posterior_mean", "ancestral", "magic"]),
    x=tensors(),
)
def test_steps_of_anything(place, n, r, solver, x):
    teacher = Teacher.from_pretrained(place / "teacher")
    at, to = torch.tensor([n]), torch.tensor([r])
    good = -1 <= r < n < 1000 and solver not in ("magic", "ancestral")
    assert (clear_or_fine(lambda: teacher.step(torch.zeros(1, 1, 8, 8), at, to, solver)) is not None) == good
    if x.shape != (1, 1, 8, 8):
        assert clear_or_fine(lambda: teacher.sample(x, 2)) is None or (x.shape[1:] == (1, 8, 8))


@few
@given(
    lr=st.floats(),
    steps=st.integers(-2, 2),
    options=st.fixed_dictionaries(
        {},
        optional={
            "optimizer": st.text(max_size=5),
            "schedule": st.text(max_size=5),
            "precision": st.sampled_from(["fp8!", "", "half"]),
            "ema": st.sampled_from([-1.0, 1.0, 2.0, float("nan")]),
            "every": st.integers(-2, 0),
            "weight_decay": st.sampled_from([-1.0, float("nan")]),
        },
    ),
)
def test_training_with_anything(lr, steps, options):
    class Quadratic:
        mu = 0.0

        def __call__(self, f, target, batch, step, generator):
            return f(batch["x0"]).pow(2).mean(1), {}

    def batches(start):
        while True:
            yield {"x0": torch.ones(2, 3)}

    good = 0 < lr < float("inf") and steps >= 1 and not options
    try:
        found = clear_or_fine(lambda: fit(torch.nn.Linear(3, 1), Quadratic(), batches, steps, lr=lr, **options))
    except FloatingPointError:
        assert good and lr > 1  # a step so long that the weights overflow
        return
    assert (found is not None) == good


@few
@given(raw=st.binary(max_size=200))
def test_any_bytes_as_a_checkpoint_or_manifest(place, raw):
    path = Path(tempfile.mkdtemp(dir=place)) / "student.pt"
    path.write_bytes(raw)
    for read in (ConsistencyFunction.load, evaluate.Classifier.load, files.read_sealed):
        with pytest.raises(ValueError, match=r"not a|damaged"):
            read(path)
