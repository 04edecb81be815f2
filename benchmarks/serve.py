"""`cmlib serve` beside the same student as a `ConsistencyModelPipeline` behind plain FastAPI, and beside the teacher's DDIM-50.

    python -m benchmarks.serve             # about 9 minutes; writes results/serve.json and the table in benchmarks/README.md
    python -m benchmarks.serve --seconds 2 --rounds 1 --out runs/serve.json      # to try it

All three servers are up all the time, and take turns: one seed a request, a PNG back, 1, 8 and 32 clients that each wait for
their answer before they ask again. *Model* is the time of the evaluation itself, the whole batch's where requests share one,
which each server tells in `Server-Timing`. A pipeline of diffusers keeps its state in the scheduler, so plain FastAPI needs a
lock around it. ONNX Runtime and eager PyTorch without HTTP are timed in turns, too, by `cmlib.parity`.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmlib import data, export, parity, pipeline
from cmlib.consistency import ConsistencyFunction
from cmlib.files import write_json

HERE = Path(__file__).resolve().parent
CLIENTS = (1, 8, 32)
NAMES = {
    "cmlib": "`cmlib serve`",
    "pipeline": "`ConsistencyModelPipeline`, plain FastAPI",
    "ddim": "the teacher's DDIM-50, plain FastAPI",
}
HEAD = "| server | clients | p50, ms | p95, ms | requests/s | `cmlib serve` answers | model p50, ms | model p95, ms |"
START, END = "<!-- serve: written by benchmarks/serve.py -->", "<!-- /serve -->"


# ---- the others


def plain(kind: str, checkpoint: Path, teacher: str, port: int) -> None:
    """Serve "pipeline" or "ddim" as a few lines of FastAPI do, until killed."""
    import uvicorn
    from diffusers import DDIMPipeline
    from diffusers.utils import logging
    from fastapi import FastAPI
    from fastapi.responses import Response

    logging.disable_progress_bar()
    if kind == "pipeline":
        pipe, steps = export.diffusers_pipeline(ConsistencyFunction.load(checkpoint)), 1
    else:
        shipped = pipeline.shipped(teacher)
        pipe, steps = DDIMPipeline.from_pretrained(str(shipped if shipped.exists() else teacher)), 50
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    app, lock = FastAPI(), threading.Lock()

    @app.get("/readyz")
    def ready() -> None:
        pass

    @app.post("/sample")
    def sample(wanted: dict[str, list[int]]) -> Response:
        with lock:
            start = time.perf_counter()
            image = pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(wanted["seeds"][0])).images[0]
            seconds = time.perf_counter() - start
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png", headers={"Server-Timing": f"model;dur={1e3 * seconds}"})

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


@contextmanager
def serving(arguments: list[str]):
    """The port of a server that `python -m …` starts and that has said it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", *arguments, "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None, f"{arguments} did not start"
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            with suppress(OSError):
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 200:
                    break
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(60)


# ---- measuring


