"""The sections of the report page that show what other commands measured: sensitivity, forecast, eval."""

from __future__ import annotations

import math

from .charts import bars, lines, ranges
from .curves import Curve
from .html import Html, change, faster, join, number, plural, share, size, tag
from .known import Known, split_name
from .patient import FINDING, OK, Check
from .tables import plain, table

MOST_LINES, MOST_PANELS, MOST_CURVES = 20, 12, 128  # of a list of bars; of curves; in one of those


def findings(known: Known) -> Html | None:
    """The findings, and the other checks for who opens them."""
    if known.checks is None:
        return None
    found = [check for check in known.checks if check.result == FINDING]
    others = sorted((check for check in known.checks if check.result != FINDING), key=lambda check: check.result != OK)
    passed = sum(check.result == OK for check in others)
    said = f"{plural(passed, 'check')} without a finding, {len(others) - passed} that could not be made"
    parts = [_listed(found)] if found else [tag("p", f"No finding in {plural(passed, 'check')}.")]
    return join((*parts, tag("details", tag("summary", said), _listed(others)) if others else None))


def _listed(checks: list[Check]) -> Html:
    items = []
    for check in checks:
        mark = check.severity or check.result
        head = tag("p", tag("b", mark, class_=mark.replace(" ", "-")), f"{check.tree}: {check.found}.")
        items.append(tag("li", head, tag("p", f"To do: {check.do}.") if check.do else None, _looked(check)))
    return tag("ul", *items, class_="checks")


def _looked(check: Check) -> Html:
    return tag("p", f"{check.name}: checked {check.checked}.", class_="note")


def sensitivity(known: Known) -> Html | None:
    found = known.sensitivity
    if found is None:
        return None
    parts = [_curves(found.curves, known.blocks)] if found.curves else []
    if found.losses:
        worst = sorted(found.losses, key=lambda row: -row.loss)[:MOST_LINES]
        base = found.dense_loss or 0.0
        rows = [(row.name, [(max(row.loss - base, 0), "fill", "")], f"{row.loss:.4f} at {row.level}") for row in worst]
        parts += [tag("h3", f"Loss with one alone pruned, over {base:.4f} of the dense model"), bars(rows)]
    if found.spearman is not None:
        parts.append(tag("p", f"Rank correlation (Spearman) of the measured losses with the layers' errors: {found.spearman:.2f}."))
    return join(parts)


def _curves(curves: list[Curve], blocks: list[str]) -> Html:
    """A panel for each kind of matrix."""
    kinds: dict[str, list[Curve]] = {}
    for curve in curves:
        kinds.setdefault(split_name(curve.name, blocks)[1], []).append(curve)
    highest, panels = max(max(curve.errors, default=0) for curve in curves), []
    for kind, held in list(kinds.items())[:MOST_PANELS]:
        shown = held[:: -(-len(held) // MOST_CURVES)]
        series = [(curve.errors, 2 + round(6 * i / max(len(shown) - 1, 1)), _levels(curve)) for i, curve in enumerate(shown)]
        panels.append(lines(series, held[0].levels, highest, f"Output error of {kind} by level of sparsity", kind))
    caption = "Output error after the update at each level, a line for each matrix; the farther from the page's colour, the later."
    if len(kinds) > MOST_PANELS:
        caption += f" {len(kinds) - MOST_PANELS} more kinds of matrices are in sensitivity.json."
    return tag("figure", tag("div", *panels, class_="panels"), tag("figcaption", caption))


def _levels(curve: Curve) -> str:
    return curve.name + "".join(f"\n{level}: {share(error, 2)}" for level, error in zip(curve.levels, curve.errors))


def forecast(known: Known) -> Html | None:
    found = known.forecast
    if not found:
        return None
    parts, dense = [], found.get("dense_perplexity")
    if rows := found.get("rows") or []:
        mark = (dense, f"dense: {dense:.2f}") if dense else None
        shown = [(row["pattern"], *_bounds(row), _said(row), f"{row['pattern']}: {_said(row)}") for row in rows]
        level = f"{share(found['level'], 0)} " if found.get("level") else ""
        said = f"Predicted perplexity with its {level}interval; the line across is the dense model's, {number(dense)}."
        parts += [ranges(shown, mark), tag("p", said, class_="note")]
        cells = [
            (row["pattern"], _share(row["sparsity"]), _said(row), size(row["bytes"]), _speedups(row["speedup"]), row["said"])
            for row in rows
        ]
        parts.append(table(("pattern", "zeros", "perplexity", "bytes", "speed", "said"), cells))
    if probes := found.get("probes"):
        cells = [(row["pattern"], number(row["predicted"]), number(row["measured"])) for row in probes]
        parts += [tag("h3", "Prunings that it was fitted to"), table(("pattern", "predicted", "measured"), cells)]
    if published := found.get("published"):
        names = list(dict.fromkeys(key for row in published for key in row))
        cells = [[plain(row.get(key, "")) for key in names] for row in published]
        parts += [tag("h3", "Other models, as published"), table(names, cells)]
        parts.append(tag("p", "From the papers named; no part of the forecast.", class_="note"))
    return join(parts) if parts else None


def _bounds(row: dict) -> tuple[float, float, float]:
    """Lowest, expected and highest perplexity; what is not finite is null in the file."""
    return tuple(math.inf if row[name] is None else row[name] for name in ("low", "perplexity", "high"))


def _said(row: dict) -> str:
    low, expected, high = (number(end) if math.isfinite(end) else "beyond" for end in _bounds(row))
    return f"more than {low}" if expected == "beyond" else f"{expected} ({low} to {high})"


def _share(value: float | None) -> str:
    return "-" if value is None else share(value)


def _speedups(found: dict | None) -> str:
    said = [f"{plural(int(batch), 'token')}: {faster(value)}" for batch, value in (found or {}).items() if value is not None]
    return "; ".join(said) or "not measured"


def quality(known: Known) -> Html | None:
    if not known.evaluation:
        return None
    rows = [(name, found) for name, found in (("dense", known.dense_evaluation), ("this model", known.evaluation)) if found]
    shown = [(name, [(found["perplexity"], "fill", "")], f"{found['perplexity']:.4f}") for name, found in rows]
    over = known.evaluation.get("tokens")
    said = f"Over {over:,} tokens" if over else "Measured"
    if known.dense_perplexity:
        said += f", {change(known.evaluation['perplexity'], known.dense_perplexity)} against the dense model"
    return join((bars(shown), tag("p", f"{said}. Lower is better.", class_="note")))
