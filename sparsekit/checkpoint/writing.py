"""Model folders out: shards, config and index, in a folder that appears by one rename."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ..documents import write_json
from ..errors import SparsekitError, listed
from ..format import FORMAT_VERSION
from ..linear import SparseLinear
from ..report import PruneReport, StructuredReport

MAX_SHARD_BYTES = 4 << 30
FORMATS = ("compressed", "dense")
_REPLACED = ".replaced-by-sparsekit-"  # in the name of a folder whose place another takes, before the process's number
SAFETENSORS_NAME = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    format: str = "compressed",
    tokenizer=None,
    overwrite: bool = False,
    report: PruneReport | StructuredReport | None = None,
) -> None:
    """Writes the model, and tokenizer and report.json where given, as a folder that ``load`` and, for "dense", transformers read.

    "compressed" stores each SparseLinear as it is; "dense" writes its zeros out and needs no sparsekit to load.
    The folder appears whole or not at all. Raises SparsekitError where it exists and is not empty, unless overwrite."""
    check_format(format)
    if not hasattr(model, "config"):
        raise SparsekitError(f"only a transformers model can be saved, got {type(model).__name__}; use its state_dict")
    sparse = compressed_shapes(model) if format == "compressed" else {}
    with new_folder(folder, overwrite) as parts:
        write_beside(parts, model, model.dtype, bool(sparse), tokenizer, report)
        _write_shards(parts, tensors_of(model, format), metadata_of(sparse))


def write_beside(
    folder: Path,
    model: nn.Module,
    dtype: torch.dtype,
    compressed: bool,
    tokenizer=None,
    report: PruneReport | StructuredReport | None = None,
) -> None:
    """Everything of a model folder but its weights, which are stored in ``dtype``."""
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    # Of the model as it is now, not of the file it was once read from.
    config.update(architectures=[type(model).__name__], dtype=str(dtype).removeprefix("torch."))
    if compressed:
        config["quantization_config"] = {"quant_method": "sparsekit", "version": FORMAT_VERSION}
    write_json(folder / "config.json", config, sort_keys=True)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        with _system_errors(folder):
            tokenizer.save_pretrained(folder)
    if report is not None:
        write_json(folder / "report.json", report.to_dict())


@contextmanager
def _system_errors(folder: Path) -> Iterator[None]:
    """Inside, what the system refuses is an OSError, also to a library in Rust, which tells of it in a text alone."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not (found := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from error


def check_format(format: str) -> None:
    """Raises SparsekitError, listing the known ones, for a format that ``save`` does not write."""
    if format not in FORMATS:
        raise SparsekitError(f"the format must be {listed(FORMATS, 'or')}, got {format!r}")


