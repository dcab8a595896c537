"""Layers, sub-layers, experts, heads and neurons out of one model, in memory or from one folder into another."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import (
    check_model_folder,
    check_new_folder,
    compressed_linears,
    load,
    resolve_device,
    save,
    skeleton,
    stored_dtype,
)  # fmt: skip
from ..checkpoint.writing import write_beside
from ..data import count_tokens
from ..errors import SparsekitError, listed
from ..report import StructuredReport, StructuredStep
from ..structured import architecture_of, prune_experts, prune_layers, select_experts, select_heads, select_neurons
from ..structured.architecture import Architecture
from ..structured.entries import SUBLAYERS, entries_of
from ..structured.experts import experts_a_token
from ..structured.heads import head_units
from ..structured.routed import GROUPED, check_neurons, check_width
from .memory import check_structured, parse_size
from .narrow import Narrowed, count_parameters, prune_heads, prune_neurons
from .source import Progress

PARTS = ("layers", *SUBLAYERS, "experts", "heads", "ffn")  # in the order in which they go
Amount = int | float | str
Batches = Iterable[Tensor | Mapping[str, Tensor]]


def prune_structured(
    model: nn.Module,
    batches: Batches,
    *,
    layers: Amount | None = None,
    attention: Amount | None = None,
    mlp: Amount | None = None,
    experts: Amount | None = None,
    heads: Amount | None = None,
    ffn: Amount | None = None,
    scope: str = "layer",
    round_to: int | None = None,
    compensate: bool = True,
    progress: Progress | None = None,
) -> StructuredReport:
    """Takes parts out of the model, in place, those that matter least on the batches: whole layers first, then attentions, MLPs,
    experts, heads and neurons, each measured on what is left by then.

    Amounts are counts (4), shares between 0 and 1 (0.25), which are rounded down, or their text ("4", "25%"): of the model's
    layers, attentions or MLPs; of each block's experts; of each block's query heads, which go with the key-value head that they
    share; of each block's neurons (ffn). scope: "layer", or "global" to take heads and neurons from wherever they matter least; a
    count is then one of the whole model. round_to: keep a multiple of it of neurons in each block. compensate: let output
    projections make up for heads and neurons by least squares.
    batches: token ids (batch, tokens), or dicts of the model's keyword arguments. progress is told what is under way, how much of
    it is done, and of how much.
    Raises SparsekitError for an unknown architecture and where an amount is none or more than there is, before anything changes."""
    begin, batches = time.perf_counter(), list(batches)
    amounts = dict(zip(PARTS, (layers, attention, mlp, experts, heads, ffn)))
    asked = {part: parse_amount(part, amount) for part, amount in amounts.items() if amount is not None}
    counts = check_amounts(model, asked, scope, round_to, compensate)
    if not batches:
        raise SparsekitError("what matters least is measured on calibration batches, got none")
    report = StructuredReport(asked, tokens=count_tokens(batches), parameters_before=count_parameters(model))
    narrowing = dict(scope=scope, compensate=compensate)
    report.parameters_predicted = report.parameters_before
    for part, count in counts.items():
        step, less = _take(model, batches, part, count, progress, narrowing | ({"round_to": round_to} if part == "ffn" else {}))
        report.steps.append(step)
        report.parameters_predicted -= less
        report.parameters = count_parameters(model)
        if report.parameters != report.parameters_predicted:
            raise SparsekitError(
                f"without its {part} the model must hold {report.parameters_predicted} parameters, got {report.parameters}; "
                f"correct the descriptor of {model.config.model_type}"
            )
    report.per_layer_config = entries_of(model.config)
    report.seconds = time.perf_counter() - begin
    return report


def prune_structured_folder(
    folder: str | Path,
    out: str | Path,
    batches: Batches,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
    tokenizer=None,
    overwrite: bool = False,
    max_memory: int | str | None = None,
    progress: Progress | None = None,
    **asked: Any,
) -> StructuredReport:
    """``prune_structured`` of the model of a Hugging Face folder, into the folder ``out``, with report.json beside the weights.

    Where its blocks stay alike, ``out`` is an ordinary folder; where they differ, one that ``sparsekit.load`` reads. The whole
    model is in memory, on the device; weights are stored in the dtype that most of them had. device, dtype: as for ``load``.
    max_memory: what the process may hold, such as "8GiB"; by default what is free.
    asked: the amounts and options of ``prune_structured``.
    Raises SparsekitError for what that refuses, for a compressed folder, and where ``out`` stands in the way unless ``overwrite``;
    then nothing is left that was not there. So is a model that does not fit in memory, before its weights are read."""
    check_new_folder(out, overwrite)
    folder = check_model_folder(folder)
    if compressed_linears(folder) is not None:
        raise SparsekitError(f"the model must be dense, and {folder} is compressed; take parts out first, then prune 2:4")
    batches, gates = list(batches), asked.get("heads") is not None
    limit, fits = None if max_memory is None else parse_size(max_memory), asked.get("compensate", True)
    fits = fits and (gates or asked.get("ffn") is not None)
    check_structured(skeleton(folder, dtype), batches, resolve_device(device), gates, fits, limit)
    model = load(folder, device=device, dtype=dtype)
    report = prune_structured(model, batches, progress=progress, **asked)
    model.to(stored_dtype(folder))
    _check_builds(model)
    report.format = "dense"
    save(model, out, format="dense", tokenizer=tokenizer, overwrite=overwrite, report=report)
    return report


def _check_builds(model: nn.Module) -> None:
    """Raises SparsekitError where a loader would build another model from its config than this one."""
    with TemporaryDirectory() as folder:
        write_beside(Path(folder), model, model.dtype, compressed=False)
        built = skeleton(Path(folder)).state_dict()
    held = model.state_dict()
    for name in (*held, *built):
        if name not in held or name not in built or held[name].shape != built[name].shape:
            raise SparsekitError(
                f"the config must say what is left of the model, and {name} is not what it says; correct the descriptor of "
                f"{model.config.model_type}"
            )


def parse_amount(part: str, amount: Amount) -> int | float:
    """A count (int) or a share (float) from a number or its text. Raises SparsekitError for none and for all."""
    text, found = str(amount).strip(), None
    with suppress(ValueError):
        found = float(text[:-1]) / 100 if text.endswith("%") else int(text) if text.isdecimal() else float(text)
    if isinstance(amount, bool) or found is None or not (found >= 1 if isinstance(found, int) else 0 < found < 1):
        raise SparsekitError(
            f"{part} to remove must be a count of at least 1, such as 4, or a share between 0 and 1, such as 25% or 0.25, "
            f"got {amount}"
        )
    return found


def check_amounts(
    model: nn.Module, asked: Mapping[str, int | float], scope: str = "layer", round_to: int | None = None, compensate: bool = True
) -> dict[str, int | float]:
    """What to ask of each part in turn: a count of layers, sub-layers and experts, a count or a share of neurons and of key-value
    heads. Raises SparsekitError where that is none or more than is sure to be there when its turn comes, and for options that are
    of parts not asked for; nothing is measured for it."""
    if not asked:
        raise SparsekitError(f"something must be asked for, of {listed(PARTS, 'or')}, got nothing")
    if round_to is not None and "ffn" not in asked:
        raise SparsekitError(f"round_to={round_to} is for the neurons that are kept, and no ffn is to go; leave it out")
    narrowing = {
        name: value for name, value, usual in (("scope", scope, "layer"), ("compensate", compensate, True)) if value != usual
    }
    if narrowing and not {"heads", "ffn"} & set(asked):
        name, value = next(iter(narrowing.items()))
        raise SparsekitError(f"{name}={value} is for heads and ffn, and neither is to go; leave it out")
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)
    shapes = [architecture.shape(block) for block in blocks]
    counts: dict[str, int | float] = {}
    for part in (part for part in PARTS if part in asked):
        amount = asked[part]
        if part == "layers":
            counts[part] = _count(part, amount, len(blocks))
        elif part in SUBLAYERS:
            there = sum(getattr(architecture, part)(block) is not None for block in blocks)
            counts[part] = _count(part, amount, there, gone=counts.get("layers", 0))
        elif part == "experts":
            held = [shape.num_experts for shape in shapes if shape.num_experts]
            if not held:
                raise SparsekitError(f"the model must have experts to remove some, got {type(model).__name__} without one")
            counts[part] = _count(part, amount, min(held))
            left = dict(enumerate(torch.zeros(n) for n in _surely_left(held, counts, "mlp", "experts")))
            select_experts(left, counts[part], experts_a_token(architecture, model))
        elif part == "heads":
            units = head_units(shapes)
            held = _surely_left(units, counts, "attention", "heads")
            size = max(shape.num_attention_heads // n for shape, n in zip(shapes, units) if n)
            counts[part] = _groups(amount, size, held, scope)
            select_heads([torch.zeros(n) for n in held], counts[part], scope=scope)
        else:
            counts[part] = amount
            of_experts = [block for block in blocks if architecture.expert_parts(block)]
            for block in of_experts:
                check_neurons(architecture, block)
            widths = [shape.moe_intermediate_size or shape.intermediate_size for shape in shapes]
            held = _surely_left(widths, counts, "mlp", "neurons")
            select_neurons([torch.zeros(n) for n in held], amount, scope=scope, round_to=round_to)
            for block in of_experts:
                if scope == "layer":
                    width = architecture.shape(block).moe_intermediate_size
                    gone = select_neurons([torch.zeros(width)], amount, round_to=round_to)
                    check_width(architecture, block, width - len(gone[0]))
                elif (round_to or 1) % GROUPED:
                    check_width(architecture, block, f"round_to {round_to} over all blocks")
    return counts


def _surely_left(units: Iterable[int | None], counts: Mapping[str, int | float], sublayer: str, what: str) -> list[int]:
    """Of the blocks' units those that are left whichever layers and sub-layers go before: of the blocks with fewest."""
    held = sorted(filter(None, units))
    gone = counts.get("layers", 0) + counts.get(sublayer, 0)
    if not held:
        raise SparsekitError(f"there must be {what} to remove, and no block has any")
    if gone >= len(held):
        raise SparsekitError(
            f"a block must be left to take parts out of, and all {len(held)} that have any may go with the {gone} layers and "
            f"{sublayer} asked for; take out fewer, or those first and the rest in a second run"
        )
    return held[: len(held) - gone]


