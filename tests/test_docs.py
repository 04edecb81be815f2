"""The README's numbers are those of the committed measurement."""

import json
import sys
from pathlib import Path

from cmlib import compare
from cmlib.files import sha256

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import audit, demo_seeds, peers, sct_ablation, serve  # noqa: E402


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_readme_shows_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    assert demo_seeds.markdown(results("demo_seeds")) in readme
    assert compare.markdown(results("compare_digits")) in readme
    assert audit.markdown(*audit.results()) in readme


def test_benchmarks_page_shows_the_committed_results():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert sct_ablation.markdown(results("sct_ablation")["results"]) in page
    assert peers.markdown(results("peers")) in page
    if (ROOT / "benchmarks" / "results" / "serve.json").exists():
        assert serve.markdown(results("serve")) in page


def test_shipped_weights_have_their_provenance():
    data = ROOT / "data"
    for weights in data.glob("*.safetensors"):
        told = json.loads(weights.with_suffix(".json").read_text())
        assert told["licence"] == "Apache-2.0" and told.get("sha256", sha256(weights)) == sha256(weights)
    from cmlib.pipeline import load_teacher

    told = json.loads((data / "digits_teacher" / "provenance.json").read_text())
    assert told["hash"] == load_teacher("digits_teacher").hash()