def load(port: int, clients: int, seconds: float) -> dict[str, Any]:
    """What `clients` see that ask again and again for `seconds`: milliseconds to an answer, the model's own, time in all."""
    end = time.perf_counter() + seconds

    def client(k: int) -> list[tuple[float, float]]:
        connection, found = http.client.HTTPConnection("127.0.0.1", port, timeout=120), []
        while time.perf_counter() < end or len(found) < 2:
            start = time.perf_counter()
            body = json.dumps({"seeds": [1000 * k + len(found)]})
            connection.request("POST", "/sample", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            image = answer.read()
            assert answer.status == 200 and image.startswith(b"\x89PNG"), (answer.status, image[:200])
            model = float(answer.headers["Server-Timing"].removeprefix("model;dur="))
            found.append((1e3 * (time.perf_counter() - start), model))
        return found

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = [pair for one in pool.map(client, range(clients)) for pair in one]
    return {"latencies": [a for a, _ in found], "model": [b for _, b in found], "elapsed": time.perf_counter() - start}


def measure(checkpoint: Path, teacher: str, dataset: str, seconds: float, rounds: int) -> dict[str, Any]:
    """All servers at all numbers of clients, and the model alone."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        f = ConsistencyFunction.load(checkpoint)
        export.save(f, Path(folder, "onnx"), "onnx")
        held_out, _ = data.load(dataset, "test", limit=64)
        alone = parity.measure(f.to("cuda") if torch.cuda.is_available() else f, export.load(Path(folder, "onnx")), held_out)
        others = [
            ["benchmarks.serve", "--plain", kind, "--checkpoint", str(checkpoint), "--teacher", teacher]
            for kind in [*NAMES][1:]
        ]
        ours = [
            "cmlib",
            "serve",
            "--onnx",
            f"{folder}/onnx",
            "--dataset",
            dataset,
            "--teacher",
            teacher,
            "--out",
            f"{folder}/page",
        ]
        ports = [stack.enter_context(serving(arguments)) for arguments in [ours, *others]]
        for port in ports:
            load(port, 1, 1)
        for clients in CLIENTS:
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
            for _ in range(rounds):
                for name, port in zip(NAMES, ports, strict=True):
                    runs[name].append(load(port, clients, seconds))
            for name, found in runs.items():
                latencies, model = (np.concatenate([run[key] for run in found]) for key in ("latencies", "model"))
                p50, p95 = np.percentile(latencies, (50, 95))
                row = {"server": name, "clients": clients, "p50": float(p50), "p95": float(p95), "requests": len(latencies)}
                row |= {"rate": len(latencies) / sum(run["elapsed"] for run in found), "model_p50": float(np.median(model))}
                rows.append(row | {"model_p95": float(np.percentile(model, 95))})
                print(rows[-1], flush=True)
    protocol = {
        "seconds": seconds,
        "rounds": rounds,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "dataset": dataset,
    }
    return {"rows": rows, "alone": alone, "protocol": {**protocol, "load": os.getloadavg()[0], "student": checkpoint.name}}


def markdown(results: dict[str, Any]) -> str:
    """A row a server and number of clients, and the model alone below."""
    lines = [HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
    rates = {row["clients"]: row["rate"] for row in results["rows"] if row["server"] == "cmlib"}
    for row in results["rows"]:
        faster = "" if row["server"] == "cmlib" else f"{rates[row['clients']] / row['rate']:.1f} times as many"
        p50, p95, rate, model, model_p95 = (f"{row[key]:.1f}" for key in ("p50", "p95", "rate", "model_p50", "model_p95"))
        cells = [p50, p95, rate, faster, model, model_p95]
        lines.append(f"| {NAMES[row['server']]} | {row['clients']} | {' | '.join(cells)} |")
    alone = results["alone"]
    eager, ours = (alone[f"latency_ms.{name}.batch_1.p50"] for name in ("eager", "export"))
    p95, told = alone["latency_ms.export.batch_1.p95"], results["protocol"]
    return "\n".join(lines) + (
        f"\n\nWithout HTTP, one image: ONNX Runtime {ours:.2f} ms (p95 {p95:.2f}), eager PyTorch {eager:.2f} ms;"
        f" ratio {ours / eager:.2f}. Reconstruction error {alone['reconstruction.ratio']:.3f} times eager's. The clients share"
        f" the {told['cores']} cores; load average at the end {told['load']:.1f}."
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--checkpoint", type=Path, default=pipeline.shipped("digits_student.safetensors"))
    options.add_argument("--teacher", default="digits_teacher")
    options.add_argument("--dataset", default="digits")
    options.add_argument("--seconds", type=float, default=15.0)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", type=Path, default=HERE / "results" / "serve.json")
    options.add_argument("--plain", choices=[*NAMES][1:], help=argparse.SUPPRESS)
    options.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.plain:
        return plain(args.plain, args.checkpoint, args.teacher, args.port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers end, too
    results = measure(args.checkpoint, args.teacher, args.dataset, args.seconds, args.rounds)
    write_json(args.out, results)
    print("\n" + markdown(results))
    if args.out.parent == HERE / "results":
        page = HERE / "README.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(START)
        page.write_text(f"{before}{START}\n{markdown(results)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