def _count(part: str, amount: int | float, there: int, gone: int = 0) -> int:
    """The amount of what is there as a count; as many as ``gone`` of it may have gone by then."""
    count = amount if isinstance(amount, int) else int((there - gone) * amount + 1e-6)
    if not 1 <= count < there - gone:
        raise SparsekitError(
            f"{part} to remove must be at least one and leave one, got {amount} of {there - gone}; the order is {', '.join(PARTS)}"
        )
    return count


def _groups(amount: int | float, size: int, groups: Sequence[int], scope: str) -> int | float:
    """An amount of query heads as one of key-value heads, each with ``size`` of them, of which blocks have ``groups``."""
    of_block, left = size * max(groups), size * (sum(groups) - len(groups))
    if scope == "layer":
        count = amount if isinstance(amount, int) else int(of_block * amount + 1e-6)
        if count < size or count >= of_block or (isinstance(amount, int) and amount % size):
            raise SparsekitError(
                f"heads go with the others of their key-value head, {size} of {of_block} at a time and not all, "
                f"got {amount} to remove"
            )
    elif isinstance(amount, int) and (amount % size or amount > left):
        raise SparsekitError(
            f"heads go with the others of their key-value head, {size} at a time, and each block keeps one of those, so that at "
            f"most {left} of {size * sum(groups)} can go, got {amount} to remove"
        )
    return amount // size if isinstance(amount, int) else amount


