"""Taking parts out of the modules of a live model or of one without weights, and making its config say what is left."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SparsekitError, listed
from ..linear import dense_weight, is_conv1d
from .architecture import Architecture, BlockShape, architecture_of
from .entries import ALIBI, COUNTS, SUBLAYERS, Entry, set_entries
from .own import alibi_heads, read_own_heads, set_alibi_heads, share_config
from .removed import take_out


def slice_linear(linear: nn.Module, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None) -> None:
    """Keeps, in place, the given output features (rows) and input features (columns) of a dense linear, in the order given."""
    weight, bias = dense_weight(linear), linear.bias
    if rows is not None:
        weight = _taken(weight, rows)
        bias = None if bias is None else _taken(bias.detach(), rows)
    if columns is not None:
        weight = _taken(weight.T, columns).T
    set_weight(linear, weight)
    if bias is not linear.bias:
        linear.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)


def set_weight(linear: nn.Module, weight: Tensor) -> None:
    """Gives a dense linear the weight (out_features, in_features), which may be of another shape than the one it has."""
    n, k = weight.shape
    held = weight.T if is_conv1d(linear) else weight
    linear.weight = nn.Parameter(held.to(linear.weight.dtype).contiguous(), requires_grad=linear.weight.requires_grad)
    _set_sizes(linear, {"out_features": n, "in_features": k, "nf": n, "nx": k})


def keep_heads(architecture: Architecture, block: nn.Module, groups: Iterable[int]) -> None:
    """Keeps these key-value heads of the block, each with its query heads, in q, k, v and o, and the sizes that the module holds.

    Where all query heads share one key-value head, that stays, and the numbers are those of the query heads to keep.
    Raises SparsekitError, and changes nothing, for a number that the block does not have, or for none."""
    shape, linears, attention = architecture.shape(block), architecture.projections(block), architecture.attention(block)
    shared = shape.num_key_value_heads == 1
    kept = _kept(groups, shape.head_units, "heads" if shared else "key-value heads")
    queries, keys = group_features(shape, kept), _features([0] if shared else kept, shape.head_dim)
    if "qkv" not in linears:
        slice_linear(linears["q"], rows=queries)
        slice_linear(linears["k"], rows=keys)
        slice_linear(linears["v"], rows=keys)
    elif architecture.qkv_order == "grouped" and not shared:
        slice_linear(linears["qkv"], rows=_features(kept, sum(group_widths(shape)) + shape.head_dim))
    else:
        first_key = shape.num_attention_heads * shape.head_dim
        first_value = first_key + shape.num_key_value_heads * shape.head_dim
        slice_linear(linears["qkv"], rows=[*queries, *(first_key + i for i in keys), *(first_value + i for i in keys)])
    slice_linear(linears["o"], columns=queries)
    left = architecture.shape(block)
    _set_sizes(
        attention,
        {
            "num_heads": left.num_attention_heads,
            "num_attention_heads": left.num_attention_heads,
            "num_key_value_heads": left.num_key_value_heads,
            "num_kv_heads": left.num_key_value_heads,
            "num_key_value_groups": left.num_attention_heads // left.num_key_value_heads,
            "split_size": left.num_attention_heads * left.head_dim,  # GPT-2's, of the queries in qkv
        },
    )
    if architecture.reads_config:
        read_own_heads(attention, left.num_attention_heads)
    if architecture.uses_alibi(attention):
        known = alibi_heads(attention) or range(shape.num_attention_heads)
        set_alibi_heads(attention, [known[i] for i in _features(kept, shape.heads_a_unit)])


def keep_neurons(architecture: Architecture, block: nn.Module, neurons: Iterable[int]) -> None:
    """Keeps these neurons of the block's MLP: their rows of gate and up, their columns of down.

    Those of experts are numbered through all of them, expert by expert, and as many are kept of each.
    Raises SparsekitError, and changes nothing, for a number that the block does not have, or for none."""
    shape = architecture.shape(block)
    if shape.moe_intermediate_size:
        _keep_of_experts(architecture, block, shape, neurons)
        return
    kept = _kept(neurons, shape.intermediate_size, "neurons")
    _slice_neurons(architecture.neurons(block), kept, shape.intermediate_size)
    _set_sizes(architecture.mlp(block), {"intermediate_size": len(kept)})


def _slice_neurons(linears: Mapping[str, nn.Module], kept: Sequence[int], width: int) -> None:
    for part, linear in linears.items():
        if part == "down":
            slice_linear(linear, columns=kept)
        else:
            slice_linear(linear, rows=[*kept, *(width + i for i in kept)] if part == "gate_up" else kept)


def _keep_of_experts(architecture: Architecture, block: nn.Module, shape: BlockShape, neurons: Iterable[int]) -> None:
    count, width = shape.num_experts, shape.moe_intermediate_size
    numbers = _kept(neurons, count * width, "neurons")
    kept = [[i % width for i in numbers if i // width == e] for e in range(count)]
    if len(sizes := {len(own) for own in kept}) > 1 or not kept[0]:
        raise SparsekitError(f"as many neurons must be kept of each of the {count} experts, got {listed(sorted(sizes))}")
    experts, _ = architecture.expert_parts(block)
    if isinstance(experts, nn.ModuleList):
        for expert, own in zip(experts, kept):
            _slice_neurons(architecture.expert_linears(expert), own, width)
            _set_sizes(expert, {"intermediate_size": len(own), "ffn_dim": len(own)})
        return
    rows = torch.tensor(kept, device=experts.down_proj.device)
    taken = {
        "gate_up_proj": _rows_of_each(experts.gate_up_proj.detach(), torch.cat([rows, rows + width], 1)),
        "down_proj": _rows_of_each(experts.down_proj.detach().mT, rows).mT.contiguous(),
    }
    for name, tensor in taken.items():
        setattr(experts, name, nn.Parameter(tensor, requires_grad=getattr(experts, name).requires_grad))
    _set_sizes(experts, {"intermediate_dim": len(kept[0]), "intermediate_size": len(kept[0])})


def _rows_of_each(tensor: Tensor, rows: Tensor) -> Tensor:
    """Of each of the matrices (n, r, k) the rows (n, kept)."""
    return tensor.gather(1, rows[:, :, None].expand(-1, -1, tensor.shape[2]))


def keep_experts(architecture: Architecture, block: nn.Module, experts: Iterable[int]) -> None:
    """Keeps these experts of the block, and their rows of the router.

    Raises SparsekitError, and changes nothing, for a number that the block does not have, or where a token is given to more experts
    than would be left."""
    count = architecture.shape(block).num_experts
    kept = _kept(experts, count, "experts")
    held, router = architecture.expert_parts(block)
    top_k = getattr(router, "top_k", getattr(architecture.mlp(block), "top_k", 1))
    if len(kept) < top_k:
        raise SparsekitError(f"a block must keep the {top_k} experts that each token is given to, got {len(kept)} to keep")
    if isinstance(held, nn.ModuleList):
        architecture.mlp(block).set_submodule(architecture.experts, nn.ModuleList(held[i] for i in kept))
    for module in (router,) if isinstance(held, nn.ModuleList) else (held, router):
        for name, parameter in module.named_parameters(recurse=False):
            if len(parameter) == count:
                taken = nn.Parameter(_taken(parameter.detach(), kept), requires_grad=parameter.requires_grad)
                setattr(module, name, taken)
    for module in (held, router, architecture.mlp(block)):
        _set_sizes(module, {"num_experts": len(kept), "out_features": len(kept)})


def resize_block(architecture: Architecture, block: nn.Module, entry: Entry) -> None:
    """Gives the modules of a block the shapes that an entry of ``per_layer_config`` says, whatever weights that leaves.

    Raises SparsekitError for more than the block has."""
    shape = architecture.shape(block)
    if not entry.get("attention", True):
        take_out(architecture, block, "attention")
    elif (heads := entry.get("num_attention_heads")) is not None:
        _count(heads, shape.num_attention_heads, "heads")
        per_group = shape.num_attention_heads // shape.num_key_value_heads
        groups = entry.get("num_key_value_heads", max(heads // per_group, 1))
        groups = _count(groups, shape.num_key_value_heads, "key-value heads")
        if groups * per_group != heads and (groups > 1 or heads > per_group):
            raise SparsekitError(f"per_layer_config must keep {per_group} heads for each key-value head, got {heads} for {groups}")
        if shape.num_key_value_heads > 1:
            keep_heads(architecture, block, range(groups))
        if groups == 1:
            keep_heads(architecture, block, range(heads))
    _number_heads(architecture, block, entry, shape.num_attention_heads)
    if not entry.get("mlp", True):
        take_out(architecture, block, "mlp")
        return
    if (neurons := entry.get("intermediate_size")) is not None:
        keep_neurons(architecture, block, range(_count(neurons, shape.intermediate_size, "neurons")))
    if (experts := entry.get("num_experts")) is not None:
        keep_experts(architecture, block, range(_count(experts, shape.num_experts, "experts")))
    if (neurons := entry.get("moe_intermediate_size")) is not None:
        neurons, width = _count(neurons, shape.moe_intermediate_size, "neurons of an expert"), shape.moe_intermediate_size
        left = architecture.shape(block).num_experts
        keep_neurons(architecture, block, [e * width + i for e in range(left) for i in range(neurons)])


def _number_heads(architecture: Architecture, block: nn.Module, entry: Entry, there: int) -> None:
    """Tells an attention with ALiBi which of the heads that were there the entry keeps."""
    attention, numbers = architecture.attention(block), entry.get(ALIBI)
    left = entry.get("num_attention_heads", 0) if attention is not None and architecture.uses_alibi(attention) else 0
    if left and numbers is not None and len(numbers) == left and numbers[-1] < there:
        set_alibi_heads(attention, numbers)
    elif left or numbers is not None:
        raise SparsekitError(
            f"{ALIBI} in per_layer_config must be the numbers that the {left} heads left had among {there or 0}, got {numbers}"
        )


def shape_model(model: nn.Module, entries: Sequence[Entry] | None) -> None:
    """Makes the modules of a freshly built model, on any device, fit the entries, one a block, and its config say so.

    Raises SparsekitError where they are not those of such a model."""
    if not entries:
        return
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)
    if len(entries) != len(blocks):
        raise SparsekitError(f"per_layer_config must say of each of the model's {len(blocks)} blocks, got {len(entries)} entries")
    for block, entry in zip(blocks, entries):
        resize_block(architecture, block, entry)
    set_entries(model.config, entries)


def settle_config(architecture: Architecture, model: nn.Module) -> None:
    """Makes the config say which sizes the modules have.

    What is alike in all blocks is written to the config's own fields where transformers builds a model of these shapes from them; a
    head count of Llama's must divide its hidden size, GPT-2 has no field for the width of a head. The rest is
    said by ``per_layer_config``, and the config's own values stay what they were."""
    config, blocks = model.config, architecture.blocks(model)
    shapes = [architecture.shape(block) for block in blocks]
    set_entries(config, None)
    said = _built(architecture, model, {})
    entries: list[Entry] = [{} for _ in blocks]
    for fields in _fields(architecture):
        wanted = [tuple(getattr(shape, size) for size in fields) for shape in shapes]
        there = {one for one in wanted if None not in one}
        if _agree(wanted, said, fields):
            continue
        changes = {name: value for name, value in zip(fields.values(), next(iter(there))) if name}
        if changes and len(there) == 1 and _agree(wanted, _built(architecture, model, changes), fields):
            for name, value in changes.items():
                setattr(config, name, value)
            continue
        for entry, one, other in zip(entries, wanted, said):
            for size, value in zip(fields, one):
                if size in COUNTS and value is not None and value != getattr(other, size):
                    entry[size] = value
    for entry, block in zip(entries, blocks):
        entry |= {name: False for name in SUBLAYERS if getattr(architecture, name)(block) is None}
        if (attention := architecture.attention(block)) is not None:
            if numbers := alibi_heads(attention):
                entry[ALIBI] = list(numbers)
            if architecture.reads_config:
                share_config(attention, config)
    set_entries(config, entries)


