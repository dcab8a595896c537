"""What plans of whole patterns are worth: one of a few for each linear, for a share of weights or for measured time.

    python -m benchmarks.discrete [--samples N] [--max-tokens N] [--times FILE] [--out FILE]

Perplexity of the shipped model pruned by SparseGPT, planned on kjv.calib.txt alone, on kjv.test.txt in windows of 128 tokens. by
choices: the plan against 4:8 in the linears from the first on, or from the last, until as many weights are gone. by latency: the
same with 2:4, until the products are as fast. Times are rows of benchmarks.linear24 for one token, of SmolLM2-135M, whose products
those of the shipped model stand for: 576x576 for q, k, v and o, 1536x576 for gate and up, 576x1536 for down. So a speed-up is
one of those products, as measured on the machine that the rows name, and no claim about the shipped model, too small for one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.allocation import SEQ_LEN, evaluate, load
from benchmarks.measure import machine, write_object
from sparsekit import checkpoint, data
from sparsekit.analysis import Curve, allocate_choices, allocate_latency, error_curves, gradient_weights
from sparsekit.analysis.costs import holds_24
from sparsekit.assets import asset
from sparsekit.patterns import Pattern
from sparsekit.plan import Plan

TIMES = Path(__file__).parent / "results" / "cpu" / "linear24-2026-11-25.json"
STANDS_FOR = {"up": ("gate_proj", "up_proj"), "down": ("down_proj",), "qkv": ("q_proj", "k_proj", "v_proj", "o_proj")}
CHOICES = (("30%", ("dense", "4:8", "2:4")), ("45%", ("dense", "4:8", "2:4", "1:4")))
SPEEDUPS = (1.1, 1.2)


def times_of(curves: Sequence[Curve], measured: Sequence[Mapping]) -> dict[tuple[int, int], tuple[float, float]]:
    """Of each shape of the shipped model the microseconds, dense and 2:4, of the product that it stands for."""
    one_token = (row for row in measured if row["m"] == 1 and row["layer"].startswith("SmolLM2"))
    rows, found = {row["layer"].split()[-1]: row for row in one_token}, {}
    for layer, names in STANDS_FOR.items():
        for curve in curves:
            if curve.name.endswith(names):
                dense = rows[layer]["dense_us"]
                found[curve.shape] = dense, min(rows[layer]["sparse_us"], dense)  # tune runs what is faster
    return found


def speedup(plan: Plan, times: Mapping[tuple[int, int], tuple[float, float]]) -> float:
    """Of the products of a plan, by these times."""
    spent = sum(times[plan.shapes[name]][holds_24(pattern)] for name, pattern in plan.patterns.items())
    return sum(times[shape][0] for shape in plan.shapes.values()) / spent


def in_order(curves: Sequence[Curve], pattern: str, enough: Callable[[Plan], bool]) -> Plan:
    """The pattern in the first linears, in this order, that are enough."""
    shapes, patterns = {curve.name: curve.shape for curve in curves}, dict.fromkeys(curve.name for curve in curves)
    for curve in curves:
        patterns[curve.name] = Pattern.parse(pattern)
        if enough(plan := Plan(patterns, shapes, "sparsegpt")):
            return plan
    raise ValueError(f"{pattern} in all linears is not enough")


def rivals(curves: Sequence[Curve], pattern: str, enough: Callable[[Plan], bool]) -> dict[str, Plan]:
    orders = {"first to last": list(curves), "last to first": list(reversed(curves))}
    return {f"{pattern}, {name}": in_order(order, pattern, enough) for name, order in orders.items()}


def rows(
    samples: int,
    max_tokens: int,
    measured: Mapping,
    choices: Sequence[tuple[str, Sequence[str]]] = CHOICES,
    speedups: Sequence[float] = SPEEDUPS,
    log: Callable[[str], None] = lambda text: None,
) -> dict:
    tokenizer = checkpoint.load_tokenizer(asset("kjv1m"))
    calib, test = (data.read_tokens(asset("text", f"kjv.{name}.txt"), tokenizer) for name in ("calib", "test"))
    batches, model = data.calibration_batches(calib, samples, SEQ_LEN, 0), load()
    levels = dict.fromkeys(["4:8", "2:4", *(text for _, of in choices for text in of if text != "dense")])
    curves, weights = error_curves(model, batches, levels), gradient_weights(model, batches)
    times, found = times_of(curves, measured["rows"]), []

    def add(by: str, target: str, name: str, plan: Plan) -> None:
        held = [str(pattern or "dense") for pattern in plan.patterns.values()]
        row = {"by": by, "target": target, "plan": name, "linears": {text: held.count(text) for text in dict.fromkeys(held)}}
        row |= {"sparsity": round(plan.sparsity, 4), "speedup": round(speedup(plan, times), 3)}
        found.append({**row, "perplexity": round(evaluate(batches, test, max_tokens, plan), 3)})
        log(str(found[-1]))

    for target, of in choices:
        add("choices", target, ", ".join(of), allocate_choices(curves, target, of, weights=weights))
        for name, rival in rivals(curves, "4:8", lambda one, least=float(target[:-1]) / 100: one.sparsity >= least).items():
            add("choices", target, name, rival)
    for wanted in speedups:
        add("latency", f"{wanted}x", "dense, 2:4", allocate_latency(curves, wanted, times, weights=weights))
        add("latency", f"{wanted}x", "dense, 2:4, weighed by size", allocate_latency(curves, wanted, times))
        for name, rival in rivals(curves, "2:4", lambda one, least=wanted: speedup(one, times) >= least).items():
            add("latency", f"{wanted}x", name, rival)
    for text in ("4:8", "2:4"):
        add("everywhere", "", text, in_order(curves, text, lambda plan: None not in plan.patterns.values()))
    return {
        "machine": machine(),
        "how": {"samples": samples, "seq_len": SEQ_LEN, "max_tokens": max_tokens},
        "times of": measured["machine"],
        "dense perplexity": round(evaluate([], test, max_tokens, None), 3),
        "rows": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows (64)")
    parser.add_argument("--max-tokens", type=int, default=1 << 16, help="of the test text (65536)")
    parser.add_argument("--times", type=Path, default=TIMES, help="rows of benchmarks.linear24 (those of the kept figures)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    measured = json.loads(args.times.read_text())
    write_object(rows(args.samples, args.max_tokens, measured, log=lambda text: print(text, flush=True)), args.out)


if __name__ == "__main__":
    main()
