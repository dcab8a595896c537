"""Pruning a whole model, block by block, so that later blocks are calibrated on the pruned output of earlier ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import SparsekitError
from ..evaluate import eval_mode
from ..linear import SparseLinear, dense_weight
from ..patterns import Pattern
from ..pruners import Pruner, method_named
from ..report import LinearReport, PruneReport
from .blocks import find_blocks, find_targets, list_skipped, verify
from .stream import Stream

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
    targets = find_targets(blocks, names, skip)
    report = PruneReport(method, str(pattern), skipped=list_skipped(model, targets, names, skip))
    for linear in (linear for group in targets for linear in group):
        if not torch.isfinite(linear.weight).all():
            raise SparsekitError(f"weights must be finite, got NaN or Inf in {names[linear]}")
    with eval_mode(model):
        stream = Stream(model, blocks, batches) if kind.needs_inputs else None
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


__all__ = ["Progress", "find_blocks", "prune"]
