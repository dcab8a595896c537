"""Writes the README's tables from the results that they show: the demo's, and of each folder that the README marks the speeds.

    sparsekit demo --model smollm2 --json > benchmarks/results/cpu/demo-smollm2.json
    python -m benchmarks.readme

A folder is marked by a line ``<!-- speed table: benchmarks/results/h200 -->``, and the table's end by
``<!-- end of the speed table -->``. It holds files of the benchmarks' own names: JSON, which names its machine, or CSV beside the
summary.json of `make gpu-evidence`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("Llama-2-7B down", "Llama-3-8B down", "square 8192")  # of the products and the format ops, on a CPU or a GPU
PRUNED = ("square 1024", "Llama-2-7B q")
TOKENS = (1, 8, 16, 32, 64, 128, 512, 2048, 8192)
MASKS = {"mask_nm": "2:4", "mask_nm-4-8": "4:8", "mask_nm-16-32": "16:32", "mask_nm-1-2": "1:2", "mask_nm-pairs": "2:4 pairs"}
FORMAT_OPS = ("prune_compress24", "compress24", "expand24", "prune24", "validate24", *MASKS, "mask_rows")


def demo(result: dict) -> str:
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
    return "\n".join([_table(rows), "", caption, f"The compressed model, asked {result['prompt']!r}: {said!r}"])


def speed(folder: Path) -> str:
    """What a folder's files say of every kernel, as Markdown; what is in none of them is left out."""
    head = ("bf16", "time", "against, and times as fast", "of a copy's speed (transposed)")
    machines, rows, turned = {}, [head, ("---", "--:", "---", "--:")], []
    for make, names in ((_linear, ("linear24",)), (_decode, ("decode",)), (_sparsegpt, ("sparsegpt",)), (_format, FORMAT_OPS)):
        for name in names:
            machine, found = read(folder, name)
            if lines := list(make(name, found)):
                machines[_said(machine)] = machines.get(_said(machine), []) + [name]
                rows += lines
                turned += [row["copy_us"] / row["turned_copy_us"] for row in found if row.get("turned_copy_us")]
    of = "; ".join(f"{machine}" + (f": {', '.join(names)}" if len(machines) > 1 else "") for machine, names in machines.items())
    said = [f"{of}. All rows are in [{folder.name}]({folder.relative_to(ROOT).as_posix()})."]
    if turned:
        reached = f"{min(turned):.2f} to {max(turned):.2f} of a copy's speed."
        said.append(f"torch's copy that only turns a transposed matrix over: {reached}")
    return "\n".join([_table(rows), "", *said])


def read(folder: Path, name: str) -> tuple[dict, list[dict]]:
    """The machine and the rows of a benchmark, none where the folder has no file of it."""
    if (path := folder / f"{name}.json").is_file():
        found = json.loads(path.read_text())
        return found["machine"], found["rows"]
    if not (path := folder / f"{name}.csv").is_file():
        return {}, []
    with path.open(newline="") as file:
        rows = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return json.loads((folder / "summary.json").read_text())["machine"], rows


def _linear(_: str, rows: list[dict]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        if row["layer"] in LAYERS and row["m"] in TOKENS:
            rivals = {f"dense {row.get('dense_dtype') or ''}".strip(): row["dense_us"]}
            rivals |= {"cuSPARSELt": row["cusparselt_us"], "torch's CUTLASS": row["torch_cutlass_us"]}
            what = f"`linear24` {row['n']} x {row['k']}, {row['m']} token{'s' * (row['m'] != 1)}"
            copied = f"{row['gbps'] / row['copy_gbps']:.2f}" if row["m"] <= 64 else ""
            yield what, _time(row["sparse_us"]), _against(row["sparse_us"], rivals), copied


def _decode(_: str, rows: list[dict]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        what = f"a token of {row['model']}, {row['blocks']} blocks, {row['batch']} at a time"
        ours, rivals = 1e3 * row["sparse_ms"], {f"dense {row['dense_dtype']}": 1e3 * row["dense_ms"]}
        yield what, _time(ours), _against(ours, rivals), f"{row['floor_ms'] / row['sparse_ms']:.2f}"


def _sparsegpt(_: str, rows: list[dict]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        if row["layer"] in PRUNED and row["pattern"] == "2:4":
            ours = 1e3 * (row["loop_ms"] + row["trailing_ms"])
            what = f"SparseGPT's loop and trailing products, {row['rows']} x {row['cols']}, {row['pattern']}"
            yield what, _time(ours), _against(ours, {"the paper's loop in eager torch": 1e3 * row["eager_loop_ms"]}), ""


def _format(name: str, rows: list[dict]) -> Iterator[tuple[str, ...]]:
    op = f"`mask_nm` {MASKS[name]}" if name in MASKS else f"`{name}`"
    of_one = [row for row in rows if row["layer"] in LAYERS and row["dtype"] == "bf16"]
    copied = {(row["n"], row["k"]): f" ({row['of_copy']:.2f})" for row in of_one if row["layout"] == "transposed"}
    for row in of_one:
        if row["layout"] == "row-major":
            rivals = {f"torch ({key[6:-3]})": us for key, us in row.items() if key.startswith("torch_")}
            of_copy = f"{row['of_copy']:.2f}{copied.get((row['n'], row['k']), '')}"
            yield f"{op} {row['n']} x {row['k']}", _time(row["us"]), _against(row["us"], rivals), of_copy


def _time(us: float) -> str:
    return f"{us:.3g} us" if us < 999.5 else f"{us / 1e3:.3g} ms" if us < 999500 else f"{us / 1e6:.3g} s"


def _against(us: float, rivals: dict[str, float | None]) -> str:
    return "; ".join(f"{name} {_time(other)}, {other / us:.3g}" for name, other in rivals.items() if other)


def _said(machine: dict) -> str:
    of = machine.get("gpu") or " ".join(str(machine[key]) for key in ("cpu", "vectors") if machine.get(key))
    return ", ".join([of, *([f"{machine['threads']} threads"] if "gpu" not in machine else []), machine["date"]])


def _number(text: str) -> float | int | str | None:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text or None


def _table(rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def written(readme: str) -> str:
    """The README with its tables made anew."""

    def made(found: re.Match) -> str:
        path = ROOT / found["path"]
        return found["mark"] + (demo(json.loads(path.read_text())) if found["kind"] == "demo" else speed(path)) + "\n"

    mark = r"(?P<mark><!-- (?P<kind>demo|speed) table: (?P<path>\S+) -->\n)"
    return re.sub(mark + r".*?(?=<!-- end of the (?P=kind) table -->)", made, readme, flags=re.S)


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text()))


if __name__ == "__main__":
    main()
