"""How much memory the pruning of a folder takes, told from shapes, and where hidden states wait so that it is enough."""

from __future__ import annotations

import re
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.lazy import LazyModel
from ..criteria import Gram
from ..errors import SparsekitError, listed
from ..linear import dense_weight, is_linear
from ..patterns import JOINT
from ..pruners import Pruner, by_gradient
from ..timing import peak_memory
from .blocks import Target, find_blocks, fused_parameters
from .store import OnDisk

_UNITS = {f"{prefix}{'iB' if base == 1024 else 'B'}": base**i for base in (1000, 1024) for i, prefix in enumerate("KMGT", 1)}


def parse_size(text: str | int) -> int:
    """Bytes of a size such as "8GiB" or "500MB"; a number alone is bytes. Raises SparsekitError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(\w*)", str(text).strip())
    unit = {"": 1, "B": 1, **_UNITS}.get(found[2]) if found else None
    if unit is None or not (size := int(float(found[1]) * unit)):
        raise SparsekitError(f'a size of memory must be a number of KiB, MiB or GiB (or KB, MB, GB), such as "8GiB", got {text!r}')
    return size


def shown_size(size: float) -> str:
    """As a person would say it, and ``parse_size`` reads it; rounded up."""
    unit = next(name for name in ("GiB", "MiB", "KiB") if size >= _UNITS[name] or name == "KiB")
    return f"{-int(-10 * size // _UNITS[unit]) / 10:g}{unit}"


def taken() -> int:
    """Bytes of memory that the process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return peak_memory(torch.device("cpu"))


def needed(
    lazy: LazyModel, targets: Sequence[Sequence[Target]], batches: Sequence[Any], kind: type[Pruner], group: str | None = None
) -> dict[str, int]:
    """Bytes that pruning takes at its largest block, by what they are for; hidden states beside those at work are not in it.

    On a GPU only what passes through the host's memory counts."""
    host = lazy.device.type == "cpu"
    if by_gradient(kind):
        scores = max(map(_scores, targets), default=0) * host * (group in JOINT)
        return {**_whole(lazy, targets, batches), "the scores of a block": scores}
    tokens = max((_tokens(batch) for batch in batches), default=0) if kind.gathers else 0
    outside = sum(lazy.nbytes(top) for top in lazy.outside) if kind.gathers else 0
    found: list[dict[str, int]] = []
    for i, matrices in enumerate(targets):
        shapes = [target.weight.shape for target in matrices]
        widest = max((max(shape) for shape in shapes), default=0)
        columns = max((k for _, k in shapes), default=0)
        known = 4 * sum(k * k if kind.gathers is Gram else k for _, k in shapes) if kind.gathers else 0
        found.append(
            {
                "the weights of a block": (lazy.nbytes(i) if host else 0) + lazy.nbytes(i, stored=True),
                "what is known of its inputs": known * host,
                "a factor": 10 * 4 * columns**2 * host * (kind.gathers is Gram),
                "the scores of a block": _scores(matrices) * host * (group in JOINT),
                "a weight at work": 4 * 4 * max((n * k for n, k in shapes), default=0) * host,
                "a batch at work": tokens * (_width(lazy) * 2 + widest * 5) * max(lazy.dtype.itemsize, 4) * host,
                "masks and positions": _arguments(lazy, batches) * host if kind.gathers else 0,
            }
        )
    largest = max(found, key=lambda block: sum(block.values()))
    capture = outside - sum(largest.values()) + largest["the weights of a block"] + largest["a batch at work"]
    return largest | ({"embeddings": capture} if capture > 0 else {})


def _scores(matrices: Sequence[Target]) -> int:
    """What a block takes that is counted as one: of each weight a score, and what is made of it."""
    return 8 * sum(target.weight.numel() for target in matrices)


