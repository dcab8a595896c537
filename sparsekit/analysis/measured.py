"""The sections of the report page that show what other commands measured: sensitivity, forecast, eval."""

from __future__ import annotations

from .charts import bars, lines, ranges
from .html import Html, change, faster, join, number, plural, share, size, tag
from .known import Known, split_name
from .tables import plain, table

MOST_LINES, MOST_PANELS = 20, 12  # of a list of bars; of curves


def sensitivity(known: Known) -> Html | None:
    found = known.sensitivity
    if not found:
        return None
    parts, curves = [], found.get("curves") or []
    blocks = known.blocks
    if curves:
        by_role: dict[str, list[dict]] = {}
        for curve in curves:
            by_role.setdefault(split_name(curve["name"], blocks)[1], []).append(curve)
        highest, panels = max(max(curve["errors"], default=0) for curve in curves), []
        for role, held in list(by_role.items())[:12]:
            series = [
                (curve["errors"], 2 + round(6 * i / max(len(held) - 1, 1)), _curve(curve)) for i, curve in enumerate(held[:200])
            ]
            panels.append(lines(series, held[0]["levels"], highest, f"Output error of {role} by level of sparsity", role))
        caption = "Output error after the update at each level, a line for each matrix; the darker, the later its block."
        left = [f"{len(by_role) - 12} more kinds of matrices are in sensitivity.json."] if len(by_role) > 12 else []
        parts += [tag("figure", tag("div", *panels, class_="panels"), tag("figcaption", caption, *left))]
    if losses := found.get("losses"):
        dense = found.get("dense_loss")
        ordered = sorted(losses, key=lambda row: -row["loss"])[:MOST_LINES]
        shown = [(row["name"], max(row["loss"] - (dense or 0), 0), row) for row in ordered]
        rows = [(name, [(more, "fill", f"at {row['level']}")], f"{row['loss']:.4f} at {row['level']}") for name, more, row in shown]
        head = "Loss with one alone pruned" + (f", over {dense:.4f} of the dense model" if dense is not None else "")
        parts += [tag("h3", head), bars(rows)]
    if (rank := found.get("spearman")) is not None:
        parts.append(tag("p", f"Rank correlation (Spearman) of the measured losses with the layers' errors: {rank:.2f}."))
    return join(parts)


def _curve(curve: dict) -> str:
    return curve["name"] + "".join(f"\n{level}: {share(error, 2)}" for level, error in zip(curve["levels"], curve["errors"]))


def forecast(known: Known) -> Html | None:
    found = known.forecast
    if not found:
        return None
    rows, dense = found.get("rows") or [], found.get("dense_perplexity")
    parts = []
    if rows:
        mark = (dense, f"dense: {dense:.2f}") if dense else None
        shown = [
            (
                row["pattern"], row["low"], row["perplexity"], row["high"], f"{number(row['perplexity'])}",
                f"{row['pattern']}: {_interval(row)}\n{row.get('said', '')}",
            )
            for row in rows if None not in (row.get("low"), row.get("perplexity"), row.get("high"))
        ]  # fmt: skip
        if shown:
            parts += [
                ranges(shown, mark),
                tag("p", "Predicted perplexity with its interval; the line is the dense model.", class_="note"),
            ]
        cells = [
            (
                row["pattern"], _share(row.get("sparsity")), _interval(row), size(row["bytes"]) if row.get("bytes") else "-",
                _speedups(row.get("speedup")), row.get("said", ""),
            )
            for row in rows
        ]  # fmt: skip
        parts.append(table(("pattern", "zeros", "perplexity", "bytes", "speed", "said"), cells))
    if probes := [row for row in found.get("probes") or [] if row.get("predicted") and row.get("measured")]:
        cells = [(row["pattern"], number(row["predicted"]), number(row["measured"])) for row in probes]
        parts += [tag("h3", "Prunings that it was fitted to"), table(("pattern", "predicted", "measured"), cells)]
    if published := found.get("published"):
        names = list(dict.fromkeys(key for row in published for key in row))
        cells = [[plain(row.get(key, "")) for key in names] for row in published]
        parts += [tag("h3", "Other models, as published"), table(names, cells)]
        parts.append(tag("p", "From the papers named; no part of the forecast.", class_="note"))
    return join(parts) if parts else None


def _share(value: float | None) -> str:
    return "-" if value is None else share(value)


def _interval(row: dict) -> str:
    if row.get("perplexity") is None:
        return "-"
    span = f" ({number(row['low'])} to {number(row['high'])})" if row.get("low") is not None and row.get("high") is not None else ""
    return number(row["perplexity"]) + span


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
