"""What to expect of a pruning before it is done: perplexity with an interval, exact bytes, measured speed; and what to choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import bench, catalog, checkpoint
from ..checkpoint.lazy import LazyModel
from ..data import evaluation_windows
from ..errors import SparsekitError
from ..linear import NM24
from ..patterns import Pattern
from ..pipeline.blocks import Target, find_blocks, find_targets
from ..pipeline.source import Resident
from ..plan import Plan, parse
from .allocation import allocate_choices
from .costs import DTypeOf, size_of, speed_of
from .published import Published, published
from .quality import LEVEL, PROBES, Probe, Quality, calibrate
from .sensitivity import Sensitivity

CANDIDATES = ("4:8", "2:4", "1:4", "50%", "60%")
Asked = str | Pattern | Plan


@dataclass(frozen=True)
class Row:
    """One pattern or plan. perplexity: expected, and low to high the interval of 80 %; all but low infinite beyond what the probes
    reach. bytes: of the weight files' tensors, dense_bytes of the dense model's. speedup: by batch, how many times as fast as the
    dense model's all linears of the blocks run together; None where it was not measured. said: what is to be known of these
    figures."""

    pattern: str
    sparsity: float
    perplexity: float
    low: float
    high: float
    bytes: int
    dense_bytes: int
    speedup: dict[int, float | None]
    said: str


@dataclass(frozen=True)
class Forecast:
    """A row for each pattern or plan asked about, in their order. probes: the prunings that were done. published: what papers
    report of other models at the same patterns; no part of the forecast. machine: what speeds are of."""

    dense_perplexity: float
    tokens: int
    level: float
    probes: tuple[Probe, ...]
    rows: tuple[Row, ...]
    published: tuple[Published, ...]
    machine: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Of JSON's types alone; what is infinite is null."""
        found = asdict(self)
        for row in found["rows"]:
            row |= {name: row[name] if math.isfinite(row[name]) else None for name in ("perplexity", "low", "high")}
        for probe in found["probes"]:
            probe["predicted"] = probe["predicted"] if math.isfinite(probe["predicted"]) else None
        return {**found, "probes": list(found["probes"]), "rows": list(found["rows"]), "published": list(found["published"])}


@dataclass(frozen=True)
class Subject:
    """A model in memory, its matrices by block, and the dtypes that its tensors are stored in."""

    model: nn.Module
    blocks: nn.ModuleList
    targets: list[list[Target]]
    dtype_of: DTypeOf
    stored: torch.dtype

    @property
    def flat(self) -> list[Target]:
        return [target for matrices in self.targets for target in matrices]

    def plan(self, asked: Asked) -> Plan:
        """The plan that is asked for. Raises SparsekitError where it is for another model."""
        asked = parse(asked)
        if isinstance(asked, Plan):
            asked.check(self.flat)
            return asked
        shapes = {target.name: tuple(target.weight.shape) for target in self.flat}
        return Plan(dict.fromkeys(shapes, asked), shapes, "sparsegpt")


def subject_of(
    model: nn.Module | str | Path,
    skip: Iterable[str] = (),
    blocks: nn.ModuleList | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
) -> Subject:
    """The model, or that of a folder, in memory. device, dtype: of a folder, as for ``load``.

    Raises SparsekitError for what is compressed already, and for no model's folder."""
    dtype_of = stored = None
    if not isinstance(model, nn.Module):
        folder = checkpoint.check_model_folder(model)
        lazy = LazyModel(folder, find_blocks, dtype, checkpoint.resolve_device(device))
        dtype_of, stored = lazy.stored_dtype, lazy.stored
        model = checkpoint.load(folder, device=device, dtype=dtype)
    source = Resident(model, blocks)
    targets = find_targets(source.blocks, {module: name for name, module in model.named_modules()}, tuple(skip))
    held = {name: tensor.dtype for name, tensor in model.state_dict(keep_vars=True).items()}
    return Subject(model, source.blocks, targets, dtype_of or held.__getitem__, stored or held[targets[0][0].tensor])


