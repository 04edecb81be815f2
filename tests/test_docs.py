"""The README's numbers are those of the committed measurement."""

import json
import sys
from pathlib import Path

from cmlib import compare
from cmlib.files import sha256

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import audit, demo_seeds, open_questions, oracle, peers, sct_ablation, serve, small_models, ten_minutes  # noqa: E402
from cmlib.pipeline import load_teacher  # noqa: E402


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_readme_shows_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    assert demo_seeds.markdown(results("demo_seeds")) in readme
    assert compare.markdown(results("compare_digits")) in readme
    assert compare.markdown(results("compare_digits_nothing")) in readme
    assert ten_minutes.markdown(results("ten_minutes")) in readme
    assert audit.markdown(*audit.results()) in readme
    for name in ("fashion_mnist", "cifar10"):
        assert small_models.markdown(name, results(f"small_{name}")) in readme


def test_benchmarks_page_shows_the_committed_results():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert sct_ablation.markdown(results("sct_ablation")["results"]) in page
    assert peers.markdown(results("peers")) in page
    assert open_questions.markdown(results("open_questions")) in page
    assert oracle.markdown(results("oracle")) in page
    if (ROOT / "benchmarks" / "results" / "serve.json").exists():
        assert serve.markdown(results("serve")) in page


def test_shipped_weights_have_their_provenance():
    data = ROOT / "data"
    for weights in data.glob("*.safetensors"):
        told = json.loads(weights.with_suffix(".json").read_text())
        assert told["licence"] == "Apache-2.0" and told.get("sha256", sha256(weights)) == sha256(weights)
        assert weights.stat().st_size <= (4e6 if "classifier" in weights.name else 8e6)
    for folder in data.glob("*_teacher"):
        told, name = json.loads((folder / "provenance.json").read_text()), folder.name.removesuffix("_teacher")
        assert told["hash"] == load_teacher(folder.name).hash()
        assert json.loads((data / f"{name}_student.json").read_text())["teacher"] == told["hash"]
        assert (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size <= 8e6
    assert json.loads((data / "cifar10_classifier.json").read_text())["held_out_accuracy"] >= 0.83
