"""The small trained model that ships with the package, its texts, and how well a model does on one of them."""

import json
from functools import cache
from pathlib import Path

import torch
from torch import nn

from sparsekit import checkpoint, data
from sparsekit.evaluate import perplexity

MODEL = Path(__file__).parent / "data" / "kjv1m"
TEXTS = Path(__file__).parent.parent / "examples" / "data"
RECORD = json.loads(MODEL.with_suffix(".json").read_text())
SEQ_LEN = RECORD["seq_len"]


@cache
def tokens(text: str) -> torch.Tensor:
    return data.read_tokens(TEXTS / text, checkpoint.load_tokenizer(MODEL))


def load() -> nn.Module:
    return checkpoint.load(MODEL, device="cpu", dtype=torch.float32)


def calibration(samples: int = 32) -> list[torch.Tensor]:
    return data.calibration_batches(tokens("kjv.calib.txt"), samples, SEQ_LEN)


def lost(model: nn.Module, count: int = 64 * 128) -> float:
    """Its perplexity on text that it was neither trained nor calibrated on."""
    return perplexity(model, tokens(RECORD["text"]), SEQ_LEN, count)["perplexity"]
