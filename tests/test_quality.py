"""What pruning costs a trained language model: the orderings that every sound implementation shows."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks import quality
from sparsekit import checkpoint, data
from sparsekit.criteria import CRITERIA
from sparsekit.evaluate import perplexity
from sparsekit.pipeline import prune

MODEL = Path(__file__).parent / "data" / "kjv1m"
TEXTS = Path(__file__).parent.parent / "examples" / "data"
RECORD = json.loads(MODEL.with_suffix(".json").read_text())
SEQ_LEN, SAMPLES, TOKENS = RECORD["seq_len"], 64, 64 * 128


@cache
def tokens(text: str) -> torch.Tensor:
    return data.read_tokens(TEXTS / text, checkpoint.load_tokenizer(MODEL))


@cache
def pruned_perplexity(method: str | None, pattern: str = "") -> float:
    model = checkpoint.load(MODEL, device="cpu", dtype=torch.float32)
    if method:
        prune(model, data.calibration_batches(tokens("kjv.calib.txt"), SAMPLES, SEQ_LEN), method, pattern)
    return perplexity(model, tokens(RECORD["text"]), SEQ_LEN, TOKENS)["perplexity"]


def test_the_dense_model_reaches_its_recorded_perplexity():
    model = checkpoint.load(MODEL, device="cpu", dtype=torch.float32)
    result = perplexity(model, tokens(RECORD["text"]), SEQ_LEN)
    assert result["tokens"] == RECORD["tokens"]
    assert result["perplexity"] == pytest.approx(RECORD["perplexity"], abs=1e-3)


@pytest.mark.parametrize("pattern", ["50%", "4:8", "2:4"])
def test_sparsegpt_loses_least(pattern):
    ours = pruned_perplexity("sparsegpt", pattern)
    assert pruned_perplexity(None) < ours < min(pruned_perplexity(method, pattern) for method in ("magnitude", "wanda"))


# ---- the table of every criterion and pattern ----

RESULT = json.loads(quality.RESULT.read_text())
TABLE = {(row["method"], row["pattern"], row["group"]): row["perplexity"] for row in RESULT["rows"]}


def test_the_page_shows_the_file():
    shown = quality.PAGE.read_text().partition("<!-- table: benchmarks/results/quality/criteria.json -->\n")[2]
    assert shown.partition("<!-- end of the table -->")[0] == quality.tables(RESULT) + "\n"


def test_the_file_holds_every_method_pattern_and_group():
    expected = {(None, None, None)}
    expected |= {(method, pattern, None) for method in quality.METHODS for pattern in quality.PATTERNS}
    expected |= {(method, quality.SHARE, group) for method in CRITERIA for group in quality.GROUPS}
    assert set(TABLE) == expected and len(RESULT["rows"]) == len(expected)


@pytest.mark.parametrize("pattern", quality.PATTERNS)
def test_sparsegpt_is_best_in_each_column(pattern):
    column = {method: TABLE[method, pattern, None] for method in quality.METHODS}
    assert TABLE[None, None, None] < min(column.values()) and min(column, key=column.get) == "sparsegpt"


def test_the_freer_the_pattern_the_less_is_lost_in_the_file():
    for method in quality.METHODS:
        half, more, most, four, two, pairs = (TABLE[method, p, None] for p in ("50%", "60%", "70%", "4:8", "2:4", "4:8 pairs"))
        assert half < more < most and half < four < two and four < pairs


@pytest.mark.parametrize("method, pattern", [("sparsegpt", "2:4"), ("sparsegpt", "70%"), ("magnitude", "2:4")])
def test_the_file_is_what_is_measured(method, pattern):
    assert quality.measure(method, pattern, None)["perplexity"] == pytest.approx(TABLE[method, pattern, None], rel=1e-3)


def test_a_measurement_goes_on_where_it_was_interrupted_and_of_other_settings_begins_anew(tmp_path, monkeypatch):
    out, seen = tmp_path / "criteria.json", []

    def measured(*case):
        seen.append(case)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {"case": list(case)}

    monkeypatch.setattr(quality, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        quality.run(out)
    assert not out.exists()
    quality.run(out)
    assert seen == [*list(quality.cases())[:3], *list(quality.cases())[2:]]
    assert [tuple(row["case"]) for row in json.loads(out.read_text())["rows"]] == list(quality.cases())
    assert list(tmp_path.iterdir()) == [out]
    seen[:] = []
    with pytest.raises(KeyboardInterrupt):
        quality.run(out)
    monkeypatch.setattr(quality, "SAMPLES", 8)
    seen[:] = [None] * 3
    quality.run(out)
    assert seen[3:] == list(quality.cases())


def test_the_freer_the_pattern_the_less_is_lost():
    dense, half, four, two = (
        pruned_perplexity(None),
        *(pruned_perplexity("sparsegpt", pattern) for pattern in ("50%", "4:8", "2:4")),
    )
    assert dense < half < four < two < 2 * dense
