"""The commands that look at a model before and after pruning: what it would cost, what it did cost, and why."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated

import typer

from .console import Device, DType, Json, SeqLen, command, compute_dtype, progress_bar, sequence_length
from .errors import SparsekitError


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
    doctor: Annotated[
        Path | None, typer.Option(help="What `sparsekit doctor --json` printed; by default doctor.json in the folder, if there.")
    ] = None,
    json_out: Json = False,
) -> None:
    """One HTML page of what became of a pruned model; it asks no network for anything."""
    from .analysis.page import write_page

    parts = dict(sensitivity=sensitivity, forecast=forecast, evaluation=eval, dense_evaluation=dense_eval, doctor=doctor)
    page = write_page(folder, out, **parts)
    print(json.dumps({"page": str(page), "bytes": page.stat().st_size}) if json_out else f"wrote {page}")


@command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="A pruned model folder.")],
    dense: Annotated[Path | None, typer.Option(help="The folder that it was pruned from.")] = None,
    calib: Annotated[
        str | None, typer.Option(help="Text that the model is for, as of `prune`: with --dense, errors are measured on it.")
    ] = None,
    eval: Annotated[Path | None, typer.Option(help="A UTF-8 text: with --dense, perplexities are compared on it.")] = None,
    batch: Annotated[int, typer.Option(help="Tokens a product, where speed is asked about.")] = 1,
    gpu: Annotated[
        str | None, typer.Option(help='Hardware to ask about in place of this machine, such as "L4", "9.0" or "cpu".')
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences of --calib to measure on.")] = 32,
    seq_len: SeqLen = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of --eval to read at most.")] = 16384,
    device: Device = "auto",
    dtype: DType = "auto",
    json_out: Json = False,
) -> None:
    """Why a pruned model got worse or no faster: what was checked, what was found, what to do."""
    from . import checkpoint, data, evaluate
    from .analysis.doctor import diagnose, summarise, to_dict
    from .analysis.patient import TREES

    if dense is None and (calib or eval):
        raise SparsekitError("--calib and --eval compare with the dense model, and none is given; give --dense")
    checkpoint.check_model_folder(folder)
    compute, place = compute_dtype(dtype, device), checkpoint.resolve_device(device)
    batches, perplexities = [], None
    if dense is not None and (calib or eval):
        checkpoint.check_model_folder(dense)
        length, tokenizer = sequence_length(seq_len, dense), checkpoint.load_tokenizer(dense)
        if calib:
            batches = data.calibration_batches(data.read_calibration(calib, tokenizer), samples, length)
        if eval:
            tokens, found = data.read_tokens(eval, tokenizer), []
            data.evaluation_windows(tokens, length, max_tokens)  # refuses a short text before a model is read
            for each in (dense, folder):
                with progress_bar(f"evaluating {each.name}") as progress:
                    model = checkpoint.load(each, device=place, dtype=compute)
                    shown = functools.partial(progress, "")
                    found.append(evaluate.perplexity(model, tokens, length, max_tokens, progress=shown)["perplexity"])
                    del model
            perplexities = tuple(found)
    asked = dict(batch=batch, gpu=gpu, device=place, dtype=None if compute == "auto" else compute)
    with progress_bar("measuring") as progress:
        checks = diagnose(folder, dense=dense, batches=batches, perplexities=perplexities, **asked, progress=progress)
    if json_out:
        print(json.dumps(to_dict(checks)))
        return
    for tree in TREES:
        print(f"{tree}?")
        for check in (check for check in checks if check.tree == tree):
            print(f"  {check.severity or check.result:<8}  {check.name}: {check.found}")
            print(f"            checked {check.checked}")
            if check.do:
                print(f"            do: {check.do}")
    print(summarise(checks))
