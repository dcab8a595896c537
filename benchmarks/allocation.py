"""What a plan is worth: perplexity of the shipped model pruned by SparseGPT, uniformly and to the plans of each allocation.

    python -m benchmarks.allocation [--targets 50% 60% 70%] [--seeds 0 1 2] [--samples N] [--max-tokens N] [--json] [--out FILE]

Calibrated, weighed and planned on kjv.calib.txt alone, evaluated on kjv.test.txt in windows of 128 tokens. by: the allocation, and
what its errors are weighed with; loss: slopes of the losses with one linear pruned alone to 60 %, on the calibration text. damage:
what the allocation expects to lose, in nats a token where the weights are. excess: of the loss that the uniform plan adds to the
dense model's, in nats, the share that is added. seed chooses the calibration windows: the first of them takes every target and way,
the others the middle target, uniformly and by gradients. rank correlation: of the losses at 60 % with the errors of the outputs,
and with the errors weighed by gradients.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from benchmarks.measure import machine, write_object
from sparsekit import checkpoint, data, prune
from sparsekit.analysis import Sensitivity, make_plan, measure_sensitivity, spearman
from sparsekit.analysis.planning import SHARES
from sparsekit.assets import asset
from sparsekit.evaluate import perplexity
from sparsekit.plan import Plan

SEQ_LEN, LEVELS = 128, (*SHARES, "4:8", "2:4")
WAYS = {  # by name: the way, and what differs from its defaults
    "owl": ("owl", {}),
    "curves, size": ("curves", {"weigh": "size"}),
    "curves, loss": ("curves", {"weigh": "loss"}),
    "curves, gradient, by block": ("curves", {"unit": "block"}),
    "curves, gradient": ("curves", {}),
}


def load():
    return checkpoint.load(asset("kjv1m"), device="cpu", dtype=torch.float32)


def measure(batches: list, text: torch.Tensor, max_tokens: int) -> Sensitivity:
    """What all plans are made of, by the calibration text alone."""
    return measure_sensitivity(
        load(), batches, LEVELS, evaluation=text, seq_len=SEQ_LEN, max_tokens=max_tokens, unit="linear", loss_levels=("60%",)
    )


def correlations(known: Sensitivity) -> dict[str, float]:
    """Of the rises of the loss at 60 % with what was expected of each linear."""
    at = known.curves[0].levels.index("60%")
    rises = {loss.name: loss.loss - known.dense_loss for loss in known.losses}
    errors = {curve.name: curve.errors[at] for curve in known.curves}
    weighed = [known.weights[name] * error for name, error in errors.items()]
    return {"errors": known.spearman, "errors weighed by gradient": spearman(weighed, [rises[name] for name in errors])}


def evaluate(batches: list, text: torch.Tensor, max_tokens: int | None, asked: str | Plan | None) -> float:
    model = load()
    if asked is not None:
        prune(model, batches, "sparsegpt", asked)
    return perplexity(model, text, SEQ_LEN, max_tokens)["perplexity"]


def rows(targets: list[str], seeds: list[int], samples: int, loss_tokens: int, max_tokens: int | None) -> tuple[dict, list[dict]]:
    tokenizer = checkpoint.load_tokenizer(asset("kjv1m"))
    calib, test = (data.read_tokens(asset("text", f"kjv.{name}.txt"), tokenizer) for name in ("calib", "test"))
    dense, found, said = evaluate([], test, max_tokens, None), [], {}
    for seed in seeds:
        batches = data.calibration_batches(calib, samples, SEQ_LEN, seed)
        if seed == seeds[0]:
            known = measure(batches, calib, loss_tokens)
            said = {"dense perplexity": dense, "rank correlation": correlations(known)}
        else:
            known = measure_sensitivity(load(), batches, LEVELS)
        for target in targets if seed == seeds[0] else targets[len(targets) // 2 :][:1]:
            uniform = evaluate(batches, test, max_tokens, target)
            found.append(_row(seed, target, "uniform", {}, uniform, dense, uniform))
            for name, (by, how) in WAYS.items() if seed == seeds[0] else list(WAYS.items())[-1:]:
                plan = make_plan(load(), batches, target, by, sensitivity=None if by == "owl" else known, **how)
                found.append(_row(seed, target, name, plan.made, evaluate(batches, test, max_tokens, plan), dense, uniform))
    return said, found


def _row(seed: int, target: str, name: str, made: dict, ppl: float, dense: float, uniform: float) -> dict:
    damage = made.get("damage") if made.get("weights") in ("gradient", "loss") else None
    return {
        "seed": seed,
        "sparsity": target,
        "by": name,
        "damage": damage and float(f"{damage:.4g}"),
        "perplexity": round(ppl, 3),
        "excess": round(math.log(ppl / dense) / math.log(uniform / dense), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["50%", "60%", "70%"], help="shares to remove (50%% 60%% 70%%)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64, help="calibration windows (64)")
    parser.add_argument("--loss-tokens", type=int, default=8192, help="of the calibration text, to measure losses on (8192)")
    parser.add_argument("--max-tokens", type=int, help="of the test text; all by default")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    said, found = rows(args.targets, args.seeds, args.samples, args.loss_tokens, args.max_tokens)
    how = {"samples": args.samples, "seq_len": SEQ_LEN, "loss_tokens": args.loss_tokens, "max_tokens": args.max_tokens}
    write_object({"machine": machine(), "how": how, **said, "rows": found}, args.out)


if __name__ == "__main__":
    main()
