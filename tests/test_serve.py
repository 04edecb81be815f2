"""Every promise of the server, against a real one: the shipped student, and a stand-in that is slow or wrong on demand."""

import base64
import concurrent.futures
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from cmlib import data, export, formats
from cmlib.cli import main
from cmlib.consistency import ConsistencyFunction, sample
from cmlib.files import sha256, write_json
from cmlib.ops import indexed_normal
from cmlib.serving import site as sites

bentoml = pytest.importorskip("bentoml", reason="pip install -e '.[serve]'")

DIGITS = Path(__file__).resolve().parent.parent / "data" / "digits_student.safetensors"
TOLERANCE = 1e-4  # of an image's pixels, in [-1, 1], alone or in any batch
# the stand-in's levels: above the first it takes its time, up to the second twelve times as much, near the third it gives NaN
SLOW, SLOWEST, WRONG = 100.0, 110.0, 13.0


# ---- the servers


class Server:
    """`cmlib serve` in a process, and requests to it."""

    def __init__(self, student, out, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = out / "log.txt"
        command = [sys.executable, "-m", "cmlib", "serve", *student, "--out", str(out), "--port", str(self.port), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CMLIB_PROFILE": "t4"}  # whose data set is CIFAR-10
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.before_ready = []

    def wait(self):
        end = time.monotonic() + 280
        while time.monotonic() < end:
            try:
                early = self.post("/sample", {"seeds": [0]}, timeout=5)[:2]
                alive = self.get("/healthz", timeout=5)[0]
                if self.get("/readyz", timeout=5)[0] == 200:
                    return self
                self.before_ready.append((*early, alive))
            except OSError:  # nobody listens yet
                pass
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError("not ready in minutes\n" + self.log.read_text())

    def request(self, method, path, body=None, headers=None, timeout=60):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def post(self, path, wanted, **options):
        return self.request("POST", path, json.dumps(wanted), {"Content-Type": "application/json"}, **options)

    def arrays(self, path, **wanted):
        status, _, body = self.post(path, {**wanted, "format": "npz"})
        assert status == 200, body
        return np.load(io.BytesIO(body))

    def images(self, seeds, evaluations=1):
        return torch.from_numpy(self.arrays("/sample", seeds=list(seeds), evaluations=evaluations)["images"])

    def counted(self, name):
        """One of the server's metrics; without labels, the sum over all of them."""
        lines = self.get("/metrics")[2].decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def family(self):
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def worker(self):
        return max(self.family()[1:], key=lambda p: p.memory_info().rss)

    def recovered(self):
        """Wait until a request is answered again; until then they are refused for now."""
        end = time.monotonic() + 20
        while (status := self.post("/sample", {"seeds": [0]})[0]) != 200:
            assert status in (429, 503, 504) and time.monotonic() < end

    def stop(self):
        self.process.terminate()
        return self.process.wait(30)


@contextmanager
def serving(student, out, *options):
    server = Server(student, out, *options)
    try:
        yield server.wait()
    finally:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="module")
def digits():
    return ConsistencyFunction.load(DIGITS)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The shipped student; with five seconds a request, for as long as that BentoML's timer keeps something of each."""
    with serving(["--checkpoint", str(DIGITS)], tmp_path_factory.mktemp("digits"), "--timeout", "5") as server:
        yield server


def stand_in(folder, seconds):
    """An export of f(x, t) = x/(1 + t): for t > SLOW it takes about `seconds`, up to SLOWEST twelve times as many, and for t
    near WRONG it is NaN."""
    from onnx import TensorProto, helper, numpy_helper

    def model(turns):
        constants = {"one": 1.0, "slow": SLOW, "wrong": WRONG, "half": 0.5, "nan": np.nan, "turns": float(turns)}
        constants |= {"slowest": SLOWEST, "twelve": 12.0}
        weights = [numpy_helper.from_array(np.array(v, np.float32), k) for k, v in constants.items()]
        weights += [numpy_helper.from_array(np.eye(256, dtype=np.float32), "eye")]
        weights += [numpy_helper.from_array(np.array([-1, 1, 1, 1]), "rows"), numpy_helper.from_array(np.array(True), "go")]
        value = helper.make_tensor_value_info
        body = helper.make_graph(
            [helper.make_node("MatMul", ["state", "eye"], ["next"]), helper.make_node("Identity", ["on"], ["still"])],
            "turn",
            [
                value("i", TensorProto.INT64, []),
                value("on", TensorProto.BOOL, []),
                value("state", TensorProto.FLOAT, [256, 256]),
            ],
            [value("still", TensorProto.BOOL, []), value("next", TensorProto.FLOAT, [256, 256])],
        )
        nodes = [
            helper.make_node("ReduceMax", ["t"], ["highest"], keepdims=0),
            helper.make_node("Greater", ["highest", "slow"], ["is_slow"]),
            helper.make_node("Cast", ["is_slow"], ["times"], to=TensorProto.FLOAT),
            helper.make_node("Less", ["highest", "slowest"], ["is_slowest"]),
            helper.make_node("Where", ["is_slowest", "twelve", "one"], ["factor"]),
            helper.make_node("Mul", ["times", "factor"], ["times_factor"]),
            helper.make_node("Mul", ["times_factor", "turns"], ["count"]),
            helper.make_node("Cast", ["count"], ["trips"], to=TensorProto.INT64),
            helper.make_node("Loop", ["trips", "go", "eye"], ["spun"], body=body),
            helper.make_node("ReduceMean", ["spun"], ["mean"], keepdims=0),  # 1/256, whatever the number of turns
            helper.make_node("Mul", ["mean", "times"], ["nothing"]),
            helper.make_node("Sub", ["t", "wrong"], ["apart"]),
            helper.make_node("Abs", ["apart"], ["distance"]),
            helper.make_node("Less", ["distance", "half"], ["is_wrong"]),
            helper.make_node("Add", ["t", "one"], ["scale"]),
            helper.make_node("Where", ["is_wrong", "nan", "scale"], ["divisor"]),
            helper.make_node("Reshape", ["divisor", "rows"], ["each"]),
            helper.make_node("Div", ["x", "each"], ["quotient"]),
            helper.make_node("Add", ["quotient", "nothing"], ["x0_hat"]),
        ]
        inputs = [value("x", TensorProto.FLOAT, ["batch", 1, 8, 8]), value("t", TensorProto.FLOAT, ["batch"])]
        graph = helper.make_graph(nodes, "stand_in", inputs, [value("x0_hat", TensorProto.FLOAT, ["batch", 1, 8, 8])], weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()

    def spent(turns):
        (folder / "model.onnx").write_bytes(model(turns))
        f, x, t = formats.read_onnx(folder / "model.onnx"), torch.zeros(1, 1, 8, 8), torch.full((1,), SLOWEST + 1)
        f(x, t)
        start = time.perf_counter()
        f(x, t)
        return time.perf_counter() - start

    spent(int(200 * seconds / spent(200)))
    described = export.signature(ConsistencyFunction.load(DIGITS))
    described |= {"format": "onnx", "device": "any", "file": "model.onnx", "sha256": sha256(folder / "model.onnx")}
    write_json(folder / "metadata.json", described)
    return ["--onnx", str(folder)]


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    """A folder with the page, so that a second server need not compute it."""

    def copy():
        folder = tmp_path_factory.mktemp("copy") / "out"
        shutil.copytree(server.log.parent, folder)
        return folder

    return copy


@pytest.fixture(scope="module")
def knobs(page, tmp_path_factory):
    """The stand-in, which takes half a second where it is slow, with four seconds a request and room for 96 images."""
    student = stand_in(tmp_path_factory.mktemp("stand-in"), 0.5)
    with serving(student, page(), "--timeout", "4", "--queue", "96") as server:
        yield server


def picture(body):
    return np.asarray(Image.open(io.BytesIO(body)))


# ---- what it computes


def test_seeds_give_python_s_images(server, digits):
    for k in (1, 2):
        noise = [indexed_normal(0, [3, 2**52 + 1, 3], digits.image_shape, stream=i) for i in range(k)]
        truth = sample(digits, noise, digits.levels(k), digits.sigma_min)
        torch.testing.assert_close(server.images([3, 2**52 + 1, 3], k), truth, atol=TOLERANCE, rtol=0)
    status, headers, body = server.post("/sample", {"seeds": [3, 2**52 + 1, 3], "evaluations": 2})
    tiles = picture(body).reshape(2, 8, 2, 8).transpose(0, 2, 1, 3).reshape(4, 8, 8)
    assert (status, headers["content-type"]) == (200, "image/png")
    assert np.array_equal(tiles[:3], data.to_uint8(truth).squeeze(1).numpy()) and not tiles[3].any()
    assert float(headers["server-timing"].removeprefix("model;dur=")) > 0


def test_jump_gives_the_noisy_image_and_f_of_it(server, digits):
    image = data.load("digits", "test", limit=1)[0]
    wanted = {"image": image[0, 0].tolist(), "sigma": 0.8, "seed": 5}
    x = data.to_float(image) + 0.8 * indexed_normal(0, [5], digits.image_shape)
    with torch.no_grad():
        truth = digits(x, torch.tensor([0.8])).clamp(-1, 1)
    arrays = server.arrays("/jump", **wanted)
    torch.testing.assert_close(torch.from_numpy(arrays["noisy"]), x)
    torch.testing.assert_close(torch.from_numpy(arrays["restored"]), truth, atol=TOLERANCE, rtol=0)
    shown = picture(server.post("/jump", wanted)[2])
    assert shown.shape == (8, 16) and np.abs(shown[:, 8:].astype(int) - data.to_uint8(truth)[0, 0].numpy()).max() <= 1


def test_alone_or_batched_the_same_images(server):
    alone = torch.cat([server.images([s]) for s in range(8)])
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda s: server.images([s % 8, 100 + s, 200 + s]), range(64)))
    for s, images in enumerate(together):
        torch.testing.assert_close(images[:1], alone[s % 8 : s % 8 + 1], atol=TOLERANCE, rtol=0)
    assert server.counted("cmlib_evaluation_images_sum") > 2 * server.counted("cmlib_evaluation_images_count"), "shared"


