"""HTML in which all text is escaped but what was made here, and numbers as people read them."""

from __future__ import annotations

import math
from html import escape

_VOID = {"br", "input", "link", "meta"}


class Html(str):
    """Text that is HTML already."""


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element. A child is escaped unless it is Html; None is left out.

    In an attribute's name underscores are hyphens, but for a trailing one, which goes; None and False leave the attribute out."""
    head = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        head += f' {key}="{escape(str(value))}"'
    return Html(f"<{head}>" if name in _VOID else f"<{head}>{join(children)}</{name}>")


def join(children) -> Html:
    """The children one after the other, escaped unless they are Html; a list or tuple stands for what it holds."""
    parts = []
    for child in children:
        if isinstance(child, list | tuple):
            parts.append(join(child))
        elif child is not None:
            parts.append(child if isinstance(child, Html) else escape(str(child)))
    return Html("".join(parts))


def share(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}%}"


def number(value: float | None) -> str:
    """Three significant digits, or as many as the whole part has."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def size(nbytes: float) -> str:
    """Bytes in the largest unit of powers of 1000 that leaves at least one, as files are sold and listed."""
    for unit, each in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= each:
            return f"{nbytes / each:.3g} {unit}" if nbytes / each < 1000 else f"{nbytes / each:,.0f} {unit}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"


def change(now: float, before: float) -> str:
    return f"{now / before - 1:+.1%}"


def faster(value: float) -> str:
    """How many times as fast; what is not more than once says so."""
    return f"{value:.2f}x" if value > 1 else f"{value:.2f}x, not faster"


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
