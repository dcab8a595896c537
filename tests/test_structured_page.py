"""docs/structured.md says what is so: its code is run, its figures are those on file."""

import json
import re
from pathlib import Path

import pytest
import shipped
import torch
import transformers

import sparsekit
from sparsekit.errors import listed
from sparsekit.pipeline.structured import PARTS
from sparsekit.structured import ARCHITECTURES, architecture_of, shape_model
from sparsekit.structured.entries import entries_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "structured.md").read_text(encoding="utf-8")
CODE = re.findall(r"(?m)^```python\n(.*?)^```", PAGE, re.S)


def test_the_code_runs_from_top_to_bottom(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sparsekit.structured.architecture.ARCHITECTURES", dict(ARCHITECTURES))
    names = {"folder": shipped.MODEL, "batches": shipped.calibration(4), "out": tmp_path / "out"}
    for block in CODE:
        exec(block, names)
    heads, neurons = names["heads"], names["neurons"]
    assert heads.kept == (1,) * 4 and neurons.kept == (320,) * 4
    assert capsys.readouterr().out.split()[-2:] == [str(neurons.parameters_before), str(neurons.parameters_after)]
    sizes = [names["architecture"].shape(block).intermediate_size for block in names["architecture"].blocks(names["model"])]
    assert sum(sizes) == 4 * 320 - 128 and len(set(sizes)) > 1, "a tenth of all, not of each"
    assert torch.isfinite(names["model"](names["batches"][0]).logits).all()
    with torch.no_grad():
        thin, loaded = names["thin"], sparsekit.load(tmp_path / "out", device="cpu")
        assert torch.equal(loaded(names["batches"][0]).logits, thin(names["batches"][0]).logits)


def test_the_descriptor_of_the_page_is_right(monkeypatch):
    monkeypatch.setattr("sparsekit.structured.architecture.ARCHITECTURES", dict(ARCHITECTURES))
    exec(next(block for block in CODE if "starcoder2" in block), {})
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96
    )
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.Starcoder2Config(**sizes, bos_token_id=1, eos_token_id=2)
    ).eval()
    ids = torch.arange(3, 15)[None]
    architecture = architecture_of(model)
    with torch.no_grad():
        for block in architecture.blocks(model):
            block.self_attn.o_proj.weight[:, :16] = 0  # the first group of heads
            block.mlp.c_proj.weight[:, ::4] = 0
        before = model(ids).logits
    result = sparsekit.prune_heads(model, [ids], 1, method="norm", compensate=False)
    sparsekit.prune_neurons(model, [ids], 0.25, compensate=False)
    assert result.removed == ((0,), (0,))
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)


def test_the_families_are_those_that_are_known():
    assert f"Known are {listed(sorted(ARCHITECTURES))}. Another is one descriptor" in " ".join(PAGE.split())


def test_the_figures_are_those_on_file():
    rows = json.loads((ROOT / "benchmarks/results/quality/structured.json").read_text())["rows"]
    held = {(r["what"], r["method"], r["scope"], r["compensate"]): r["perplexity"] for r in rows}
    what, seen = None, 0
    for line in PAGE.splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 5 or not re.fullmatch(r"[\d.]+", cells[3]):
            continue
        what = next((kind for kind in ("nothing", "neurons", "head") if kind in cells[0]), None) or what
        kind = {"head": "heads"}.get(what, what)
        if "all eight" in cells[0]:
            kind = "heads"
        method = "random" if cells[1].startswith("at random") else cells[1]
        for text, compensate in ((cells[3], False), (cells[4], True)):
            if text:
                assert float(text) == pytest.approx(held[kind, method, cells[2], compensate], abs=0.0051), line
                seen += 1
    assert seen == 15
    ours, random = re.search(r"loses least: perplexity ([\d.]+), and ([\d.]+) in the mean", PAGE.replace("\n", " ")).groups()
    assert float(ours) == pytest.approx(held["layers", "influence", "global", False], abs=0.0051)
    assert float(random) == pytest.approx(held["layers", "random", "layer", False], abs=0.0051)


def test_the_entries_of_the_page_are_followed():
    text = re.search(r"(?m)^```json\n(.*?)^```", PAGE, re.S)[1]
    model = shipped.load()
    model.config.update(json.loads(text))
    shape_model(model, entries_of(model.config))
    architecture = architecture_of(model)
    shapes = [architecture.shape(block) for block in architecture.blocks(model)]
    assert [shape.num_attention_heads for shape in shapes] == [4, None, 4, 4]
    assert [shape.intermediate_size for shape in shapes] == [384, 384, 320, None]


def test_the_parts_of_the_page_are_those_of_the_command():
    rows = re.search(r"\| part \|.*?\n\n", PAGE, re.S)[0].splitlines()[2:]
    assert tuple(name for row in rows for name in re.findall(r"`(\w+)`", row)) == PARTS


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
