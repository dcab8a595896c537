"""Pruning a whole model, block by block, so that later blocks are calibrated on the pruned output of earlier ones."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .data import check_vocabulary
from .errors import SparsekitError
from .evaluate import eval_mode
from .linear import SparseLinear, dense_weight, is_linear
from .patterns import Pattern
from .pruners import Pruner, method_named
from .report import LinearReport, PruneReport

Progress = Callable[[str, int, int], None]  # what is under way, blocks done, blocks in all


@torch.no_grad()
def prune(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]] = (),
    method: str = "sparsegpt",
    pattern: str | Pattern = "2:4",
    *,
    skip: Iterable[str] = (),
    blocks: nn.ModuleList | None = None,
    progress: Progress | None = None,
) -> PruneReport:
    """Prunes every linear of the model's decoder blocks, in place, on the device that the model is on.

    batches: token ids (batch, tokens), or dicts of the model's keyword arguments; not needed by "magnitude". Tokens that an
    attention_mask of such a dict leaves out are not calibrated on.
    method: "magnitude", "wanda" or "sparsegpt". pattern: a Pattern or its text.
    skip: names, or shell patterns of names, of modules whose linears to leave alone; embeddings and the output layer always are.
    blocks: the decoder blocks in order; by default the largest ModuleList of the model.
    Returns a PruneReport. Raises SparsekitError for what cannot be pruned, among it NaN in weights or activations (named), and
    where a linear does not hold the pattern at the end. The model is then left part pruned: load it again."""
    pattern, kind, skip = Pattern.parse(pattern), method_named(method), tuple(skip)
    begin = time.perf_counter()
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise SparsekitError("the model must be dense, got one that is compressed already; prune the model it was made from")
    blocks = find_blocks(model) if blocks is None else blocks
    names = {module: name for name, module in model.named_modules()}
    targets = _targets(blocks, names, skip)
    report = PruneReport(method, str(pattern), skipped=_skipped(model, targets, names, skip))
    for linear in (linear for group in targets for linear in group):
        if not torch.isfinite(linear.weight).all():
            raise SparsekitError(f"weights must be finite, got NaN or Inf in {names[linear]}")
    with eval_mode(model):
        stream = _Stream(model, blocks, batches) if kind.needs_inputs else None
        for i, (block, linears) in enumerate(zip(blocks, targets)):
            if progress:
                progress(names[block], i, len(blocks))
            pruners = {linear: kind(dense_weight(linear).shape[1], pattern, linear.weight.device) for linear in linears}
            if stream:
                stream.observe(block, pruners)
            for linear in linears:
                report.linears.append(_prune_linear(linear, names[linear], pruners.pop(linear)))
            if stream and i + 1 < len(blocks):
                stream.advance(block)
    if progress:
        progress("verifying", len(blocks), len(blocks))
    verify(targets, names, pattern, kind)
    report.tokens = stream.tokens if stream else 0
    report.seconds = time.perf_counter() - begin
    return report


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: the ModuleList whose linears hold most weights. Raises SparsekitError where no list holds a linear."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    weights = [sum(m.weight.numel() for m in blocks.modules() if is_linear(m)) for blocks in lists]
    if not any(weights):
        raise SparsekitError(
            f"the model must have decoder blocks with a linear to prune, got {type(model).__name__} without one; "
            f"name the blocks with blocks="
        )
    return lists[weights.index(max(weights))]


def verify(targets: list[list[nn.Module]], names: dict[nn.Module, str], pattern: Pattern, kind: type[Pruner]) -> None:
    """Raises SparsekitError, naming the first linear whose weight does not hold the pattern."""
    for linear in (linear for group in targets for linear in group):
        if broken := pattern.check(dense_weight(linear), rowwise=kind.rowwise):
            raise SparsekitError(f"every pruned linear must hold {pattern}, got {names[linear]}, where {broken}")


def _asked(name: str, skip: tuple[str, ...]) -> bool:
    """Whether the module, or one that holds it, is named by ``skip``."""
    return any(fnmatchcase(name, text) or fnmatchcase(name, f"{text}.*") for text in skip)


def _targets(blocks: nn.ModuleList, names: dict[nn.Module, str], skip: tuple[str, ...]) -> list[list[nn.Module]]:
    """The linears to prune, block by block."""
    unused = [text for text in skip if not any(fnmatchcase(name, text) for name in names.values())]
    if unused:
        raise SparsekitError(f"every skipped name must be a module of the model, got {unused[0]!r}")
    targets = [[m for m in block.modules() if is_linear(m) and not _asked(names[m], skip)] for block in blocks]
    if not any(targets):
        raise SparsekitError("there must be a linear to prune, and every one is skipped")
    held: set[int] = set()
    for linear in (linear for group in targets for linear in group):
        if id(linear.weight) in held:
            raise SparsekitError(
                f"the weight of {names[linear]} must be used once, and another linear or block uses it too; skip it"
            )
        held.add(id(linear.weight))
    return targets


def _skipped(
    model: nn.Module, targets: list[list[nn.Module]], names: dict[nn.Module, str], skip: tuple[str, ...]
) -> dict[str, str]:
    """Every module with a weight matrix of its own that will not be pruned, with the reason."""
    pruned = {linear for group in targets for linear in group}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    skipped = {}
    for module, name in names.items():
        if module in pruned or all(weight.dim() < 2 for weight in module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Embedding):
            skipped[name] = "embedding"
        elif module is output:
            skipped[name] = "output layer"
        elif not is_linear(module):
            skipped[name] = f"{type(module).__name__}, not a linear"
        else:
            skipped[name] = "asked for" if _asked(name, skip) else "outside the blocks"
    return skipped


def _prune_linear(linear: nn.Module, name: str, pruner: Pruner) -> LinearReport:
    begin = time.perf_counter()
    weight = dense_weight(linear)
    try:
        result = pruner.prune(weight)
    except ValueError as error:
        raise SparsekitError(f"{name} cannot be pruned: {error}") from error
    weight.copy_(result.weight)
    zeros = (result.weight == 0).sum().item() / max(weight.numel(), 1)
    return LinearReport(name, tuple(weight.shape), zeros, result.output_error, result.damping, time.perf_counter() - begin)


class _Captured(Exception):
    """Ends the model's forward once the last block's call has been seen."""


class _Stream:
    """The hidden states of all batches, carried from block to block, with the other arguments each block is called with."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, batches: Iterable[Tensor | Mapping[str, Tensor]]):
        device = next(model.parameters()).device
        self.hidden: list[Tensor] = []
        self.masks: list[Tensor | None] = []  # of each batch: which of its tokens count, (batch * tokens,) bool, or all
        self.calls: list[list[tuple[tuple, dict[str, Any]]]] = []  # [batch][block]: arguments, keyword arguments
        self.tokens = 0
        self._index = {block: i for i, block in enumerate(blocks)}
        for batch in batches:
            args, kwargs = ((), batch) if isinstance(batch, Mapping) else ((batch.to(device),), {})
            kwargs = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in kwargs.items()}
            if (ids := args[0] if args else kwargs.get("input_ids")) is not None:
                check_vocabulary(ids, model)
            hidden, calls = _capture(model, blocks, args, kwargs)
            mask = kwargs.get("attention_mask")
            padded = mask is not None and mask.dim() == 2 and not mask.bool().all()
            self.masks.append(mask.bool().flatten() if padded else None)
            self.hidden.append(hidden)
            self.calls.append(calls)
            self.tokens += int(mask.count_nonzero()) if padded else hidden.shape[:-1].numel()
        if not self.hidden:
            raise SparsekitError("this method needs calibration batches, got none")

    def observe(self, block: nn.Module, pruners: dict[nn.Module, Pruner]) -> None:
        """Runs every batch through the block and shows each pruner what its linear receives.

        Linears that receive the same tensor (q, k and v; gate and up) share one statistic, gathered once."""
        leaders: dict[nn.Module, nn.Module] = {}
        calls: Counter[nn.Module] = Counter()
        # Of the batch under way: input, its version and who got it first. Holding the tensors keeps their identity unique.
        seen: list[tuple[Tensor, int, nn.Module]] = []
        mask: Tensor | None = None

        def look(linear: nn.Module, args: tuple) -> None:
            x = args[0]
            calls[linear] += 1
            leader = next((first for tensor, version, first in seen if tensor is x and version == x._version), linear)
            if leader is linear:
                seen.append((x, x._version, linear))
            if leaders.setdefault(linear, leader) is not leader:
                raise SparsekitError("linears of a block must share their inputs alike in every batch; give batches of one kind")
            if leader is linear:
                # An expert sees some of the tokens, in an order of its own: there the mask says nothing.
                whole = mask is None or mask.numel() != x.shape[:-1].numel()
                pruners[linear].observe(x if whole else x.reshape(-1, x.shape[-1])[mask])

        hooks = [linear.register_forward_pre_hook(look) for linear in pruners]
        try:
            for b in range(len(self.hidden)):
                mask = self.masks[b]
                self._run(block, b)
                seen.clear()
        finally:
            for hook in hooks:
                hook.remove()
        for linear, leader in leaders.items():
            if calls[linear] != calls[leader]:
                raise SparsekitError("linears that share an input must be called alike, and one of a block is called more often")
            pruners[linear].statistics = pruners[leader].statistics

    def advance(self, block: nn.Module) -> None:
        """Replaces the hidden states by the block's output, and forgets the block's arguments."""
        for b in range(len(self.hidden)):
            self.hidden[b] = self._run(block, b)
            self.calls[b][self._index[block]] = ((), {})

    def _run(self, block: nn.Module, b: int) -> Tensor:
        args, kwargs = self.calls[b][self._index[block]]
        out = block(self.hidden[b], *args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]


