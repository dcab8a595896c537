"""2:4 by SparseGPT, then a short training with the zeros held: how much of what pruning cost comes back.

    python examples/recover.py [--model DIR] [--text TEXT] [--held-out TEXT] [--out DIR] [--steps 150]

The dense model is the teacher: its next-token distributions are what the pruned one learns, on the text it was calibrated on.
Prints the perplexity of the dense, the pruned and the recovered model on the held-out text, and writes the last to --out.
"""

import argparse
import copy
import datetime
import json
import math
import time
from pathlib import Path

import torch
from rich.progress import track

import sparsekit
from sparsekit import checkpoint, data
from sparsekit.demo import machine
from sparsekit.gradual import GradualPruner, distillation_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument("--model", type=Path, default=here.parent / "tests" / "data" / "kjv1m")
    parser.add_argument("--text", type=Path, default=here / "data" / "kjv.calib.txt")
    parser.add_argument("--held-out", type=Path, default=here / "data" / "kjv.test.txt")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64, help="sequences to calibrate on")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    args = parser.parse_args()

    if args.out:
        checkpoint.check_new_folder(args.out)
    tokenizer = checkpoint.load_tokenizer(args.model)
    tokens, held_out = (data.read_tokens(text, tokenizer) for text in (args.text, args.held_out))
    model = sparsekit.load(args.model, dtype=torch.float32)
    teacher = copy.deepcopy(model)
    found = {"dense": sparsekit.perplexity(teacher, held_out, args.seq_len)["perplexity"]}
    sparsekit.prune(model, data.calibration_batches(tokens, args.samples, args.seq_len, args.seed), "sparsegpt", args.pattern)
    found["pruned"] = sparsekit.perplexity(model, held_out, args.seq_len)["perplexity"]

    pruner = GradualPruner.fixed(model, args.pattern)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, min(20, args.steps // 5))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
    )
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    begin = time.perf_counter()
    for _ in track(range(args.steps), description="recovering"):
        starts = torch.randint(0, len(tokens) - args.seq_len + 1, (args.batch, 1), generator=generator)
        ids = tokens[starts + torch.arange(args.seq_len)].to(next(model.parameters()).device)
        with torch.no_grad():
            taught = teacher(input_ids=ids, use_cache=False).logits
        distillation_loss(model(input_ids=ids, use_cache=False).logits, taught).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        pruner.step(optimiser)
        schedule.step()
        optimiser.zero_grad()
    seconds = time.perf_counter() - begin
    pruner.finish()  # every linear still holds the pattern
    found["recovered"] = sparsekit.perplexity(model.eval(), held_out, args.seq_len)["perplexity"]

    share = (found["pruned"] - found["recovered"]) / (found["pruned"] - found["dense"])
    print("  ".join(f"{name} {value:.2f}" for name, value in found.items()), f" of the way back: {share:.0%}")
    if args.json:
        where = {"machine": machine(), "date": datetime.date.today().isoformat(), "seconds_of_training": round(seconds, 1)}
        record = {**where, "pattern": args.pattern, "steps": args.steps, **found, "way_back": share}
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    if args.out:
        model.to(checkpoint.stored_dtype(args.model))
        sparsekit.compress(model)
        checkpoint.save(model, args.out, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
