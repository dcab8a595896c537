"""What the shipped model loses without heads, neurons or layers: by importance, with and without compensation, and at random.

    python -m benchmarks.structured [--samples 32] [--tokens 8192] [--draws 8] [--json] [--out FILE]

A row is a removal: what, how many (of each block, or of all together where the scope is global), the parameters that are left, and
the perplexity on text that the model was neither trained nor calibrated on. "random" is the mean over draws, with the least and the
most."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import sparsekit
from benchmarks.measure import write
from sparsekit import checkpoint, data
from sparsekit.assets import asset
from sparsekit.evaluate import perplexity
from sparsekit.structured import architecture_of, keep_heads, keep_neurons, prune_layers, remove_layers

MODEL, TEXTS = asset("kjv1m"), asset("text")
RECORD = Path(__file__).parents[1] / "tests" / "data" / "kjv1m.json"  # its text and the length of its windows
NEURONS, HEADS, LAYERS = 0.3, 1, 1


def at_random(model: nn.Module, what: str, draw: random.Random) -> None:
    """Takes as many out as the other rows of that kind do."""
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)
    if what == "layers":
        remove_layers(model, draw.sample(range(len(blocks)), LAYERS))
        return
    for block in blocks:
        shape = architecture.shape(block)
        if what == "heads":
            keep_heads(architecture, block, draw.sample(range(shape.num_key_value_heads), shape.num_key_value_heads - HEADS))
        else:
            left = shape.intermediate_size - int(shape.intermediate_size * NEURONS)
            keep_neurons(architecture, block, draw.sample(range(shape.intermediate_size), left))


def rows(samples: int, tokens: int, draws: int) -> list[dict]:
    record = json.loads(RECORD.read_text())
    tokenizer, seq_len = checkpoint.load_tokenizer(MODEL), record["seq_len"]
    batches = data.calibration_batches(data.read_tokens(TEXTS / "kjv.calib.txt", tokenizer), samples, seq_len)
    text = data.read_tokens(TEXTS / record["text"], tokenizer)

    def lost(change: Callable[[nn.Module], object]) -> tuple[float, int]:
        model = checkpoint.load(MODEL, device="cpu", dtype=torch.float32)
        change(model)
        return perplexity(model, text, seq_len, tokens)["perplexity"], sum(p.numel() for p in model.parameters())

    def row(what: str, remove: float | str, method: str, scope: str, compensate: bool, change: Callable) -> dict:
        found, left = lost(change)
        settings = {"what": what, "remove": remove, "method": method, "scope": scope, "compensate": compensate}
        return {**settings, "parameters": left, "perplexity": round(found, 3)}

    found = [row("nothing", 0, "", "", False, lambda model: None)]
    for what, remove in (("heads", HEADS), ("neurons", NEURONS), ("layers", LAYERS)):
        several = [lost(lambda model, w=what, s=seed: at_random(model, w, random.Random(s))) for seed in range(draws)]
        values, left = [value for value, _ in several], several[0][1]
        told = {"what": what, "remove": remove, "method": "random", "scope": "layer", "compensate": False, "parameters": left}
        values = {"perplexity": sum(values) / draws, "least": min(values), "most": max(values)}
        found.append(told | {name: round(value, 3) for name, value in values.items()})
    removals = [
        ("heads", HEADS, sparsekit.prune_heads, "layer", ("norm", "taylor")),
        ("heads", HEADS * 2, sparsekit.prune_heads, "global", ("taylor",)),
        ("neurons", NEURONS, sparsekit.prune_neurons, "layer", ("contribution", "taylor")),
        ("neurons", NEURONS, sparsekit.prune_neurons, "global", ("taylor",)),
    ]
    for what, remove, prune, scope, methods in removals:
        for method in methods:
            for compensate in (False, True):
                options = {"method": method, "scope": scope, "compensate": compensate}
                found.append(row(what, remove, change=lambda m, p=prune, r=remove, o=options: p(m, batches, r, **o), **options))
    found.append(row("layers", LAYERS, "influence", "global", False, lambda model: prune_layers(model, batches, LAYERS)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    write(rows(given.samples, given.tokens, given.draws), given.json, given.out)


if __name__ == "__main__":
    main()