def _take(
    model: nn.Module, batches: list, part: str, count: int | float, progress: Progress | None, options: dict[str, Any]
) -> tuple[StructuredStep, int]:
    """Takes one part out. Returns what went, and how many parameters that is, reckoned from what was there."""
    begin, architecture = time.perf_counter(), architecture_of(model)
    sizes = [_sizes(architecture, block) for block in architecture.blocks(model)]

    def told(done: int, of: int) -> None:
        if progress:
            progress(part, done, of)

    if part in ("layers", *SUBLAYERS):
        found = prune_layers(model, batches, count, "block" if part == "layers" else part, progress=told)
        step = StructuredStep(part, list(found.removed), list(found.influence))
        less = sum(sizes[i][part] for i in found.removed)
    elif part == "experts":
        found = prune_experts(model, batches, count, progress=told)
        removed, importance = ([list(held.get(i, ())) for i in range(len(sizes))] for held in (found.removed, found.importance))
        step, less = StructuredStep(part, removed, importance), sum(sizes[i][part] * len(gone) for i, gone in found.removed.items())
    else:
        found = (prune_heads if part == "heads" else prune_neurons)(model, batches, count, progress=progress, **options)
        step, less = _narrowed(part, found), found.parameters_before - found.parameters_predicted
    step.seconds = time.perf_counter() - begin
    return step, less


def _narrowed(part: str, found: Narrowed) -> StructuredStep:
    """Of neurons the share of their importance that went is told, not that of each: there are too many."""
    shares = [
        sum(scores[i] for i in gone) / total if (total := sum(scores)) else 0.0
        for scores, gone in zip(found.importance, found.removed)
    ]
    step = StructuredStep(part, [list(gone) for gone in found.removed], shares)
    if part == "heads":
        step.importance = [list(scores) for scores in found.importance]
    step.method, step.damping = found.method, list(found.damping)
    step.output_error_plain, step.output_error = ([errors[i] for errors in found.errors] for i in range(2))
    return step


def _sizes(architecture: Architecture, block: nn.Module) -> dict[str, int]:
    """The parameters of the block, of its sub-layers, and of one of its experts with its part of the router."""

    def held(*modules: nn.Module | None) -> int:
        return sum(p.numel() for module in modules if module is not None for p in module.parameters())

    mlp = architecture.mlp(block)
    sizes = {"layers": held(block), "attention": held(architecture.attention(block))}
    sizes["mlp"] = held(*architecture.neurons(block).values()) if mlp is block else held(mlp)
    if parts := architecture.expert_parts(block):
        count = architecture.shape(block).num_experts
        separate = isinstance(parts[0], nn.ModuleList)
        shared = [p for part in parts[separate:] for p in part.parameters() if len(p) == count]
        sizes["experts"] = sum(p.numel() // count for p in shared) + (held(parts[0][0]) if separate else 0)
    return sizes
