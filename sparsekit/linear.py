"""SparseLinear: torch.nn.Linear with a weight stored 2:4."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

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
    and what was pruned stays pruned, since it is stored nowhere. Under autocast it computes in autocast's dtype. torch.jit.script
    is refused; torch.export and torch.jit.trace take it."""

    def __init__(self, weight: Sparse24, bias: Tensor | None = None, conv1d: bool = False, requires_grad: bool = True):
        super().__init__()
        if not (isinstance(weight, Sparse24) and weight.values.is_meta):
            ops.validate24(weight)
        self.out_features, self.in_features = weight.shape
        if bias is not None and (bias.shape != (self.out_features,) or not bias.is_floating_point()):
            got = f"{tuple(bias.shape)} of {bias.dtype}"
            raise ValueError(f"SparseLinear: bias must be ({self.out_features},) of a float dtype, got {got}")
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
        it does not, TypeError for another module, such as an nn.Linear whose class has a forward of its own. Its parameters require
        gradients where the linear's do; its hooks stay with it, and a parametrized weight comes as it is now."""
        if not is_linear(linear) and getattr(type(linear), "forward", None) is not nn.Linear.forward:
            kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
            raise TypeError(f"from_linear: linear must be an nn.Linear, forward included, or a transformers Conv1D, got a {kind}")
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

    @property
    def weight(self) -> Tensor:
        """The dense weight for code that reads it of a linear, (out_features, in_features) or transposed as a Conv1D holds it.

        Its dtype, shape and device cost nothing; whatever else is done with it writes it out anew, with gradients to values.
        Writing to it, or to its data, raises RuntimeError; a view of it is of what was written out."""
        return self._write_out() if torch.compiler.is_compiling() else _DenseWeight.of(self)

    def _write_out(self) -> Tensor:
        weight = ops.expand24(self.weight24)
        return weight.T if self.conv1d else weight

    def _weight(self, values: Tensor) -> Sparse24 | Fragments24:
        return ops.held(values, self.metadata, self.out_features, self.in_features)

    def _settle(self, fragments: bool | None = None) -> None:
        """Brings values and meta into fragment order or out of it, by default as their device wants. values stays the object it
        is, with its gradient; spread over processes, it stays in its order, since what spreads it holds its sizes."""
        held = self._weight(self.values.detach())
        if _is_spread(self.values):
            return
        if isinstance(held, Fragments24) == (_reads_fragments(self.values) if fragments is None else fragments):
            return
        turn = to_fragments if isinstance(held, Sparse24) else from_fragments
        gradient = None if self.values.grad is None else turn(held._replace(values=self.values.grad.detach())).values
        self.values.grad = None
        self.values.data, self.metadata, _ = turn(held)
        self.values.grad = gradient

    def _apply(self, fn, recurse: bool = True):
        self._settle(fragments=False)  # the dtype or the device to come may have no other order
        super()._apply(lambda t: fn(t) if t is not self.metadata else fn(t).to(t.dtype), recurse)  # .type() casts buffers too
        self._settle()
        return self

    def __prepare_scriptable__(self):
        raise TypeError("SparseLinear: torch.jit.script cannot compile it; use torch.export, torch.compile or torch.jit.trace")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}meta"] = self.metadata
        if isinstance(self._weight(self.values), Fragments24):
            s = _turned(from_fragments, self._weight(self.values.detach()))
            destination[f"{prefix}values"], destination[f"{prefix}meta"] = s.values, s.meta

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
                    ops.validate24(given._replace(values=_whole(given.values)))
            except (ValueError, TypeError) as error:
                error_msgs.append(f"{prefix or 'the linear'}: {error}")
                return
            if fragments:
                state_dict[f"{prefix}values"], meta, _ = _turned(to_fragments, given)
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
        if self.conv1d:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                dense = Conv1D(self.out_features, self.in_features)
        else:
            dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self._write_out().contiguous(), requires_grad=self.values.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        # By itself nn.Module looks for an attribute in vain before it looks here, for longer than a small product's checks take.
        values, metadata, bias = self._parameters.get("values"), self._buffers.get("metadata"), self.bias
        if values is None or metadata is None:  # a parametrisation, or a wrapper that shards, keeps them elsewhere
            values, metadata = self.values, self.metadata
        if torch._C._is_any_autocast_enabled() and not x.is_meta and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            if x.dtype in ops.LINEAR_DTYPES:  # of another, as of an nn.Linear's, it is an error
                x = x.to(dtype)
            values, bias = values.to(dtype), None if bias is None else bias.to(dtype)
        return ops.linear24(x, ops.held(values, metadata, self.out_features, self.in_features), bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={str(self.values.dtype).removeprefix('torch.')}, 2:4"
        )


