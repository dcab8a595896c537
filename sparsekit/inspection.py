"""What a model folder holds, linear by linear, read without building the model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from .checkpoint import check_model_folder, check_stored, compressed_linears, skeleton, weight_files
from .errors import SparsekitError
from .format import Sparse24
from .linear import is_conv1d, is_linear
from .ops import expand24
from .patterns import NM
from .pipeline.blocks import Target, fused_parameters

# Tightest first: a weight is said to hold the first that it does.
_KNOWN = (NM(1, 4), NM(2, 4), NM(4, 8))
DENSE_BELOW = 0.01  # the share of zeros that a dense weight has by chance at most


@dataclass(frozen=True)
class Held:
    """One weight matrix of a folder: weight (out_features, in_features) with its zeros, and the bytes that hold it."""

    name: str
    weight: Tensor
    nbytes: int
    compressed: bool


class Weights:
    """The weight matrices of a model folder by name, each read when it is asked for: of its linears, and of experts that are held
    together. Names and shapes are those of its config. Raises SparsekitError for a folder that ``load`` refuses."""

    def __init__(self, folder: str | Path):
        self.folder = check_model_folder(folder)
        self._compressed = compressed_linears(self.folder)
        model = skeleton(self.folder)
        self._prefix = f"{model.base_model_prefix}."
        self._linears = {name: m for name, m in model.named_modules() if is_linear(m)}
        for name in self._compressed or {}:
            if name not in self._linears:
                raise SparsekitError(f"{self.folder} holds a compressed {name}, which its config does not have")
        self._files, self.nbytes = {}, 0
        for path, tensors in weight_files(self.folder):
            self._files.update(dict.fromkeys(tensors.keys(), path))
            self.nbytes += path.stat().st_size
        self._experts = {
            f"{name}.{parameter}[{i}]": Target(f"{name}.{parameter}[{i}]", module, parameter, i)
            for name, module in model.named_modules()
            for parameter in fused_parameters(module)
            if f"{name}.{parameter}" in self._files
            for i in range(module.num_experts)
        }

    @property
    def format(self) -> str:
        return "dense" if self._compressed is None else "compressed"

    @property
    def linears(self) -> list[str]:
        """Those with a weight of their own in the files, which a tied output layer has not."""
        return [name for name in self._linears if name in (self._compressed or {}) or self._dense(name)]

    @property
    def experts(self) -> list[str]:
        """The matrices of parameters that hold one for each expert."""
        return list(self._experts)

    def read(self, name: str) -> Held:
        if target := self._experts.get(name):
            weight = target.of(self._tensor(target.tensor))
            return Held(name, weight, weight.nbytes, False)
        if name in (self._compressed or {}):
            stored = Sparse24(self._tensor(f"{name}.values"), self._tensor(f"{name}.meta"), self._compressed[name])
            check_stored(name, stored, self.folder)
            return Held(name, expand24(stored), stored.nbytes, True)
        if name not in self._linears or not self._dense(name):
            raise SparsekitError(f"{self.folder} must hold a weight of {name}, and has none")
        weight = self._tensor(self._dense(name))
        return Held(name, weight.T if is_conv1d(self._linears[name]) else weight, weight.nbytes, False)

    def _dense(self, name: str) -> str | None:
        # The checkpoint of a bare model, such as GPT-2's, leaves the prefix out.
        bare = name.removeprefix(self._prefix)
        return next((key for key in (f"{name}.weight", f"{bare}.weight") if key in self._files), None)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._files:
            raise SparsekitError(f"the weights in {self.folder} must be those of its config, and {name} is missing")
        with safe_open(self._files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)


def inspect(folder: str | Path) -> dict:
    """Per linear of the folder's model: name, shape (out, in), pattern found, sparsity, bytes on disk and bytes if dense.

    pattern is "1:4", "2:4" or "4:8" where the weight holds it, else the share of zeros, such as "50.0%", or "dense" where fewer
    than one weight in a hundred is zero. ``bytes`` counts all weight files. A linear without a weight of its own in them
    (a tied output layer) is left out. Raises SparsekitError for a folder that ``load`` refuses."""
    weights = Weights(folder)
    rows = [_row(weights.read(name)) for name in weights.linears]
    return {"format": weights.format, "bytes": weights.nbytes, "linears": rows}


def found_pattern(weight: Tensor) -> str:
    """The tightest known pattern that the weight holds, else its share of zeros, or "dense"."""
    sparsity = share_of_zeros(weight)
    held = next((str(pattern) for pattern in _KNOWN if sparsity > 0 and pattern.check(weight) is None), None)
    return held or ("dense" if sparsity < DENSE_BELOW else f"{sparsity:.1%}")


def share_of_zeros(weight: Tensor) -> float:
    return (weight == 0).sum().item() / max(weight.numel(), 1)


def _row(held: Held) -> dict:
    return {
        "name": held.name,
        "shape": list(held.weight.shape),
        "pattern": found_pattern(held.weight),
        "sparsity": share_of_zeros(held.weight),
        "compressed": held.compressed,
        "bytes": held.nbytes,
        "dense_bytes": held.weight.nbytes,
    }
