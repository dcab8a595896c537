"""The commands that look at a model before and after pruning: what it would cost, what it did cost, and why."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Annotated

import typer

from .console import (
    CalibField,
    Device,
    DType,
    Json,
    Samples,
    Seed,
    SeqLen,
    Skip,
    calibration,
    command,
    compute_dtype,
    progress_bar,
    sequence_length,
    show,
)
from .documents import to_json, write_json, write_whole
from .errors import SparsekitError

Calib = Annotated[str | None, typer.Option(help="What to calibrate on, as for `sparsekit prune`.")]
Measured = Annotated[Path | None, typer.Option(help="What `sparsekit sensitivity` wrote of this model, to measure less.")]
LEVELS = "10%,20%,30%,40%,50%,4:8,2:4,60%,70%,80%,90%"
Stream = Annotated[
    bool,
    typer.Option("--stream", help="Read the model block by block, if it does not fit in memory; hidden states wait on disk."),
]


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
    print(to_json({"page": str(page), "bytes": page.stat().st_size}) if json_out else f"wrote {page}")


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
            batches = calibration(dense, tokenizer, calib, None, samples, length, 0, device=place, dtype=compute)
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
        print(to_json(to_dict(checks)))
        return
    for tree in TREES:
        print(f"{tree}?")
        for check in (check for check in checks if check.tree == tree):
            print(f"  {check.severity or check.result:<8}  {check.name}: {check.found}")
            print(f"            checked {check.checked}")
            if check.do:
                print(f"            do: {check.do}")
    print(summarise(checks))


@command(after="; nothing was written")
def sensitivity(
    model_dir: Annotated[Path, typer.Argument(help="A dense model folder.")],
    calib: Calib = None,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("sensitivity.json"),
    eval: Annotated[Path | None, typer.Option(help="A UTF-8 text to measure losses on.")] = None,
    unit: Annotated[
        str | None, typer.Option(help="What is pruned alone for a loss: linear, block or none; by default linear, where --eval is.")
    ] = None,
    levels: Annotated[str, typer.Option(help="The patterns to measure errors at.")] = LEVELS,
    loss_levels: Annotated[str, typer.Option(help="The patterns to measure losses at.")] = "60%",
    max_tokens: Annotated[int | None, typer.Option(help="Read no more than this many tokens of the --eval text.")] = None,
    calib_field: CalibField = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    stream: Stream = False,
    device: Device = "auto",
    json_out: Json = False,
) -> None:
    """What pruning each linear alone costs: the error of its outputs at many levels, and the model's loss."""
    from . import checkpoint, data
    from .analysis import measure_sensitivity
    from .analysis.curves import read_levels
    from .analysis.sensitivity import check_unit

    unit = ("linear" if eval else "none") if unit is None else unit
    asked = [read_levels(_split(text)) for text in (levels, loss_levels)]
    if unit != "none":
        check_unit(unit)
    if (unit != "none") != (eval is not None):
        raise SparsekitError(f"losses need an --eval text and a --unit, linear or block, got --eval {eval} and --unit {unit}")
    if stream and eval:
        raise SparsekitError("losses need the whole model in memory, got --eval with --stream; leave one of them out")
    if max_tokens is not None and not eval:
        raise SparsekitError(f"--max-tokens is how much of --eval is read, got {max_tokens} without it; leave it out")
    checkpoint.check_new_file(out)
    tokenizer, batches, length = _batches(model_dir, calib, calib_field, samples, seq_len, seed, device)
    how = dict(device=device, dtype=compute_dtype("auto", device))
    if eval:
        tokens = data.read_tokens(eval, tokenizer)
        data.evaluation_windows(tokens, length, max_tokens)  # refuses a short text before the model is read
        how |= dict(evaluation=tokens, seq_len=length, max_tokens=max_tokens, unit=unit, loss_levels=asked[1])
    model = model_dir if stream else checkpoint.load(model_dir, device=device, dtype=how["dtype"])
    with progress_bar("sensitivity") as progress:
        found = measure_sensitivity(model, batches, asked[0], **how, progress=progress)
    found.save(out)
    if json_out:
        print(to_json({"out": str(out), **found.to_dict()}))
        return
    rows = []
    for curve in found.curves:
        weight = f"{found.weights[curve.name]:.4g}" if found.weights else ""
        rows.append((curve.name, "x".join(map(str, curve.shape)), weight, *(f"{error:.4f}" for error in curve.errors)))
    show(f"{out}: error of the outputs", ("linear", "shape", "weight", *found.curves[0].levels), rows)
    if found.losses:
        rows = [(one.name, one.level, f"{one.loss:.4f}", f"{one.loss - found.dense_loss:+.4f}") for one in found.losses]
        show(f"loss (dense {found.dense_loss:.4f}) with one {unit} pruned alone", (unit, "level", "loss", "change"), rows)
        rho = "none" if found.spearman is None else f"{found.spearman:.3f}"
        print(f"rank correlation of the losses with the errors of the outputs: {rho}")