def _whole(lazy: LazyModel, targets: Sequence[Sequence[Target]], batches: Sequence[Any]) -> dict[str, int]:
    """What gradients take: a backward pass of the whole model, a sequence at a time."""
    config = lazy.model.config.get_text_config()
    matrices = [target for group in targets for target in group]
    largest = max((getattr(target.module, target.parameter).numel() for target in matrices), default=0)
    length = max((_length(batch) for batch in batches), default=0)
    experts = getattr(config, "num_experts_per_tok", None) or 1 << 30  # that a token is given to
    features = sum(sum(target.weight.shape) for target in matrices if target.expert is None or target.expert[1] < experts)
    heads = getattr(config, "num_attention_heads", 1) * (len(targets) if config._attn_implementation == "eager" else 1)
    itemsize = max(lazy.dtype.itemsize, 4)
    parts = [*range(len(lazy.blocks)), *lazy.outside]
    found = {
        "the weights of the whole model": sum(map(lazy.nbytes, parts)) + max(lazy.nbytes(part, stored=True) for part in parts),
        "its squared gradients": 4 * sum(target.weight.numel() for target in matrices),
        "a gradient at work": 4 * 4 * largest,
        "a sequence at work": itemsize * length * (2 * features + heads * length + 5 * config.vocab_size),
    }
    return found if lazy.device.type == "cpu" else {"the weights of a block": max(lazy.nbytes(p, stored=True) for p in parts)}


def store_within(
    limit: int,
    offload: Path,
    lazy: LazyModel,
    targets: Sequence[Sequence[Target]],
    batches: Sequence[Any],
    kind: type[Pruner],
    group: str | None = None,
) -> OnDisk | None:
    """Where hidden states wait, so that the process holds ``limit`` bytes at most: on disk in ``offload``, or in memory (None).

    Raises SparsekitError, saying how much is needed, where one block alone takes more."""
    need = _within(limit, needed(lazy, targets, batches, kind, group))
    streams = kind.gathers and not by_gradient(kind)
    hidden = sum(_tokens(batch) for batch in batches) * _width(lazy) * lazy.dtype.itemsize if streams else 0
    return OnDisk(offload) if need + hidden > limit else None


def check_whole(limit: int, folder: Path, dtype: torch.dtype | str, device: torch.device, tokens: int) -> None:
    """Raises SparsekitError, saying how much is needed, where a process of ``limit`` bytes cannot load the whole model of the
    folder and write ``tokens`` tokens at a time with it. On a GPU it holds a part at a time."""
    lazy = LazyModel(folder, find_blocks, dtype, device)
    parts = [*range(len(lazy.blocks)), *lazy.outside]
    if device.type != "cpu":
        _within(limit, {"the largest part of the model": max(lazy.nbytes(part, stored=True) for part in parts)})
        return
    keys_and_values = 2 * len(lazy.blocks) * tokens * _width(lazy) * lazy.dtype.itemsize
    found = {"the whole model that writes the text": sum(map(lazy.nbytes, parts)), "its keys and values": keys_and_values}
    _within(limit, found, "; calibrate on a text, which needs a block at a time")


