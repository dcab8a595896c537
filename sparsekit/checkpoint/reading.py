"""Model folders in: whole models, skeletons without weights, and what is wrong with a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import ops
from ..errors import SparsekitError
from ..format import FORMAT_VERSION, Sparse24
from ..linear import SparseLinear, dense_weight, is_linear
from ..structured.entries import Entry, entries_of
from ..structured.surgery import shape_model

SAFETENSORS_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load(folder: str | Path, *, device: str | torch.device = "auto", dtype: torch.dtype | str = "auto") -> nn.Module:
    """The causal language model of a folder that ``save`` wrote or of any ordinary Hugging Face folder, in eval mode.

    device: "auto" is CUDA where torch has it, else the CPU. dtype: of activations and dense weights, "auto" the stored one;
    the values of a SparseLinear stay in the dtype they are stored in.
    Raises SparsekitError where the folder, its config or its weights are missing, broken or of a newer format."""
    folder = check_model_folder(folder)
    linears = compressed_linears(folder)
    if linears is None and _entries(folder, read_config(folder)):
        linears = {}  # transformers builds blocks that are alike
    device = resolve_device(device)
    model = _load_as_is(folder, linears, dtype) if linears is not None else _load_dense(folder, dtype)
    return model.to(device).eval()


def load_tokenizer(folder: str | Path):
    """The tokenizer of a model folder. Raises SparsekitError where there is none."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken file raises whatever its reader trips over
        raise SparsekitError(f"the folder {folder} must hold a tokenizer that can be read: {first_sentence(error)}") from error


