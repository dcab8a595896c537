"""The command line: arguments in, one table or one JSON object out, one sentence and exit code 2 for input that cannot be used."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .errors import SparsekitError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
errors = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens a sequence; by default 2048, or the model's context if shorter.")]
Device = Annotated[str, typer.Option(help='"auto" (CUDA where torch has it), "cpu", "cuda", "cuda:1", ...')]
DType = Annotated[
    str,
    typer.Option(help='Dtype to compute in: "auto" (fp32 on a CPU, else as stored), "float32", "bfloat16", "float16".'),
]


def command(after: str = "") -> Callable:
    """Registers a subcommand; its user's mistakes become one sentence on stderr and exit code 2, Ctrl-C exit code 130.

    ``after`` ends the sentence where it was not the user: what a full disk or an interruption leaves behind, unless the error knows
    better, in its attribute ``left``."""

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args, **kwargs):
            try:
                function(*args, **kwargs)
            except SparsekitError as error:
                say(f"{error}")
                raise typer.Exit(2) from None
            except BrokenPipeError:  # the reader of stdout has seen enough
                raise
            except OSError as error:  # a full disk, a folder that may not be read or written
                say(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}{getattr(error, 'left', after)}")
                raise typer.Exit(2) from None
            except KeyboardInterrupt as error:
                say(f"interrupted{getattr(error, 'left', after)}")
                raise typer.Exit(130) from None

        return app.command()(run)

    return register


def say(text: str) -> None:
    """One line on stderr, as it is: not wrapped, and no part of a path taken for markup or an emoji."""
    errors.print(f"sparsekit: {text}", soft_wrap=True, markup=False, emoji=False)


@contextmanager
def progress_bar(text: str, shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A rich progress bar on stderr where that is a terminal, as a function of what is under way, how much is done, of how much."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    # Elsewhere rich would leave an empty line behind.
    with Progress(*columns, *times, console=errors, transient=True, disable=not (shown and errors.is_terminal)) as bar:
        task = bar.add_task(text, total=None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{text} {what}".strip(), completed=done, total=total)

        yield advance


def show(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """One table on stdout; in a pipe as wide as its cells, so that every name stays in one piece."""
    table = Table(title=Text(title))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:
        console.width = 10_000
    console.print(table)


def compute_dtype(dtype: str, device: str):
    """The torch dtype to load with: what was asked for, or fp32 on a CPU and as stored elsewhere."""
    import torch

    from .checkpoint import resolve_device

    if dtype == "auto":
        return torch.float32 if resolve_device(device).type == "cpu" else "auto"
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise SparsekitError(f"the dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    return known[dtype]


def sequence_length(asked: int | None, folder: Path) -> int:
    """The length asked for, or 2048, within the context of the folder's model."""
    from .checkpoint import read_config
    from .data import context_length

    context = context_length(read_config(folder))
    if asked is not None and not 1 <= asked <= context:
        raise SparsekitError(f"--seq-len must be 1 to the model's context of {context} tokens, got {asked}")
    return min(2048, context) if asked is None else asked


@command(after="; nothing was written")
def prune(
    model_dir: Annotated[Path, typer.Argument(help="A Hugging Face folder with safetensors.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    calib: Annotated[
        str | None,
        typer.Option(
            help="What to calibrate on: a UTF-8 text, a folder of .txt and .md files, a .jsonl file, token ids (.npy, .safetensors "
            'or .ids), or "self": text that the model writes. Magnitude needs none.'
        ),
    ] = None,
    calib_field: Annotated[str | None, typer.Option(help='Where the texts of a .jsonl file are; "text" by default.')] = None,
    method: Annotated[
        str, typer.Option("--method", "--criterion", help="sparsegpt, or by scores: wanda, magnitude, activation, obd or obs.")
    ] = "sparsegpt",
    pattern: Annotated[
        str, typer.Option(help='N kept of M, such as "2:4", the share removed, such as "50%", or "block:32x32@50%".')
    ] = "2:4",
    format: Annotated[
        str, typer.Option(help="compressed, or dense: zeros written out, loads in plain transformers.")
    ] = "compressed",
    samples: Annotated[int, typer.Option(help="Sequences to calibrate on.")] = 128,
    seq_len: SeqLen = None,
    seed: Annotated[int, typer.Option(help="Chooses the sequences.")] = 0,
    group: Annotated[
        str | None, typer.Option(help="What a share is counted in: row (of outputs) or layer; by default row for wanda alone.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="A linear to leave alone, by name or shell pattern; may be repeated.")
    ] = None,
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
    from .patterns import Pattern
    from .pruners import method_named

    # What is cheap to refuse is refused before the model is read.
    if method_named(method, Pattern.parse(pattern), group).gathers and calib is None:
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
        if world.leads:
            checkpoint.check_new_folder(out, overwrite or resume)
        checkpoint.check_model_folder(model_dir)
        dtype, length = compute_dtype("auto", device), sequence_length(seq_len, model_dir)
        tokenizer = checkpoint.load_tokenizer(model_dir)
        batches, config = (), checkpoint.read_config(model_dir)
        if source:
            tokens = data.read_calibration(source, tokenizer, calib_field, getattr(config.get_text_config(), "vocab_size", None))
            batches = data.calibration_batches(tokens, samples, length, seed)
        elif calib:
            data.check_sampling(samples, length, seed)
            first, model = data.first_token(tokenizer, config), checkpoint.load(model_dir, device=world.device, dtype=dtype)
            with progress_bar("writing", world.leads) as progress:
                batches = evaluate.own_text(model, first, samples, length, seed, progress=lambda *now: progress("tokens", *now))
            del model  # from here on one block is in memory
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
        with progress_bar(f"{method} {pattern}", world.leads) as progress:
            report = pipeline.prune_folder(model_dir, out, batches, method, pattern, **how, progress=progress, world=world)
    world.close()
    if not world.leads:
        return
    if report.format != format:
        say(f"no linear holds 2:4 after pruning to {pattern}; the weights are stored dense")
    if json_out:
        print(json.dumps({"out": str(out), **report.to_dict()}))
    else:
        rows = []
        for row in report.linears:
            error = "" if row.output_error is None else f"{row.output_error:.4f}"
            rows.append((row.name, "x".join(map(str, row.shape)), f"{row.sparsity:.1%}", error))
        show(f"{out}: {method} {pattern}, {report.seconds:.1f} s", ("linear", "shape", "sparsity", "output error"), rows)
        for name, reason in report.skipped.items():
            print(f"not pruned: {name} ({reason})")
        for row in report.linears:
            if row.statistics != "own" and report.tokens:
                by = "the statistics of its layer" if row.statistics == "layer" else "magnitude"
                print(f"pruned by {by}: {row.name} (saw {row.tokens} tokens)")


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
        print(json.dumps(result))
    else:
        print(f"perplexity {result['perplexity']:.4f} over {result['tokens']} tokens in {result['seconds']:.1f} s")


@command()
def inspect(folder: Annotated[Path, typer.Argument(help="A model folder.")], json_out: Json = False) -> None:
    """What each linear of a model folder holds, and its bytes."""
    from .inspection import inspect as read

    found = read(folder)
    if json_out:
        print(json.dumps(found))
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
    print(json.dumps(result) if json_out else f"{result['text']}\n[{result['tokens_per_second']:.1f} tokens/s]")


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
        print(json.dumps({"device": measuring.key(place), "file": kept and str(kept), "rows": [row._asdict() for row in rows]}))
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
