"""The page as a folder of static files: the student in the visitor's own browser, its examples, and the teacher's walks."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmlib import data, export, pipeline
from cmlib.consistency import ConsistencyFunction
from cmlib.files import sha256, write_atomically, write_json
from cmlib.ops import indexed_normal
from cmlib.teacher import Teacher

PAGE = Path(__file__).resolve().parent / "page"
CDN = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/"
RUNTIME = {  # what the page loads of onnxruntime-web 1.30.0, by where it runs, with its integrity
    "wasm": {
        "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
        "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
    },
    "webgpu": {
        "ort.webgpu.bundle.min.mjs": "sha384-1ntMeyj+z5diX6vBR5h+zlJBPc4iNvhCxE6nlammh8daBYcLBZkzrwDkuJjhwI+f",
        "ort-wasm-simd-threaded.asyncify.wasm": "sha384-EPVDLTxuO663dkZO/pcKJF6vOyyfq/5z9FY1oksN0UWFX2ABH4wDDZQHeNoUleWR",
    },
}
FILES = {**RUNTIME["wasm"], **RUNTIME["webgpu"]}
EXAMPLES, LEVELS, LOWEST = 10, 20, 0.05  # images, noise levels on the slider, and the lowest of them: below, nothing shows


def write(
    folder: Path, dataset: str, student: Path, teacher: str | Path | None = None, assets: Path | None = None
) -> dict[str, Any]:
    """Write or renew the page in `folder` with `student`, a checkpoint or what `cmlib export --format onnx` wrote.

    Several data sets can share a folder: each gets `page/<its name>`, and the page offers them all. `teacher` defaults to the
    shipped one, if there is one of the student's architecture; `assets` is a folder with onnxruntime-web's files, for use
    without a network. Returns the model's entry in the page's settings. Raises ValueError.
    """
    name = Path(dataset).resolve().name if Path(dataset).is_dir() else Path(dataset).name
    f = None if student.is_dir() else ConsistencyFunction.load(student)
    model, shape = folder / "page" / name, f.image_shape if f else shape_of(student)
    if shape[0] not in (1, 3):
        raise ValueError(f"{student} makes {shape[0]} channels; what is shown and served is grey or RGB")
    images, labels = data.load(dataset, "test")
    if tuple(images.shape[1:]) != shape:
        raise ValueError(f"{student} makes images {shape}, {dataset}'s are {tuple(images.shape[1:])}; give its own --dataset")
    firsts = [] if labels is None else [int((labels == k).nonzero()[0]) for k in labels.unique()]  # one a class
    images = images[list(dict.fromkeys([*firsts, *range(len(images))]))[:EXAMPLES]]
    own = f"{name}_teacher" if pipeline.shipped(f"{name}_teacher").exists() else None
    walker = pipeline.load_teacher(str(teacher or own), shape) if teacher or own else None
    if walker and not teacher and f and not alike(f.net, walker.unet):
        walker = None  # of another architecture, so of another teacher
    if assets is not None:
        check(assets)
    told = place(student, f, model)
    levels = noise_grid(told)
    entry = {"name": name, "shape": list(shape), "levels": levels, "examples": len(images), "sampling": told["sampling"]}
    entry |= {"file": told["file"], "teacher": walker and walker.hash(), "images": data.fingerprint(images)}
    sizes = {"examples.bin": images.numel()} | ({"walks.bin": images.numel() * LEVELS * (LEVELS + 1) // 2} if walker else {})
    whole = all((model / file).is_file() and (model / file).stat().st_size == size for file, size in sizes.items())
    if not whole or _entry(model / "page.json") != entry:
        write_atomically(model / "examples.bin", images.numpy().tofile)
        if walker is not None:
            write_atomically(model / "walks.bin", teacher_walks(walker, images, levels).numpy().tofile)
        write_json(model / "page.json", entry)
    if assets is not None:
        (folder / "page" / "runtime").mkdir(exist_ok=True)
        for file in FILES:
            shutil.copyfile(assets / file, folder / "page" / "runtime" / file)
    for path in PAGE.iterdir():
        shutil.copyfile(path, (folder if path.name == "index.html" else folder / "page") / path.name)
    entries = [found for path in sorted((folder / "page").glob("*/page.json")) if (found := _entry(path))]
    runtime = CDN if assets is None else "runtime/"
    write_json(folder / "page" / "settings.json", {"runtime": runtime, "files": RUNTIME, "models": entries})
    return entry


def alike(net: Any, other: Any) -> bool:
    """Whether two U-Nets have blocks of one kind and width."""
    return all(net.config[key] == other.config[key] for key in ("block_out_channels", "down_block_types", "layers_per_block"))


def _entry(page: Path) -> dict[str, Any]:
    """A model's entry in the page's settings; empty where its file is missing or cut."""
    try:
        return json.loads(page.read_bytes())
    except (OSError, ValueError):
        return {}


def shape_of(student: Path) -> tuple[int, ...]:
    """[C,H,W] of the images that a checkpoint, or what `cmlib export --format onnx` wrote, makes."""
    if student.is_dir():
        return tuple(described(student)["inputs"]["x"]["shape"][1:])
    return ConsistencyFunction.load(student).image_shape


def place(student: Path, f: ConsistencyFunction | None, folder: Path) -> dict[str, Any]:
    """Put the ONNX model and its metadata into `folder`, unless they are there, and run it once: of `f`, which the checkpoint
    `student` holds, or else the export in the folder `student`. Returns the metadata."""
    if f is not None:
        try:
            before = described(folder)
        except ValueError:
            before = {}
        if (before.get("weights_sha256"), before.get("precision")) != (export.weights_sha256(f), "fp32"):
            export.save(f, folder, "onnx")
    source = folder if f is not None else student
    told = described(source)
    shape, sigma = told["inputs"]["x"]["shape"][1:], told["inputs"]["t"]["max"]
    try:
        made = export.load(source)(torch.zeros(2, *shape), torch.full((2,), sigma))
    except Exception as error:  # ONNX Runtime's own types
        raise ValueError(f"ONNX Runtime cannot run {student}: {error}") from error
    if made.shape != (2, *shape) or not bool(made.isfinite().all()):
        raise ValueError(f"{student} makes no images {tuple(shape)}, as its metadata say, or not finite ones")
    if source.resolve() != folder.resolve():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / told["file"], folder / told["file"])
        write_json(folder / "metadata.json", told)
    return told


def described(folder: Path) -> dict[str, Any]:
    """The metadata of an ONNX export. Raises ValueError where there are none, or the model is not the one they describe."""
    try:
        told = json.loads((folder / "metadata.json").read_bytes())
        sampling, t, shape = told["sampling"], told["inputs"]["t"], told["inputs"]["x"]["shape"][1:]
        one, two = sampling["sigmas"]["1"], sampling["sigmas"]["2"]
        levels = [0, sampling["sigma_min"], *two[::-1], t["max"]]
        rising = all(low <= high < math.inf for low, high in pairwise(levels))
        sound = rising and t["min"] == levels[1] < levels[-1] and one == two[:1] and len(shape) == 3 and min(shape) > 0
        format, name, known = told["format"], told["file"], told["sha256"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{folder} holds no export that cmlib can read ({type(error).__name__})") from error
    if format != "onnx" or name != export.FORMATS["onnx"][0]:
        raise ValueError(f"{folder} holds {format} in {name}; what is served is `cmlib export --format onnx`")
    if not sound:
        raise ValueError(f"{folder / 'metadata.json'} has noise levels or a shape that no student has; export again")
    if not (folder / name).is_file() or sha256(folder / name) != known:
        raise ValueError(f"{folder / name} is not what its metadata describe: damaged, or its export was interrupted")
    return told


def check(assets: Path) -> None:
    """Raises ValueError unless `assets` has the files of onnxruntime-web that the page loads."""
    for name, integrity in FILES.items():
        if not (assets / name).is_file():
            raise ValueError(f"{assets} lacks {name}; it is in dist/ of what `npm pack onnxruntime-web@1.30.0` brings")
        if integrity != "sha384-" + base64.b64encode(hashlib.sha384((assets / name).read_bytes()).digest()).decode():
            raise ValueError(f"{assets / name} is not that of onnxruntime-web 1.30.0")


def noise_grid(told: dict[str, Any]) -> list[float]:
    """The slider's levels σ, ascending, even in ln σ."""
    lo, hi = max(told["inputs"]["t"]["min"], LOWEST), told["inputs"]["t"]["max"]
    return torch.logspace(math.log10(lo), math.log10(hi), LEVELS, dtype=torch.float64).tolist()


@torch.no_grad()
def teacher_walks(teacher: Teacher, images: Tensor, levels: list[float]) -> Tensor:
    """The teacher's DDIM walk down `levels` from every level of every uint8 image [N,C,H,W] with the noise of seed 0.

    Row k(k+1)/2 + j of an image is where the walk from level k is after j + 1 of its k + 1 steps, as x/√(1+σ²): uint8
    [N, K(K+1)/2, C, H, W].
    """
    x0 = data.to_float(images).to(teacher.device)
    noise = indexed_normal(0, [0], x0.shape[1:]).to(teacher.device)
    rows = []
    for k in range(len(levels)):
        x = x0 + levels[k] * noise
        for t, r in zip(levels[k::-1], [*levels[:k][::-1], 0.0], strict=True):
            x = teacher.ode_step(x, x.new_full((len(x),), t), x.new_full((len(x),), r))
            rows.append(data.to_uint8(x / math.sqrt(1 + r**2)).cpu())
    return torch.stack(rows, 1)
