"""Writes the README's table of the demo from the result that it shows.

sparsekit demo --model smollm2 --json > benchmarks/results/cpu/demo-smollm2.json
python -m benchmarks.readme
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = "benchmarks/results/cpu/demo-smollm2.json"


def table(result: dict) -> str:
    """The demo's JSON object as Markdown."""
    ppl, size, speed = result["perplexity"], result["bytes"], result["tokens_per_second"]
    rows = [
        ("", "perplexity", "bytes on disk", "tokens/s"),
        ("---", "--:", "--:", "--:"),
        ("dense", f"{ppl['dense']:.2f}", f"{size['dense']:,}", f"{speed['dense']:.1f} ({result['dense_dtype']})"),
        ("magnitude", f"{ppl['magnitude']:.2f}", "", ""),
        ("wanda", f"{ppl['wanda']:.2f}", "", ""),
        ("sparsegpt, compressed", f"{ppl['sparsegpt']:.2f}", f"{size['compressed']:,}", f"{speed['sparse']:.1f}"),
    ]
    caption = f"At 2:4, {result['evaluated_tokens']:,} held-out tokens. {result['machine']}, {result['date']}."
    said = result["sentence"].replace("\n", " ")
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", caption, f"The compressed model, asked {result['prompt']!r}: {said!r}"])


def main() -> None:
    readme = ROOT / "README.md"
    mark = f"<!-- demo table: {RESULT} -->\n"
    text = table(json.loads((ROOT / RESULT).read_text()))
    whole = re.sub(
        f"(?<={re.escape(mark)}).*?(?=<!-- end of the demo table -->)", lambda _: text + "\n", readme.read_text(), flags=re.S
    )
    readme.write_text(whole)


if __name__ == "__main__":
    main()