@command(after="; nothing was written")
def plan(
    model_dir: Annotated[Path, typer.Argument(help="A dense model folder.")],
    target: Annotated[str, typer.Option(help='The share of all weights to remove, "60%"; by latency the speed-up, "1.2x".')],
    calib: Calib = None,
    out: Annotated[Path, typer.Option(help="The plan to write, for `sparsekit prune --plan`.")] = Path("plan.yaml"),
    by: Annotated[str, typer.Option(help="curves, owl, choices or latency.")] = "curves",
    unit: Annotated[str, typer.Option(help="What gets a share of its own: linear or block; by owl always a block.")] = "linear",
    low: Annotated[str | None, typer.Option("--min", help="No linear loses a smaller share.")] = None,
    high: Annotated[
        str | None, typer.Option("--max", help="No linear loses a larger share; by default halfway from the target to all.")
    ] = None,
    choices: Annotated[
        str | None, typer.Option(help='The patterns to choose from, by default "dense,4:8,2:4", by latency "dense,2:4".')
    ] = None,
    weigh: Annotated[str | None, typer.Option(help="What errors are weighed with: gradient (the default), loss or size.")] = None,
    sensitivity: Measured = None,
    batch: Annotated[int, typer.Option(help="Tokens of the products that are to be fast, by latency.")] = 1,
    calib_field: CalibField = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    stream: Stream = False,
    device: Device = "auto",
    json_out: Json = False,
) -> None:
    """Decide which linear is pruned how far: a plan that a person can edit and `sparsekit prune --plan` follows."""
    from . import checkpoint
    from .analysis import Sensitivity, make_plan
    from .analysis.planning import check_ways

    if by == "owl":
        unit = "block"
    bounds = dict(low=low or 0.0, high=high, choices=None if choices is None else _split(choices))
    check_ways(target, by, unit, weigh, **bounds)
    if batch != 1 and by != "latency":
        raise SparsekitError(f"--batch is for plans by latency, got {batch} for a plan by {by}; leave it out")
    checkpoint.check_new_file(out)
    known = Sensitivity.load(sensitivity) if sensitivity else None
    batches: list = []
    if calib or not known or by == "owl":
        _, batches, _ = _batches(model_dir, calib, calib_field, samples, seq_len, seed, device)
    where = dict(device=device, dtype=compute_dtype("auto", device))
    lazily = stream or by == "owl" or (known is not None and (weigh in ("size", "loss") or bool(known.weights)))
    model = checkpoint.check_model_folder(model_dir) if lazily else checkpoint.load(model_dir, **where)
    how = dict(unit=unit, weigh=weigh, sensitivity=known, tokens=batch, **bounds, **where)
    with progress_bar(f"plan by {by}") as progress:
        made = make_plan(model, batches, target, by, **how, progress=progress)
    made.save(out)
    if json_out:
        print(to_json({"out": str(out), "sparsity": made.sparsity, **made.to_dict()}))
        return
    rows = [
        (name, "x".join(map(str, made.shapes[name])), pattern.brief if pattern else "dense")
        for name, pattern in made.patterns.items()
    ]
    show(f"{out}: {made}", ("linear", "shape", "pattern"), rows)
    print(", ".join(f"{name} {value}" for name, value in made.made.items()))


def _split(text: str) -> list[str]:
    """What stands between the commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _batches(
    folder: Path, calib: str | None, field: str | None, samples: int, seq_len: int | None, seed: int, device: str
) -> tuple:
    """The folder's tokenizer, the calibration batches, and the length of a sequence."""
    from . import checkpoint

    checkpoint.check_model_folder(folder)
    if calib is None:
        raise SparsekitError("--calib must name a text to calibrate on")
    length, tokenizer = sequence_length(seq_len, folder), checkpoint.load_tokenizer(folder)
    where = dict(device=device, dtype=compute_dtype("auto", device))
    return tokenizer, calibration(folder, tokenizer, calib, field, samples, length, seed, **where), length