def _fields(architecture: Architecture) -> list[Mapping[str, str | None]]:
    """The sizes of a block that hang together, each with the config's field for it."""
    return [
        {
            "num_attention_heads": architecture.heads_field,
            "num_key_value_heads": architecture.kv_heads_field,
            "head_dim": architecture.head_dim_field,
        },
        {"intermediate_size": architecture.intermediate_field},
        {"num_experts": architecture.experts_field},
        {"moe_intermediate_size": architecture.expert_size_field},
    ]


def _built(architecture: Architecture, model: nn.Module, changes: Mapping[str, Any]) -> list[BlockShape] | None:
    """The shapes of the blocks of a model of its config with the changes, built as a loader builds it; None where none can be."""
    config = copy.deepcopy(model.config)
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        config = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            built = type(model)(config)
    except Exception:  # a config's class and a model's refuse with exceptions of their own
        if not changes:
            raise
        return None
    return [architecture.shape(block) for block in architecture.blocks(built)]


def _agree(wanted: Sequence[tuple], found: Sequence[BlockShape] | None, sizes: Iterable[str]) -> bool:
    """Whether blocks have the sizes that are wanted of them; None is wanted of a part that is gone."""
    if found is None:
        return False
    return all(None in one or one == tuple(getattr(shape, size) for size in sizes) for one, shape in zip(wanted, found))


