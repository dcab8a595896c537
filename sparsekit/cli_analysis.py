"""The commands that look at a model before and after pruning: what it would cost, what it did cost, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .console import Json, command


@command(after="; nothing was written")
def report(
    folder: Annotated[Path, typer.Argument(help="A pruned model folder, with its report.json.")],
    out: Annotated[Path | None, typer.Option(help="The page to write; by default report.html in the folder.")] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="What `sparsekit sensitivity` wrote; by default sensitivity.json in the folder, if there.")
    ] = None,
    forecast: Annotated[
        Path | None, typer.Option(help="What `sparsekit forecast` wrote; by default forecast.json in the folder, if there.")
    ] = None,
    eval: Annotated[
        Path | None, typer.Option(help="What `sparsekit eval --json` printed of the folder; by default eval.json in it, if there.")
    ] = None,
    dense_eval: Annotated[
        Path | None, typer.Option(help="The same of the dense model; by default eval-dense.json in the folder, if there.")
    ] = None,
    json_out: Json = False,
) -> None:
    """One HTML page of what became of a pruned model; it asks no network for anything."""
    from .analysis.page import write_page

    parts = dict(sensitivity=sensitivity, forecast=forecast, evaluation=eval, dense_evaluation=dense_eval)
    page = write_page(folder, out, **parts)
    print(json.dumps({"page": str(page), "bytes": page.stat().st_size}) if json_out else f"wrote {page}")
