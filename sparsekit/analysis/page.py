"""The report page: one HTML file that says what became of a pruned model, and asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from .. import __version__
from ..documents import write_whole
from ..errors import SparsekitError
from . import measured, sections
from .html import Html, join, tag
from .known import FORECAST, Known, read

PAGE = "report.html"

# Key, title, and what makes it.
_SECTIONS: tuple[tuple[str, str, Callable[[Known], Html | None]], ...] = (
    ("summary", "Summary", sections.summary),
    ("findings", "What the doctor found", measured.findings),
    ("structured", "What was taken out whole", sections.structured),
    ("quality", "Perplexity", measured.quality),
    ("errors", "Error by layer", sections.errors),
    ("allocation", "Sparsity by layer", sections.allocation),
    ("sensitivity", "Sensitivity", measured.sensitivity),
    ("forecast", "Forecast", measured.forecast),
    ("size", "Size", sections.sizes),
    ("speed", "Speed", sections.speed),
    ("time", "Where the time went", sections.times),
    ("matrices", "Every matrix", sections.matrices),
    ("skipped", "Not pruned", sections.skipped),
    ("run", "The run", sections.run),
)


def write_page(folder: str | Path, out: str | Path | None = None, **parts: str | Path | None) -> Path:
    """Writes what ``make_page`` makes of a pruned folder to ``out``, by default report.html in it, and returns where that is."""
    out = Path(folder) / PAGE if out is None else Path(out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise SparsekitError(f"the page must be a file in a folder that is there, got {out}")
    text = make_page(folder, **parts)
    write_whole(out, lambda part: part.write_text(text, encoding="utf-8"))
    return out


def make_page(
    folder: str | Path,
    *,
    sensitivity: str | Path | None = None,
    forecast: str | Path | None = None,
    evaluation: str | Path | None = None,
    dense_evaluation: str | Path | None = None,
    doctor: str | Path | None = None,
) -> str:
    """The HTML of a pruned folder: of its report.json, its weights, its plan.yaml, and of what other commands wrote as JSON.

    sensitivity, forecast, doctor: of ``sparsekit sensitivity``, ``forecast`` and ``doctor --json``; evaluation, dense_evaluation:
    of ``sparsekit eval --json`` on this model and on the dense one. Each is by default the file of that name beside report.json.
    Raises SparsekitError where the folder is no model or has no report.json, and for a file that is not what it should be."""
    known = read(folder, sensitivity, forecast, evaluation, dense_evaluation, doctor)
    shown = []
    for key, title, make in _SECTIONS:
        try:
            made = make(known)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            if make is not measured.forecast:  # all else has been looked at when it was read
                raise
            path = forecast or Path(folder, FORECAST)
            raise SparsekitError(f"{path} must be what sparsekit forecast writes, got {error!r}") from error
        if made is not None:
            shown.append((key, title, made))
    return _assemble(known, shown)


def _assemble(known: Known, shown: list[tuple[str, str, Html]]) -> str:
    links = [tag("a", title, href=f"#{key}") for key, title, _ in shown]
    held = [
        tag("div", made, id=key) if key == "summary" else tag("section", tag("h2", title), made, id=key)
        for key, title, made in shown
    ]
    said = known.raw.get("method"), known.raw.get("pattern"), f"stored {known.held['format']}"
    body = join(
        (
            tag("header", tag("h1", known.name), tag("p", ", ".join(str(part) for part in said if part))),
            tag("nav", *links, aria_label="Sections"),
            tag("main", *held),
            tag("footer", f"Made by sparsekit {__version__}. This file holds all that it shows."),
        )
    )
    here = files(__package__)
    script = (here / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = (here / "page.html").read_text(encoding="utf-8")
    for name, value in (
        ("hash", f"sha256-{digest}"),
        ("title", tag("title", f"{known.name}: sparsekit report")),
        ("script", script),
        ("body", body),  # last: what it holds is not looked through again
    ):
        text = text.replace(f"{{{{{name}}}}}", value, 1)
    return text
