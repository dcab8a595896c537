"""How good forecasts of perplexity are: held-out prunings of the shipped model, done and evaluated, against what was expected.

    python -m benchmarks.forecast [--seeds N] [--max-tokens N] [--out FILE]

Each seed calibrates a forecast anew, with its own random probes. spearman is the rank correlation of expected and measured
perplexities over the held-out prunings, coverage the share of them within the interval of 80 %, by seed and over all. error is the
median of |log(expected rise / measured rise)|, the rise being log(perplexity / dense perplexity); width the median of
log(largest rise / smallest rise) of the intervals. beyond: how many of the prunings were not forecast. The rows are of the first
seed. by half of the probes: the same by every other probe of each seed.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import sparsekit
from benchmarks.measure import machine, write_object
from sparsekit import checkpoint, data, evaluate
from sparsekit.analysis import Sensitivity, error_curves, gradient_weights, spearman
from sparsekit.analysis.forecast import Subject, subject_of
from sparsekit.analysis.quality import LEVEL, SHARES, Quality, calibrate, restored
from sparsekit.assets import asset
from sparsekit.plan import Plan

SEQ_LEN, SAMPLES = 128, 64
UNIFORM = ("30%", "40%", "50%", "60%", "70%", "80%", "4:8", "2:4", "1:4")
COUNTS = {"by linear": 16, "by block": 12, "mixed": 16, "some blocks": 8}


def held_out(subject: Subject, uniform: Sequence[str], counts: dict[str, int], seed: int = 1) -> list[tuple[str, Plan]]:
    """Plans by kind, none of them made as probes are: one pattern; a share for each linear; one for each block; any of three
    patterns for each linear; one pattern for some of the blocks."""
    chance, groups = random.Random(seed), [[target.name for target in of] for of in subject.targets]
    shapes = {target.name: tuple(target.weight.shape) for target in subject.flat}

    def share(middle: float, apart: float) -> str:
        return f"{100 * min(max(middle + chance.uniform(-apart, apart), 0.1), 0.9):.0f}%"

    found = [("uniform", subject.plan(text)) for text in uniform]
    for kind, count in counts.items():
        for _ in range(count):
            middle = chance.uniform(0.3, 0.7)
            if kind == "by linear":
                patterns = {name: share(middle, 0.2) for name in shapes}
            elif kind == "by block":
                patterns = {name: text for of in groups for text in [share(middle, 0.2)] for name in of}
            elif kind == "mixed":
                three = chance.sample([None, "4:8", "2:4", "1:4", "50%", "60%", "70%"], 3)
                patterns = {name: chance.choice(three) for name in shapes}
            else:
                text, some = chance.choice(["2:4", "50%", "60%", "70%"]), chance.sample(range(len(groups)), len(groups) // 2)
                patterns = {name: text if i in some else None for i, of in enumerate(groups) for name in of}
            found.append((kind, Plan(patterns, shapes, "sparsegpt")))
    return found


def coverage(quality: Quality, plans: list[Plan], measured: list[float]) -> float:
    """The share of prunings that ended within their interval."""
    expected = map(quality.expected, plans)
    return statistics.mean(e.low <= got <= e.high for e, got in zip(expected, measured))


def compared(quality: Quality, plans: list[Plan], measured: list[float]) -> dict[str, float]:
    """How a forecast fares."""
    found = [quality.expected(plan) for plan in plans]
    rises = [[math.log(one / quality.dense) for one in (e.perplexity, got, e.low, e.high)] for e, got in zip(found, measured)]
    return {
        "spearman": spearman([e.perplexity for e in found], measured),
        "coverage": coverage(quality, plans, measured),
        "error": statistics.median(abs(math.log(e / got)) if got > 0 else math.inf for e, got, *_ in rises),
        "width": statistics.median(math.log(high / low) for *_, low, high in rises),
        "beyond": sum(math.isinf(e.perplexity) for e in found),
    }


def summary(qualities: Sequence[Quality], plans: list[Plan], measured: list[float]) -> dict:
    """How forecasts fare, each by itself and all together."""
    by_seed = [compared(quality, plans, measured) for quality in qualities]
    each = {name: [one[name] for one in by_seed] for name in by_seed[0]}
    return {
        "probes": len(qualities[0].probes),
        "spearman": {"mean": statistics.mean(each["spearman"]), "least": min(each["spearman"])},
        "coverage": statistics.mean(each["coverage"]),
        "coverage of a seed": {"least": min(each["coverage"]), "most": max(each["coverage"])},
        "error": statistics.mean(each["error"]),
        "width": statistics.mean(each["width"]),
        "by_seed": by_seed,
    }


def measure(subject: Subject, batches: list, tokens, plans: list[Plan], max_tokens: int) -> list[float]:
    """The perplexity after each of the plans, really pruned."""
    found = []
    for plan in plans:
        with restored(subject.flat):
            sparsekit.prune(subject.model, batches, "sparsegpt", plan, stored=subject.stored)
            found.append(evaluate.perplexity(subject.model, tokens, SEQ_LEN, max_tokens, batch=32)["perplexity"])
    return found


def run(
    seeds: int,
    max_tokens: int,
    uniform: Sequence[str] = UNIFORM,
    counts: dict[str, int] = COUNTS,
    samples: int = SAMPLES,
    log: Callable[[str], None] = lambda text: None,
) -> dict:
    folder = asset("kjv1m")
    tokenizer = checkpoint.load_tokenizer(folder)
    read = {name: data.read_tokens(asset("text", f"kjv.{name}.txt"), tokenizer) for name in ("calib", "test")}
    batches = data.calibration_batches(read["calib"], samples, SEQ_LEN, batch=32)
    subject = subject_of(folder, device="cpu", dtype=torch.float32)
    kinds, plans = zip(*held_out(subject, uniform, counts))
    curves = error_curves(subject.model, batches, [*SHARES, "4:8", "2:4", "1:4"])
    measured = measure(subject, batches, read["test"], plans, max_tokens)
    log(f"{len(plans)} prunings held out")
    known = Sensitivity(0, curves, weights=gradient_weights(subject.model, batches))
    how = dict(max_tokens=max_tokens, sensitivity=known, stored=subject.stored)
    qualities = []
    for seed in range(seeds):
        qualities.append(calibrate(subject.model, subject.targets, batches, read["test"], SEQ_LEN, plans, seed=seed, **how))
        log(f"seed {seed}: {compared(qualities[-1], plans, measured)}")
    by_kind = {}
    for kind in dict.fromkeys(kinds):
        some = [(plan, got) for one, plan, got in zip(kinds, plans, measured) if one == kind]
        by_kind[kind] = statistics.mean(coverage(quality, *zip(*some)) for quality in qualities)
    rows = []
    for kind, plan, got in zip(kinds, plans, measured):
        expected = qualities[0].expected(plan)
        ends = {name: round(getattr(expected, name), 4) for name in ("perplexity", "low", "high")}
        harm = {name: round(value, 6) for name, value in asdict(qualities[0].damages.harm(plan)).items()}
        rows.append({"kind": kind, "sparsity": round(plan.sparsity, 4), **harm, "measured": round(got, 4), **ends})
    return {
        "machine": machine(),
        "model": "kjv1m",
        "method": "sparsegpt",
        "dense": qualities[0].dense,
        "evaluated_tokens": qualities[0].tokens,
        "level": LEVEL,
        "held_out": len(plans),
        "seeds": seeds,
        **summary(qualities, plans, measured),
        "coverage_by_kind": by_kind,
        "by half of the probes": summary([quality.by(quality.probes[::2]) for quality in qualities], plans, measured),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="forecasts, each with its own probes (10)")
    parser.add_argument("--max-tokens", type=int, default=1 << 14, help="of the text to evaluate on (16384)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    write_object(run(args.seeds, args.max_tokens, log=lambda text: print(text, flush=True)), args.out)


if __name__ == "__main__":
    main()
