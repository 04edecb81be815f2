"""What was written, read back, computes f; what its metadata and its report say is true; what is damaged is refused."""

import io
import json
import logging
import os
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import ConsistencyModelPipeline

from cmlib import data, export, formats, parity
from cmlib.cli import main
from cmlib.consistency import ConsistencyFunction, sample
from cmlib.files import sha256
from cmlib.unet import UNet
from tests.small import UNET, seeded

DIGITS = Path(__file__).resolve().parent.parent / "data" / "digits_student.safetensors"


@pytest.fixture
def student():
    torch.manual_seed(0)
    return ConsistencyFunction(UNet(**UNET), 0.01, 80.0, 1.0, rho=20.0).eval()


@pytest.fixture(scope="module")
def digits():
    return ConsistencyFunction.load(DIGITS)


@pytest.fixture(scope="module")
def colour():
    """A random network of one level, for three channels."""
    torch.manual_seed(0)
    small = {"in_channels": 3, "out_channels": 3, "block_out_channels": (8,), "down_block_types": ("AttnDownBlock2D",)}
    return ConsistencyFunction(UNet(**{**UNET, **small, "up_block_types": ("UpBlock2D",)}), 0.002, 80.0).eval()


def noisy(f, n, seed=0):
    """x_t of n images of noise in [-1, 1], and levels t over f's whole range: both ends are among them."""
    t = torch.cat([torch.tensor([f.sigma_max, f.sigma_min]), formats.noise_levels(f, max(n, 3))])[:n]
    x0 = torch.rand(n, *f.image_shape, generator=seeded(seed)) * 2 - 1
    return x0 + t[:, None, None, None] * torch.randn(x0.shape, generator=seeded(seed + 1)), t


def relative(f, g, n=32):
    """‖g − f‖ / ‖f‖ over n noisy images."""
    x, t = noisy(f, n)
    with torch.no_grad():
        return float((g(x, t) - f(x, t)).norm() / f(x, t).norm())


# ---- the formats


@pytest.mark.parametrize("format", ["diffusers", "torchscript", "torch-export", "onnx"])
@pytest.mark.parametrize("name", ["digits", "colour"])
def test_what_was_written_computes_f_at_any_batch_size(name, format, tmp_path, request):
    f = request.getfixturevalue(name)
    told = export.save(f, tmp_path, format)
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name]
    g = export.load(tmp_path)
    for n in (1, 5):
        x, t = noisy(f, n)
        with torch.no_grad():
            torch.testing.assert_close(g(x, t), f(x, t), atol=1e-4, rtol=0)
    assert told == json.loads((tmp_path / "metadata.json").read_text())
    assert told["sha256"] == sha256(tmp_path / told["file"])
    assert told["inputs"]["x"]["shape"] == ["batch", *f.image_shape]
    assert (told["inputs"]["t"]["min"], told["inputs"]["t"]["max"]) == (f.sigma_min, f.sigma_max)
    assert told["sampling"]["sigmas"] == {"1": f.levels(1), "2": f.levels(2)}
    assert str(Path.cwd()).encode() not in (tmp_path / told["file"]).read_bytes(), "no paths of this machine"


def test_triton_s_model_repository(colour, tmp_path):
    """Its names and shapes are the model's own; Triton adds the batch, and takes no scalar but as a reshaped [1]."""
    import onnxruntime

    told = export.save(colour, tmp_path, "triton")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        "metadata.json", "student/1/model.onnx", "student/config.pbtxt",
    ]  # fmt: skip
    session = onnxruntime.InferenceSession(str(tmp_path / told["file"]))
    config = (tmp_path / "student" / "config.pbtxt").read_text()
    found = dict(re.findall(r'name: "(\w+)", data_type: TYPE_FP32, dims: (\[[^]]+\](?:, reshape { shape: \[\] })?)', config))
    shapes = {node.name: node.shape[1:] for node in [*session.get_inputs(), *session.get_outputs()]}
    assert found == {name: str(shape) if shape else "[1], reshape { shape: [] }" for name, shape in shapes.items()}
    x, t = noisy(colour, 4)
    with torch.no_grad():
        torch.testing.assert_close(export.load(tmp_path)(x, t), colour(x, t), atol=1e-4, rtol=0)


def test_hash_of_the_weights_is_the_shipped_file_s(digits, colour):
    assert export.weights_sha256(digits) == json.loads(DIGITS.with_suffix(".json").read_text())["sha256"]
    assert export.weights_sha256(colour) != export.weights_sha256(digits)


def fully_halved(f):
    """What not to do: f with its scalings in float16, too."""
    g = ConsistencyFunction(formats.HalfNetwork(f.net).net, f.sigma_min, f.sigma_max, f.sigma_data)
    return lambda x, t: g(x.half(), t.half()).float()


