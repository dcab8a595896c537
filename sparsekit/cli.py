"""The command line: arguments in, one table or one JSON object out, one sentence and exit code 2 for input that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import cli_analysis  # noqa: F401  its commands are the app's too
from .console import (
    CalibField,
    Device,
    DType,
    Json,
    Samples,
    Seed,
    SeqLen,
    Skip,
    app,
    calibration,
    command,
    compute_dtype,
    errors,
    progress_bar,
    say,
    sequence_length,
    show,
)  # fmt: skip
from .documents import to_json
from .errors import SparsekitError, listed

if TYPE_CHECKING:
    from .report import StructuredReport


@command(after="; nothing was written")
def prune(
    context: typer.Context,
    model_dir: Annotated[Path, typer.Argument(help="A Hugging Face folder with safetensors.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    calib: Annotated[
        str | None,
        typer.Option(
            help="What to calibrate on: a UTF-8 text, a folder of .txt and .md files, a .jsonl file, token ids (.npy, .safetensors "
            'or .ids), or "self": text that the model writes. Magnitude needs none.'
        ),
    ] = None,
    calib_field: CalibField = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "--criterion",
            help="sparsegpt (the default), or by scores: wanda, obs, obd, gradient, activation or magnitude.",
        ),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help='N kept of M, such as "2:4" (the default), the share removed, "50%", or "block:32x32@50%".')
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="The pattern of every linear, as `sparsekit plan` writes it.")] = None,
    structured: Annotated[
        list[str] | None,
        typer.Option(
            help="Take parts out whole instead: layers, attention, mlp, experts, heads or ffn with a count or a share, such as "
            "heads=25%; may be repeated."
        ),
    ] = None,
    scope: Annotated[
        str, typer.Option(help="What amounts of heads and ffn are of: each layer, or global, wherever they matter least.")
    ] = "layer",
    round_to: Annotated[int | None, typer.Option(help="Keep a multiple of this many neurons in each layer, such as 64.")] = None,
    compensate: Annotated[bool, typer.Option(help="Whether what is left makes up for heads and ffn by least squares.")] = True,
    format: Annotated[
        str, typer.Option(help="compressed, or dense: zeros written out, loads in plain transformers.")
    ] = "compressed",
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    group: Annotated[
        str | None,
        typer.Option(help="What a share is counted in: row (of outputs), layer, block or model; by default row for wanda alone."),
    ] = None,
    skip: Skip = None,
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output folder where it is not empty, and what is unfinished of it.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from what an interrupted run of the same command finished, if there is one.")
    ] = False,
    max_memory: Annotated[
        str | None, typer.Option(help='What the process may hold, such as "8GiB"; hidden states wait on disk where they exceed it.')
    ] = None,
    offload: Annotated[Path | None, typer.Option(help="The folder for hidden states on disk; by default beside out.")] = None,
    json_out: Json = False,
) -> None:
    """Prune a model, check that every linear holds the pattern, and write it."""
    from . import checkpoint, data, evaluate, pipeline
    from .pipeline import memory
    from .plan import Plan, parse, patterns_in
    from .pruners import method_named

    # What is cheap to refuse is refused before the model is read.
    parts = _parts(context, structured)
    if parts and calib is None:
        raise SparsekitError("--calib must name a text for --structured to measure on what matters least")
    if plan and pattern:
        raise SparsekitError(f"--plan says the pattern of every linear, got --pattern {pattern} too; leave one of them out")
    asked = Plan.load(plan) if plan else parse(pattern or "2:4")
    method = method or (asked.method if plan else None) or "sparsegpt"
    if not parts and method_named(method, patterns_in(asked), group).gathers and calib is None:
        raise SparsekitError(f"--calib must name a text for {method} to calibrate on; magnitude alone needs none")
    if calib_field is not None and calib in (None, data.SELF):
        raise SparsekitError(f"--calib-field belongs to a .jsonl file, got {calib_field!r} with --calib {calib}; leave it out")
    checkpoint.check_format(format)
    source = None if calib in (None, data.SELF) else Path(calib)
    for path in (model_dir, source):
        if path and out.resolve() in (path.resolve(), *path.resolve().parents):
            raise SparsekitError(f"the output folder {out} would be replaced, and must not be or hold the input {path}")
    world = pipeline.World.from_environment(device)
    with world.watched():  # from here on what refuses one rank ends the others
        if parts and world.size > 1:
            raise SparsekitError(f"--structured runs in one process, got {world.size} of torchrun; start it without")
        if world.leads:
            checkpoint.check_new_folder(out, overwrite or resume)
        checkpoint.check_model_folder(model_dir)
        if parts:
            pipeline.check_amounts(checkpoint.skeleton(model_dir), parts, scope, round_to, compensate)
        dtype, length = compute_dtype("auto", device), sequence_length(seq_len, model_dir)
        tokenizer, batches = checkpoint.load_tokenizer(model_dir), ()
        if calib:
            if calib == data.SELF and max_memory is not None:
                tokens = min(samples, evaluate.TEXTS) * length
                memory.check_whole(memory.parse_size(max_memory), model_dir, dtype, world.device, tokens)
            how = dict(device=world.device, dtype=dtype, shown=world.leads)
            batches = calibration(model_dir, tokenizer, calib, calib_field, samples, length, seed, **how)
        if parts:
            how = dict(scope=scope, round_to=round_to, compensate=compensate, device=device, dtype=dtype, tokenizer=tokenizer)
            with progress_bar("") as progress:
                how |= dict(overwrite=overwrite, max_memory=max_memory, progress=progress)
                _show_structured(out, pipeline.prune_structured_folder(model_dir, out, batches, **how, **parts), json_out)
            return
        how = dict(
            format=format,
            group=group,
            skip=skip or (),
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            overwrite=overwrite,
            resume=resume,
            max_memory=max_memory,
            offload=offload,
        )
        with progress_bar(f"{method} {asked}", world.leads) as progress:
            report = pipeline.prune_folder(model_dir, out, batches, method, asked, **how, progress=progress, world=world)
    world.close()
    if not world.leads:
        return
    if report.format != format:
        say(f"no linear holds 2:4 after pruning to {asked}; the weights are stored dense")
    if json_out:
        print(to_json({"out": str(out), **report.to_dict()}))
    else:
        rows = []
        for row in report.linears:
            error = "" if row.output_error is None else f"{row.output_error:.4f}"
            rows.append((row.name, "x".join(map(str, row.shape)), f"{row.sparsity:.1%}", error))
        show(f"{out}: {method} {asked}, {report.seconds:.1f} s", ("linear", "shape", "sparsity", "output error"), rows)
        for name, reason in report.skipped.items():
            print(f"not pruned: {name} ({reason})")
        for row in report.linears:
            if row.statistics != "own" and report.tokens:
                by = "the statistics of its layer" if row.statistics == "layer" else "magnitude"
                print(f"pruned by {by}: {row.name} (saw {row.tokens} tokens)")


_OF_PARTS = ("scope", "round_to", "compensate")
_OF_PATTERNS = ("method", "pattern", "plan", "format", "group", "skip", "resume", "offload")


def _parts(context: typer.Context, structured: list[str] | None) -> dict[str, int | float]:
    """The amounts by part that --structured asks for."""
    from .pipeline import parse_amount
    from .pipeline.structured import PARTS

    given = [name for name in context.params if context.get_parameter_source(name).name != "DEFAULT"]
    names = {name: f"--{name.replace('_', '-')}" for name in given}
    if not structured and (loose := [names[name] for name in given if name in _OF_PARTS]):
        raise SparsekitError(f"{loose[0]} belongs to --structured, and is given without it; leave it out")
    if structured and (other := [names[name] for name in given if name in _OF_PATTERNS]):
        raise SparsekitError(f"--structured takes parts out whole, got {other[0]} too; leave it out, and prune its result with it")
    parts = {}
    for text in structured or ():
        part, _, amount = text.partition("=")
        if part not in PARTS or not amount:
            raise SparsekitError(f"--structured must be {listed(PARTS, 'or')} = an amount, such as heads=25%, got {text!r}")
        if part in parts:
            raise SparsekitError(f"--structured must name each part once, got {part} twice")
        parts[part] = parse_amount(part, amount)
    return parts


def _show_structured(out: Path, report: StructuredReport, json_out: bool) -> None:
    if json_out:
        print(to_json({"out": str(out), **report.to_dict()}))
        return
    rows = []
    for step in report.steps:
        flat = not any(isinstance(one, list) for one in step.removed)
        removed = step.removed if flat else map(len, step.removed)
        rows.append((step.part, "blocks" if flat else "of each block", ", ".join(map(str, removed)), f"{step.seconds:.1f} s"))
    show(f"{out}: {report.seconds:.1f} s", ("part", "removed", "", "time"), rows)
    print(f"{report.parameters:,} of {report.parameters_before:,} parameters are left ({report.parameters_predicted:,} predicted)")
    if report.per_layer_config:
        alike = all(entry == report.per_layer_config[0] for entry in report.per_layer_config)
        why = "transformers' config cannot say what its blocks have left" if alike else "its blocks differ"
        print(f"{why}: sparsekit loads it, transformers alone does not")


@command()
def eval(
    folder: Annotated[Path, typer.Argument(help="A model folder, compressed or ordinary.")],
    text: Annotated[Path, typer.Option(help="A UTF-8 text file.")],
    seq_len: SeqLen = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read no more than this many tokens of the text.")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    json_out: Json = False,
) -> None:
    """Perplexity on a text."""
    from . import checkpoint, data, evaluate

    checkpoint.check_model_folder(folder)
    compute, length = compute_dtype(dtype, device), sequence_length(seq_len, folder)
    tokens = data.read_tokens(text, checkpoint.load_tokenizer(folder))
    data.evaluation_windows(tokens, length, max_tokens)  # refuses a short text before the model is read
    model = checkpoint.load(folder, device=device, dtype=compute)
    with progress_bar("evaluating") as progress:
        result = evaluate.perplexity(model, tokens, length, max_tokens, progress=lambda done, total: progress("", done, total))
    if json_out:
        print(to_json(result))
    else:
        print(f"perplexity {result['perplexity']:.4f} over {result['tokens']} tokens in {result['seconds']:.1f} s")


@command()
def inspect(folder: Annotated[Path, typer.Argument(help="A model folder.")], json_out: Json = False) -> None:
    """What each linear of a model folder holds, and its bytes."""
    from .inspection import inspect as read

    found = read(folder)
    if json_out:
        print(to_json(found))
        return
    rows = [
        (
            row["name"],
            "x".join(map(str, row["shape"])),
            row["pattern"],
            f"{row['sparsity']:.1%}",
            f"{row['bytes']:,}",
            f"{row['bytes'] / row['dense_bytes']:.4f}",
        )
        for row in found["linears"]
    ]
    show(f"{folder}: {found['format']}", ("linear", "shape", "pattern", "sparsity", "bytes", "of dense"), rows)
    print(f"{found['bytes']:,} bytes of weight files")


@command()
def generate(
    folder: Annotated[Path, typer.Argument(help="A model folder, compressed or ordinary.")],
    prompt: Annotated[str, typer.Option(help="What to say to the model.")],
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 64,
    device: Device = "auto",
    dtype: DType = "auto",
    json_out: Json = False,
) -> None:
    """Greedy text from a model, and how fast it came."""
    from . import checkpoint, evaluate

    model = checkpoint.load(folder, device=device, dtype=compute_dtype(dtype, device))
    result = evaluate.generate(model, checkpoint.load_tokenizer(folder), prompt, max_new_tokens)
    print(to_json(result) if json_out else f"{result['text']}\n[{result['tokens_per_second']:.1f} tokens/s]")


@command()
def bench(
    model_dir: Annotated[Path | None, typer.Argument(help="A model folder, whose linears to measure.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help='A weight to measure, as "4096x11008" (out x in); may be repeated.')
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="A number of tokens; may be repeated.")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    tune: Annotated[bool, typer.Option("--tune", help="Keep the rows: products on this machine then choose by them.")] = False,
    json_out: Json = False,
) -> None:
    """How fast each kernel multiplies with a 2:4 weight here, beside the dense product."""
    import torch

    from . import bench as measuring
    from . import checkpoint

    shapes = tuple(map(_shape, shape or ())) + (checkpoint.linear_shapes(model_dir) if model_dir else ())
    place = checkpoint.resolve_device(device)
    compute = compute_dtype(dtype, device)
    compute = torch.bfloat16 if compute == "auto" else compute
    if tune:
        measuring.check_writable(place)
    with progress_bar("measuring") as progress:
        rows = measuring.measure(
            place, compute, shapes or measuring.SHAPES, tuple(tokens or ()) or measuring.TOKENS, progress=progress
        )
    kept = measuring.save(place, rows) if tune else None
    if json_out:
        print(to_json({"device": measuring.key(place), "file": kept and str(kept), "rows": [row._asdict() for row in rows]}))
        return
    dense = {(row.m, row.n, row.k): row.us for row in rows if row.kernel == measuring.DENSE}
    lines = []
    for row in rows:
        kernel = row.kernel + (f" {row.tile}/{row.split}" if row.tile or row.split else "")
        times = f"{row.us:.1f}", f"{dense[row.m, row.n, row.k] / row.us:.2f}"
        lines.append((f"{row.n}x{row.k}", str(row.m), row.dtype, kernel, *times))
    show(measuring.key(place), ("weight", "tokens", "dtype", "kernel", "us", "of dense speed"), lines)
    if kept:
        print(f"kept in {kept}")


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise SparsekitError(f'--shape must be out x in, such as "4096x11008", got {text!r}')
    return int(n), int(k)


@command(after="; what was finished is kept")
def demo(
    model: Annotated[str, typer.Option(help="tiny (shipped with the package) or smollm2 (downloaded once, 93 MB).")] = "tiny",
    out: Annotated[Path, typer.Option(help="Where to put what is made; a second run reuses it.")] = Path("sparsekit-demo"),
    json_out: Json = False,
) -> None:
    """Prune a real language model, store it compressed, reload it in a new process, and show what came of it."""
    from .demo import run

    run(model, out, json_out, errors, progress_bar)


def main() -> None:
    app()