def check_new_folder(folder: str | Path, overwrite: bool = False) -> Path:
    """The folder's path. Raises SparsekitError where something is there already that may not be replaced.

    What a process that was killed while it replaced the folder has left is put right first."""
    folder = Path(folder)
    put_right(folder.resolve())
    if folder.exists() and not folder.is_dir():
        raise SparsekitError(f"the output must be a folder, got the file {folder}")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise SparsekitError(f"the output folder {folder} exists and is not empty; give another, or --overwrite")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise SparsekitError(
            f"only a model folder is overwritten, and {folder} holds other things and no config.json; give another"
        )
    parent = next((parent for parent in folder.absolute().parents if parent.exists()), folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise SparsekitError(f"the output folder {folder} must be in a folder that can be written, and {parent} is not one")
    return folder


@contextmanager
def new_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill beside the one asked for, which it replaces in one rename at the end; removed where anything fails."""
    folder = check_new_folder(folder, overwrite).resolve()
    missing = [parent for parent in folder.parents if not parent.exists()]
    parts = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(parts, ignore_errors=True)  # left by a killed process that had this one's number
    parts.mkdir(parents=True)
    try:
        yield parts
        replace_folder(folder, parts)
    except BaseException:
        remove_folder(parts, missing)
        raise


def replace_folder(folder: Path, parts: Path) -> None:
    """Puts ``parts`` in the place of ``folder``, whatever stands there, in one rename; the old one is back where that fails, and
    where the process is killed before it, with the next call of ``check_new_folder``."""
    old = folder.with_name(f"{folder.name}{_REPLACED}{os.getpid()}")
    try:
        if folder.is_dir():
            folder.rename(old)
        parts.rename(folder)
    finally:
        put_right(folder)


def put_right(folder: Path) -> None:
    """Ends what replace_folder has begun, here or in a process that is gone: the old folder is back where no other came, else it
    is removed."""
    for old in sorted(folder.parent.glob(f"{glob.escape(folder.name)}{_REPLACED}*")):
        pid = old.name.rpartition("-")[2]
        if not pid.isdecimal() or (int(pid) != os.getpid() and _is_alive(int(pid))):
            continue
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            old.rename(folder)
        elif folder.is_dir():
            shutil.rmtree(old, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def remove_folder(folder: Path, parents: list[Path]) -> None:
    """Removes the folder, and those of ``parents``, which were made for it, that nobody has put anything in."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in parents:
        with suppress(OSError):
            parent.rmdir()


def tensors_of(model: nn.Module, format: str) -> dict[str, Callable[[], Tensor]]:
    """What to write, by name, each made when its turn comes; a tensor tied to an earlier one is left out."""
    sparse = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    made: dict[str, Callable[[], Tensor]] = {}
    seen: set[tuple] = set()
    for name, tensor in model.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        linear = sparse.get(parent) if leaf in ("values", "meta") else None
        if linear is not None and format == "dense":
            made[f"{parent}.weight"] = lambda linear=linear: linear.to_linear().weight.detach()
            continue
        if linear is not None:
            made[f"{parent}.weight"] = lambda: torch.empty(0)  # what stops other loaders, see above
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        made[name] = lambda tensor=tensor: tensor
    return made


def compressed_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Shape (out_features, in_features) of each SparseLinear by its name."""
    return {name: (m.out_features, m.in_features) for name, m in model.named_modules() if isinstance(m, SparseLinear)}


def metadata_of(compressed: dict[str, tuple[int, int]]) -> dict[str, str]:
    """The ``__metadata__`` of a weight file beside or in which these linears are stored compressed."""
    text = json.dumps({"version": FORMAT_VERSION, "linears": compressed})
    return {"format": "pt", **({"sparsekit": text} if compressed else {})}


def _write_shards(folder: Path, tensors: dict[str, Callable[[], Tensor]], metadata: dict[str, str]) -> None:
    """model.safetensors, or numbered shards and their index where the tensors fill more than one."""
    shards: list[dict[str, Tensor]] = [{}]
    held: dict[Path, dict[str, int]] = {}

    def flush() -> None:
        path = folder / f"shard-{len(held)}.safetensors"
        save_file(shards[0], path, metadata)
        held[path] = {name: tensor.nbytes for name, tensor in shards[0].items()}
        shards[0] = {}

    filled = 0
    for name, make in tensors.items():
        tensor = make().detach().cpu().contiguous()
        if filled and filled + tensor.nbytes > MAX_SHARD_BYTES:
            flush()
            filled = 0
        shards[0][name] = tensor
        filled += tensor.nbytes
    flush()
    if len(held) == 1:
        next(iter(held)).rename(folder / "model.safetensors")
        return
    files = {shard_name(i, len(held)): sizes for i, sizes in enumerate(held.values())}
    for path, file in zip(held, files):
        path.rename(folder / file)
    write_index(folder, files)


def shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, files: dict[str, dict[str, int]]) -> None:
    """The index of the weight files: of each the bytes of its tensors by name."""
    index = {
        "metadata": {"total_size": sum(sum(sizes.values()) for sizes in files.values())},
        "weight_map": {name: file for file, sizes in files.items() for name in sizes},
    }
    write_json(folder / "model.safetensors.index.json", index, sort_keys=True)


def save_file(
    tensors: dict[str, Tensor],
    path: Path,
    metadata: dict[str, str],
    within: Callable[[str], AbstractContextManager] = nullcontext,
) -> None:
    """Writes a safetensors file. within: what each tensor is written in, by its name: a clock.

    The same tensors give the same bytes; the library's own writer leaves the order of the metadata to chance."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that each lies aligned
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": SAFETENSORS_NAME[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            with within(name):
                file.write(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))


def check_new_file(path: str | Path) -> Path:
    """The path of a file that can be written. Raises SparsekitError where a folder stands there, or it would be in none."""
    path = Path(path)
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise SparsekitError(f"the output must be a file in a folder that is there and can be written, got {path}")
    return path
