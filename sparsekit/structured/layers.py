"""Whole layers, attentions and MLPs: how much each changes the hidden states, and a model without those that change them least.

Source: ShortGPT (Men et al. 2024, arXiv:2403.03853), for the measure; here it is taken anew after each removal, and of sub-layers
too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SparsekitError, listed
from .architecture import Architecture, architecture_of
from .entries import SUBLAYERS
from .removed import RemovedAttention, take_out
from .surgery import settle_config
from .watching import Batches, Progress, calls, run

KINDS = ("block", *SUBLAYERS)


@dataclass(frozen=True)
class RemovedLayers:
    """What ``prune_layers`` took out. kind: "block", "attention" or "mlp". removed: numbers of blocks, as they were before the
    first removal, in the order of removal. influence: of each of them when its turn came."""

    kind: str
    removed: tuple[int, ...]
    influence: tuple[float, ...]


@torch.no_grad()
def block_influence(
    model: nn.Module, batches: Batches, kind: str = "block", *, progress: Progress | None = None
) -> list[float | None]:
    """How much each block changes the hidden states: 1 - the mean over tokens of the cosine of a token's state before and after it.

    kind: "block", or "attention" or "mlp" for that step alone: from the block's input to what the block makes of it without its
    MLP, and from there to its output. None where the sub-layer is gone already. Every token counts alike, one with a massive
    activation too, but for those that a batch's attention_mask leaves out. 0 where the step changes nothing, up to 2.
    progress is told (batches done, batches in all).
    Raises SparsekitError for no batches, an unknown kind or model, and hidden states that are not finite."""
    _check_kind(kind)
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)
    there = [kind == "block" or getattr(architecture, kind)(block) is not None for block in blocks]
    sums, tokens = [0.0] * len(blocks), 0
    entering: dict[nn.Module, Tensor] = {}
    mask: Tensor | None = None

    def enter(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        entering[block] = (args[0] if args else kwargs["hidden_states"]).clone()  # it may add to them in place

    def leave(i: int, block: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        nonlocal tokens
        before, after = entering.pop(block), _hidden(out)
        if i == 0:
            tokens += before.shape[:-1].numel() if mask is None else int(mask.count_nonzero())
        if kind != "block" and there[i]:
            with _without_mlp(architecture, block):  # called past its hooks
                rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                middle = _hidden(block.forward(before.clone(), *args[1:], **rest))
            before, after = (before, middle) if kind == "attention" else (middle, after)
        if there[i]:
            sums[i] += _change(before, after, mask)

    with ExitStack() as hooks:
        for i, block in enumerate(blocks):
            hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            leaving = block.register_forward_hook(lambda *call, i=i: leave(i, *call), with_kwargs=True)
            hooks.callback(leaving.remove)
        for args, kwargs, mask in calls(model, batches, progress):  # noqa: B007  the hooks read it
            run(model, args, kwargs | {"use_cache": False})  # a step runs twice
    if not tokens:
        raise SparsekitError("the influence of layers is measured on tokens, and the attention_mask of every batch leaves all out")
    if broken := [i for i, total in enumerate(sums) if not math.isfinite(total)]:
        raise SparsekitError(f"hidden states must be finite, got NaN or Inf around block {broken[0]}")
    return [total / tokens if measured else None for total, measured in zip(sums, there)]


def select_layers(influence: Sequence[float | None], remove: int) -> list[int]:
    """The numbers of the ``remove`` layers of least influence, in rising order; of equal ones the first go. None is not there.

    Raises SparsekitError unless it is a number of layers that leaves one, and for an influence that is no number."""
    there = [i for i, value in enumerate(influence) if value is not None]
    if broken := [i for i in there if math.isnan(influence[i])]:
        raise SparsekitError(f"an influence must be a number, got NaN for layer {broken[0]}")
    _check_count(remove, len(there), "layers")
    return sorted(sorted(there, key=lambda i: influence[i])[:remove])


def remove_layers(model: nn.Module, layers: Iterable[int]) -> None:
    """Takes these blocks out of the model, in place: the others' places in the cache are renumbered, and the config's number of
    layers and its lists of a value a layer are cut.

    Raises SparsekitError, and changes nothing, for a number that is no block's, for none and for all."""
    architecture = architecture_of(model)
    _cut(architecture, model, _checked(layers, len(architecture.blocks(model)), "blocks"))
    settle_config(architecture, model)


def remove_sublayers(model: nn.Module, kind: str, layers: Iterable[int]) -> None:
    """Takes the "attention" or the "mlp" of these blocks out of the model, in place.

    Raises SparsekitError, and changes nothing, for a number that is no block's or whose sub-layer is gone already."""
    _check_kind(kind, SUBLAYERS)
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)
    there = [i for i, block in enumerate(blocks) if getattr(architecture, kind)(block) is not None]
    chosen = _checked(layers, len(blocks), "blocks")
    if gone := [i for i in chosen if i not in there]:
        raise SparsekitError(f"the {kind} to remove must be there, and that of block {gone[0]} is gone already")
    _check_count(len(chosen), len(there), f"{kind} sub-layers")
    for i in chosen:
        take_out(architecture, blocks[i], kind)
    settle_config(architecture, model)


