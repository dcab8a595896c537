"""What a model folder holds, linear by linear, read without building the model's weights."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .checkpoint import check_model_folder, compressed_linears, skeleton, weight_files
from .format import Sparse24
from .linear import is_conv1d, is_linear
from .ops import expand24
from .patterns import NM

# Tightest first: a weight is said to hold the first that it does.
_KNOWN = (NM(1, 4), NM(2, 4), NM(4, 8))


def inspect(folder: str | Path) -> dict:
    """Per linear of the folder's model: name, shape (out, in), pattern found, sparsity, bytes on disk and bytes if dense.

    pattern is "1:4", "2:4" or "4:8" where the weight holds it, else the share of zeros, such as "50%", or "dense" where fewer
    than one weight in a hundred is zero. ``bytes`` counts all weight files. Raises SparsekitError as ``load`` does."""
    folder = check_model_folder(folder)
    compressed = compressed_linears(folder) or {}
    linears = {name: m for name, m in skeleton(folder).named_modules() if is_linear(m)}
    rows = []
    for _, tensors in weight_files(folder):
        names = set(tensors.keys())
        for name, linear in linears.items():
            if name in compressed and f"{name}.values" in names:
                stored = [tensors.get_tensor(f"{name}.{leaf}") for leaf in ("values", "meta")]
                weight = expand24(Sparse24(*stored, compressed[name]))
            elif f"{name}.weight" in names:
                stored = [tensors.get_tensor(f"{name}.weight")]
                weight = stored[0].T if is_conv1d(linear) else stored[0]
            else:
                continue
            rows.append(_row(name, weight, sum(t.nbytes for t in stored), name in compressed))
    order = {name: i for i, name in enumerate(linears)}
    rows.sort(key=lambda row: order[row["name"]])
    total = sum(path.stat().st_size for path, _ in weight_files(folder))
    return {"format": "compressed" if compressed else "dense", "bytes": total, "linears": rows}


def _row(name: str, weight: Tensor, nbytes: int, compressed: bool) -> dict:
    sparsity = (weight == 0).sum().item() / max(weight.numel(), 1)
    held = next((str(pattern) for pattern in _KNOWN if sparsity > 0 and pattern.check(weight) is None), None)
    return {
        "name": name,
        "shape": list(weight.shape),
        "pattern": held or ("dense" if sparsity < 0.01 else f"{sparsity:.1%}"),
        "sparsity": sparsity,
        "compressed": compressed,
        "bytes": nbytes,
        "dense_bytes": weight.nbytes,
    }
