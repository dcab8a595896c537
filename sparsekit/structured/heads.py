"""Attention heads: how much each matters, and which go. Those that share a key-value head go together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import SparsekitError, listed
from ..linear import dense_weight
from .architecture import BlockShape, architecture_of
from .selection import Remove, select
from .watching import Batches, Progress, gate_gradients, watch

METHODS = ("taylor", "norm")
UNITS = ("group", "head")


def head_importance(
    model: nn.Module, batches: Batches, method: str = "taylor", *, per: str = "group", progress: Progress | None = None
) -> list[Tensor]:
    """How much each head matters on the calibration batches: (units,) fp32 on the CPU for each block, higher is kept.

    method: "taylor", the mean over samples of |d loss / d gate| for a gate on what the head gives to the output projection (Michel
    et al. 2019, arXiv:1905.10650; the loss is the mean negative log-likelihood of a sample's tokens), comparable between blocks;
    or "norm", the root mean square over tokens of what it adds to the hidden states there, to compare heads of a block.
    per: a "group", a key-value head with the query heads that share it (a query head where all of the model's share one), or a
    query "head". A gate on a group is one gate: what its heads' gates would say apart may cancel within a sample.
    A block without attention has none. Batches: token ids (batch, tokens), or dicts of the model's keyword arguments; padding does
    not count. Raises SparsekitError for an architecture that is not known, and for no batches."""
    if method not in METHODS:
        raise SparsekitError(f"the importance of heads is {listed(METHODS, 'or')}, got {method!r}")
    if per not in UNITS:
        raise SparsekitError(f"heads are counted per {listed(UNITS, 'or')}, got {per!r}")
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)
    outputs = [architecture.projections(block).get("o") for block in blocks]
    shapes = [architecture.shape(block) for block in blocks]
    units = head_units(shapes) if per == "group" else [shape.num_attention_heads for shape in shapes]
    counts = {o: count for o, count in zip(outputs, units) if o is not None}
    if method == "taylor":
        found = gate_gradients(model, batches, counts, progress)
    else:
        norms = {o: _HeadNorms(dense_weight(o), count) for o, count in counts.items()}
        watch(model, batches, {o: norm.update for o, norm in norms.items()}, progress)
        found = {o: norm.result() for o, norm in norms.items()}
    return [torch.zeros(0) if o is None else found[o].float().cpu() for o in outputs]


def head_units(shapes: Sequence[BlockShape]) -> list[int | None]:
    """How many units of heads each block has, to take some out: key-value heads, and where no block has two of those, query heads.

    In a model where others have more, a block that is left with one key-value head has one unit."""
    shared = all(shape.num_key_value_heads in (None, 1) for shape in shapes)
    return [shape.num_attention_heads if shared else shape.num_key_value_heads for shape in shapes]


class _HeadNorms:
    """|W_h x_h| of each head over the tokens: from the sum of x_h x_h', (count, width, width), and the weight at the end."""

    def __init__(self, weight: Tensor, count: int):
        self.weight, self.tokens = weight, 0
        width = weight.shape[1] // count
        self.sum = torch.zeros(count, width, width, device=weight.device)

    def update(self, rows: Tensor) -> None:
        heads = rows.float().unflatten(-1, self.sum.shape[:2]).transpose(0, 1)  # (count, tokens, width)
        self.sum.baddbmm_(heads.transpose(1, 2), heads)
        self.tokens += len(rows)

    def result(self) -> Tensor:
        weight = self.weight.float().unflatten(1, self.sum.shape[:2]).transpose(0, 1)  # (count, out, width)
        squares = ((weight @ self.sum) * weight).sum((1, 2))
        return (squares / max(self.tokens, 1)).clamp(min=0).sqrt()


def select_heads(importance: Sequence[Tensor], remove: Remove, *, scope: str = "layer") -> list[list[int]]:
    """The heads to remove from each block, in rising order, by the importance of each (units,): the least important.

    remove: a share (0 < remove < 1, a float), rounded down, or a count. scope: "layer", that of each block, or of blocks in turn
    where counts are given for each; "global", that of all blocks together, wherever they are. Exactly as many go as that is. A
    block that has heads keeps at least one.
    Raises SparsekitError for more than there are, and for a share that is less than one head."""
    return select(importance, remove, scope, "heads")
