"""Train the classifier whose features a data set's Fréchet distance is measured with, and ship it.

    python -m benchmarks.classifier cifar10          # half an hour on one core that multiplies in bfloat16; resumes
    python -m benchmarks.classifier fashion_mnist

Writes data/NAME_classifier.safetensors and its provenance.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmlib import data, evaluate
from cmlib.files import sha256, write_json
from cmlib.train import fit

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, Any] = {"lr": 3e-3, "weight_decay": 5e-2, "warmup": 300, "ema": 0.995, "seed": 0, "precision": "bf16"}
EPOCHS, BATCH, NOISE, SHIFT = {"cifar10": 12, "fashion_mnist": 4}, 128, 0.02, 4


def augmented(images: Tensor, seed: int, start: int) -> Iterator[dict[str, Tensor]]:
    """Batches, each image mirrored by a coin and shifted by up to SHIFT pixels."""
    for k, batch in enumerate(data.batches(images, BATCH, seed, start), start):
        generator = torch.Generator().manual_seed(10**6 * seed + k)
        mirrored = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
        x = F.pad(torch.where(mirrored, batch["x0"].flip(3), batch["x0"]), (SHIFT,) * 4, mode="reflect")
        corners = torch.randint(2 * SHIFT + 1, (BATCH, 2), generator=generator).tolist()
        side = images.shape[2]
        shifted = [image[:, i : i + side, j : j + side] for image, (i, j) in zip(x, corners, strict=True)]
        yield {"x0": torch.stack(shifted), "index": batch["index"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=EPOCHS)
    name = parser.parse_args().dataset
    images, labels = data.load(name)
    assert labels is not None
    epoch = len(images) // BATCH
    steps = EPOCHS[name] * epoch
    torch.manual_seed(0)
    model = evaluate.Classifier(images.shape[1], images.shape[2], int(labels.max()) + 1, norm=True)
    objective = evaluate.Classification(labels, NOISE)
    held_out = data.load(name, "test")
    assert held_out[1] is not None

    def on_epoch(step: int, average: torch.nn.Module) -> dict[str, float]:
        return {"accuracy": evaluate.accuracy(average, *held_out)}

    trained, history = fit(
        model,
        objective,
        lambda start: augmented(images, 0, start),
        steps,
        folder=ROOT / "runs" / f"{name}_classifier",
        resume=True,
        every=epoch,
        on_every=on_epoch,
        name=name,
        compiler="inductor",
        **SETTINGS,
    )
    path = ROOT / "data" / f"{name}_classifier.safetensors"
    trained.save(path)  # type: ignore[operator]
    told = {
        "what": f"classifier of {name}; its last hidden layer (64 ReLU units) gives the features of fd_{name}",
        "command": f"python -m benchmarks.classifier {name}",
        "images": f"{len(images)} of the train split, mirrored and shifted; fingerprint {data.fingerprint(images)}",
        "held_out_accuracy": round(history[-1]["accuracy"], 4),
        "updates": steps,
        "batch_size": BATCH,
        "noise": NOISE,
        **SETTINGS,
        "minutes_on_one_core": round(history[-1]["seconds"] / 60, 1),
        "sha256": sha256(path),
        "licence": "Apache-2.0",
    }
    write_json(path.with_suffix(".json"), told)
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
