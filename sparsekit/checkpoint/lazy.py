"""A model folder read a part at a time: for models that do not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import SparsekitError
from ..format import Sparse24
from ..linear import is_conv1d
from ..ops import expand24
from .reading import (
    SAFETENSORS_DTYPE,
    assign,
    check_stored,
    compressed_linears,
    first_sentence,
    linears_in,
    open_weights,
    quiet_transformers,
    read_config,
    read_generation_config,
    skeleton,
    stored_dtype,
    weight_files,
)

FindBlocks = Callable[[nn.Module], nn.ModuleList]
OUTSIDE = -1  # the part of whatever belongs to no block


class LazyModel:
    """The model of a folder, in eval mode, with all parameters on the meta device but those of the parts that are filled.

    A part is one of ``blocks``, by its number, or a name of ``outside``. Names are the model's, which those in the files may differ
    from: transformers' own loader reads each part, so that a checkpoint of the bare model and experts stored one by one come out as
    they do when the model is loaded as a whole. Buffers are real, and on the device, from the start.
    Raises SparsekitError where the folder is compressed or quantised, or its weights are not those of its config."""

    def __init__(
        self, folder: Path, find_blocks: Callable[[nn.Module], nn.ModuleList], dtype: torch.dtype | str, device: torch.device
    ):
        try:
            from transformers.core_model_loading import rename_source_key
        except ImportError:
            raise SparsekitError("a folder is pruned block by block with transformers 5.1 or newer; upgrade transformers") from None

        config = read_config(folder)
        if compressed_linears(folder) is not None:
            raise SparsekitError("the model must be dense, got one that is compressed already; prune the model it was made from")
        if quantised := getattr(config, "quantization_config", None):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
            raise SparsekitError(f"the weights must be dense, and those in {folder} are quantised by {method}; dequantise them")
        self.folder, self.device, self.stored = folder, device, stored_dtype(folder)
        self.dtype = (getattr(config, "dtype", None) or self.stored) if dtype == "auto" else dtype
        self.model = skeleton(folder, self.dtype).eval()
        self.model.generation_config = read_generation_config(folder) or self.model.generation_config
        self.model.tie_weights()
        for module in self.model.modules():
            module._buffers.update({name: t.to(device) for name, t in module._buffers.items() if t is not None})
        self.blocks = find_blocks(self.model)
        held = self.model.state_dict(keep_vars=True)
        self._part = _parts(self.model, self.blocks, held)
        self._meta = {name: t for name, t in held.items() if t.is_meta}
        self._keys: dict[str, list[str]] = {name: [] for name in held}  # of each tensor of the model: what it is read from
        self._file: dict[str, Path] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        renamings, converters = _conversions(self.model)
        shapes = {}
        for path, tensors in weight_files(folder):
            for key in tensors.keys():
                name, converter = rename_source_key(key, renamings, converters, self.model.base_model_prefix, held)
                if name not in held and key in held:
                    name, converter = key, None
                if name in held:
                    self._keys[name].append(key)
                    self._file[key] = path
                    part = tensors.get_slice(key)
                    self._dtypes[name] = SAFETENSORS_DTYPE.get(part.get_dtype(), self.stored)
                    shapes[name] = None if converter else tuple(part.get_shape())
        twins = {id(held[name]) for name in shapes}  # a tied tensor is there if its twin is
        splits = any(len(one.target_patterns) > 1 for one in converters)  # what comes of a split, its names do not tell
        for name, tensor in held.items():
            absent = name not in shapes and id(tensor) not in twins and name in self._meta and not splits
            if absent or shapes.get(name) not in (None, tuple(tensor.shape)):
                raise _foreign(folder, name)
        # Outside the blocks tensors are read one at a time: one of them may be as large as a block.
        groups: dict[int, list[str]] = {}
        for name, part in self._part.items():
            if part == OUTSIDE and not (name in held and not held[name].is_meta and not self._keys[name]):
                groups.setdefault(id(held[name]), []).append(name)
        self.outside = {names[0]: names for names in groups.values()}

    def names(self, part: int | str) -> list[str]:
        """The tensors of a part: parameters, and buffers that are stored."""
        return self.outside[part] if isinstance(part, str) else [name for name, i in self._part.items() if i == part]

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that the tensor has in the folder."""
        return self._dtypes.get(name, self.stored)

    def _dtype(self, name: str) -> torch.dtype | None:
        """The dtype that the tensor is computed with; None is the stored one."""
        return self._meta[name].dtype if name in self._meta else None

    def nbytes(self, part: int | str, stored: bool = False) -> int:
        """Bytes of a part's parameters as the model computes with them, or as they are stored."""
        held = {id(self._meta[name]): name for name in self.names(part) if name in self._meta}  # twins once
        dtypes = {name: self.stored_dtype(name) if stored else self._meta[name].dtype for name in held.values()}
        return sum(self._meta[name].numel() * dtype.itemsize for name, dtype in dtypes.items())

    def fill(self, parts: Iterable[int | str]) -> None:
        """Reads the parts, in the model's dtype. Raises SparsekitError where a tensor is missing or of another shape."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        names = [name for part in parts for name in self.names(part)]
        paths = {self._file[key] for name in names for key in self._keys[name]}
        renamings, converters = _conversions(self.model)  # they carry what they have gathered: new ones for each part
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            device_map={"": self.device},
            weight_mapping=[*renamings, *converters],
        )
        older = {"tp_plan": None} if "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters else {}
        with ExitStack() as stack, quiet_transformers():
            files = {path: stack.enter_context(open_weights(path)) for path in paths}
            try:
                # Copied here, in the dtype to be: transformers' threads would each keep memory of their own for it.
                dtypes = {key: self._dtype(name) for name in names for key in self._keys[name]}
                read = {
                    key: files[self._file[key]].get_tensor(key).to(self.device, dtype, copy=True) for key, dtype in dtypes.items()
                }
                info, _ = convert_and_load_state_dict_in_model(self.model, read, config, **older)
                del read
            except Exception as error:  # a file of another's making raises whatever the conversion trips over
                raise SparsekitError(f"the weights in {self.folder} cannot be read: {first_sentence(error)}") from error
            if any(self._part[name] == OUTSIDE for name in names):
                self.model.tie_weights(missing_keys=set(info.missing_keys), recompute_mapping=False)
        wrong = [name for name, *_ in info.mismatched_keys] + list(info.conversion_errors)
        held = self.model.state_dict(keep_vars=True)
        if wrong := wrong + [name for name in names if held[name].is_meta]:
            raise _foreign(self.folder, wrong[0])

    def fill_block(self, i: int, path: Path) -> None:
        """Fills block i from a weight file that ``save`` or the pruning of a folder wrote, in the model's dtype, dense."""
        with open_weights(path) as tensors:
            compressed = linears_in(path, tensors) or {}
            for name in tensors.keys():
                parent, _, leaf = name.rpartition(".")
                if parent not in compressed or leaf not in ("values", "meta", "weight"):
                    self._put(name, tensors.get_tensor(name), path)
                elif leaf == "values":
                    stored = Sparse24(tensors.get_tensor(name), tensors.get_tensor(f"{parent}.meta"), compressed[parent])
                    check_stored(parent, stored, path)
                    weight = expand24(stored)
                    self._put(
                        f"{parent}.weight", weight.T.contiguous() if is_conv1d(self.model.get_submodule(parent)) else weight, path
                    )
        held = self.blocks[i].state_dict(keep_vars=True)
        if absent := [name for name in held if held[name].is_meta]:
            raise SparsekitError(f"{path} must hold block {i}, and {absent[0]} is missing; prune it anew")

    def _put(self, name: str, tensor: Tensor, path: Path) -> None:
        dtype = self._meta[name].dtype if name in self._meta else tensor.dtype
        assign(self.model, name, tensor.to(self.device), dtype, path)

    def drop(self, parts: Iterable[int | str]) -> None:
        """Lets the parameters of the parts go: they are on the meta device again."""
        for name in [name for part in parts for name in self.names(part) if name in self._meta]:
            parent, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(parent)
            if leaf in module._parameters:
                module._parameters[leaf] = self._meta[name]


def _foreign(folder: Path, name: str) -> SparsekitError:
    return SparsekitError(f"the weights in {folder} must be those of its config, and {name} is missing or of another shape")


def _conversions(model: nn.Module) -> tuple[list, list]:
    """How transformers turns what a checkpoint of this model holds into what the model holds: renamings, and what joins or splits
    tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model)
    return [one for one in mapping if isinstance(one, WeightRenaming)], [one for one in mapping if isinstance(one, WeightConverter)]


def _parts(model: nn.Module, blocks: nn.ModuleList, held: dict[str, Tensor]) -> dict[str, int]:
    """The part of each tensor, by name. Raises SparsekitError where two parts share one."""
    names = {module: name for name, module in model.named_modules()}
    prefixes = {f"{names[block]}.": i for i, block in enumerate(blocks)}
    parts = {name: next((i for prefix, i in prefixes.items() if name.startswith(prefix)), OUTSIDE) for name in held}
    first: dict[int, str] = {}
    for name, tensor in held.items():
        twin = first.setdefault(id(tensor), name)
        if parts[twin] != parts[name]:
            raise SparsekitError(f"a block must share no weight with another, and {name} is {twin}; prune the model in memory")
    return parts
