"""SparseLinear: torch.nn.Linear with a weight stored 2:4."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from . import ops
from .errors import SparsekitError
from .format import Fragments24, Sparse24, from_fragments, nbytes24, padded_columns, to_fragments
from .patterns import NM

NM24 = NM(2, 4)


class SparseLinear(nn.Module):
    """y = x W' + b for a weight W (out_features, in_features) stored 2:4, at 9/16 of its bytes in a 16-bit dtype.

    On a CPU ``values`` (out, kp/2) and ``meta`` (out, kp/8) are the canonical format of sparsekit/format.py; on a CUDA device they
    are its fragment order, the only copy there. The state_dict is canonical everywhere. ``values`` may be narrower than the
    activations: 16-bit storage under fp32 activations is summed in fp32. ``conv1d`` remembers that the layer it replaces was
    GPT-2's Conv1D, which holds its weight transposed. Raises ValueError, or TypeError for a dtype, naming the first bad place,
    where the weight is not in the canonical format; so does load_state_dict, as a RuntimeError.

    It trains like an nn.Linear: ``values`` is the parameter, so the gradient and the state of an optimiser are half the dense size,
    and what was pruned stays pruned, since it is stored nowhere. Under autocast it computes in autocast's dtype."""

    def __init__(self, weight: Sparse24, bias: Tensor | None = None, conv1d: bool = False, requires_grad: bool = True):
        super().__init__()
        if not weight.values.is_meta:
            ops.validate24(weight)
        self.out_features, self.in_features = weight.shape
        trainable = requires_grad and weight.values.dtype in ops.LINEAR_DTYPES
        self.values = nn.Parameter(weight.values, requires_grad=trainable)
        # A GraphModule has a ``meta`` of its own, so an exported linear can have no buffer of that name.
        self.register_buffer("metadata", weight.meta, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=trainable)
        self.conv1d = conv1d
        self._settle()

    @classmethod
    def from_linear(cls, linear: nn.Module) -> SparseLinear:
        """From an nn.Linear, or a transformers Conv1D, whose weight holds 2:4. Raises ValueError, naming the first group, where
        it does not, TypeError for another module. Its parameters require gradients where the linear's do."""
        if not (isinstance(linear, nn.Linear) or is_linear(linear)):
            raise TypeError(f"from_linear: linear must be an nn.Linear or a transformers Conv1D, got a {type(linear).__name__}")
        bias = None if linear.bias is None else linear.bias.detach().clone()
        sparse = cls(ops.compress24(dense_weight(linear)), bias, is_conv1d(linear), linear.weight.requires_grad)
        if bias is not None:
            sparse.bias.requires_grad_(linear.bias.requires_grad)
        return sparse.train(linear.training)

    @classmethod
    def empty(cls, linear: nn.Module, dtype: torch.dtype) -> SparseLinear:
        """A SparseLinear of the linear's shape whose values are yet to be loaded, on the meta device."""
        n, k = dense_weight(linear).shape
        kp = padded_columns(k)
        values = torch.empty(n, kp // 2, dtype=dtype, device="meta")
        meta = torch.empty(n, kp // 8, dtype=torch.uint8, device="meta")
        bias = None if linear.bias is None else torch.empty(n, dtype=linear.bias.dtype, device="meta")
        requires_grad = linear.weight.requires_grad
        return cls(Sparse24(values, meta, (n, k)), bias, is_conv1d(linear), requires_grad).train(linear.training)

    @property
    def meta(self) -> Tensor:
        """The buffer ``metadata``, by the name that it has in files and in the state_dict."""
        return self.metadata

    @meta.setter
    def meta(self, meta: Tensor) -> None:
        self.metadata = meta

    @property
    def weight24(self) -> Sparse24:
        """The weight in the canonical format: the tensors themselves on a CPU, made from them on a CUDA device."""
        held = self._weight(self.values)
        return from_fragments(held) if isinstance(held, Fragments24) else held

    def _weight(self, values: Tensor) -> Sparse24 | Fragments24:
        return ops.held(values, self.metadata, self.out_features, self.in_features)

    def _settle(self, fragments: bool | None = None) -> None:
        """Brings values and meta into fragment order or out of it, by default as their device wants. values stays the object it
        is, with its gradient."""
        held = self._weight(self.values.detach())
        if isinstance(held, Fragments24) == (_reads_fragments(self.values) if fragments is None else fragments):
            return
        turn = to_fragments if isinstance(held, Sparse24) else from_fragments
        gradient = None if self.values.grad is None else turn(held._replace(values=self.values.grad.detach())).values
        self.values.grad = None
        self.values.data, self.metadata, _ = turn(held)
        self.values.grad = gradient

    def _apply(self, fn, recurse: bool = True):
        self._settle(fragments=False)  # the dtype or the device to come may have no other order
        super()._apply(fn, recurse)
        self._settle()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}meta"] = self.metadata
        if isinstance(self._weight(self.values), Fragments24):
            destination[f"{prefix}values"], destination[f"{prefix}meta"], _ = from_fragments(self._weight(self.values.detach()))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        state_dict = dict(state_dict)
        values, meta = state_dict.get(f"{prefix}values"), state_dict.pop(f"{prefix}meta", None)
        (n, k), kp = (self.out_features, self.in_features), padded_columns(self.in_features)
        fragments, sizes = isinstance(self._weight(self.values), Fragments24), [(n, kp // 2), (n, kp // 8)]
        shapes = [isinstance(t, Tensor) and tuple(t.shape) for t in (values, meta)]
        if shapes == sizes:  # else the base class tells of the values
            given = Sparse24(values.to(self.values.dtype), meta, (n, k))
            try:
                if not values.is_meta:
                    ops.validate24(given)
            except (ValueError, TypeError) as error:
                error_msgs.append(f"{prefix or 'the linear'}: {error}")
                return
            if fragments:
                state_dict[f"{prefix}values"], meta, _ = to_fragments(given)
        elif meta is None:
            missing_keys.extend([f"{prefix}meta"] if strict else [])
        elif shapes[1] != sizes[1]:
            error_msgs.append(f"size mismatch for {prefix}meta: it must be {sizes[1]}, got {shapes[1] or type(meta).__name__}")
        refused = len(error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if shapes == sizes and len(error_msgs) == refused:
            if local_metadata.get("assign_to_params_buffers", False):
                self.metadata = meta
            else:
                self.metadata.copy_(meta)
        if not fragments:
            self._settle()  # assign=True may have brought tensors of another device

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
        dense.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        values, bias = self.values, self.bias
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            if x.dtype in ops.LINEAR_DTYPES:  # of another, as of an nn.Linear's, it is an error
                x = x.to(dtype)
            values, bias = values.to(dtype), None if bias is None else bias.to(dtype)
        return ops.linear24(x, self._weight(values), bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={str(self.values.dtype).removeprefix('torch.')}, 2:4"
        )


def _reads_fragments(values: Tensor) -> bool:
    """Whether the kernels of the device that the values are on read fragment order."""
    return values.is_cuda and values.dtype in (torch.float16, torch.bfloat16)


def _is_transformers(module: nn.Module, name: str, file: str) -> bool:
    # By name: importing transformers for an isinstance check costs seconds.
    return type(module).__name__ == name and type(module).__module__ == f"transformers.{file}"


def is_conv1d(module: nn.Module) -> bool:
    return _is_transformers(module, "Conv1D", "pytorch_utils")


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a dense linear that can be pruned: nn.Linear itself, GPT-2's Conv1D or Falcon's linear.

    Other subclasses of nn.Linear are left alone: a quantised one holds something else in ``weight``."""
    return (
        type(module) is nn.Linear or is_conv1d(module) or _is_transformers(module, "FalconLinear", "models.falcon.modeling_falcon")
    )


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight of an nn.Linear or a Conv1D as (out_features, in_features), detached, sharing memory with the module."""
    weight = linear.weight.detach()
    return weight.T if is_conv1d(linear) else weight


def compress(model: nn.Module, within: Callable[[str], AbstractContextManager] = nullcontext) -> list[str]:
    """Swaps, in place, every linear of the model whose weight holds 2:4 for a SparseLinear; returns their names.

    Left alone: a weight that does not hold 2:4 or that stands in two places (a tied output layer), and one so narrow that it
    would take more bytes stored 2:4. within: what each is done in, by its name: a clock. Raises SparsekitError for a model that is
    a linear itself."""
    if is_linear(model):
        raise SparsekitError(
            f"compress needs a model that holds linears, got a {type(model).__name__}; use SparseLinear.from_linear"
        )
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    swapped = []
    for name, linear in [(name, module) for name, module in model.named_modules() if is_linear(module)]:
        weight = dense_weight(linear)
        saves = nbytes24(*weight.shape, weight.dtype) < weight.nbytes
        with within(name):
            if saves and owners[id(linear.weight)] == 1 and NM24.check(weight) is None:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, SparseLinear.from_linear(linear))
                swapped.append(name)
    return swapped