def group_widths(shape: BlockShape) -> tuple[int, int]:
    """Features of the queries, and of the keys, that go with one unit of heads: with a query head where all share one key, none."""
    return shape.heads_a_unit * shape.head_dim, 0 if shape.num_key_value_heads == 1 < shape.num_attention_heads else shape.head_dim


def group_features(shape: BlockShape, groups: Iterable[int]) -> list[int]:
    """The output projection's inputs that come from these units of heads."""
    return _features(groups, group_widths(shape)[0])


def group_parameters(architecture: Architecture, block: nn.Module) -> int:
    """What a key-value head of the block and its query heads hold, or a query head where all share one; reckoned, not counted."""
    linears = architecture.projections(block)
    if not linears:
        return 0
    queries, keys = group_widths(architecture.shape(block))
    rows = {"q": queries, "k": keys, "v": keys, "qkv": queries + 2 * keys}
    return sum(_row(one) * rows[part] if part in rows else dense_weight(one).shape[0] * queries for part, one in linears.items())


def neuron_parameters(architecture: Architecture, block: nn.Module) -> int:
    """What a neuron of the block's MLP, or of an expert, holds; reckoned, not counted."""
    linears = architecture.neurons(block)
    if parts := architecture.expert_parts(block):
        if not isinstance(parts[0], nn.ModuleList):
            return 3 * parts[0].down_proj.shape[1]
        linears = architecture.expert_linears(parts[0][0])
    rows = {"gate_up": 2}
    return sum(dense_weight(one).shape[0] if part == "down" else rows.get(part, 1) * _row(one) for part, one in linears.items())


def _row(linear: nn.Module) -> int:
    """The parameters of one output feature."""
    return dense_weight(linear).shape[1] + (linear.bias is not None)


def _features(units: Iterable[int], width: int) -> list[int]:
    return [feature for unit in units for feature in range(unit * width, (unit + 1) * width)]


def _kept(units: Iterable[int], count: int | None, what: str) -> list[int]:
    kept = sorted(set(units))
    if count is None:
        raise SparsekitError(f"the block must have {what} to keep some of them, and has none")
    if not kept or kept[0] < 0 or kept[-1] >= count:
        raise SparsekitError(f"the {what} to keep must be some of the block's {count}, got {kept or 'none'}")
    return kept


def _count(number: Any, most: int | None, what: str) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= (most or 0):
        raise SparsekitError(f"per_layer_config must keep between 1 and {most or 0} {what} in a block, got {number!r}")
    return number


def _taken(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    return tensor.index_select(0, torch.tensor(rows, dtype=torch.long, device=tensor.device))


def _set_sizes(module: nn.Module, sizes: Mapping[str, int]) -> None:
    """Sets those of the attributes that the module has as numbers."""
    for name, size in sizes.items():
        if isinstance(module.__dict__.get(name), int):
            setattr(module, name, size)
