"""What a model folder holds, linear by linear, read without building the model's weights."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from .checkpoint import check_model_folder, check_stored, compressed_linears, skeleton, weight_files
from .errors import SparsekitError
from .format import Sparse24
from .linear import is_conv1d, is_linear
from .ops import expand24
from .patterns import NM

# Tightest first: a weight is said to hold the first that it does.
_KNOWN = (NM(1, 4), NM(2, 4), NM(4, 8))


def inspect(folder: str | Path) -> dict:
    """Per linear of the folder's model: name, shape (out, in), pattern found, sparsity, bytes on disk and bytes if dense.

    pattern is "1:4", "2:4" or "4:8" where the weight holds it, else the share of zeros, such as "50.0%", or "dense" where fewer
    than one weight in a hundred is zero. ``bytes`` counts all weight files. A linear without a weight of its own in them
    (a tied output layer) is left out. Raises SparsekitError for a folder that ``load`` refuses."""
    folder = check_model_folder(folder)
    compressed = compressed_linears(folder)
    model = skeleton(folder)
    linears = {name: m for name, m in model.named_modules() if is_linear(m)}
    for name in compressed or {}:
        if name not in linears:
            raise SparsekitError(f"{folder} holds a compressed {name}, which its config does not have")
    files, total = {}, 0
    for path, tensors in weight_files(folder):
        files.update(dict.fromkeys(tensors.keys(), path))
        total += path.stat().st_size

    def read(name: str) -> Tensor:
        if name not in files:
            raise SparsekitError(f"the weights in {folder} must be those of its config, and {name} is missing")
        with safe_open(files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    rows = []
    for name, linear in linears.items():
        # The checkpoint of a bare model, such as GPT-2's, leaves the prefix out.
        bare = name.removeprefix(f"{model.base_model_prefix}.")
        dense = next((key for key in (f"{name}.weight", f"{bare}.weight") if key in files), None)
        if compressed and name in compressed:
            stored = Sparse24(read(f"{name}.values"), read(f"{name}.meta"), compressed[name])
            check_stored(name, stored, folder)
            rows.append(_row(name, expand24(stored), stored.nbytes, True))
        elif dense:
            weight = read(dense)
            rows.append(_row(name, weight.T if is_conv1d(linear) else weight, weight.nbytes, False))
    return {"format": "dense" if compressed is None else "compressed", "bytes": total, "linears": rows}


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