def test_a_request_cut_over_two_evaluations_is_put_together_again(server):
    parts = [range(40 * k, 40 * k + 40) for k in range(6)]  # at most 64 in one evaluation
    alone = [server.images(part) for part in parts]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for images, truth in zip(pool.map(server.images, parts), alone, strict=True):
            torch.testing.assert_close(images, truth, atol=TOLERANCE, rtol=0)


def test_the_page_is_there(server):
    status, headers, body = server.get("/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    for path in re.findall(r'(?:href|src)="(page/[^"]+)"', body.decode()):
        assert server.get(f"/{path}")[0] == 200
    assert json.loads(server.get("/page/settings.json")[2])["models"][0]["name"] == "digits"
    log = server.log.read_text()
    assert log.startswith("preparing the page") and "any web server" not in log
    assert server.get("/page/digits/model.onnx")[2] == (server.log.parent / "page" / "digits" / "model.onnx").read_bytes()


# ---- what it refuses


BLACK = [[0] * 8 for _ in range(8)]


def declared(server, status):
    """The content types that the schema promises for it."""
    return json.loads(server.get("/openapi.json")[2])["paths"]["/sample"]["post"]["responses"][str(status)]["content"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/sample", {"seeds": []}, 422),
        ("/sample", {"seeds": [0] * 65}, 422),
        ("/sample", {"seeds": [-1]}, 422),
        ("/sample", {"seeds": [2**53]}, 422),
        ("/sample", {"seeds": [0.5]}, 422),
        ("/sample", {"seeds": ["0"]}, 422),
        ("/sample", {"seeds": [True]}, 422),
        ("/sample", {"seeds": [float("nan")]}, 422),
        ("/sample", {"seeds": [0], "evaluations": 3}, 422),
        ("/sample", {"seeds": [0], "evaluations": True}, 422),
        ("/sample", {"seeds": [0], "format": "gif"}, 422),
        ("/sample", {"seeds": [0], "evaluation": 2}, 422),
        ("/jump", {"image": BLACK, "sigma": float("inf")}, 422),
        ("/jump", {"image": BLACK, "sigma": 1e6}, 422),
        ("/jump", {"image": BLACK[1:], "sigma": 1.0}, 422),
        ("/jump", {"image": [[0] * 7] * 8, "sigma": 1.0}, 422),
        ("/jump", {"image": [[256] * 8] * 8, "sigma": 1.0}, 422),
        ("/jump", {"image": [[[0]] * 8] * 8, "sigma": 1.0}, 422),
        ("/sample", b"", 422),
        ("/sample", b"\xff\xfe{", 400),
        ("/sample", b'{"seeds": [0]', 422),
        ("/sample", b'{"seeds": "\\ud800"}', 422),
        ("/sample", b"[" * 10_000, 400),
        ("/sample", b" " * 100_000, 413),
        ("/nowhere", {}, 404),
    ],
)  # fmt: skip
def test_bad_input_is_refused(server, path, body, status):
    raw = body if isinstance(body, bytes) else json.dumps(body)
    found, headers, answer = server.request("POST", path, raw, {"Content-Type": "application/json"})
    assert found == status, answer
    assert status == 404 or headers["content-type"].partition(";")[0] in declared(server, status)
    assert b"Traceback" not in answer and len(answer) < 5_000
    assert server.request("POST", path, b"{}", {"Content-Type": "application/vnd.bentoml+pickle"})[0] in (404, 422)


def test_a_body_without_a_length_is_capped_too(server):
    status, headers, _ = server.request("POST", "/sample", iter([b" " * 10_000] * 10), {"Content-Type": "application/json"})
    assert status == 413 and headers["content-type"] in declared(server, 413)


def test_schema_holds_over_a_thousand_cases(server, tmp_path):
    """schemathesis makes them from the server's own OpenAPI: examples, limits, violations and random ones."""
    command = [
        shutil.which("schemathesis", path=Path(sys.executable).parent), "run", f"http://127.0.0.1:{server.port}/openapi.json",
        "--max-examples", "450", "--seed", "0", "--no-color", "--phases", "coverage,fuzzing", "--mode", "all",
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
        "negative_data_rejection,positive_data_acceptance,unsupported_method",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert int(re.search(r"(\d+) generated, \1 passed", done.stdout)[1]) >= 1000


# ---- under load, and when the model fails


def test_not_ready_until_warm(knobs):
    """The stand-in is slow to warm up: until it has been, the server is alive, says so, and refuses work."""
    assert knobs.before_ready
    assert all(status == 503 and headers["retry-after"] == "1" for status, headers, _ in knobs.before_ready)
    assert {alive for _, _, alive in knobs.before_ready} == {200}


def test_output_that_is_not_finite_is_an_error_and_harms_no_neighbour(knobs):
    def jump(sigma):
        return knobs.post("/jump", {"image": BLACK, "sigma": sigma, "seed": 1, "format": "npz"})

    alone, evaluations = jump(2.0)[2], knobs.counted("cmlib_evaluation_images_count")
    with concurrent.futures.ThreadPoolExecutor(25) as pool:
        first = pool.submit(knobs.post, "/sample", {"seeds": [0]})  # while it takes its time, the others gather
        time.sleep(0.2)
        answers = list(pool.map(jump, [WRONG if k % 3 == 0 else 2.0 for k in range(24)]))
        assert first.result()[0] == 200
    assert knobs.counted("cmlib_evaluation_images_count") - evaluations <= 8, "good and bad rows shared evaluations"
    for k, (status, _, body) in enumerate(answers):
        if k % 3 == 0:
            assert status == 500 and b"not finite" in body
        else:
            restored = np.load(io.BytesIO(body))["restored"]
            np.testing.assert_allclose(restored, np.load(io.BytesIO(alone))["restored"], atol=TOLERANCE)


def test_a_full_queue_answers_429_at_once_and_recovers(knobs):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda s: knobs.post("/sample", {"seeds": list(range(40 * s, 40 * s + 40))}), range(8)))
    statuses = [status for status, _, _ in answers]
    assert set(statuses) <= {200, 429, 503, 504} and statuses.count(200) >= 1 and statuses.count(429) >= 4, statuses
    assert all(headers["retry-after"] == "1" for status, headers, _ in answers if status in (429, 503))
    knobs.recovered()


def test_too_slow_is_504_and_the_next_request_is_fine(knobs):
    start = time.perf_counter()
    slow, _, _ = knobs.post("/jump", {"image": BLACK, "sigma": (SLOW + SLOWEST) / 2})  # six seconds of work, four allowed
    assert slow == 504 and 3 < time.perf_counter() - start < 6
    knobs.recovered()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # what timed out has left the queue, which holds just these
        both = list(pool.map(lambda k: knobs.post("/sample", {"seeds": list(range(48 * k, 48 * k + 48))})[0], range(2)))
    assert both == [200, 200]
    stalled = http.client.HTTPConnection("127.0.0.1", knobs.port, timeout=20)
    stalled.request("POST", "/sample", iter([]), {"Content-Type": "application/json", "Content-Length": "100"})
    assert stalled.getresponse().status == 504, "a body that never comes ends, too"
    assert knobs.post("/jump", {"image": BLACK, "sigma": 2.0})[0] == 200
    metrics = knobs.get("/metrics")[2].decode()
    assert 'cmlib_request_seconds_count{endpoint="/sample",status="504"}' in metrics
    assert "Traceback" not in knobs.log.read_text()


def test_memory_is_flat(server):
    """Over 10,000 requests, more than half of them through the model: a kilobyte more for each of the last 6,000 would show."""
    jump, bad = ({"image": image, "sigma": 1.0, "seed": 3} for image in (BLACK, BLACK[1:]))
    kinds = [("POST", "/jump", json.dumps(jump), 200), ("POST", "/jump", json.dumps(bad), 422)]
    for wanted in ({"seeds": [1, 2, 3]}, {"seeds": [4], "evaluations": 2, "format": "npz"}, {"seeds": [5]}):
        kinds.append(("POST", "/sample", json.dumps(wanted), 200))
    kinds += [("POST", "/sample", "not JSON", 422), ("GET", "/page/nothing-{}", None, 404)]

    def some(count):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        for k in range(count):
            method, path, body, status = kinds[k % len(kinds)]
            connection.request(method, path.replace("{}", str(k)), body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
        connection.close()

    def megabytes(count):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(some, [count // 4] * 4))
        return server.worker().memory_info().rss / 1e6

    before, after = megabytes(4_000), megabytes(6_000)
    assert after - before < 6, f"{before:.1f} MB, after 6,000 more requests {after:.1f} MB"


# ---- start and end


def test_sigterm_answers_what_is_at_work_and_leaves_nothing(knobs):
    """Runs last of those that use this server."""
    family = knobs.family()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        at_work = pool.submit(knobs.post, "/sample", {"seeds": [0, 1, 2]})
        time.sleep(0.3)
        knobs.process.terminate()
        status, _, body = at_work.result()
    assert status == 200 and picture(body).shape == (16, 16)
    assert knobs.process.wait(20) == 0
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert json.loads((knobs.log.parent / "metrics.json").read_text())["protocol.queue"] == 96
    with pytest.raises(OSError):
        knobs.get("/healthz")


def test_two_workers_and_a_client_that_does_not_listen(page):
    """One port, one /metrics; SIGTERM waits for such a client no longer than for a request, and leaves nothing."""
    folder = page()
    (folder / "page" / "large.bin").write_bytes(bytes(64_000_000))  # more than sockets hold
    with serving(
        ["--checkpoint", str(DIGITS)], folder, "--workers", "2", "--timeout", "2", "--queue", "8", "--host", "localhost"
    ) as server:
        assert len(server.family()) >= 3
        answered = 'cmlib_request_seconds_count{endpoint="/sample",status="200"}'
        before = server.counted(answered)
        for _ in range(20):
            server.recovered()  # each worker warms up by itself
        assert server.counted(answered) == before + 20
        assert server.post("/sample", {"seeds": list(range(9))})[0] == 422, "more than the queue holds is refused for good"
        family, deaf = server.family(), socket.create_connection(("127.0.0.1", server.port))
        deaf.sendall(b"GET /page/large.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.5)
        server.process.terminate()
        assert server.process.wait(20) == 0
        deaf.close()
        assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def refused(capsys, out, *student):
    assert main(["serve", "--profile", "ci", "--out", str(out), *map(str, student)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("cmlib: ")
    return lines[0]


def test_wrong_models_are_refused_in_one_line(tmp_path, capsys):
    good = tmp_path / "good"
    good.mkdir()
    stand_in(good, 0.01)
    told = json.loads((good / "metadata.json").read_text())

    def changed(model, **metadata):
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        (folder / "model.onnx").write_bytes(model)
        write_json(folder / "metadata.json", {**told, **metadata})
        return refused(capsys, tmp_path / "out", "--onnx", folder)

    model = (good / "model.onnx").read_bytes()
    half, text = model[: len(model) // 2], b"not a model"
    assert "damaged" in changed(half)
    assert "ONNX Runtime cannot run" in changed(half, sha256=hashlib.sha256(half).hexdigest())
    assert "ONNX Runtime cannot run" in changed(text, sha256=hashlib.sha256(text).hexdigest())
    assert "cmlib export --format onnx" in changed(model, format="tensorrt")
    (tmp_path / "victim").write_text("precious")
    digest = hashlib.sha256(model).hexdigest()
    assert "cmlib export --format onnx" in changed(model, file="../../../victim", sha256=digest)
    assert "cmlib export --format onnx" in changed(model, file=str(tmp_path / "victim"), sha256=digest)
    assert (tmp_path / "victim").read_text() == "precious" and not list((tmp_path / "out").rglob("*.onnx")), "none is copied"
    lacks = {**told["sampling"], "sigmas": {"2": told["sampling"]["sigmas"]["2"]}}
    assert "holds no export" in changed(model, sampling=lacks)
    for levels in ([float("nan"), 1.0], [1.0, 2.0], [1e9, 1.0]):
        odd = {**told["sampling"], "sigmas": {"1": levels[:1], "2": levels}}
        assert "noise levels" in changed(model, sampling=odd)
    latent = json.loads(json.dumps(told["inputs"]).replace('"batch", 1, 8, 8', '"batch", 4, 8, 8'))
    assert "makes 4 channels" in changed(model, inputs=latent)
    wide = json.loads(json.dumps(told["inputs"]).replace('"batch", 1, 8, 8', '"batch", 1, 8, 16'))
    assert "give its own --dataset" in changed(model, inputs=wide)
    assert "give the folder of" in refused(capsys, tmp_path / "out", "--onnx", good / "model.onnx")
    assert "holds no export" in refused(capsys, tmp_path / "out", "--onnx", tmp_path)
    assert "no checkpoint at" in refused(capsys, tmp_path / "out", "--checkpoint", tmp_path / "nowhere.pt")
    assert "is not a consistency model" in refused(capsys, tmp_path / "out", "--checkpoint", __file__)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused(capsys, tmp_path / "out", "--onnx", good, "--port", port)
    assert "65535" in refused(capsys, tmp_path / "out", "--onnx", good, "--port", 70_000)
    assert "cannot listen on no.invalid:3000" in refused(capsys, tmp_path / "out", "--onnx", good, "--host", "no.invalid")
    assert not list((tmp_path / "out").rglob("*.onnx")), "before anything is computed"


def test_a_site_is_checked_before_it_is_written_and_mends_what_is_damaged(page, tmp_path, capsys, monkeypatch):
    site = ["site", "--profile", "t4", "--checkpoint", str(DIGITS), "--out"]
    assert main([*site, str(tmp_path / "out"), "--assets", str(tmp_path / "nowhere")]) == 2
    assert "nowhere lacks ort" in capsys.readouterr().err and not list((tmp_path / "out").rglob("*"))
    digits = page() / "page" / "digits"
    whole = {path.name: path.read_bytes() for path in digits.iterdir()}
    (digits / "examples.bin").unlink()
    (digits / "walks.bin").write_bytes(whole["walks.bin"][:-1])
    (digits / "page.json").write_bytes(whole["page.json"][:-9])
    (tmp_path / "ort.mjs").touch()
    monkeypatch.setattr(sites, "FILES", {"ort.mjs": "sha384-" + base64.b64encode(hashlib.sha384().digest()).decode()})
    assert main([*site, str(digits.parent.parent), "--assets", str(tmp_path)]) == 0
    assert (digits.parent / "runtime" / "ort.mjs").exists()
    assert {path.name: path.read_bytes() for path in digits.iterdir()} == whole