def test_half_precision_keeps_the_boundary(colour, tmp_path):
    export.save(colour, tmp_path, "onnx", "fp16")
    g = export.load(tmp_path)
    assert 1e-6 < relative(colour, g) < 1e-3
    x = torch.rand(4, 3, 8, 8, generator=seeded())
    t = torch.full((4,), colour.sigma_min)
    with torch.no_grad():
        assert torch.equal(g(x, t), x) and not torch.equal(fully_halved(colour)(x, t), x)


def test_half_precision_s_scalings_do_not_overflow():
    torch.manual_seed(0)
    f = ConsistencyFunction(UNet(**UNET), 0.01, 500.0).eval()
    x, t = noisy(f, 1)  # σ = 500
    with torch.no_grad():
        assert relative(f, formats.halved(f)) < 1e-3
        assert not fully_halved(f)(x, t).any(), "σ² = ∞ leaves nothing of the image"


def test_int8_moves_the_function_and_breaks_it_where_the_scalings_are_in(digits, tmp_path):
    model = formats.onnx(digits, (torch.zeros(2, 1, 8, 8), torch.ones(2)))
    batches = formats.calibration(digits, data.load("digits", limit=64)[0])
    assert batches[0][1][0] == pytest.approx(digits.sigma_min) and batches[-1][1][-1] == pytest.approx(digits.sigma_max)
    held_out = data.to_float(data.load("digits", "test", limit=64)[0])
    x_t, t = held_out + 0.05 * torch.randn(held_out.shape, generator=seeded()), torch.full((64,), 0.05)

    def error(operators):
        (tmp_path / "model.onnx").write_bytes(formats.quantized(model, batches, operators))
        g = formats.read_onnx(tmp_path / "model.onnx")
        return relative(digits, g), float((g(x_t, t) - held_out).norm() / (digits(x_t, t) - held_out).norm())

    with torch.no_grad():
        moved, ratio = error(formats.MULTIPLICATIONS)
        assert 0.005 < moved < 0.15 and ratio < 1.05
        assert (tmp_path / "model.onnx").stat().st_size < 0.45 * len(model)
        moved, ratio = error((*formats.MULTIPLICATIONS, "Mul", "Add"))
        assert moved > 0.15 and ratio > 5


def test_tensorrt(digits, tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="this machine has none; give --format onnx"):
            export.save(digits, tmp_path, "tensorrt")
        pytest.skip("needs a GPU")
    pytest.importorskip("tensorrt")
    for precision, bound in (("fp32", 1e-3), ("fp16", 5e-3), ("int8", 0.15)):
        images = data.load("digits", limit=128)[0]
        export.save(digits.to("cuda"), tmp_path, "tensorrt", precision, images)
        assert relative(digits.to("cpu"), export.load(tmp_path), 100) < bound


# ---- whole or not at all


def test_interrupted_export_leaves_no_model(student, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "fsync", interrupt)
        export.save(student, tmp_path, "torchscript")
    assert not list(tmp_path.iterdir())

    class Pipeline:
        def save_pretrained(self, folder):
            (Path(folder) / "unet").mkdir()
            (Path(folder) / "model_index.json").write_text("{")
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(export, "diffusers_pipeline", lambda f: Pipeline())
        export.save(student, tmp_path, "diffusers")
    assert not list(tmp_path.iterdir())


def test_model_without_its_own_metadata_is_refused(student, tmp_path):
    with pytest.raises(ValueError, match="holds no export"):
        export.load(tmp_path)
    export.save(student, tmp_path, "torchscript")
    older = (tmp_path / "metadata.json").read_bytes()
    torch.manual_seed(1)
    export.save(ConsistencyFunction(UNet(**UNET)), tmp_path, "torchscript")
    export.load(tmp_path)
    (tmp_path / "metadata.json").write_bytes(older)
    with pytest.raises(ValueError, match="interrupted; export again"):
        export.load(tmp_path)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_archive_with_code_in_it_is_not_run(student, tmp_path):
    written = zipfile.ZipFile(io.BytesIO(formats.torch_export(student, (torch.zeros(2, 1, 8, 8), torch.ones(2)))))
    files = {name: written.read(name) for name in written.namelist()}
    buffer = io.BytesIO()
    torch.save(Evil(tmp_path / "ran"), buffer)
    config = "archive/data/weights/model_weights_config.json"
    told = json.loads(files[config])
    first = next(iter(told["config"].values()))
    first["use_pickle"] = True

    def read(changed):
        with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
            for name, content in {**files, **changed}.items():
                archive.writestr(name, content)
        return formats.read_torch_export(tmp_path / "model.pt2")

    read({})
    for changed in (
        {config: json.dumps(told), f"archive/data/weights/{first['path_name']}": buffer.getvalue()},
        {"archive/data/sample_inputs/model.pt": buffer.getvalue()},
        {"archive/data/aotinductor/model/model.so": b"code"},
    ):
        with pytest.raises(ValueError, match="refused"):
            read(changed)
    assert not (tmp_path / "ran").exists()


# ---- the report


