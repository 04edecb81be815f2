"""The README's numbers are those of the committed measurement."""

import json
import sys
from pathlib import Path

from cmlib.files import sha256

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from demo_seeds import RESULTS, markdown  # noqa: E402


def test_readme_shows_the_committed_results():
    assert markdown(json.loads(RESULTS.read_text())) in (ROOT / "README.md").read_text()


def test_shipped_weights_have_their_provenance():
    data = ROOT / "data"
    for weights in data.glob("*.safetensors"):
        told = json.loads(weights.with_suffix(".json").read_text())
        assert told["licence"] == "Apache-2.0" and told.get("sha256", sha256(weights)) == sha256(weights)
    from cmlib.pipeline import load_teacher

    told = json.loads((data / "digits_teacher" / "provenance.json").read_text())
    assert told["hash"] == load_teacher("digits_teacher").hash()