class _DenseWeight(Tensor):
    """A weight that is written out when it is used. Its memory is one element, repeated."""

    @classmethod
    def of(cls, linear: SparseLinear, detached: bool = False) -> Tensor:
        n, k = linear.out_features, linear.in_features
        shape = (k, n) if linear.conv1d else (n, k)
        weight = torch.empty((), dtype=linear.values.dtype, device=linear.values.device).expand(shape).as_subclass(cls)
        weight._linear, weight._detached = linear, detached
        return weight

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in _FREE:
            return super().__torch_function__(function, types, args, kwargs)
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        writes = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
        written = kwargs.get("out") if not writes else args[0] if args else kwargs.get("tensor")  # as torch.nn.init has it
        if isinstance(written, cls):
            raise RuntimeError(f"SparseLinear.weight: it must be read alone, got {name}, which would be lost; write to the values")
        if function in (Tensor.detach, Tensor.data.__get__):
            return cls.of(args[0]._linear, detached=True)  # as little to be written to
        return function(*tree_map_only(cls, cls._written_out, args), **tree_map_only(cls, cls._written_out, kwargs))

    def _written_out(self) -> Tensor:
        weight = self._linear._write_out()
        return weight.detach() if self._detached else weight


# What is known of a weight that is not written out.
_FREE = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_cuda", "is_cpu", "is_meta", "layout")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size, Tensor.__len__),
}


def _is_spread(t: Tensor) -> bool:
    """Whether it is a DTensor, by what that alone has: the import costs a second."""
    return hasattr(t, "full_tensor")


def _whole(t: Tensor) -> Tensor:
    """All of a tensor that may be spread over processes; each must ask."""
    return t.full_tensor() if _is_spread(t) else t


def _turned(turn: Callable, held: Sparse24 | Fragments24) -> Sparse24 | Fragments24:
    """The weight in the order that ``turn`` makes, its values spread over processes as they were."""
    turned = turn(held._replace(values=_whole(held.values)))
    if not _is_spread(held.values):
        return turned
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = held.values.device_mesh, held.values.placements
    return turned._replace(values=distribute_tensor(turned.values, mesh, placements, src_data_rank=None))


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

    Left alone: a weight that does not hold 2:4, that stands in two places (a tied output layer) or is no parameter (under a mask of
    torch.nn.utils.prune, until its ``remove``), and one so narrow that it would take more bytes stored 2:4. Hooks go with their
    linear. within: what each is done in, by its name: a clock. Raises SparsekitError for a model that is a linear itself, and, with
    nothing swapped, for one whose weights are not in memory."""
    if is_linear(model):
        raise SparsekitError(
            f"compress needs a model that holds linears, got a {type(model).__name__}; use SparseLinear.from_linear"
        )
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    linears = [(name, module) for name, module in model.named_modules() if is_linear(module)]
    if absent := next((name for name, linear in linears if linear.weight.is_meta), None):
        raise SparsekitError(f"compress needs weights that are in memory, got {absent} on the meta device; load without offloading")
    swapped = []
    for name, linear in linears:
        weight = dense_weight(linear)
        saves = nbytes24(*weight.shape, weight.dtype) < weight.nbytes
        with within(name):
            if saves and owners[id(linear.weight)] == 1 and NM24.check(weight) is None:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, SparseLinear.from_linear(linear))
                swapped.append(name)
    return swapped