def forecast(
    model: nn.Module | str | Path,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    tokens: Tensor,
    asked: Iterable[Asked],
    *,
    seq_len: int,
    max_tokens: int | None = None,
    probes: int = PROBES,
    seed: int = 0,
    batch: Sequence[int] = (1,),
    skip: Iterable[str] = (),
    sensitivity: Sensitivity | None = None,
    blocks: nn.ModuleList | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Forecast:
    """What pruning by SparseGPT to each of the patterns or plans would make of the model, which stays as it is, bit for bit.

    model: one in memory, or the folder of one that fits there (device, dtype: as for ``load``). batches, skip, blocks: as for
    ``prune``. tokens (count,): the text to forecast the perplexity on, in windows of seq_len. probes: how many random prunings to
    do and evaluate, to calibrate by; seed chooses them. batch: numbers of tokens that products take at once. sensitivity: of
    ``measure_sensitivity``, measured before.
    Raises SparsekitError for too short a text, fewer than 4 probes, a plan for another model and curves that lack a level."""
    asked, subject = [parse(one) for one in asked], _checked(model, tokens, seq_len, max_tokens, batch, skip, blocks, device, dtype)
    plans = {i: subject.plan(one) for i, one in enumerate(asked)}
    if not plans:
        raise SparsekitError('there must be a pattern or a plan to forecast, such as "2:4", got none')
    how = dict(probes=probes, seed=seed, max_tokens=max_tokens, sensitivity=sensitivity, skip=skip, progress=progress)
    quality = _calibrated(subject, batches, tokens, seq_len, list(plans.values()), how)
    place = next(subject.model.parameters()).device
    rows = [_row(subject, quality, str(one), plans[i], batch, place) for i, one in enumerate(asked)]
    return _told(subject, quality, rows, [one for one in asked if isinstance(one, Pattern)])


def _checked(model, tokens, seq_len, max_tokens, batch, skip, blocks, device, dtype) -> Subject:
    """Refuses what can be refused before the model is read."""
    evaluation_windows(tokens, seq_len, max_tokens)
    if not batch or min(batch) < 1:
        raise SparsekitError(f"a batch must be at least one token, got {min(batch, default='none')}")
    return subject_of(model, skip, blocks, device, dtype)


def _calibrated(
    subject: Subject, batches: Iterable, tokens: Tensor, seq_len: int, plans: Sequence[Plan], how: Mapping[str, Any]
) -> Quality:
    blocks = subject.blocks
    return calibrate(subject.model, subject.targets, batches, tokens, seq_len, plans, blocks=blocks, stored=subject.stored, **how)


def _row(subject: Subject, quality: Quality, text: str, plan: Plan, batches: Sequence[int], place: torch.device | None) -> Row:
    size = size_of(subject.model, subject.flat, plan, subject.dtype_of)
    speeds = {batch: speed_of(subject.model, subject.flat, plan, batch, subject.stored, place) for batch in batches}
    expected, said = quality.expected(plan), []
    if plan.method not in (None, "sparsegpt"):
        said.append(f"the plan is for {plan.method}, and the perplexity is what SparseGPT would leave by it")
    if math.isinf(expected.perplexity):
        said.append(f"beyond what the probes reach: more than {expected.low:.2f}")
    elif quality.beyond(plan):
        said.append("outside of what the probes did")
    if size.bitmask < size.stored:
        said.append(f"zeros are stored too; as values and bitmask (sparse-bitmask) {size.bitmask:,} bytes")
    said += dict.fromkeys(speed.said for speed in speeds.values())
    ends = expected.perplexity, expected.low, expected.high
    times = {batch: speed.times for batch, speed in speeds.items()}
    return Row(text, plan.sparsity, *ends, size.stored, size.dense, times, "; ".join(said))


def _told(subject: Subject, quality: Quality, rows: Sequence[Row], patterns: Sequence[Pattern]) -> Forecast:
    place = next(subject.model.parameters()).device
    machine = {
        "device": bench.key(place),
        "dtype": str(subject.stored).removeprefix("torch."),
        "torch": torch.__version__,
    }
    shown = tuple(published(patterns))
    return Forecast(quality.dense, quality.tokens, LEVEL, quality.probes, tuple(rows), shown, machine)


# ---- what to choose ----


@dataclass(frozen=True)
class Recommendation:
    """pattern: what to prune to, None where nothing within the limit gains any; plan: the same, linear by linear. row: what to
    expect of it. why: the reasons, a sentence each. rejected: of each other candidate the reason. forecast: of all of them."""

    pattern: Pattern | Plan | None
    plan: Plan | None
    row: Row | None
    why: tuple[str, ...]
    rejected: dict[str, str]
    forecast: Forecast

    def to_dict(self) -> dict[str, Any]:
        """The forecast's ``to_dict`` with the choice under "recommended", whose row is that of the same pattern."""
        told = {"plan": self.plan and self.plan.to_dict(), "why": list(self.why), "rejected": self.rejected}
        return {**self.forecast.to_dict(), "recommended": {"pattern": self.row and self.row.pattern, **told}}


def recommend(
    model: nn.Module | str | Path,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    tokens: Tensor,
    *,
    max_quality_loss: float,
    seq_len: int,
    hardware: str | catalog.Capability | torch.device | None = None,
    batch: int = 1,
    candidates: Iterable[Asked] = CANDIDATES,
    max_tokens: int | None = None,
    probes: int = PROBES,
    seed: int = 0,
    skip: Iterable[str] = (),
    sensitivity: Sensitivity | None = None,
    blocks: nn.ModuleList | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Recommendation:
    """Which of the candidates to prune to, by SparseGPT, so that the perplexity rises by no more than the share max_quality_loss:
    0.05 is 5 % more than the dense model's. The upper end of the interval must stay below that.

    Of those that do, the fastest with ``batch`` tokens a product if one is faster than dense, else the smallest file, if one is
    smaller than the dense one. Where 2:4 is a candidate that loses too much, so is a plan that leaves some linears dense, those
    that lose most (``allocate_choices``). hardware: as for ``catalog.capability_of``; speeds were measured on this machine (None)
    alone. The other arguments are those of ``forecast``. Raises SparsekitError as that does, and for a limit not above 0."""
    if not 0 < max_quality_loss < math.inf:
        raise SparsekitError(f"the quality loss must be a share above 0, such as 0.05, got {max_quality_loss!r}")
    capability = catalog.capability_of(hardware)
    subject = _checked(model, tokens, seq_len, max_tokens, (batch,), skip, blocks, device, dtype)
    advice = catalog.recommend(hardware, batch, subject.stored)
    asked = {str(one): one for one in map(parse, candidates)}
    plans = {text: subject.plan(one) for text, one in asked.items()}
    how = dict(probes=probes, seed=seed, max_tokens=max_tokens, sensitivity=sensitivity, skip=skip, progress=progress)
    quality = _calibrated(subject, batches, tokens, seq_len, list(plans.values()), how)
    here = next(subject.model.parameters()).device if hardware is None else None
    runs = catalog.entry("2:4", capability).kernel is not None
    limit, rejected, left = quality.dense * (1 + max_quality_loss), {}, {}
    if part := _partly(quality, limit) if asked.get(str(NM24)) == NM24 else None:
        held = sum(pattern is not None for pattern in part.patterns.values())
        text = f"{NM24} in {held} of {len(part.patterns)} linears"
        asked[text], plans[text] = part, part
    rows = {text: _row(subject, quality, text, plan, (batch,), here) for text, plan in plans.items()}
    for text, row in rows.items():
        faster = runs and (row.speedup[batch] or 0) > 1
        if row.high > limit:
            most = "be beyond what the probes reach" if math.isinf(row.high) else f"reach {row.high:.2f}"
            rejected[text] = f"its perplexity may {most}, and the limit is {limit:.2f}"
        elif not faster and row.bytes >= row.dense_bytes:
            rejected[text] = f"neither smaller nor faster here: {row.said}"
        else:
            left[text] = (row.speedup[batch] if faster else 0.0, -row.bytes, -row.perplexity)
    best = max(left, key=left.__getitem__, default=None)
    for text in left:
        if text != best:
            differ = next((i for i in range(2) if left[best][i] != left[text][i]), 2)
            rejected[text] = f"{best} is {('faster', 'smaller', 'as small and as fast, and loses less')[differ]}"
    patterns = [one for one in asked.values() if isinstance(one, Pattern)]
    told = _told(subject, quality, list(rows.values()), patterns)
    if best is None:
        why = (f"no candidate keeps the perplexity below {limit:.2f} for certain enough and gains size or speed", *advice.why)
        return Recommendation(None, None, None, why, rejected, told)
    row = rows[best]
    why = (
        f"perplexity {row.perplexity:.2f}, with {LEVEL:.0%} between {row.low:.2f} and {row.high:.2f}",
        f"the dense model has {quality.dense:.2f}, and the limit is {limit:.2f}",
        f"{row.bytes:,} bytes of {row.dense_bytes:,}",
        row.said,
        *advice.why,
    )
    return Recommendation(asked[best], plans[best], row, why, rejected, told)


def _partly(quality: Quality, limit: float) -> Plan | None:
    """2:4 in as many linears as the limit allows, by tenths of all weights; None where it allows all of them, or hardly any."""
    curves, weights = list(quality.damages.curves.values()), quality.damages.weights
    for tenths in range(10, 0, -1):
        plan = allocate_choices(curves, tenths * NM24.sparsity / 10, (None, NM24), weights=weights)
        if quality.expected(plan).high <= limit:
            return None if tenths == 10 else plan
    return None
