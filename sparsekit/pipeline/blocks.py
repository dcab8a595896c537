"""Which weight matrices of a model are pruned, which are not and why, and whether the pruned ones hold their pattern."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..errors import SparsekitError
from ..linear import is_conv1d, is_linear
from ..patterns import Pattern, Share
from ..plan import Asked, Masks, Plan, pattern_of


@dataclass(frozen=True)
class Target:
    """One weight matrix to prune: that of a linear, or of one expert in a parameter that holds those of all its experts.

    expert: which expert of which layer it belongs to, as (name of what holds the experts, number); None outside experts.
    role: its name within the expert, the same for all experts of the layer."""

    name: str
    module: nn.Module
    parameter: str = "weight"
    index: int | None = None  # of the matrix in a parameter (experts, ..., ...)
    expert: tuple[str, int] | None = None
    role: str = ""

    @property
    def tensor(self) -> str:
        """The name of the parameter that holds it, in the model's state_dict."""
        return f"{self.name}.{self.parameter}" if self.index is None else self.name.partition("[")[0]

    @property
    def weight(self) -> Tensor:
        """The matrix (out_features, in_features), a view: writing to it changes the model."""
        return self.of(getattr(self.module, self.parameter).detach())

    def of(self, held: Tensor) -> Tensor:
        """The matrix's part (out_features, in_features) of a tensor in the shape of its parameter: of a gradient, for one."""
        if self.index is None:
            return held.T if is_conv1d(self.module) else held
        return held[self.index].T if is_transposed(self.module, self.parameter) else held[self.index]


def fused_parameters(module: nn.Module) -> list[str]:
    """The parameters that hold a matrix for each of the module's ``num_experts``, as transformers 5 has them (experts, ., .)."""
    held = getattr(module, "num_experts", None)
    return [name for name, p in module.named_parameters(recurse=False) if p.dim() == 3 and p.shape[0] == held and held > 1]


def is_transposed(module: nn.Module, parameter: str) -> bool:
    """Whether the matrices of a fused parameter are (in_features, out_features).

    Where the module does not say, the way into the experts and the way out of them tell: one's inputs are the other's outputs."""
    if hasattr(module, "is_transposed"):
        return module.is_transposed
    shapes = [getattr(module, name).shape for name in fused_parameters(module)]
    return len(shapes) > 1 and shapes[0][2] != shapes[-1][1] and shapes[0][1] == shapes[-1][2]


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: the ModuleList whose linears hold most weights. Raises SparsekitError where no list holds a linear."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    weights = [sum(sum(p.numel() for p in _matrices(m).values()) for m in blocks.modules()) for blocks in lists]
    if not any(weights):
        raise SparsekitError(
            f"the model must have decoder blocks with a linear to prune, got {type(model).__name__} without one; "
            f"name the blocks with blocks="
        )
    return lists[weights.index(max(weights))]


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of the module's own that can be pruned."""
    return {name: getattr(module, name) for name in (["weight"] if is_linear(module) else fused_parameters(module))}


def check_finite(targets: Iterable[Target]) -> None:
    """Raises SparsekitError, naming the first matrix that holds NaN or Inf."""
    for target in targets:
        if not torch.isfinite(target.weight).all():
            raise SparsekitError(f"weights must be finite, got NaN or Inf in {target.name}")


def verify(patterns: Mapping[Target, Pattern], rowwise: bool) -> None:
    """Raises SparsekitError, naming the first matrix that does not hold its pattern."""
    for target, pattern in patterns.items():
        if broken := pattern.check(target.weight, rowwise=rowwise):
            raise SparsekitError(f"every pruned linear must hold {pattern}, got {target.name}, where {broken}")


def check_together(pattern: Share, targets: Sequence[Target], group: str, gone: int | None = None) -> None:
    """Raises SparsekitError where fewer of the units of all the targets, a ``group``, are gone than the pattern asks for.

    gone: how many are, where that is counted already."""
    gone = sum(pattern.gone(target.weight) for target in targets) if gone is None else gone
    wanted = pattern.removed(pattern.count(target.weight.shape for target in targets))
    if gone < wanted:
        where = f"the {len(targets)} linears from {targets[0].name} on"
        raise SparsekitError(f"each {group} must hold {pattern}, {wanted} gone, got {gone} in {where}")


def _asked(name: str, skip: tuple[str, ...]) -> bool:
    """Whether the module or matrix, or one that holds it, is named by ``skip``."""
    return any(name == text or fnmatchcase(name, text) or fnmatchcase(name, f"{text}.*") for text in skip)


