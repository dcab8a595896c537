"""Recovery after pruning: the example does what it says, and its figures are those of the README."""

import json
import re
import runpy
import sys
from pathlib import Path

from sparsekit import SparseLinear, checkpoint

ROOT = Path(__file__).resolve().parents[1]
SCRIPT, RESULT = ROOT / "examples" / "recover.py", json.loads((ROOT / "benchmarks/results/cpu/recover.json").read_text())


def test_the_readme_shows_the_file():
    shown = re.search(r"`python examples/recover.py --steps (\d+)` takes .*?\)\)", (ROOT / "README.md").read_text(), re.S)
    steps, said = int(shown[1]), " ".join(shown[0].split())
    found = {name: f"{RESULT[name]:.2f}" for name in ("dense", "pruned", "recovered")}
    assert RESULT["steps"] == steps and RESULT["pattern"] == "2:4"
    assert f"from perplexity {found['dense']} to {found['pruned']} by SparseGPT at 2:4" in said
    assert f"in {RESULT['seconds_of_training']:.0f} seconds of training on a CPU" in said
    assert f"back to {found['recovered']}, {RESULT['way_back']:.0%} of the way" in said.replace(" %", "%")


def test_at_least_half_of_the_way_back_on_file():
    lost, left = RESULT["pruned"] - RESULT["dense"], RESULT["recovered"] - RESULT["dense"]
    assert RESULT["way_back"] == 1 - left / lost and RESULT["way_back"] >= 0.5


def test_the_script_brings_half_of_it_back_with_the_zeros_held(tmp_path, monkeypatch):
    """On a part of the held-out text, with half as many steps as on file."""
    held_out = (ROOT / "examples/data/kjv.test.txt").read_text(encoding="utf-8")[:30_000]
    (tmp_path / "held-out.txt").write_text(held_out, encoding="utf-8")
    arguments = [
        "--held-out",
        tmp_path / "held-out.txt",
        "--steps",
        40,
        "--out",
        tmp_path / "out",
        "--json",
        tmp_path / "found.json",
    ]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["dense"] < found["recovered"] < found["pruned"] and found["way_back"] >= 0.5
    model = checkpoint.load(tmp_path / "out", device="cpu")
    held = [module for module in model.modules() if isinstance(module, SparseLinear)]  # what does not hold 2:4 stays dense
    assert len(held) == 7 * len(model.model.layers)
