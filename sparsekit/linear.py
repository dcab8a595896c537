"""SparseLinear: torch.nn.Linear with a weight stored 2:4."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .errors import SparsekitError
from .format import Sparse24, nbytes24, padded_columns
from .patterns import NM

NM24 = NM(2, 4)


class SparseLinear(nn.Module):
    """y = x W' + b for a weight W (out_features, in_features) stored 2:4, at 9/16 of its bytes in a 16-bit dtype.

    values (out, kp/2) and meta (out, kp/8) are the canonical format of sparsekit/format.py, in the state_dict as they are.
    ``values`` may be narrower than the activations: 16-bit storage under fp32 activations is summed in fp32.
    ``conv1d`` remembers that the layer it replaces was GPT-2's Conv1D, which holds its weight transposed."""

    def __init__(self, weight: Sparse24, bias: Tensor | None = None, conv1d: bool = False):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.values = nn.Parameter(weight.values, requires_grad=False)
        self.register_buffer("meta", weight.meta)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.conv1d = conv1d

    @classmethod
    def from_linear(cls, linear: nn.Module) -> SparseLinear:
        """From an nn.Linear, or a transformers Conv1D, whose weight holds 2:4. Raises ValueError, naming the first group, where
        it does not."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(ops.compress24(dense_weight(linear)), bias, is_conv1d(linear)).train(linear.training)

    @classmethod
    def empty(cls, linear: nn.Module, dtype: torch.dtype) -> SparseLinear:
        """A SparseLinear of the linear's shape whose values are yet to be loaded, on the meta device."""
        n, k = dense_weight(linear).shape
        kp = padded_columns(k)
        values = torch.empty(n, kp // 2, dtype=dtype, device="meta")
        meta = torch.empty(n, kp // 8, dtype=torch.uint8, device="meta")
        bias = None if linear.bias is None else torch.empty(n, dtype=linear.bias.dtype, device="meta")
        return cls(Sparse24(values, meta, (n, k)), bias, is_conv1d(linear)).train(linear.training)

    @property
    def weight24(self) -> Sparse24:
        return Sparse24(self.values, self.meta, (self.out_features, self.in_features))

    def to_linear(self) -> nn.Module:
        """The dense layer again, zeros written out: an nn.Linear, or a Conv1D where it came from one."""
        weight = ops.expand24(self.weight24)
        if self.conv1d:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                dense = Conv1D(self.out_features, self.in_features)
            weight = weight.T.contiguous()
        else:
            dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        trained = x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if trained and torch.is_grad_enabled():
            return F.linear(x, ops.expand24(self.weight24).to(x.dtype), self.bias)  # the op itself has no gradient
        return ops.linear24(x, self.weight24, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={str(self.values.dtype).removeprefix('torch.')}, 2:4"
        )


def is_conv1d(module: nn.Module) -> bool:
    # By name: importing transformers for an isinstance check costs seconds.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a dense linear that can be pruned: nn.Linear itself or GPT-2's Conv1D.

    Subclasses of nn.Linear are left alone: a quantised one holds something else in ``weight``."""
    return type(module) is nn.Linear or is_conv1d(module)


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight of an nn.Linear or a Conv1D as (out_features, in_features), detached, sharing memory with the module."""
    weight = linear.weight.detach()
    return weight.T if is_conv1d(linear) else weight


def compress(model: nn.Module) -> list[str]:
    """Swaps, in place, every linear of the model whose weight holds 2:4 for a SparseLinear; returns their names.

    Left alone: a weight that does not hold 2:4 or that stands in two places (a tied output layer), and one so narrow that it
    would take more bytes stored 2:4. Raises SparsekitError for a model that is a linear itself."""
    if is_linear(model):
        raise SparsekitError(
            f"compress needs a model that holds linears, got a {type(model).__name__}; use SparseLinear.from_linear"
        )
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    swapped = []
    for name, linear in [(name, module) for name, module in model.named_modules() if is_linear(module)]:
        weight = dense_weight(linear)
        saves = nbytes24(*weight.shape, weight.dtype) < weight.nbytes
        if saves and owners[id(linear.weight)] == 1 and NM24.check(weight) is None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SparseLinear.from_linear(linear))
            swapped.append(name)
    return swapped
