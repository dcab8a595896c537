"""What pruning costs a trained language model: the orderings that every sound implementation shows."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from sparsekit import checkpoint, data
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


def test_the_freer_the_pattern_the_less_is_lost():
    dense, half, four, two = (
        pruned_perplexity(None),
        *(pruned_perplexity("sparsegpt", pattern) for pattern in ("50%", "4:8", "2:4")),
    )
    assert dense < half < four < two < 2 * dense
