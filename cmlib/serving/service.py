"""The served student: BentoML's workers and adaptive batching, ONNX Runtime underneath, a strict schema in front.

`serve.start` and BentoML's workers import this module, with the arguments that `start` set; nothing else does.
"""

from __future__ import annotations

import asyncio
import io
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import anyio
import bentoml
import numpy as np
import torch
from bentoml._internal.marshal.dispatcher import CorkDispatcher
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from cmlib import __version__, formats
from cmlib.data import to_float
from cmlib.ops import indexed_normal
from cmlib.serving.site import described


class Arguments(BaseModel):
    """What `serve.start` hands to the workers."""

    folder: Path  # as `site.write` leaves it
    name: str  # of the model's folder in it
    workers: int = 1
    timeout: float = 30.0  # seconds a request may take
    queue: int = 256  # images that may wait or be at work in a worker
    tensorrt: bool = False


ARGS: Any = bentoml.use_arguments(Arguments)
MODEL = ARGS.folder / "page" / ARGS.name
TOLD = described(MODEL)
SHAPE: list[int] = TOLD["inputs"]["x"]["shape"][1:]  # [C,H,W]
LEVELS: dict[str, list[float]] = TOLD["sampling"]["sigmas"]
SIGMA_MIN, SIGMA_MAX = TOLD["inputs"]["t"]["min"], TOLD["inputs"]["t"]["max"]
BATCH, IMAGES = 64, min(64, ARGS.queue)  # images in one evaluation, and in one request
RETRY = {"Retry-After": "1"}
SECONDS = [1e-3 * 2**k for k in range(16)]
REQUESTS = Histogram("cmlib_request_seconds", "Until the answer starts", ["endpoint", "status"], buckets=SECONDS)
MODEL_TIME = Histogram("cmlib_evaluation_seconds", "One evaluation of f, a batch at a time", buckets=SECONDS)
MODEL_BATCH = Histogram("cmlib_evaluation_images", "Images in it", buckets=[2**k for k in range(7)])


# ---- requests and answers


class Strict(BaseModel):
    """No unknown fields, no conversions between types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _whole(value: Any) -> Any:
    """In JSON Schema 57.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
Seed = Annotated[int, Field(ge=0, le=2**53 - 1, description="The noise, and so the image, follows from this number."), Whole]
Format = Annotated[Literal["png", "npz"], Field(description="png to look at; npz for floats in [-1, 1], [N,C,H,W].")]
Level = Annotated[int, Field(ge=0, le=255), Whole]
Pixel = Level if SHAPE[0] == 1 else Annotated[list[Level], Field(min_length=SHAPE[0], max_length=SHAPE[0])]
Row = Annotated[list[Pixel], Field(min_length=SHAPE[2], max_length=SHAPE[2])]  # type: ignore[valid-type]
Rows = Annotated[list[Row], Field(min_length=SHAPE[1], max_length=SHAPE[1], description="Rows of pixels, 0 to 255.")]


class SampleRequest(Strict):
    """Images from noise, one a seed, in one or two evaluations of f."""

    seeds: Annotated[list[Seed], Field(min_length=1, max_length=IMAGES)]
    evaluations: Annotated[int, Field(ge=1, le=2), Whole] = 1
    format: Format = "png"


class JumpRequest(Strict):
    """An image, the level σ of the noise to add to it, and the noise's seed."""

    image: Rows
    sigma: Annotated[float, Field(ge=SIGMA_MIN, le=SIGMA_MAX)]
    seed: Seed = 0
    format: Format = "png"


class Problem(BaseModel):
    """What is wrong."""

    detail: Any


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is not JSON"},
    413: {"model": Problem, "description": "The body is too large", "content": {"text/plain": {"schema": {"type": "string"}}}},
    422: {"model": Problem, "description": "The request does not fit the schema"},
    429: {"model": Problem, "description": "Too many images wait; retry after the seconds in Retry-After"},
    500: {"model": Problem, "description": "The model's output is not finite"},
    503: {"model": Problem, "description": "The model is not warm yet, or too slow for its queue; see Retry-After"},
    504: {"description": "The request took too long"},
}
PICTURES: dict[str, Any] = {"content": {"image/png": {}, "application/x-npz": {}}, "description": "The images"}
app = FastAPI(
    title="cmlib", version=__version__, redoc_url=None, max_body_size=20_000 + 16 * math.prod(SHAPE), responses=ERRORS
)