@command(after="; nothing was written")
def forecast(
    model_dir: Annotated[Path, typer.Argument(help="A Hugging Face folder with safetensors.")],
    text: Annotated[Path, typer.Option("--eval", help="The UTF-8 text to forecast the perplexity on.")],
    calib: Calib = None,
    pattern: Annotated[list[str] | None, typer.Option(help='Such as "2:4" or "50%"; may be repeated.')] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="A plan file; may be repeated.")] = None,
    probes: Annotated[int, typer.Option(help="Prunings to do and evaluate, for the forecast to go by.")] = 12,
    batch: Annotated[list[int] | None, typer.Option(help="Tokens that products take at once; 1, may be repeated.")] = None,
    max_loss: Annotated[
        float | None, typer.Option(help="Say what to choose, if the perplexity may rise by this share: 0.05 is 5 %.")
    ] = None,
    keep_plan: Annotated[Path | None, typer.Option(help="With --max-loss: where to write the plan that is recommended.")] = None,
    sensitivity: Measured = None,
    calib_field: CalibField = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    max_tokens: Annotated[int | None, typer.Option(help="Evaluate on no more than this many tokens of the text.")] = None,
    seed: Seed = 0,
    skip: Skip = None,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="A file to keep the forecast in, as JSON.")] = None,
    json_out: Json = False,
) -> None:
    """What SparseGPT would make of a model: perplexity with an interval, bytes, and speed by what `bench --tune` measured here."""
    from . import checkpoint, data
    from .analysis import Sensitivity
    from .analysis import forecast as analysis
    from .plan import Plan, parse

    asked = [*map(parse, pattern or ()), *map(Plan.load, plan or ())] or list(map(parse, analysis.CANDIDATES))
    batches = tuple(batch or (1,))
    if max_loss is not None and len(batches) > 1:
        raise SparsekitError(f"--max-loss chooses for one --batch, got {', '.join(map(str, batches))}")
    known = None if sensitivity is None else Sensitivity.load(sensitivity)
    if keep_plan is not None and max_loss is None:
        raise SparsekitError(f"--keep-plan keeps what --max-loss recommends, got {keep_plan} without it; leave it out")
    for path in filter(None, (out, keep_plan)):
        checkpoint.check_new_file(path)
    tokenizer, shown, length = _batches(model_dir, calib, calib_field, samples, seq_len, seed, device)
    how = dict(
        seq_len=length,
        max_tokens=max_tokens,
        probes=probes,
        seed=seed,
        skip=skip or (),
        sensitivity=known,
        device=device,
        dtype=compute_dtype("auto", device),
    )
    measured = data.read_tokens(text, tokenizer)
    with progress_bar("forecast") as progress:
        if max_loss is None:
            found = told = analysis.forecast(model_dir, shown, measured, asked, batch=batches, **how, progress=progress)
        else:
            limit = dict(max_quality_loss=max_loss, batch=batches[0])
            found = analysis.recommend(model_dir, shown, measured, candidates=asked, **limit, **how, progress=progress)
            told = found.forecast
    if out is not None:
        write_whole(out, lambda part: write_json(part, found.to_dict()))
    if keep_plan is not None and found.plan is not None:
        found.plan.save(keep_plan)
    if json_out:
        print(to_json(found.to_dict()))
        return
    lines = []
    for row in told.rows:
        speeds = ("not measured" if times is None else f"{times:.2f}" for times in row.speedup.values())
        size = f"{row.bytes:,}", f"{row.bytes / row.dense_bytes:.4f}"
        expected, high = ("beyond" if math.isinf(end) else f"{end:.2f}" for end in (row.perplexity, row.high))
        ends = expected, f"[{row.low:.2f}, {high}]"
        lines.append((row.pattern, f"{row.sparsity:.1%}", *ends, *size, *speeds))
    speeds = [f"speed at {tokens}" for tokens in batches]
    title = f"{model_dir}: dense {told.dense_perplexity:.2f}, {told.tokens} tokens, {len(told.probes)} probes"
    show(title, ("pattern", "sparsity", "perplexity", f"{told.level:.0%} within", "bytes", "of dense", *speeds), lines)
    for row in told.rows:
        print(f"{row.pattern}: {row.said}")
    for row in told.published:
        print(f"published of {row.model}, {row.method} {row.pattern}: {row.dense:.2f} -> {row.perplexity:.2f} ({row.source})")
    if max_loss is not None:
        print(f"recommended: {'nothing' if found.pattern is None else found.pattern}")
        for reason in found.why:
            print(f"  {reason}")
        for name, reason in found.rejected.items():
            print(f"  not {name}: {reason}")
        if keep_plan is not None and found.plan is not None:
            print(f"its plan is in {keep_plan}")