def prune_layers(
    model: nn.Module, batches: Batches, remove: int, kind: str = "block", *, progress: Progress | None = None
) -> RemovedLayers:
    """Takes the ``remove`` blocks, attentions or MLPs of least influence out of the model, in place, one at a time: after each, the
    influence of the others is measured anew.

    progress is told (batches done, batches in all), over all removals.
    Raises SparsekitError where that is more than there are, or all of them; then nothing is changed."""
    _check_kind(kind)
    architecture, batches = architecture_of(model), list(batches)
    blocks = architecture.blocks(model)
    there = len(blocks) if kind == "block" else sum(getattr(architecture, kind)(block) is not None for block in blocks)
    _check_count(remove, there, "layers" if kind == "block" else f"{kind} sub-layers")
    if kind == "block":
        _check_cut(model)
    numbers, removed, influence = list(range(len(blocks))), [], []
    for step in range(remove):

        def told(done: int, _: int, step: int = step) -> None:
            if progress:
                progress(step * len(batches) + done, remove * len(batches))

        measured = block_influence(model, batches, kind, progress=told)
        (i,) = select_layers(measured, 1)
        removed.append(numbers[i])
        influence.append(measured[i])
        if kind == "block":
            _cut(architecture, model, [i])
            del numbers[i]
        else:
            take_out(architecture, blocks[i], kind)
    settle_config(architecture, model)
    return RemovedLayers(kind, tuple(removed), tuple(influence))


@contextmanager
def _without_mlp(architecture: Architecture, block: nn.Module) -> Iterator[None]:
    paths = [architecture.mlp_at] if architecture.mlp_at else [getattr(architecture, p) for p in architecture.neurons(block)]
    held = {path: block.get_submodule(path) for path in paths}
    take_out(architecture, block, "mlp")
    try:
        yield
    finally:
        for path, module in held.items():
            block.set_submodule(path, module)


def _hidden(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _change(before: Tensor, after: Tensor, mask: Tensor | None) -> float:
    """The sum over tokens of 1 - the cosine of their states (batch, tokens, width)."""
    before, after = (t.flatten(0, -2).double() for t in (before, after))
    same, some = (before == after).all(-1), before.any(-1) & after.any(-1)
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1, eps=0.0)
    cosine = cosine.where(~same, 1.0).where(same | some, 0.0)  # the same direction exactly; none, from or to nothing
    return float((1 - (cosine if mask is None else cosine[mask])).sum())


def _cut(architecture: Architecture, model: nn.Module, layers: Sequence[int]) -> None:
    """Takes the blocks out, and from the config what it says of them one by one."""
    _check_cut(model)
    config, blocks = model.config, architecture.blocks(model)
    left = [i for i in range(len(blocks)) if i not in layers]
    step = getattr(config, "decoder_sparse_step", 1)  # Qwen's: of each ``step`` blocks the last holds experts
    for name in architecture.lists:
        if (values := getattr(config, name, None)) is not None:
            setattr(config, name, [values[i] for i in left])
    for name in architecture.block_lists:
        listed_ = {*(getattr(config, name, None) or ()), *(i for i in range(len(blocks)) if (i + 1) % step)}
        setattr(config, name, [new for new, old in enumerate(left) if old in listed_])
    if step != 1:
        config.decoder_sparse_step = 1
    for i in reversed(layers):
        del blocks[i]
    setattr(config, architecture.layers_field, len(blocks))
    for i, block in enumerate(blocks):
        for module in block.modules():
            for name in {architecture.index, "layer_idx"} if isinstance(module, RemovedAttention) else {architecture.index}:
                if isinstance(module.__dict__.get(name), int):
                    setattr(module, name, i)


def _check_cut(model: nn.Module) -> None:
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise SparsekitError(
            "blocks can be taken out of a model whose attention does not depend on a block's number, and "
            "scale_attn_by_inverse_layer_idx makes it so; remove heads or neurons instead"
        )


def _check_kind(kind: str, kinds: Sequence[str] = KINDS) -> None:
    if kind not in kinds:
        raise SparsekitError(f"what to remove must be {listed(kinds, 'or')}, got {kind!r}")


def _check_count(remove: int, there: int, what: str) -> None:
    if isinstance(remove, bool) or not isinstance(remove, int) or not 1 <= remove < there:
        raise SparsekitError(f"the number of {what} to remove must be 1 to {there - 1}, for the model has {there}, got {remove!r}")


def _checked(layers: Iterable[int], there: int, what: str) -> list[int]:
    chosen = sorted(set(layers))
    if chosen and (chosen[0] < 0 or chosen[-1] >= there):
        raise SparsekitError(f"the {what} to remove must be numbers from 0 to {there - 1}, got {chosen}")
    _check_count(len(chosen), there + (what != "blocks"), what)
    return chosen
