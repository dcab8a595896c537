"""What flows from block to block: the hidden states of the calibration batches, and the other arguments of each block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..data import model_call
from ..errors import SparsekitError
from ..pruners import Pruner
from ..timing import Phases
from .blocks import Target
from .observe import Observer, Role
from .store import InMemory, Store


class _Captured(Exception):
    """Ends the model's forward once the last block's call has been seen."""


class Stream:
    """The hidden states of all batches, carried from block to block, with the other arguments each block is called with.

    device: where the batches go, by default where the model's first parameter is. store: where the hidden states wait, an InMemory
    or OnDisk of their own."""

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        batches: Iterable[Tensor | Mapping[str, Tensor]],
        *,
        device: torch.device | None = None,
        store: Store | None = None,
    ):
        device = next(model.parameters()).device if device is None else device
        self.hidden = InMemory() if store is None else store
        self.masks: list[Tensor | None] = []  # of each batch: which of its tokens count, (batch * tokens,) bool, or all
        self.calls: list[list[tuple[tuple, dict[str, Any]]]] = []  # [batch][block]: arguments, keyword arguments
        self.beside: tuple | None = None  # what the blocks return beside the hidden states, None for these alone
        self.tokens = 0
        self._index = {block: i for i, block in enumerate(blocks)}
        held: dict[tuple, list[Tensor]] = {}  # of the blocks' other arguments, the last few of each kind
        for batch in batches:
            args, kwargs, mask = model_call(model, batch, device)
            hidden, calls, self.beside = _capture(model, blocks, args, kwargs)
            self.masks.append(mask)
            self.hidden.append(hidden)
            met: dict[int, Tensor] = {}
            self.calls.append([_shared(call, held, met) for call in calls])
            self.tokens += hidden.shape[:-1].numel() if mask is None else int(mask.count_nonzero())
        if not len(self.hidden):
            raise SparsekitError("this method needs calibration batches, got none")

    def observe(self, block: nn.Module, pruners: dict[Target, Pruner], phases: Phases) -> set[Role]:
        """Runs every batch through the block and shows each pruner what its matrix receives. Returns what ``settle`` asks for.

        The time goes to the phases "forward" and, as parts of that, ("gram", name) of the matrix that gathers and ("forward", name)
        of the matrix of each linear."""
        observer = Observer(block, pruners, phases)
        with phases("forward"):
            for b in range(len(self.hidden)):
                with observer.batch(self.masks[b]):
                    self._run(block, b)
        return observer.finish()

    def advance(self, block: nn.Module, forget: bool = True) -> None:
        """Replaces the hidden states by the block's output, and forgets the block's arguments, unless it is to run again."""
        for b in range(len(self.hidden)):
            self.hidden[b] = self._run(block, b)
            if forget:
                self.calls[b][self._index[block]] = ((), {})

    def again(self, block: nn.Module, b: int, hidden: Tensor) -> Tensor:
        """What the block makes of the hidden states in place of those of batch b, with the other arguments of that batch."""
        args, kwargs = self.calls[b][self._index[block]]
        out = block(hidden, *args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def _run(self, block: nn.Module, b: int) -> Tensor:
        return self.again(block, b, self.hidden[b])


def _shared(value: Any, held: dict[tuple, list[Tensor]], met: dict[int, Tensor]) -> Any:
    """The value with each tensor that equals one held in its place: batches alike have one mask, which can be larger than their
    hidden states. met: what this batch's tensors have become, by id."""
    if type(value) in (tuple, list):
        return type(value)(_shared(one, held, met) for one in value)
    if type(value) is dict:
        return {name: _shared(one, held, met) for name, one in value.items()}
    if not isinstance(value, Tensor):
        return value
    if id(value) not in met:
        known = held.setdefault((value.shape, value.stride(), value.dtype, value.device), [])
        met[id(value)] = next((one for one in known if torch.equal(one, value)), value)
        if met[id(value)] is value:
            known[:] = [*known, value][-8:]  # of a batch: sines, cosines and masks of two kinds of blocks
    return met[id(value)]


def _capture(
    model: nn.Module, blocks: nn.ModuleList, args: tuple, kwargs: dict[str, Any]
) -> tuple[Tensor, list[tuple[tuple, dict[str, Any]]], tuple | None]:
    """The hidden states that enter the first block, the other arguments of every block, and what the first one returns beside its
    hidden states, None where these are all, from one call of the model.

    The blocks themselves do not run: each passes its hidden states on, in whatever form the first one returns. So masks,
    position embeddings and the like are the model's own, whichever block they differ in."""
    first_hidden: list[Tensor] = []
    calls: list[tuple[tuple, dict[str, Any]]] = []
    beside: list[tuple | None] = []

    def stub(block: nn.Module, original: Callable):
        def forward(*args, **kwargs):
            if len(calls) == len(blocks) or block is not blocks[len(calls)]:
                raise SparsekitError("the blocks must run once each, in their order in the model")
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if block is blocks[0]:
                first_hidden.append(hidden)
                out = original(hidden.clone(), *args[1:], **kwargs)  # it may add to them in place
                beside.append(None if isinstance(out, Tensor) else tuple(out[1:]))
            calls.append((args[1:], kwargs))
            if block is blocks[-1]:
                raise _Captured
            return hidden if beside[0] is None else (hidden, *beside[0])

        return forward

    if hasattr(model, "config"):
        kwargs = {"use_cache": False, **kwargs}
    with suppress(_Captured), _replaced(blocks, stub):
        model(*args, **kwargs)
    if len(calls) != len(blocks):
        raise SparsekitError(f"each block must run once in a forward pass, got {len(calls)} calls of {len(blocks)} blocks")
    return first_hidden[0], calls, beside[0]


@contextmanager
def ending_in(blocks: nn.ModuleList, hidden: Tensor, beside: tuple | None) -> Iterator[None]:
    """Inside, a model's last block returns ``hidden``, whatever the model is called with, and no block runs: what the model returns
    is what it makes of these hidden states behind its blocks. beside: of ``Stream``."""

    def stub(block: nn.Module, _: Callable):
        def forward(*args, **kwargs):
            out = hidden if block is blocks[-1] else args[0] if args else kwargs["hidden_states"]
            return out if beside is None else (out, *beside)

        return forward

    with _replaced(blocks, stub):
        yield


@contextmanager
def _replaced(blocks: nn.ModuleList, stub: Callable[[nn.Module, Callable], Callable]) -> Iterator[None]:
    """Inside, what a block does when it is called is what ``stub`` makes of the block and what it did."""
    before = [(block, block.__dict__.get("forward")) for block in blocks]  # one may be replaced by somebody else already
    try:
        for block in blocks:
            block.forward = stub(block, block.forward)
        yield
    finally:
        for block, forward in before:
            del block.forward
            if forward is not None:
                block.forward = forward