@app.exception_handler(RequestValidationError)
async def _told(_: Request, error: Exception) -> JSONResponse:
    """What does not fit, and where; without the input, which JSON may be unable to say again."""
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": [{k: e[k] for k in ("loc", "msg", "type")} for e in error.errors()[:10]]}, 422)


def _answer(arrays: dict[str, Tensor], format: str, seconds: float) -> Response:
    """Images [N,C,H,W] as one sheet in PNG, or as an .npz; the model's own time goes into the Server-Timing header."""
    buffer = io.BytesIO()
    if format == "npz":
        np.savez(buffer, **{name: images.numpy() for name, images in arrays.items()})  # type: ignore[arg-type]
    else:
        images = torch.cat([*arrays.values()])
        columns = math.ceil(math.sqrt(len(images))) if len(arrays) == 1 else len(images)
        images = torch.cat([images, images.new_full((-len(images) % columns, *SHAPE), -1)])
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
        sheet = pixels.reshape(-1, columns, *SHAPE).permute(0, 3, 1, 4, 2).reshape(-1, columns * SHAPE[2], SHAPE[0])
        Image.fromarray(sheet.squeeze(-1).numpy()).save(buffer, "PNG")
    kind = "image/png" if format == "png" else "application/x-npz"
    return Response(buffer.getvalue(), media_type=kind, headers={"Server-Timing": f"model;dur={1e3 * seconds:.3f}"})


# ---- the service


