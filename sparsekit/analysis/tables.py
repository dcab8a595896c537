"""Tables of the report page, from rows or from any JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .html import Html, join, number, tag

MOST_ROWS = 2000  # of a table: a browser sorts so many at once


def table(head: Iterable[str], rows: Iterable[Iterable[str | tuple[str, float]]], find: bool = False) -> Html:
    """A table that a click on a heading sorts. A cell is its text, or that and the number to sort by.

    find: with a box for a part of the first column's text."""
    head, rows = list(head), [list(row) for row in rows]
    numeric = [bool(rows) and all(isinstance(row[i], tuple) for row in rows) for i in range(len(head))]
    heads = [
        tag("th", tag("button", name, type="button"), scope="col", aria_sort="none", class_="n" if right else None)
        for name, right in zip(head, numeric)
    ]
    body = []
    for row in rows:
        cells = [tag("td", *c[:1], data_v=c[1], class_="n") if isinstance(c, tuple) else tag("td", c) for c in row]
        body.append(tag("tr", *cells))
    whole = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body))
    box = tag("label", "Find ", tag("input", type="search", placeholder="part of a name")) if find else None
    return join((box, tag("div", whole, class_="rows", tabindex="0", role="group", aria_label=f"table of {head[0]}")))


def nested(value: Any) -> Html:
    """Any JSON as tables."""
    if isinstance(value, dict):
        flat = {key: held for key, held in value.items() if not isinstance(held, dict) and not _records(held)}
        parts = [table(("what", "value"), [(key, plain(held)) for key, held in flat.items()])] if flat else []
        for key, held in value.items():
            if key not in flat:
                parts += [tag("h3", key), nested(held)]
        return join(parts)
    if _records(value):
        names = list(dict.fromkeys(key for row in value for key in row))
        return table(names, [[plain(row.get(name, "")) for name in names] for row in value[:MOST_ROWS]])
    return tag("p", plain(value))


def _records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(held)}" for key, held in value.items()) or "none"
    return str(value)
