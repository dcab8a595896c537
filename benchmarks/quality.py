"""What each criterion costs the shipped model at each pattern and in each group, in perplexity: a table in docs/pruning.md.

python -m benchmarks.quality --out benchmarks/results/quality/criteria.json   # measures all of it: 3 minutes of a core
python -m benchmarks.quality --docs                                           # writes the tables anew from that file

While it measures, a file beside OUT keeps each row that is done: the same command on the same day, machine and source goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import machine
from sparsekit import checkpoint, data
from sparsekit.assets import asset
from sparsekit.criteria import CRITERIA
from sparsekit.documents import write_json, write_whole
from sparsekit.evaluate import perplexity
from sparsekit.patterns import GROUPS
from sparsekit.pipeline import prune

ROOT = Path(__file__).resolve().parents[1]
MODEL, TEXTS, PAGE = asset("kjv1m"), asset("text"), ROOT / "docs" / "pruning.md"
RESULT = ROOT / "benchmarks" / "results" / "quality" / "criteria.json"
METHODS = ("sparsegpt", *CRITERIA)
PATTERNS = ("50%", "60%", "70%", "4:8", "2:4", "4:8 pairs", "block:4x4@30%")
SHARE = "50%"  # what the groups are compared at
SAMPLES, SEQ_LEN, TOKENS = 64, 128, 64 * 128
Case = tuple[str | None, str | None, str | None]  # method, pattern, group


@cache
def texts() -> tuple[list[Tensor], Tensor]:
    """The batches to calibrate on, and the tokens to evaluate on, of another text."""
    tokenizer = checkpoint.load_tokenizer(MODEL)
    calibration, test = (data.read_tokens(TEXTS / f"kjv.{name}.txt", tokenizer) for name in ("calib", "test"))
    return data.calibration_batches(calibration, SAMPLES, SEQ_LEN), test


def measure(method: str | None, pattern: str | None, group: str | None) -> dict:
    """The perplexity of the model pruned so, or of the dense one."""
    batches, test = texts()
    model = checkpoint.load(MODEL, device="cpu", dtype=torch.float32)
    sparsity = prune(model, batches, method, pattern, group=group).sparsity if method else 0.0
    found = perplexity(model, test, SEQ_LEN, TOKENS)["perplexity"]
    return {"method": method, "pattern": pattern, "group": group, "sparsity": sparsity, "perplexity": found}


def cases() -> Iterator[Case]:
    """The dense model, each method at each pattern, and each criterion at SHARE in each group."""
    yield None, None, None
    for pattern in PATTERNS:
        for method in METHODS:
            yield method, pattern, None
    for group in GROUPS:
        for method in CRITERIA:
            yield method, SHARE, group


def run(out: Path) -> None:
    """Measures every case, and writes the file when all are there."""
    code = b"".join(path.read_bytes() for path in sorted((ROOT / "sparsekit").rglob("*.py")))
    settings = {"model": MODEL.name, "samples": SAMPLES, "seq_len": SEQ_LEN, "tokens": TOKENS}
    of = {"machine": machine(), "source": hashlib.sha256(code).hexdigest()[:12], "settings": settings}
    part, rows = out.with_suffix(".part.json"), []
    if part.exists():
        found = json.loads(part.read_text())
        rows = found["rows"] if found == {**of, "rows": found["rows"]} else []
    for case in list(cases())[len(rows) :]:
        rows.append(measure(*case))
        print(json.dumps(rows[-1]), flush=True)
        write_whole(part, lambda path: write_json(path, {**of, "rows": rows}))
    part.rename(out)


def tables(result: dict) -> str:
    """The file's rows as Markdown: methods by patterns, and criteria by groups."""
    found = {(row["method"], row["pattern"], row["group"]): row["perplexity"] for row in result["rows"]}
    dense = found[None, None, None]
    ungrouped = [key for key in found if key[0] and not key[2]]
    patterns, methods = (list(dict.fromkeys(key[place] for key in ungrouped)) for place in (1, 0))
    groups = list(dict.fromkeys(group for *_, group in found if group))
    by_pattern = [[method, *(found[method, pattern, None] for pattern in patterns)] for method in methods]
    by_group = [[method, *(found[method, SHARE, group] for group in groups)] for method in methods if method in CRITERIA]
    made, s = result["machine"], result["settings"]
    caption = (
        f"Perplexity of the shipped model, dense {dense:.2f}, on {s['tokens']:,} held-out tokens; calibrated on {s['samples']} "
        f"sequences of {s['seq_len']} tokens. {made['cpu']}, torch {made['torch']}, {made['date']}."
    )
    head = _table(["", *patterns], by_pattern)
    return "\n".join([caption, "", *head, "", f"At {SHARE}, counted in:", "", *_table(["", *groups], by_group)])


def _table(head: list[str], lines: list[list]) -> list[str]:
    """The least of each column in bold."""
    best = [min(column) for column in list(zip(*lines))[1:]]
    shown = [head, ["---", *["--:"] * (len(head) - 1)]]
    for name, *cells in lines:
        shown.append([name, *(f"{'**' * (cell == least)}{cell:.2f}{'**' * (cell == least)}" for cell, least in zip(cells, best))])
    return [f"| {' | '.join(row)} |" for row in shown]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="measure, and keep the rows in this JSON file")
    parser.add_argument("--docs", action="store_true", help=f"write the tables of {PAGE.name} from {RESULT.relative_to(ROOT)}")
    args = parser.parse_args()
    if args.out:
        run(args.out)
    if args.docs:
        text = tables(json.loads(RESULT.read_text()))
        mark = f"<!-- table: {RESULT.relative_to(ROOT)} -->\n"
        whole = re.sub(
            f"(?<={re.escape(mark)}).*?(?=<!-- end of the table -->)", lambda _: text + "\n", PAGE.read_text(), flags=re.S
        )
        PAGE.write_text(whole)


if __name__ == "__main__":
    main()
