"""The sections of the report page, each made from what is known of a pruned model, or None where that says nothing of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable

from ..report import LinearReport
from .charts import SERIES, Scale, bars, figure, heatmap, legend, legend_of, scatter
from .html import Html, change, duration, faster, join, number, plural, share, size, tag
from .known import Known, split_name
from .tables import MOST_ROWS, nested, plain, table

MOST_PATTERNS, MOST_NUMBERS = 12, 16  # of a list of bars: a plan may have hundreds; of neurons in a cell


# ---- what stands at the top ----


def summary(known: Known) -> Html:
    report, held = known.report, known.held
    tiles = []
    if report and report.linears:
        of_all = sum(row["sparsity"] * math.prod(row["shape"]) for row in held["linears"])
        every = sum(math.prod(row["shape"]) for row in held["linears"]) or 1
        said = f"{plural(len(report.linears), 'pruned matrix', 'pruned matrices')}; {share(of_all / every)} of all linears"
        tiles.append(_tile("Zeros", share(report.sparsity), said))
    if perplexity := (known.evaluation or {}).get("perplexity"):
        dense = known.dense_perplexity
        said = f"dense {dense:.2f}, {change(perplexity, dense)}" if dense else f"over {known.evaluation.get('tokens', 0):,} tokens"
        tiles.append(_tile("Perplexity", f"{perplexity:.2f}", said))
    if rows := _measured(known):
        worst, middle = max(rows, key=_error), statistics.median(map(_error, rows))
        tiles.append(_tile("Output error, median", share(middle), f"worst {share(worst.output_error)}: {worst.name}"))
    if now := known.raw.get("parameters"):
        before = known.raw.get("parameters_before") or now
        tiles.append(_tile("Parameters", f"{now:,}", f"of {before:,}, {change(now, before)}"))
    dense_bytes = _dense_bytes(held)
    tiles.append(_tile("Weight files", size(held["bytes"]), f"{share(held['bytes'] / dense_bytes)} of {size(dense_bytes)} dense"))
    if report:
        whom = f"{report.tokens:,} tokens" if report.tokens else "no calibration"
        tiles.append(_tile("Pruned in", duration(report.seconds), f"{whom}, {plural(report.processes, 'process', 'processes')}"))
        if report.peak_memory:
            tiles.append(_tile("Peak memory", size(report.peak_memory), "the most that was held at once"))
    return tag("div", *tiles, class_="tiles")


def _tile(name: str, value: str, said: str) -> Html:
    return tag("div", tag("h3", name), tag("strong", value), tag("p", said), class_="tile")


def _dense_bytes(held: dict) -> int:
    return held["bytes"] + sum(row["dense_bytes"] - row["bytes"] for row in held["linears"])


# ---- error and sparsity by layer ----


def _measured(known: Known) -> list[LinearReport]:
    """The matrices whose error is known."""
    return [row for row in known.report.linears if row.output_error is not None] if known.report else []


def _error(row: LinearReport) -> float:
    return row.output_error


def errors(known: Known) -> Html | None:
    if not (rows := _measured(known)):
        return None
    said = "Squared error of a matrix's outputs over their square, on the calibration tokens."
    charts = [_map(known, rows, _error, share, "Output error after pruning", "output error")]
    both = [row for row in rows if row.output_error_masked and row.output_error > 0]
    if both:
        roles = _roles(known, both)
        points = [
            (row.output_error_masked, row.output_error, roles.index(_role(known, row.name, roles)), f"{row.name}\n{_errors(row)}")
            for row in both
        ]
        chart = scatter(points, "mask alone", "after the update", "Output error before and after the update of the weights")
        less = statistics.median(row.output_error / row.output_error_masked for row in both)
        caption = (
            f"Each point is a matrix: its error if the mask alone were applied, and after what is left made up for it. Below the "
            f"line the update helped; the median matrix keeps {share(less, 0)} of the mask's error."
        )
        charts.append(figure(chart, caption, legend(dict(enumerate(roles)))))
    parts = [tag("p", said), tag("div", *charts, class_="beside")]
    worst = sorted(rows, key=_error, reverse=True)[:10]
    most = [(row.name, [(row.output_error, "fill", _errors(row))], share(row.output_error)) for row in worst]
    parts += [tag("h3", "The largest errors"), bars(most)]
    return join(parts)


def _errors(row: LinearReport) -> str:
    masked = f", mask alone {share(row.output_error_masked, 2)}" if row.output_error_masked is not None else ""
    return f"output error {share(row.output_error, 2)}{masked}"


def _roles(known: Known, rows: Iterable[LinearReport]) -> list[str]:
    """At most as many roles as there are colours, the last one "others" where there are more."""
    names = list(dict.fromkeys(split_name(row.name, known.blocks)[1] for row in rows))
    return names if len(names) <= SERIES else [*names[: SERIES - 1], "others"]


def _role(known: Known, name: str, roles: list[str]) -> str:
    role = split_name(name, known.blocks)[1]
    return role if role in roles else "others"


def _map(known: Known, rows: list, value: Callable, said: Callable, caption: str, what: str) -> Html:
    """A heat map by role and block; where several matrices (experts) share a cell it shows the mean by weights."""
    groups: dict[tuple[str, str], list] = {}
    for row in rows:
        block, role = split_name(row.name, known.blocks)
        groups.setdefault((role, block), []).append(row)
    cells = {}
    for key, held in groups.items():
        weights = [math.prod(row.shape) for row in held]
        mean = sum(value(row) * n for row, n in zip(held, weights)) / max(sum(weights), 1)
        tip = f"{held[0].name}\n{what} {said(mean, 2)}"
        if len(held) > 1:
            worst = max(held, key=value)
            tip = f"block {key[1]}, {key[0]}: {len(held)} matrices\n{what} {said(mean, 2)}, "
            tip += f"most {said(value(worst), 2)}: {worst.name}"
        cells[key] = mean, said(mean, 0 if mean >= 0.1 else 1), tip
    scale = Scale([mean for mean, *_ in cells.values()])
    roles, blocks = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
    chart = heatmap(roles, blocks, cells, f"{caption}, by matrix and block", scale)
    return figure(chart, f"{caption}, by matrix (down) and block (across).", legend_of(scale, said))


def allocation(known: Known) -> Html | None:
    rows = known.report.linears if known.report else []
    if not rows:
        return None
    if max(row.sparsity for row in rows) - min(row.sparsity for row in rows) < 0.005 and not known.plan:
        return tag("p", f"Every pruned matrix has the same share of zeros, {share(rows[0].sparsity)}: no plan was given.")
    parts = [_map(known, rows, lambda row: row.sparsity, share, "Share of zeros", "zeros")]
    if known.plan:
        patterns: dict[str, tuple[int, int]] = {}
        shapes = {row["name"]: row["shape"] for row in known.held["linears"]} | {row.name: row.shape for row in rows}
        for name, (pattern, _) in sorted(known.plan.items(), key=lambda item: item[1][1]):
            count, weights = patterns.get(pattern, (0, 0))
            patterns[pattern] = count + 1, weights + math.prod(shapes.get(name, (0,)))
        whole = sum(weights for _, weights in patterns.values()) or 1
        listed = [
            (pattern, [(weights, "fill", "")], f"{plural(count, 'matrix', 'matrices')}, {share(weights / whole)} of the weights")
            for pattern, (count, weights) in patterns.items()
        ]
        ends = list(patterns)[:: max(len(patterns) - 1, 1)]
        said = f"The plan gives {plural(len(known.plan), 'matrix', 'matrices')} {len(patterns)} patterns, {ends[0]} to {ends[-1]}."
        parts += [tag("h3", "The plan"), bars(listed) if len(listed) <= MOST_PATTERNS else tag("p", said)]
    return join(parts)


# ---- size, speed, time ----


def sizes(known: Known) -> Html:
    held, linears = known.held, known.held["linears"]
    pruned = {row.name for row in known.report.linears} if known.report else set()
    dense = [sum(row["dense_bytes"] for row in linears if (row["name"] in pruned) is which) for which in (True, False)]
    now = [sum(row["bytes"] for row in linears if (row["name"] in pruned) is which) for which in (True, False)]
    rest = held["bytes"] - sum(now)
    names = ("pruned linears", "linears left dense", "all else: embeddings, norms, biases, experts held together, headers")
    rows = []
    for label, parts in (("dense", dense), (f"as stored ({held['format']})", now)):
        filled = [(value, f"c{i}", f"{names[i]}: {size(value)}") for i, value in enumerate((*parts, rest)) if value]
        rows.append((label, filled, size(sum(value for value, *_ in filled))))
    parts = [bars(rows), legend({i: names[i] for i, value in enumerate((*dense, rest)) if value})]
    if held["format"] == "dense" and pruned:
        parts.append(
            tag("p", "Stored dense, zeros written out: it loads everywhere, and takes the bytes of the dense model.", class_="note")
        )
    elif sum(now[:1]):
        parts.append(
            tag(
                "p", f"The pruned linears take {share(now[0] / dense[0], 2)} of their dense bytes, indices included.", class_="note"
            )
        )
    return join(parts)


def speed(known: Known) -> Html:
    shapes = sorted({tuple(row["shape"]) for row in known.held["linears"] if row["pattern"] in ("2:4", "1:4")}, reverse=True)
    if not shapes:
        left = ", of what is left" if known.raw.get("structured") else ": not faster"
        return tag("p", f"No linear holds 2:4, so that every product is the dense one{left}.")
    measured = {key: found for key, found in known.speeds.items() if key[1:] in shapes}
    missing = [shape for shape in shapes if not any(key[1:] == shape for key in measured)]
    parts = []
    if measured:
        tokens = sorted({m for found in measured.values() for m in found})
        head = ("weight (out x in)", "dtype", *(plural(m, "token") for m in tokens))
        cells = [
            (f"{n} x {k}", dtype, *(faster(found[m]) if m in found else "-" for m in tokens))
            for (dtype, n, k), found in sorted(measured.items(), key=lambda item: (-item[0][1] * item[0][2], item[0]))
        ]
        parts += [tag("p", f"Times as fast as the dense product, measured {known.measured}."), table(head, cells)]
    if missing:
        said = ", ".join(f"{n} x {k}" for n, k in missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        parts.append(
            tag("p", f"Not measured {known.measured}: {said}. ", tag("code", "sparsekit bench DIR --tune"), " does.", class_="note")
        )
    parts.append(tag("p", known.machine, class_="note"))
    return join(parts)


def times(known: Known) -> Html | None:
    phases = known.report.phases if known.report else {}
    if not phases:
        return None
    whole = sum(phases.values()) or 1
    ordered = sorted(phases.items(), key=lambda item: -item[1])
    rows = [(name, [(seconds, "fill", "")], f"{duration(seconds)}, {share(seconds / whole, 0)}") for name, seconds in ordered]
    said = "Over all blocks and their matrices"
    if known.report.processes > 1:
        said += f", of one of {known.report.processes} processes"
    return join((bars(rows), tag("p", f"{said}. The run as a whole took {duration(known.report.seconds)}.", class_="note")))


# ---- tables ----


def matrices(known: Known) -> Html:
    told = {row.name: row for row in known.report.linears} if known.report else {}
    held = {row["name"]: row for row in known.held["linears"]}
    names = list(dict.fromkeys((*told, *held)))
    worst = sorted(names, key=lambda name: -(told[name].output_error or 0) if name in told else 1)
    shown = names if len(names) <= MOST_ROWS else worst[:MOST_ROWS]
    plan = ("planned",) if known.plan else ()
    head = (
        "matrix", "out x in", "holds", *plan, "zeros", "error", "mask alone", "damping", "tokens", "inputs of", "seconds", "bytes",
        "of dense",
    )  # fmt: skip
    cells = []
    for name in shown:
        row, found = told.get(name), held.get(name)
        shape = row.shape if row else found["shape"]
        zeros = found["sparsity"] if found else row.sparsity
        spent = sum(row.seconds.values()) if row else None
        planned = [(known.plan[name][0], known.plan[name][1]) if name in known.plan else ("-", -1)] if known.plan else []
        cells.append(
            (
                name,
                (f"{shape[0]} x {shape[1]}", math.prod(shape)),
                found["pattern"] if found else row.pattern,
                *planned,
                (share(zeros), zeros),
                _cell(row and row.output_error, lambda value: share(value, 2)),
                _cell(row and row.output_error_masked, lambda value: share(value, 2)),
                _cell(row and row.damping, number),
                _cell(row and known.report.tokens and row.tokens, lambda value: f"{value:,}"),
                row.statistics if row and known.report.tokens else "-",
                _cell(spent or None, lambda value: f"{value:.3f}"),
                _cell(found and found["bytes"], lambda value: f"{value:,}"),
                _cell(found and found["bytes"] / max(found["dense_bytes"], 1), share),
            )
        )
    left = len(names) - len(shown)
    note = f"The {len(shown):,} with the largest errors of {len(names):,}; report.json holds the others." if left else None
    kept = [i for i in range(len(head)) if any(row[i] not in ("-", _cell(None, str)) for row in cells)]  # of what is known at all
    rows = [[row[i] for i in kept] for row in cells]
    return join((table([head[i] for i in kept], rows, find=True), tag("p", note, class_="note") if note else None))


def _cell(value: float | None, said: Callable) -> tuple[str, float]:
    return ("-", -1.0) if value is None else (said(value), value)


def skipped(known: Known) -> Html | None:
    found = known.report.skipped if known.report else {}
    return table(("module", "why it was not pruned"), list(found.items())) if found else None


def structured(known: Known) -> Html | None:
    """What was taken out whole, a step at a time."""
    raw = known.raw
    if not raw.get("structured"):
        return None
    sizes = [(name, raw[key]) for name, key in (("before", "parameters_before"), ("now", "parameters")) if raw.get(key)]
    parts = [tag("p", f"Asked for: {plain(raw['asked'])}.")] if raw.get("asked") else []
    if sizes:
        shown = [(name, [(count, "fill", "")], f"{count:,} parameters") for name, count in sizes]
        parts.append(bars(shown))
    for step in raw.get("steps") or []:
        parts.append(tag("h3", ", ".join(filter(None, (step["part"], step.get("method"), duration(step.get("seconds", 0)))))))
        whole = all(isinstance(number, int) for number in step["removed"])
        parts.append((_taken_whole if whole else _taken_by_block)(step))
    return join(parts) if parts else nested(raw["structured"])


def _taken_whole(step: dict) -> Html:
    """Layers and sub-layers, in the order in which they went."""
    rows = [
        (str(i + 1), str(block), _cell(importance, number))
        for i, (block, importance) in enumerate(zip(step["removed"], step["importance"]))
    ]
    return table(("went", "block", "importance"), rows)


def _taken_by_block(step: dict) -> Html:
    """Heads, neurons and experts: of each block how many went, which, and what that did to the linear that reads them."""
    rows, errors = [], {"output_error_plain": "error, plain", "output_error": "error, made up for"}
    errors = {key: name for key, name in errors.items() if step.get(key)}
    for i, (gone, importance) in enumerate(zip(step["removed"], step["importance"])):
        which = plain(gone[:MOST_NUMBERS]) + (f" and {len(gone) - MOST_NUMBERS:,} more" if len(gone) > MOST_NUMBERS else "")
        lost = sum(importance[k] for k in gone) / (sum(importance) or 1) if isinstance(importance, list) else importance
        rows.append(
            (
                str(i),
                (f"{len(gone):,}", len(gone)),
                which,
                _cell(lost, share),
                *(_cell(step[key][i], lambda value: share(value, 2)) for key in errors),
            )
        )
    return table(("block", "gone", "which", "of the importance", *errors.values()), rows)


def run(known: Known) -> Html:
    """What was asked for: all of report.json that is a plain value, and the fingerprint."""
    single = {key: value for key, value in known.raw.items() if not isinstance(value, dict | list)}
    single |= known.report.fingerprint if known.report else {}
    return table(("setting", "value"), [(key, plain(value)) for key, value in single.items()])