def resolve_device(device: str | torch.device) -> torch.device:
    """The device named, "auto" being CUDA where torch has it. Raises SparsekitError where torch cannot use it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise SparsekitError(f"the device must be one torch can use here, got {device!r}: {first_sentence(error)}") from error
    if found.type == "meta":
        raise SparsekitError("the device must be one that computes, got 'meta'")
    return found


def check_model_folder(folder: str | Path) -> Path:
    """The folder's path. Raises SparsekitError where it is no model folder or its weights cannot be read to the end."""
    folder = Path(folder)
    if not folder.is_dir():
        raise SparsekitError(f"the model must be a folder, and {folder} {'is a file' if folder.exists() else 'does not exist'}")
    if not (folder / "config.json").is_file():
        raise SparsekitError(f"the folder {folder} must hold a config.json, and has none; give a Hugging Face model folder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise SparsekitError(f"{folder / 'config.json'} is not JSON: {first_sentence(error)}") from None
    if not isinstance(config, dict):
        raise SparsekitError(f"{folder / 'config.json'} must be a JSON object, got a {type(config).__name__}")
    for _ in weight_files(folder):
        pass
    return folder


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that most floating-point bytes of the folder's weights are stored in."""
    held: dict[torch.dtype, int] = {}
    for _, tensors in weight_files(folder):
        for name in tensors.keys():
            part = tensors.get_slice(name)
            dtype = SAFETENSORS_DTYPE.get(part.get_dtype())
            if dtype is not None:
                held[dtype] = held.get(dtype, 0) + math.prod(part.get_shape())
    return max(held, key=held.__getitem__) if held else torch.float32


def weight_files(folder: Path) -> Iterator[tuple[Path, safe_open]]:
    """Each safetensors file of the folder, opened. Raises SparsekitError where there is none or one is broken."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    paths = [single]
    if index.is_file() and not single.is_file():  # where there are both, transformers reads the one file
        try:
            paths = [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SparsekitError(f"{index} must be the index of the weight files, and cannot be read as one") from None
        if not paths:
            raise SparsekitError(f"{index} must be the index of the weight files, and holds no tensor")
    for path in paths:
        if not path.is_file():
            raise SparsekitError(f"the weights must be safetensors files, and {path} is missing; save them as safetensors first")
        with open_weights(path) as tensors:
            yield path, tensors


@contextmanager
def open_weights(path: Path) -> Iterator[safe_open]:
    """One safetensors file, opened. Raises SparsekitError where it is broken."""
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise SparsekitError(f"{path} is not a whole safetensors file: {first_sentence(error)}") from error


def compressed_linears(folder: Path) -> dict[str, tuple[int, int]] | None:
    """Shape by name of the linears a folder holds compressed; None for an ordinary folder.

    transformers' own ``save_pretrained``, as a Trainer calls it, does not say which they are: there by the names of their tensors,
    columns rounded up to 8. Raises SparsekitError for a format version newer than this package's."""
    found, names, metas = [], set(), {}
    for path, tensors in weight_files(folder):
        if (linears := linears_in(path, tensors)) is not None:
            found.append(linears)
        names.update(tensors.keys())
        metas |= {name[:-5]: tensors.get_slice(name).get_shape() for name in tensors.keys() if name.endswith(".meta")}
    if found:
        return {name: shape for linears in found for name, shape in linears.items()}
    # ``save`` leaves an empty weight beside each, for transformers to trip over.
    unsaid = [name for name, shape in metas.items() if f"{name}.values" in names and f"{name}.weight" not in names]
    return {name: (metas[name][0], 8 * metas[name][1]) for name in unsaid if len(metas[name]) == 2} or None


def linears_in(path: Path, tensors: safe_open) -> dict[str, tuple[int, int]] | None:
    """Shape by name of the linears that one weight file says are compressed; None where it says nothing of them."""
    text = (tensors.metadata() or {}).get("sparsekit")
    if not text:
        return None
    try:
        header = json.loads(text)
        newer = int(header["version"]) > FORMAT_VERSION
        shapes = {} if newer else {name: (int(n), int(k)) for name, (n, k) in header["linears"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SparsekitError(f"{path} must say how it is compressed, and its metadata cannot be read") from None
    if newer:
        raise SparsekitError(
            f"{path} is written in format version {header['version']}, this sparsekit reads up to {FORMAT_VERSION}; "
            f"upgrade sparsekit"
        )
    return shapes


def check_stored(name: str, weight: Sparse24, folder: Path) -> None:
    """Raises SparsekitError where what the folder holds for the linear ``name`` is not in the canonical format."""
    try:
        ops.validate24(weight)
    except (ValueError, TypeError) as error:
        raise SparsekitError(f"{name} in {folder} is damaged: {error}") from error


def _load_dense(folder: Path, dtype: torch.dtype | str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    options = dict(local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True)
    config = read_config(folder)
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "sparsekit":
        raise SparsekitError(f"the config in {folder} says sparsekit, and the metadata of the weights that would tell how is gone")
    try:
        with quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, **options)
    except Exception as error:  # a config of another's making raises whatever the model's code trips over
        raise SparsekitError(f"the model in {folder} cannot be loaded: {first_sentence(error)}") from error
    absent = [*info["missing_keys"], *info["mismatched_keys"]]
    if absent:
        raise SparsekitError(f"the weights in {folder} must be those of its config, and {absent[0]} is missing or of another shape")
    return model


def _load_as_is(folder: Path, linears: dict[str, tuple[int, int]], dtype: torch.dtype | str) -> nn.Module:
    """The model of a folder that sparsekit wrote, each tensor under its own name; ``linears`` of them are compressed."""
    model = skeleton(folder, dtype)
    dtype = model.dtype
    for name, shape in linears.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise SparsekitError(f"{folder} holds a compressed {name}, which its config does not have") from None
        found = SparseLinear.empty(linear, dtype) if is_linear(linear) else None
        if found is None or (found.out_features, found.in_features) != tuple(shape):
            raise SparsekitError(f"{name} must be the linear of its config, got one of shape {tuple(shape)} in {folder}")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, found)
    for path, tensors in weight_files(folder):
        for name in tensors.keys():
            assign(model, name, tensors.get_tensor(name), dtype, path)
    model.tie_weights()
    if absent := [name for name, t in (*model.state_dict().items(), *model.named_buffers()) if t.is_meta]:
        raise SparsekitError(f"the weights in {folder} must be those of its config, and {absent[0]} is missing")
    for name in linears:
        check_stored(name, model.get_submodule(name).weight24, folder)
    model.generation_config = read_generation_config(folder) or model.generation_config
    return model


def read_generation_config(folder: Path):
    """How the folder's model is to generate; None where it does not say."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder, local_files_only=True)


def read_config(folder: Path):
    """The transformers config of a model folder. Code that it may name is never run."""
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # any value of it may be wrong, each with an exception of its own
        raise SparsekitError(f"the config in {folder} must name a causal language model: {first_sentence(error)}") from error


def _entries(folder: Path, config) -> list[Entry] | None:
    """What the folder's config says of blocks that differ."""
    try:
        return entries_of(config)
    except SparsekitError as error:
        raise SparsekitError(f"the config in {folder} cannot be followed: {error}") from None


def skeleton(folder: Path, dtype: torch.dtype | str = "auto") -> nn.Module:
    """The model of a folder's config with every parameter on the meta device: names and shapes, no weights."""
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    config.__dict__.pop("quantization_config", None)
    dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    try:
        with quiet_transformers(), _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        raise SparsekitError(f"the config in {folder} must name a causal language model: {first_sentence(error)}") from error
    try:
        shape_model(model, _entries(folder, config))
    except SparsekitError as error:
        raise SparsekitError(f"the config in {folder} must be that of a model that can be built: {error}") from None
    return model


def linear_shapes(folder: Path) -> tuple[tuple[int, int], ...]:
    """The distinct shapes (out_features, in_features) of the linears in a folder's decoder blocks, by its config alone."""
    check_model_folder(folder)
    model = skeleton(folder)
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if is_linear(module) and module is not head]
    return tuple(dict.fromkeys(tuple(dense_weight(linear).shape) for linear in linears))


def assign(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, path: Path) -> None:
    """Puts a tensor read from ``path`` in its place, in the model's dtype unless it belongs to a SparseLinear's storage."""
    parent, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(parent)
        if isinstance(module, SparseLinear) and leaf == "weight" and tensor.numel() == 0:
            return
        stored = isinstance(module, SparseLinear) and leaf in ("values", "meta")
        place = getattr(module, leaf) if stored else {**module._parameters, **module._buffers}[leaf]
    except (AttributeError, KeyError):
        place = None  # absent, or a bias that the config does without
    if place is None:
        raise SparsekitError(f"{path} holds {name}, which the model of its config does not have")
    if place.shape != tensor.shape:
        raise SparsekitError(f"{name} must be of shape {tuple(place.shape)}, got {tuple(tensor.shape)} in {path}")
    if tensor.is_floating_point() and not stored:
        tensor = tensor.to(dtype)
    if isinstance(place, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=place.requires_grad and tensor.is_floating_point())
    setattr(module, leaf, tensor)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside take no memory for parameters; buffers, such as rotary frequencies, are real."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no table of missing weights: what is missing is raised instead."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_sentence(error: Exception) -> str:
    """What the error says first, in one line without its full stop."""
    lines = f"{'no such thing as ' if isinstance(error, KeyError) else ''}{error}".split("\n")
    text = " ".join(lines[: 2 if lines[0].rstrip().endswith(":") else 1])
    return " ".join(text.split()).partition(". ")[0].rstrip(".") or type(error).__name__
