"""What the matrices of a block are multiplied with, an expert's by the tokens that are routed to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..criteria import CRITERIA, total
from ..errors import SparsekitError
from ..pruners import Pruner, scored
from ..timing import Phases
from .blocks import Target, holders_of_experts, is_transposed

Role = tuple[str, str]  # a layer of experts, and the name that a matrix of each of them has there

# Where what is known of a matrix's inputs comes from.
OWN, LAYER, MAGNITUDE = "own", "layer", "magnitude"

# Tokens a column below which an expert's statistics are not its own. SparseGPT on random weights (256 x 256, 2:4, three spectra of
# inputs, held-out tokens): from one token a column never worse than magnitude; at a quarter 15 % worse to 60 times better.
FEWEST = 0.25


class Observer:
    """Shows each pruner the inputs of its matrix while a block runs.

    Matrices that receive the same tensor (q, k and v; gate and up, an expert's too) share one statistic, gathered once."""

    def __init__(self, block: nn.Module, pruners: dict[Target, Pruner], phases: Phases | None = None):
        self.pruners, self._phases = pruners, phases or Phases(torch.device("cpu"))
        self._holders = holders_of_experts(block)
        self.leaders: dict[Target, Target] = {}  # who gathers for whom
        self.entering: set[Role] = set()  # the roles of the matrices that the tokens come to first
        self._calls: Counter[Target] = Counter()
        # Of the batch under way, by input: the tensor, who got it first, and all who did. Holding it keeps its memory unique.
        self._seen: dict[tuple, tuple[Tensor, Target, set[Target]]] = {}
        self._entries: dict[tuple[str, int], tuple] = {}  # the first input of an expert
        self._mask: Tensor | None = None
        self._counted: dict[tuple[str, int], Tensor] = {}  # of an expert: which of its rows count

    @contextmanager
    def batch(self, mask: Tensor | None) -> Iterator[None]:
        """While a batch runs. mask: which of its tokens count, (batch * tokens,) bool, or all."""
        self._mask = mask
        linears = {target.module: target for target in self.pruners if target.index is None}
        fused = [target for target in self.pruners if target.index is not None]
        with ExitStack() as stack:
            for linear, target in linears.items():
                hook = linear.register_forward_pre_hook(lambda _, args, target=target: self._look(target, args[0], args[0]))
                stack.callback(hook.remove)
            for holder in self._holders if mask is not None else ():
                stack.callback(holder.register_forward_pre_hook(self._blank).remove)
            stack.enter_context(clocked(linears.values(), self._phases))  # after what looks at its input, and gathers
            if fused:
                stack.enter_context(Products(fused, self._look))
            yield
        for of_the_batch in (self._seen, self._entries, self._counted):
            of_the_batch.clear()

    def _blank(self, _: nn.Module, args: tuple) -> tuple:
        """Zeros in place of the tokens that do not count, where they come to a layer of experts: there they can be told by it."""
        if not args or args[0].shape[:-1].numel() != self._mask.numel():
            return args
        return args[0].masked_fill(~self._mask.view(*args[0].shape[:-1], 1), 0), *args[1:]

    def _look(self, target: Target, source: Tensor, rows: Tensor) -> None:
        """Takes the rows (..., k) of the tensor ``source`` that meet the matrix."""
        if not rows.numel():
            return
        key = (source.data_ptr(), source.shape, source.stride(), source.dtype, source._version, target.index)
        _, leader, met = self._seen.setdefault(key, (source, target, set()))
        if target.index is not None and target in met:  # its rows are multiplied in parts, such as gate and up
            return
        met.add(target)
        self._calls[target] += 1
        if target.expert and self._entries.setdefault(target.expert, key) == key:
            self.entering.add((target.expert[0], target.role))
        if self.leaders.setdefault(target, leader) is not leader:
            raise SparsekitError("linears of a block must share their inputs alike in every batch; give batches of one kind")
        if leader is target:
            with self._phases(("gram", target.name)):
                self.pruners[target].observe(rows if self._mask is None else self._count(target, rows.reshape(-1, rows.shape[-1])))

    def _count(self, target: Target, rows: Tensor) -> Tensor:
        """The rows (tokens, k) that count. An expert sees some of the tokens, in an order of its own that it keeps on their way."""
        if target.expert is None:
            return rows[self._mask] if len(rows) == len(self._mask) else rows
        counted = self._counted.setdefault(target.expert, rows.any(-1))
        return rows[counted] if len(rows) == len(counted) else rows

    def finish(self) -> set[Role]:
        """Hands the shared statistics out. Returns the roles whose inputs are the tokens that come to the layer of experts.

        An expert that no token reached shares as the others of its layer do."""
        for target, leader in self.leaders.items():
            if self._calls[target] != self._calls[leader]:
                raise SparsekitError("linears that share an input must be called alike, and one of a block is called more often")
        led = {(t.expert[0], t.role): leader.role for t, leader in self.leaders.items() if t.expert and t.expert == leader.expert}
        named = {(target.expert, target.role): target for target in self.pruners if target.expert}
        for target in self.pruners:
            if target.expert and target not in self.leaders:
                role = led.get((target.expert[0], target.role))
                if role is None and target.index is not None:
                    raise SparsekitError(
                        f"{target.name} must be multiplied in a way that can be watched, as (out, in) unless its module says "
                        f'is_transposed, and is not; skip it, or load the model with experts_implementation="eager"'
                    )
                self.leaders[target] = named.get((target.expert, role), target)
        for target, leader in self.leaders.items():
            self.pruners[target].statistics = self.pruners[leader].statistics
        return self.entering


@contextmanager
def clocked(targets: Iterable[Target], phases: Phases) -> Iterator[None]:
    """Inside, the time that a linear takes to run goes to the phase ("forward", name) of its matrix. That of an expert in one
    parameter with the others is not told apart from theirs."""
    running: dict[nn.Module, AbstractContextManager] = {}

    def begin(linear: nn.Module, name: str) -> None:
        running[linear] = phases(("forward", name))
        running[linear].__enter__()

    def end(linear: nn.Module, *_) -> None:
        running.pop(linear).__exit__(None, None, None)

    with ExitStack() as stack:
        for target in targets:
            if target.index is None:
                hook = target.module.register_forward_pre_hook(lambda linear, _, name=target.name: begin(linear, name))
                stack.callback(hook.remove)
                stack.callback(target.module.register_forward_hook(end).remove)
        yield


class Products(TorchDispatchMode):
    """Sees every product with a matrix of a fused parameter, whichever function of torch asks for it, and changes none.

    look(target, source, rows): a matrix, the tensor that is multiplied, and the rows of it that meet the matrix."""

    def __init__(self, targets: list[Target], look: Callable[[Target, Tensor, Tensor], None]):
        super().__init__()
        self._look = look
        # Of each parameter: itself, the dimension of its inputs, the matrices to look at.
        self._held: dict[tuple[nn.Module, str], tuple[Tensor, int, dict[int, Target]]] = {}
        for target in targets:
            dim = 1 if is_transposed(target.module, target.parameter) else 2
            parameter = getattr(target.module, target.parameter).detach()
            self._held.setdefault((target.module, target.parameter), (parameter, dim, {}))[2][target.index] = target
        self._picked: list[tuple[Tensor, tuple[nn.Module, str], Tensor]] = []  # copies of matrices: what, of which, the experts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::mm", "aten::bmm"):
            self._product(*args[:2])
        elif name in ("aten::addmm", "aten::baddbmm"):
            self._product(*args[1:3])
        elif name in ("aten::_grouped_mm", "transformers::grouped_mm_fallback"):
            ends = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
            self._grouped(args[0], args[1], ends)
        elif name == "aten::index" and len(args[1]) == 1 and (key := self._find(args[0])) and args[1][0].dim() == 1:
            self._picked.append((out, key, args[1][0]))
        return out

    def _find(self, tensor: Tensor) -> tuple[nn.Module, str] | None:
        """The parameter in whose memory the tensor lies."""
        for key, (parameter, _, _) in self._held.items():
            if 0 <= tensor.data_ptr() - parameter.data_ptr() < parameter.nbytes:
                return key
        return None

    def _product(self, a: Tensor, b: Tensor) -> None:
        """a @ b, of two matrices or of two batches of them; the rows that meet a weight on the left are columns of b."""
        self._weighed(b, -2, a, a)
        self._weighed(a, -1, b.transpose(-1, -2), b)

    def _weighed(self, weight: Tensor, inputs: int, rows: Tensor, source: Tensor) -> None:
        """rows (..., t, k) meet the weight, if it is one, with its dimension ``inputs``."""
        for copy, key, experts in self._picked:
            if 0 <= weight.data_ptr() - copy.data_ptr() < copy.nbytes and self._agrees(weight, inputs, copy, key):
                for index in experts.unique().tolist():
                    self._show(key, index, source, rows[experts == index].flatten(0, 1))
                return
        if (key := self._find(weight)) is None:
            return
        parameter, _, targets = self._held[key]
        if not self._agrees(weight, inputs, parameter, key):
            return
        first = (weight.data_ptr() - parameter.data_ptr()) // (parameter.stride(0) * parameter.element_size())
        if weight.dim() == 2 or weight.shape[0] == 1:
            self._show(key, first, source, rows.flatten(0, -2))
        elif weight.shape[0] == len(parameter) and weight.stride(0) == parameter.stride(0):
            for index in targets:  # of every token there is a row, and one of zeros where it is routed to others
                self._show(key, index, source, rows[index][rows[index].any(-1)])

    def _agrees(self, weight: Tensor, inputs: int, held: Tensor, key: tuple[nn.Module, str]) -> bool:
        """Whether the product runs over the inputs of the matrices, as it must."""
        dim = self._held[key][1]
        return weight.shape[inputs] == held.shape[dim] and weight.stride(inputs) == held.stride(dim)

    def _grouped(self, rows: Tensor, weight: Tensor, ends: Tensor | None) -> None:
        """Neighbouring rows (t, k) for each matrix of weight (experts, k, n), up to ``ends`` (experts,)."""
        key = self._find(weight)
        if key is None or ends is None or rows.dim() != 2 or not self._agrees(weight, -2, self._held[key][0], key):
            return
        begin = 0
        for index, end in enumerate(ends.tolist()):
            self._show(key, index, rows, rows[begin:end])
            begin = end

    def _show(self, key: tuple[nn.Module, str], index: int, source: Tensor, rows: Tensor) -> None:
        if (target := self._held[key][2].get(index)) is not None:
            self._look(target, source, rows)


def settle(pruners: dict[Target, Pruner], entering: set[Role]) -> dict[Target, tuple[str, int]]:
    """Where the statistics of each matrix come from, and the tokens that it saw.

    Those of an expert that saw fewer than FEWEST tokens a column become the sum over all experts of its layer where the tokens that
    come to the layer are what the matrix receives. Elsewhere, as for the way out of an expert, there is nothing to share: such a
    matrix is to be pruned by magnitude."""
    own = {target: pruner.statistics for target, pruner in pruners.items()}
    origins, layers = {}, {}
    for target, pruner in pruners.items():
        origins[target] = OWN, own[target].tokens
        if target.expert is None or own[target].tokens >= FEWEST * target.weight.shape[1]:
            continue
        origins[target] = MAGNITUDE, own[target].tokens
        if (target.expert[0], target.role) in entering:
            parts = [own[t] for t in own if t.expert and (t.expert[0], t.role) == (target.expert[0], target.role)]
            key = tuple(map(id, parts))  # gate and up share it as they share their own
            pruner.statistics = layers[key] = layers.get(key) or total(parts)
            origins[target] = LAYER, own[target].tokens
    return origins


def by_magnitude(pruner: Pruner) -> Pruner:
    """A pruner by magnitude that counts as the given one does."""
    return scored(CRITERIA["magnitude"], pruner.rowwise)(0, pruner.pattern)
