"""Pruning a whole model, block by block, so that later blocks are calibrated on the pruned output of earlier ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SparsekitError
from .linear import SparseLinear, dense_weight, is_linear
from .patterns import Pattern
from .prune import Pruner, method_named
from .report import LinearReport, PruneReport

Progress = Callable[[str, int, int], None]  # what is under way, blocks done, blocks in all


@torch.no_grad()
def prune(
    model: nn.Module,
    batches: Iterable[Tensor | dict[str, Tensor]] = (),
    method: str = "sparsegpt",
    pattern: str | Pattern = "2:4",
    *,
    skip: Iterable[str] = (),
    blocks: nn.ModuleList | None = None,
    progress: Progress | None = None,
) -> PruneReport:
    """Prunes every linear of the model's decoder blocks, in place, on the device that the model is on.

    batches: token ids (batch, tokens), or dicts of the model's keyword arguments; not needed by "magnitude".
    method: "magnitude", "wanda" or "sparsegpt". pattern: a Pattern or its text.
    skip: names, or shell patterns of names, of linears to leave alone; embeddings and the output layer always are.
    blocks: the decoder blocks in order; by default the largest ModuleList of the model.
    Returns a PruneReport. Raises SparsekitError for what cannot be pruned, among it NaN in weights or activations (named), and
    where a linear does not hold the pattern at the end. The model is then left part pruned: load it again."""
    pattern, kind = Pattern.parse(pattern), method_named(method)
    begin = time.perf_counter()
    blocks = find_blocks(model) if blocks is None else blocks
    names = {module: name for name, module in model.named_modules()}
    targets = _targets(model, blocks, names, tuple(skip))
    report = PruneReport(method, str(pattern), skipped=_skipped(model, targets, names))
    for linear in (linear for group in targets for linear in group):
        if not torch.isfinite(linear.weight).all():
            raise SparsekitError(f"weights must be finite, got NaN or Inf in {names[linear]}")
    training = model.training
    model.eval()
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
    model.train(training)
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


def _targets(model: nn.Module, blocks: nn.ModuleList, names: dict[nn.Module, str], skip: tuple[str, ...]) -> list[list[nn.Module]]:
    """The linears to prune, block by block."""
    unused = [text for text in skip if not any(fnmatch(name, text) for name in names.values())]
    if unused:
        raise SparsekitError(f"every skipped name must be a module of the model, got {unused[0]!r}")
    if any(isinstance(module, SparseLinear) for module in blocks.modules()):
        raise SparsekitError("the model must be dense, got one that is compressed already; prune the model it was made from")
    targets = [
        [m for m in block.modules() if is_linear(m) and not any(fnmatch(names[m], text) for text in skip)] for block in blocks
    ]
    if not any(targets):
        raise SparsekitError("there must be a linear to prune, and every one is skipped")
    return targets


def _skipped(model: nn.Module, targets: list[list[nn.Module]], names: dict[nn.Module, str]) -> dict[str, str]:
    """Every module with a weight matrix that will not be pruned, with the reason."""
    pruned = {linear for group in targets for linear in group}
    skipped = {}
    for module, name in names.items():
        weight = getattr(module, "weight", None)
        if module in pruned or not isinstance(weight, Tensor) or weight.dim() < 2:
            continue
        if isinstance(module, nn.Embedding):
            skipped[name] = "embedding"
        elif module is getattr(model, "get_output_embeddings", lambda: None)():
            skipped[name] = "output layer"
        else:
            skipped[name] = "asked for or outside the blocks" if is_linear(module) else f"{type(module).__name__}, not a linear"
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

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, batches: Iterable[Tensor | dict[str, Tensor]]):
        device = next(model.parameters()).device
        self.hidden: list[Tensor] = []
        self.calls: list[list[tuple[tuple, dict[str, Any]]]] = []  # [batch][block]: arguments, keyword arguments
        self.tokens = 0
        self._index = {block: i for i, block in enumerate(blocks)}
        for batch in batches:
            inputs = batch if isinstance(batch, dict) else {"input_ids": batch}
            inputs = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in inputs.items()}
            hidden, calls = _capture(model, blocks, inputs)
            self.hidden.append(hidden)
            self.calls.append(calls)
            self.tokens += hidden.shape[:-1].numel()
        if not self.hidden:
            raise SparsekitError("this method needs calibration batches, got none")

    def observe(self, block: nn.Module, pruners: dict[nn.Module, Pruner]) -> None:
        """Runs every batch through the block and shows each pruner what its linear receives.

        Linears that receive the same tensor (q, k and v; gate and up) share one statistic, gathered once."""
        leaders: dict[nn.Module, nn.Module] = {}
        seen: list[tuple[Tensor, nn.Module]] = []  # of the batch under way; holding the tensors keeps their identity unique

        def look(linear: nn.Module, args: tuple) -> None:
            x = args[0]
            first = next((other for tensor, other in seen if tensor is x and tensor._version == x._version), None)
            if first is None:
                seen.append((x, linear))
                leader = linear
            else:
                leader = leaders[first]
            if leaders.setdefault(linear, leader) is not leader:
                raise SparsekitError("linears of a block must share their inputs alike in every batch; give batches of one kind")
            if leader is linear:
                pruners[linear].observe(x)

        hooks = [linear.register_forward_pre_hook(look) for linear in pruners]
        try:
            for b in range(len(self.hidden)):
                self._run(block, b)
                seen.clear()
        finally:
            for hook in hooks:
                hook.remove()
        for linear, leader in leaders.items():
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


def _capture(model: nn.Module, blocks: nn.ModuleList, inputs: dict[str, Any]) -> tuple[Tensor, list[tuple[tuple, dict[str, Any]]]]:
    """The hidden states that enter the first block, and the other arguments of every block, from one call of the model.

    The blocks themselves do not run: each passes its hidden states on, in whatever form the first one returns. So masks,
    position embeddings and the like are the model's own, whichever block they differ in."""
    first_hidden: list[Tensor] = []
    calls: list[tuple[tuple, dict[str, Any]]] = []
    rest: list[Any] = []  # what the first block returns beside the hidden states

    def stub(block: nn.Module, original: Callable):
        def forward(*args, **kwargs):
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

    try:
        for block in blocks:
            block.forward = stub(block, block.forward)
        model(**inputs, **({} if "use_cache" in inputs or not hasattr(model, "config") else {"use_cache": False}))
    except _Captured:
        pass
    finally:
        for block in blocks:
            del block.forward
    if len(calls) != len(blocks):
        raise SparsekitError(f"each block must run once in a forward pass, got {len(calls)} calls of {len(blocks)} blocks")
    return first_hidden[0], calls
