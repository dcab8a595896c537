"""docs/analysis.md says what is so: its code is run, its figures are those on file; and what they show holds on less text too."""

import json
import math
import re
from pathlib import Path

import pytest
import shipped
from test_cli import invoke

import sparsekit
from benchmarks import discrete
from sparsekit.analysis import make_plan

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")
FIGURES = json.loads((ROOT / "benchmarks/results/quality/allocation.json").read_text())
ROWS = {(row["seed"], row["sparsity"], row["by"]): row for row in FIGURES["rows"]}


def test_the_code_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"folder": shipped.MODEL, "batches": shipped.calibration(4)}
    for block in re.findall(r"(?m)^```python\n(.*?)^```", PAGE, re.S):
        exec(block, names)
    assert {path.name for path in tmp_path.iterdir()} >= {"plan.yaml", "sensitivity.json"}
    total = sum(math.prod(shape) for shape in names["plan"].shapes.values())
    assert names["plan"].sparsity == pytest.approx(0.6, abs=1e-9)
    assert names["report"].sparsity == pytest.approx(0.6, abs=1 / total)
    assert sparsekit.Plan.load("plan.yaml") == names["plan"]


def test_its_options_are_there():
    said = {name: invoke(name, "--help").stdout for name in ("sensitivity", "plan", "prune", "bench")}
    for line in re.findall(r"sparsekit (.*)", re.search(r"(?s)```\n(sparsekit sens.*?)```", PAGE)[1]):
        for option in re.findall(r"--[\w-]+", line):
            assert option in said[line.split()[0]], (line, option)
    everywhere = "".join(said.values())
    assert all(option in everywhere for option in re.findall(r"`(--[\w-]+)", PAGE))


def test_its_table_is_on_file():
    table = re.search(r"(?s)<!-- allocation table -->\n(.*?)<!-- end", PAGE)[1]
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines() if line.startswith("|")]
    targets = lines[0][1:]
    assert len(targets) == 3 and len(lines) == 8
    for name, *figures in lines[2:]:
        for target, figure in zip(targets, figures):
            assert float(figure) == round(ROWS[0, target, name]["perplexity"], 2), (name, target)


def test_its_table_of_choices_is_on_file_and_says_what_was_better():
    kept = json.loads((ROOT / "benchmarks/results/quality/discrete.json").read_text())
    table = re.search(r"(?s)<!-- discrete table -->\n(.*?)<!-- end", PAGE)[1]
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines() if line.startswith("|")][2:]
    assert kept["times of"] == json.loads(discrete.TIMES.read_text())["machine"]
    rows = {(row["target"] or "everywhere", row["plan"]): row for row in kept["rows"]}
    assert len(lines) == len(rows) == len(kept["rows"])
    for target, plan, counts, faster, perplexity in lines:
        row = rows[target, plan]
        assert counts == ", ".join(str(row["linears"].get(text, 0)) for text in ("dense", "4:8", "2:4", "1:4"))
        assert (faster, perplexity) == (f"{row['speedup']:.2f}x", f"{row['perplexity']:.2f}") and sum(row["linears"].values()) == 28
    best: dict[str, dict] = {}
    for row in sorted(kept["rows"], key=lambda row: row["perplexity"]):
        best.setdefault(row["target"], row)
    assert [best[target]["plan"] for target in ("30%", "1.1x", "1.2x")] == ["dense, 4:8, 2:4", "dense, 2:4", "dense, 2:4"]
    assert best["45%"]["plan"] == "4:8, last to first"
    assert all(row["speedup"] >= float(row["target"][:-1]) for row in kept["rows"] if row["by"] == "latency")
    assert all(row["sparsity"] >= float(row["target"][:-1]) / 100 for row in kept["rows"] if row["by"] == "choices")