def _capture(
    model: nn.Module, blocks: nn.ModuleList, args: tuple, kwargs: dict[str, Any]
) -> tuple[Tensor, list[tuple[tuple, dict[str, Any]]]]:
    """The hidden states that enter the first block, and the other arguments of every block, from one call of the model.

    The blocks themselves do not run: each passes its hidden states on, in whatever form the first one returns. So masks,
    position embeddings and the like are the model's own, whichever block they differ in."""
    first_hidden: list[Tensor] = []
    calls: list[tuple[tuple, dict[str, Any]]] = []
    rest: list[Any] = []  # what the first block returns beside the hidden states

    def stub(block: nn.Module, original: Callable):
        def forward(*args, **kwargs):
            if len(calls) == len(blocks) or block is not blocks[len(calls)]:
                raise SparsekitError("the blocks must run once each, in their order in the model")
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if block is blocks[0]:
                first_hidden.append(hidden)
                out = original(hidden, *args[1:], **kwargs)
                rest.extend([out] if isinstance(out, Tensor) else [None, *out[1:]])
            calls.append((args[1:], kwargs))
            if block is blocks[-1]:
                raise _Captured
            return hidden if isinstance(rest[0], Tensor) else (hidden, *rest[1:])

        return forward

    if hasattr(model, "config"):
        kwargs = {"use_cache": False, **kwargs}
    patched = [(block, block.__dict__.get("forward")) for block in blocks]  # one may be patched by somebody else already
    try:
        for block in blocks:
            block.forward = stub(block, block.forward)
        model(*args, **kwargs)
    except _Captured:
        pass
    finally:
        for block, forward in patched:
            del block.forward
            if forward is not None:
                block.forward = forward
    if len(calls) != len(blocks):
        raise SparsekitError(f"each block must run once in a forward pass, got {len(calls)} calls of {len(blocks)} blocks")
    return first_hidden[0], calls
