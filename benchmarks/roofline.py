"""The rows of benchmarks/linear24.py under their roofs: operations a second over operations a byte, sparse and dense.

    python -m benchmarks.roofline benchmarks/results/h200/linear24.csv --card "NVIDIA H200" --out roofline.png

The slanted roof is the copy bandwidth of the same run. There is no flat roof but what was measured: a peak from a data sheet is
reached by nothing.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path


def points(rows: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Operations a byte and TFLOP/s of the sparse and the dense product of each row, counting the dense product's operations."""
    found: dict[str, list[tuple[float, float]]] = {"2:4": [], "dense": []}
    for row in rows:
        m, n, k = (int(row[name]) for name in ("m", "n", "k"))
        size = 4 if row["dtype"] == "float32" else 2
        for name, weight_bytes, column in (("2:4", n * k * (size / 2 + 1 / 8), "sparse_us"), ("dense", n * k * size, "dense_us")):
            operations, nbytes = 2 * m * n * k, weight_bytes + size * (m * k + m * n)
            found[name].append((operations / nbytes, operations / float(row[column]) / 1e6))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="the CSV of benchmarks/linear24.py")
    parser.add_argument("--card", required=True, help="what the rows were measured on, for the caption")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with args.rows.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for (name, found), mark in zip(points(rows).items(), "ox"):
        axes.scatter(*zip(*found), marker=mark, label=name)
    copy = max(float(row["copy_gbps"]) for row in rows)
    low, high = (limit(x for found in points(rows).values() for x, _ in found) for limit in (min, max))
    top = max(y for found in points(rows).values() for _, y in found)
    ends = [low, min(high, top / copy * 1e3)]
    axes.plot(ends, [x * copy / 1e3 for x in ends], color="grey", label=f"copy: {copy:.0f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s, of the dense product's operations")
    axes.set_title(f"linear24 and the dense product on {args.card}")
    axes.legend()
    figure.savefig(args.out, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