def test_the_benchmark_of_choices_says_what_it_measured(monkeypatch):
    monkeypatch.setattr(discrete, "evaluate", lambda batches, text, most, plan: 10.0 if plan is None else 12.0)
    # as fast, twice as fast, and slower, which tune never runs: 28 linears dense 4*(4*10 + 2*20 + 30), 2:4 4*(4*10 + 2*10 + 30)
    measured = [
        {"layer": f"SmolLM2-135M {layer}", "m": m, "dense_us": dense * m, "sparse_us": sparse}
        for layer, dense, sparse in (("qkv", 10.0, 10.0), ("up", 20.0, 10.0), ("down", 30.0, 40.0))
        for m in (1, 8)
    ]
    found = discrete.rows(2, 256, {"machine": {"cpu": "none"}, "rows": measured}, (("30%", ("dense", "2:4")),), (1.1,))
    assert [row["plan"] for row in found["rows"]] == [
        "dense, 2:4", "4:8, first to last", "4:8, last to first", "dense, 2:4", "dense, 2:4, weighed by size", "2:4, first to last",
        "2:4, last to first", "4:8", "2:4",
    ]  # fmt: skip
    assert found["rows"][-1]["speedup"] == round(110 / 90, 3) and found["rows"][-2]["speedup"] == 1
    assert found["times of"] == {"cpu": "none"} and all(row["speedup"] >= 1.1 for row in found["rows"] if row["by"] == "latency")


def test_on_file_error_curves_beat_the_uniform_plan_at_every_sparsity_and_seed():
    assert {seed for seed, *_ in ROWS} == {0, 1, 2}
    for (seed, target, name), row in ROWS.items():
        if name != "uniform" and "size" not in name:
            assert row["perplexity"] < ROWS[seed, target, "uniform"]["perplexity"], (seed, target, name)
        if name == "curves, gradient":
            assert row["excess"] < 0.65, (seed, target)
    held = {"errors": "0.54 with", "errors weighed by gradient": "0.85 with"}
    for name, text in held.items():
        assert f"{FIGURES['rank correlation'][name]:.2f} with" == text and text in " ".join(PAGE.split())
    assert f"Dense it is {FIGURES['dense perplexity']:.2f}." in PAGE


def test_error_curves_beat_the_uniform_plan_at_60_percent():
    batches, plans = shipped.calibration(16), ["60%"]
    plans.append(make_plan(shipped.load(), batches, "60%"))
    found = []
    for plan in plans:
        model = shipped.load()
        sparsekit.prune(model, batches, "sparsegpt", plan)
        found.append(shipped.lost(model))
    uniform, planned = found
    assert planned < 0.95 * uniform  # 0.89 of it on the whole text with four times the calibration


def test_the_benchmark_says_what_it_measured(monkeypatch):
    from benchmarks import allocation

    asked = []
    monkeypatch.setattr(allocation, "WAYS", {"curves, gradient": ("curves", {})})
    monkeypatch.setattr(allocation, "evaluate", lambda batches, text, most, plan: asked.append(plan) or 10.0 + 4 * len(asked))
    said, rows = allocation.rows(["50%", "60%"], [0, 1], samples=2, loss_tokens=256, max_tokens=256)
    assert [(row["seed"], row["sparsity"], row["by"]) for row in rows] == [
        (0, "50%", "uniform"), (0, "50%", "curves, gradient"), (0, "60%", "uniform"), (0, "60%", "curves, gradient"),
        (1, "60%", "uniform"), (1, "60%", "curves, gradient"),
    ]  # fmt: skip
    assert asked[0] is None and asked[1] == "50%" and asked[2].sparsity == pytest.approx(0.5)
    assert said["dense perplexity"] == 14 and [row["perplexity"] for row in rows] == [18, 22, 26, 30, 34, 38]
    assert rows[0]["excess"] == 1 and rows[1]["excess"] == round(math.log(22 / 14) / math.log(18 / 14), 3)
    assert -1 <= said["rank correlation"]["errors weighed by gradient"] <= 1


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", PAGE))
def test_links_lead_somewhere(link):
    assert (ROOT / "docs" / link).exists()
