"""Where the weights of a model's blocks come from and where they go: a model in memory, or whatever else brings them in turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import SparsekitError
from ..linear import SparseLinear
from ..report import BlockReport, LinearReport
from .blocks import Target, find_blocks
from .store import InMemory, Store

Progress = Callable[[str, int, int], None]  # what is under way, blocks done, blocks in all


class Source(Protocol):
    """Where the weights of a model's blocks come from and where they go. Outside ``enter(i)`` to ``leave(i)`` a block's parameters
    may be on the meta device."""

    model: nn.Module
    blocks: nn.ModuleList
    device: torch.device
    store: Store | None  # where hidden states wait; None is in memory

    def capturing(self) -> AbstractContextManager:
        """Inside, the model can run up to the end of its first block."""

    def surrounding(self) -> AbstractContextManager:
        """Inside, what stands outside the blocks is there."""

    def whole(self) -> AbstractContextManager:
        """Inside, all of the model's weights are there, as they were before any pruning."""

    def dense(self) -> Source:
        """The same model as it is before it is pruned, to look at."""

    def keep(self) -> Store:
        """A new place for what has to be kept of all weights until the end."""

    def enter(self, i: int) -> tuple[BlockReport, list[LinearReport]] | None:
        """Brings the weights of block i. Returns what was reported of it where it is pruned already, by an earlier run."""

    def rounded(self, target: Target, weight: Tensor) -> Tensor:
        """The pruned weight of the target as it will be read back, in the dtype it has: later blocks are calibrated on that."""

    def leave(self, i: int, told: BlockReport, rows: list[LinearReport]) -> None:
        """Ends the work on block i, of which ``told`` reports, and of its matrices ``rows``."""


class Resident:
    """A model that is in memory as a whole, and is changed there. stored: dtype that its weights are to be rounded to."""

    store = None

    def __init__(self, model: nn.Module, blocks: nn.ModuleList | None = None, stored: torch.dtype | None = None):
        if any(isinstance(module, SparseLinear) for module in model.modules()):
            raise SparsekitError("the model must be dense, got one that is compressed already; prune the model it was made from")
        self.model, self.blocks, self.stored = model, find_blocks(model) if blocks is None else blocks, stored
        self.device = next(model.parameters()).device

    def capturing(self) -> AbstractContextManager:
        return nullcontext()

    def surrounding(self) -> AbstractContextManager:
        return nullcontext()

    def whole(self) -> AbstractContextManager:
        return nullcontext()

    def dense(self) -> Source:
        return self

    def keep(self) -> Store:
        return InMemory()

    def enter(self, i: int) -> None:
        return None

    def rounded(self, target: Target, weight: Tensor) -> Tensor:
        return weight if self.stored is None else weight.to(self.stored).to(weight.dtype)

    def leave(self, i: int, told: BlockReport, rows: list[LinearReport]) -> None:
        pass