def test_report_tells_what_was_done_to_f(student, monkeypatch):
    monkeypatch.setattr(parity, "SECONDS", 0.0)
    images = data.load("digits", "test", limit=16)[0]
    shifted = export.Exported(lambda x, t: student(x, t) + 0.25, "cpu")
    found = parity.measure(student, shifted, images)
    for key in ("level_0.max_abs", "level_3.mean_abs", "parity.max_abs", "parity.mean_abs"):
        assert found[key] == pytest.approx(0.25, abs=1e-5)
    assert found["level_0.sigma"] == pytest.approx(0.01) and found["level_6.sigma"] == pytest.approx(80)
    assert found["level_0.error_ratio"] == pytest.approx(0.25 / 0.01, rel=0.1), "at σ_min, f(x, t) = x"
    assert found["reconstruction.ratio"] > 1
    same = parity.measure(student, export.Exported(student, "cpu"), images)
    assert same["reconstruction.ratio"] == 1 and same["parity.relative"] == 0
    assert all(same[f"latency_ms.{name}.batch_{n}.p95"] >= same[f"latency_ms.{name}.batch_{n}.p50"] > 0
               for name in ("eager", "export") for n in (1, 8, 32))  # fmt: skip


def test_what_compiles_in_its_first_call_is_timed_as_often_as_the_rest(student, monkeypatch):
    clock, calls = [0.0], {"eager": 0, "compiled": 0}
    monkeypatch.setattr(parity, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def made(name, first):
        def run(x, t):
            calls[name] += 1
            clock[0] += first if calls[name] == 1 else 0.001

        return run

    found = parity.latency({"eager": made("eager", 0.001), "compiled": made("compiled", 60.0)}, student, (1,))
    assert found["protocol.runs.batch_1"] == parity.RUNS and calls["compiled"] == parity.WARM_UP + parity.RUNS
    assert found["latency_ms.compiled.batch_1.p95"] == pytest.approx(1)


def test_command_writes_model_metadata_and_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "SECONDS", 0.0)
    arguments = ["export", "--format", "torchscript", "--checkpoint", str(DIGITS), "--out", str(tmp_path)]
    assert main([*arguments, "--profile", "t4"]) == 0  # whose data set is CIFAR-10
    assert {p.name for p in tmp_path.iterdir()} == {"model.torchscript", "metadata.json", "parity.json", "metrics.json"}
    found = json.loads((tmp_path / "parity.json").read_text())
    assert found["parity.max_abs"] < 1e-4 and found["reconstruction.ratio"] == pytest.approx(1, abs=1e-5)
    assert found["protocol.threads"] == torch.get_num_threads() and found["protocol.precision"] == "fp32"
    printed = capsys.readouterr().out
    assert "torch.jit is deprecated" in printed and f"{found['latency_ms.export.batch_1.p50']:.2f}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx", "--checkpoint", str(DIGITS)], "onnxruntime is missing; pip install onnx onnxruntime onnxscript"),
        (["--format", "torch-export", "--checkpoint", str(DIGITS), "--precision", "int8"], "comes in fp32, fp16, not in int8"),
        (["--format", "onnx", "--checkpoint", __file__], "is not a consistency model"),
        (["--format", "onnx", "--checkpoint", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", *arguments, "--out", str(tmp_path), "--profile", "ci"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0] and not list(tmp_path.iterdir())


def test_checkpoint_of_other_images_asks_for_its_dataset(student, colour, tmp_path, capsys):
    colour.save(tmp_path / "colour.safetensors")
    assert (
        main(["export", "--checkpoint", str(tmp_path / "colour.safetensors"), "--out", str(tmp_path), "--profile", "ci"]) == 2
    )
    assert "give its own --dataset" in capsys.readouterr().err


def test_exporters_leave_logging_as_it_was(student):
    before = logging.root.manager.disable
    formats.torchscript(student, (torch.zeros(2, 1, 8, 8), torch.ones(2)))
    assert logging.root.manager.disable == before


# ---- diffusers


@pytest.mark.parametrize("evaluations", [1, 2, 4])
def test_pipeline_samples_the_same_images(tmp_path, student, evaluations):
    export.export_diffusers(student, tmp_path)
    pipe = ConsistencyModelPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    theirs = pipe(batch_size=3, num_inference_steps=evaluations, generator=generator, output_type="pt").images

    generator = torch.Generator().manual_seed(5)  # one draw to start from, then one a step, the last unused
    noise = [torch.randn(3, 1, 8, 8, generator=generator) for _ in range(evaluations + (evaluations > 1))]
    if evaluations > 1:
        noise = noise[:-1]
    ours = sample(student, noise, student.levels(evaluations), student.sigma_min)
    torch.testing.assert_close(theirs, (ours + 1) / 2, atol=1e-4, rtol=0)


def test_round_trip(tmp_path, student):
    export.export_diffusers(student, tmp_path)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    again = export.load_diffusers(tmp_path)
    assert {**again.config, "unet": None} == {**student.config, "unet": None}
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 60.0])
    assert torch.equal(again(x, t), student(x, t))