def find_targets(
    blocks: nn.ModuleList, names: dict[nn.Module, str], skip: tuple[str, ...], asked: Asked | None = None
) -> list[list[Target]]:
    """The matrices to prune, block by block, in the order of the model's modules.

    asked: what they are pruned to; a plan must name every matrix that could be, skipped ones too, and no other. Without a pattern
    of its own there a matrix is left as it is."""
    known = [*names.values(), *(name for block in blocks for t in _all_of(block, names) for name in (t.name, _of_all(t)))]
    unused = [text for text in skip if text not in known and not any(fnmatchcase(name, text) for name in known)]
    if unused:
        raise SparsekitError(f"every skipped name must be a module of the model, got {unused[0]!r}")
    routers = {module for block in blocks for module in _routers(block)}
    every = [[target for target in _all_of(block, names) if target.module not in routers] for block in blocks]
    if isinstance(asked, Plan | Masks):
        asked.check(target for group in every for target in group)
    left = _left_dense(asked, (target for group in every for target in group))
    targets = [
        [t for t in group if t.name not in left and not _asked(t.name, skip) and not _asked(_of_all(t), skip)] for group in every
    ]
    if not any(targets):
        raise SparsekitError("there must be a linear to prune, and every one is skipped")
    held: set[tuple[int, int | None]] = set()
    for target in (target for group in targets for target in group):
        if not isinstance(getattr(target.module, target.parameter), nn.Parameter):
            raise SparsekitError(
                f"the weight of {target.name} must be a parameter, and is made anew at each pass; take the masks of torch's own "
                f"pruning off with sparsekit.integrations.torch_prune.take_masks"
            )
        place = (id(getattr(target.module, target.parameter)), target.index)
        if place in held:
            raise SparsekitError(f"the weight of {target.name} must be used once, and another linear or block uses it too; skip it")
        held.add(place)
    return targets


def _left_dense(asked: Asked | None, targets: Iterable[Target]) -> set[str]:
    """The names of the matrices that a plan, or masks, have no pattern for."""
    return set() if asked is None else {target.name for target in targets if pattern_of(asked, target.name) is None}


def _all_of(block: nn.Module, names: dict[nn.Module, str]) -> Iterator[Target]:
    """Every matrix of the block that can be pruned, its router's included."""
    experts = {}  # of each module inside an expert: who it belongs to, and its name there
    for _, held, _ in _layers_of_experts(block):
        if isinstance(held, nn.ModuleList):
            for i, expert in enumerate(held):
                experts |= {module: ((names[held], i), role) for role, module in expert.named_modules()}
    for module in block.modules():
        if is_linear(module):
            expert, role = experts.get(module, (None, ""))
            yield Target(names[module], module, expert=expert, role=role)
        for parameter in fused_parameters(module):
            for i in range(module.num_experts):
                name = f"{names[module]}.{parameter}[{i}]"
                yield Target(name, module, parameter, i, (names[module], i), parameter)


def _of_all(target: Target) -> str:
    """The name of the parameter that holds the matrix, where that holds others too; else of the module."""
    return target.name.partition("[")[0] if target.index is not None else target.name


def _layers_of_experts(block: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, list[nn.Module]]]:
    """What holds experts, they themselves, and the modules of their router's matrices, for each layer of experts in the block.

    A router is a neighbour of the experts that holds one matrix alone, of a row for each expert; the gate of an expert that all
    tokens share has one row. A plain list of modules without a router is no layer of experts."""
    for parent in block.modules():
        for experts in parent.children():
            count = len(experts) if isinstance(experts, nn.ModuleList) else getattr(experts, "num_experts", 0)
            if not isinstance(experts, nn.ModuleList) and not fused_parameters(experts):
                continue
            routers = []
            for sibling in parent.children():
                held = [(m, p) for m in sibling.modules() for p in m.parameters(recurse=False) if p.dim() > 1]
                if sibling is not experts and len(held) == 1 and held[0][1].dim() == 2 and len(held[0][1]) in (1, count):
                    routers.append(held[0][0])
            if not isinstance(experts, nn.ModuleList) or (count > 1 and routers):
                yield parent, experts, routers


def holders_of_experts(block: nn.Module) -> list[nn.Module]:
    """The modules of the block that tokens come to in order to be given to experts."""
    return [parent if isinstance(held, nn.ModuleList) else held for parent, held, _ in _layers_of_experts(block)]


def _routers(block: nn.Module) -> Iterator[nn.Module]:
    for _, _, routers in _layers_of_experts(block):
        yield from routers


def list_skipped(
    model: nn.Module,
    blocks: nn.ModuleList,
    targets: list[list[Target]],
    names: dict[nn.Module, str],
    skip: tuple[str, ...],
    asked: Asked | None = None,
) -> dict[str, str]:
    """Every module with a weight matrix of its own, and every expert, that will not be pruned, with the reason."""
    pruned = {target.name for group in targets for target in group}
    routers = {module for block in blocks for module in _routers(block)}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    skipped, left_dense = {}, _left_dense(asked, (target for block in blocks for target in _all_of(block, names)))

    def reason(*known: str) -> str:
        if any(_asked(name, skip) for name in known):
            return "asked for"
        without = "has no mask" if isinstance(asked, Masks) else "dense in the plan"
        return without if known[0] in left_dense else "outside the blocks"

    for module, name in names.items():
        for parameter in (fused := fused_parameters(module)):
            whole = f"{name}.{parameter}"
            left = [matrix for i in range(module.num_experts) if (matrix := f"{whole}[{i}]") not in pruned]
            alike = len(left) == module.num_experts and len({each in left_dense for each in left}) == 1
            skipped |= {whole: reason(left[0], whole)} if alike else {each: reason(each, whole) for each in left}
        if fused or name in pruned or all(weight.dim() < 2 for weight in module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Embedding):
            skipped[name] = "embedding"
        elif module is output:
            skipped[name] = "output layer"
        elif module in routers:
            skipped[name] = "router"
        elif not is_linear(module):
            skipped[name] = f"{type(module).__name__}, not a linear"
        else:
            skipped[name] = reason(name)
    return skipped