def free(device: torch.device) -> int | None:
    """Bytes of memory that the process can still take on the device, within its control group; None where that is not told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        found.append(1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]))
    except (OSError, TypeError):
        return None
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            found.append(int(Path("/sys/fs/cgroup", limit).read_text()) - int(Path("/sys/fs/cgroup", used).read_text()))
        except (OSError, ValueError):  # another version of control groups, or no limit
            continue
    return max(min(found), 0)


def check_structured(
    model: nn.Module, batches: Sequence[Any], device: torch.device, gates: bool, fits: bool, limit: int | None = None
) -> None:
    """Raises SparsekitError, saying how much is needed, where parts cannot be taken out of a model of this skeleton, all of it in
    memory, within ``limit`` bytes or within what is free on the device.

    gates: importance is by gradients. fits: what stays makes up for what goes, by least squares."""
    config = model.config.get_text_config()
    linears = [dense_weight(module).shape for module in model.modules() if is_linear(module)]
    fused = [getattr(module, name).shape for module in model.modules() for name in fused_parameters(module)]
    widest = max((k for _, k in linears), default=0)
    experts = max((n * min(shape) ** 2 for n, *shape in fused), default=0)  # a Gram matrix of each of a block's
    held, length = (max(map(of, batches), default=0) for of in (_tokens, _length))
    a_token = max(model.dtype.itemsize, 4) * held
    scores = config.num_attention_heads * length
    forward = {"a batch at work": a_token * (5 * max(map(max, linears), default=0) + scores)}
    if fits:
        forward["what is known of inputs"] = 4 * (9 * widest**2 + experts)
        forward["hidden states"] = 2 * sum(map(_tokens, batches)) * config.hidden_size * model.dtype.itemsize
    features = sum(n + k for n, k in linears) + 5 * config.vocab_size
    backward = {"a batch's gradients": a_token * (features + scores) * gates}
    weights = {"the weights of the whole model": sum(parameter.nbytes for parameter in model.parameters())}
    parts = weights | max(forward, backward, key=lambda one: sum(one.values()))
    if limit is not None and device.type == "cpu":
        _within(limit, parts, "; structured pruning holds all of the model")
        return
    there, need = free(device), sum(parts.values())
    if there is not None and need > there:
        what = listed(f"{shown_size(size)} for {name}" for name, size in parts.items() if size)
        raise SparsekitError(
            f"structured pruning holds the whole model and needs {shown_size(need)} of free memory, and {device} has "
            f"{shown_size(there)}: it takes {what}; use a 16-bit dtype, fewer or shorter samples, or a larger machine"
        )


def _within(limit: int, parts: dict[str, int], instead: str = "") -> int:
    """Bytes of the parts and of what the process holds now. Raises SparsekitError where they exceed the limit."""
    parts = {"the program": taken(), **parts}
    need = sum(parts.values())
    if need > limit:
        what = listed(f"{shown_size(size)} for {name}" for name, size in parts.items() if size)
        raise SparsekitError(f"--max-memory must be at least {shown_size(need)}, got {shown_size(limit)}: it takes {what}{instead}")
    return need


def _arguments(lazy: LazyModel, batches: Sequence[Any]) -> int:
    """Bytes at most of the masks and position embeddings that blocks are called with: one for all batches alike, or one for each
    that is padded."""
    config, found, met = lazy.model.config.get_text_config(), 0, set()
    kinds = len(set(getattr(config, "layer_types", None) or [None]))
    head = getattr(config, "head_dim", None) or _width(lazy) // config.num_attention_heads
    for batch in batches:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        padded, rows, length = mask is not None and not mask.bool().all(), _tokens(batch) // max(_length(batch), 1), _length(batch)
        if padded or (rows, length) not in met:
            met.add((rows, length))
            square = rows * length**2 * (1 if config._attn_implementation == "sdpa" else lazy.dtype.itemsize)
            found += kinds * (square + 2 * length * head * max(lazy.dtype.itemsize, 4))
    return found


def _width(lazy: LazyModel) -> int:
    return lazy.model.config.get_text_config().hidden_size


def _length(batch: Tensor | Mapping[str, Any]) -> int:
    """The tokens of a batch's sequences, padding among them."""
    tensors = [t for t in (batch.values() if isinstance(batch, Mapping) else [batch]) if isinstance(t, Tensor) and t.dim() > 1]
    return max((t.shape[1] for t in tensors), default=0)


def _tokens(batch: Tensor | Mapping[str, Any]) -> int:
    """The tokens of a batch, padding among them."""
    tensors = [t for t in (batch.values() if isinstance(batch, Mapping) else [batch]) if isinstance(t, Tensor)]
    return max((t.shape[:2].numel() for t in tensors), default=0)