class Counted:
    """Times every request; other paths than ours share one label, so that a stranger's guesses do not grow the metrics."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        endpoint = scope["path"] if scope["path"] in ("/", "/sample", "/jump") else "other"
        start = time.perf_counter()

        async def noted(message: Any) -> None:
            if message["type"] == "http.response.start":
                REQUESTS.labels(endpoint, message["status"]).observe(time.perf_counter() - start)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except asyncio.CancelledError:  # BentoML's timeout
            REQUESTS.labels(endpoint, 504).observe(time.perf_counter() - start)
            raise


def _overloaded() -> NoReturn:
    raise HTTPException(503, "the queue is too slow; try again", RETRY)


@bentoml.asgi_app(app)
@bentoml.service(
    name="cmlib",
    workers=ARGS.workers,
    traffic={"timeout": ARGS.timeout},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},  # BentoML's have a label for every path that anybody asks for
    tracing={"excluded_urls": [".*"]},  # its timer would keep every request's spans until the timeout
)
class Student:
    """One process: a session of ONNX Runtime, and a queue that BentoML's dispatcher batches adaptively."""

    def __init__(self) -> None:
        self.waiting, self.warm, self.broken = 0, False, False
        dispatcher: Any = CorkDispatcher(int(1e3 * ARGS.timeout), BATCH, fallback=_overloaded, get_batch_size=len)
        self.batched = dispatcher(self._run)
        threading.Thread(target=self._warm_up, daemon=True).start()

    def _warm_up(self) -> None:
        """Load f, and evaluate it once at 1, 2, 4, … BATCH images."""
        try:
            self.f = formats.read_onnx(MODEL / TOLD["file"], tensorrt=ARGS.tensorrt)
            for n in (2**k for k in range(int(math.log2(BATCH)) + 1)):
                self.f(torch.zeros(n, *SHAPE), torch.full((n,), SIGMA_MAX))
            self.warm = True
        except Exception:
            self.broken = True
            logging.getLogger("bentoml").exception("the model does not run")

    def __is_ready__(self) -> bool:
        return self.warm

    def __is_alive__(self) -> bool:
        return not self.broken

    async def _run(self, jobs: Sequence[Sequence[tuple[Tensor, float]]]) -> list[list[tuple[Tensor, float]]]:
        """f of all rows (x, σ) of all jobs in one evaluation; rows (x0_hat, seconds that it took), job by job."""
        rows = [row for job in jobs for row in job]
        x, t = torch.stack([x for x, _ in rows]), torch.tensor([t for _, t in rows])
        start = time.perf_counter()
        images = await anyio.to_thread.run_sync(self.f, x, t)
        seconds = time.perf_counter() - start
        MODEL_TIME.observe(seconds)
        MODEL_BATCH.observe(len(rows))
        done = iter(images)
        return [[(next(done), seconds) for _ in job] for job in jobs]

    @contextmanager
    def place(self, n: int) -> Iterator[list[asyncio.Future[Any]]]:
        """Room in the queue for a request of n images, until the last of the evaluations that are put into the list is done,
        even if nobody waits for it any more. Raises HTTPException 429 or 503."""
        if not self.warm:
            raise HTTPException(503, "the model is not warm yet; try again", RETRY)
        if self.waiting + n > ARGS.queue:
            raise HTTPException(429, "too many images wait; try again", RETRY)
        self.waiting += n
        work: list[asyncio.Future[Any]] = []

        def leave(_: Any = None) -> None:
            self.waiting -= n

        try:
            yield work
        finally:
            if work and not work[-1].done():
                work[-1].add_done_callback(leave)
            else:
                leave()

    async def evaluate(self, work: list[asyncio.Future[Any]], x: Tensor, sigma: float) -> tuple[Tensor, float]:
        """f(x, σ) [N,C,H,W], clipped, and the seconds it took. Raises HTTPException 500 or 503."""
        work.append(asyncio.ensure_future(self.batched([(row, sigma) for row in x])))
        rows = await asyncio.shield(work[-1])  # a request that times out leaves its batch in peace
        images = torch.stack([image for image, _ in rows])
        if not bool(images.isfinite().all()):
            raise HTTPException(500, "the model's output is not finite")
        return images.clamp(-1, 1), rows[0][1]

    @app.post("/sample", response_class=Response, responses={200: PICTURES})
    async def sample(self, wanted: SampleRequest) -> Response:
        """Images from noise (CM Alg. 1); seed s draws `indexed_normal(0, [s], shape, stream=k)` for evaluation k."""
        x, seconds = torch.zeros(len(wanted.seeds), *SHAPE), 0.0
        with self.place(len(wanted.seeds)) as work:
            for k, sigma in enumerate(LEVELS[str(wanted.evaluations)]):
                scale = sigma if k == 0 else math.sqrt(sigma**2 - SIGMA_MIN**2)
                noise = await anyio.to_thread.run_sync(indexed_normal, 0, wanted.seeds, SHAPE, k)
                x, took = await self.evaluate(work, x + scale * noise, sigma)
                seconds += took
        return await anyio.to_thread.run_sync(_answer, {"images": x}, wanted.format, seconds)

    @app.post("/jump", response_class=Response, responses={200: PICTURES})
    async def jump(self, wanted: JumpRequest) -> Response:
        """x = x0 + σ·z, z the noise of `/sample`'s first evaluation, beside f(x, σ); noisy is shown as x/√(1+σ²)."""
        pixels = torch.tensor(wanted.image, dtype=torch.uint8).reshape(1, *SHAPE[1:], SHAPE[0])
        x0 = to_float(pixels.permute(0, 3, 1, 2))
        x = x0 + wanted.sigma * indexed_normal(0, [wanted.seed], SHAPE)
        with self.place(1) as work:
            restored, seconds = await self.evaluate(work, x, wanted.sigma)
        noisy = x if wanted.format == "npz" else x / math.sqrt(1 + wanted.sigma**2)
        return _answer({"noisy": noisy, "restored": restored}, wanted.format, seconds)

    @app.get("/", include_in_schema=False)
    async def page(self) -> FileResponse:
        """The page, whose student runs in the visitor's browser."""
        return FileResponse(ARGS.folder / "index.html")

    @app.get("/metrics", include_in_schema=False)
    async def metrics(self) -> Response:
        """Prometheus metrics of all workers."""
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


Student.add_asgi_middleware(Counted)  # type: ignore[attr-defined]
app.mount("/page", StaticFiles(directory=ARGS.folder / "page"))
