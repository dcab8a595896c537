"""What every subcommand is made of: the app, one sentence and exit code 2 for bad input, progress bars and tables."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import current_thread, main_thread
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .errors import SparsekitError, interrupted

ABOUT = "2:4 sparsity for language models: prune one, store it small, run it, and know what it cost."

app = typer.Typer(help=ABOUT, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
errors = Console(stderr=True, highlight=False)

# What ends a command, and how it is handled where nobody has said otherwise.
_ENDING = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens a sequence; by default 2048, or the model's context if shorter.")]
CalibField = Annotated[str | None, typer.Option(help='Where the texts of a .jsonl file are; "text" by default.')]
Samples = Annotated[int, typer.Option(help="Sequences to calibrate on.")]
Seed = Annotated[int, typer.Option(help="Chooses the sequences.")]
Skip = Annotated[list[str] | None, typer.Option(help="A linear to leave alone, by name or shell pattern; may be repeated.")]
Device = Annotated[str, typer.Option(help='"auto" (CUDA where torch has it), "cpu", "cuda", "cuda:1", ...')]
DType = Annotated[
    str,
    typer.Option(help='Dtype to compute in: "auto" (fp32 on a CPU, else as stored), "float32", "bfloat16", "float16".'),
]


def command(after: str = "") -> Callable:
    """Registers a subcommand; its user's mistakes become one sentence on stderr and exit code 2, Ctrl-C exit code 130, and SIGTERM
    and SIGHUP likewise what a shell makes of them.

    ``after`` ends the sentence where it was not the user: what a full disk or an interruption leaves behind, unless the error knows
    better, in its attribute ``left``."""

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args, **kwargs):
            noted: list[int] = []
            try:
                with _noted_interrupts(noted):
                    function(*args, **kwargs)
            except BrokenPipeError:  # the reader of stdout has seen enough
                raise
            except (Exception, KeyboardInterrupt) as error:
                left = getattr(error, "left", after)
                if interrupted.is_set() or isinstance(error, KeyboardInterrupt):
                    number = noted[0] if noted else signal.SIGINT
                    ended = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
                    why = getattr(error, "why", None) if number == signal.SIGTERM else None  # torchrun sends it where a rank fails
                    with suppress(OSError):  # SIGHUP: the terminal is gone
                        say(f"{why or ended}{left}")
                    raise typer.Exit(128 + number) from None
                if isinstance(error, SparsekitError):
                    say(f"{error}{getattr(error, 'left', '')}")
                elif isinstance(error, OSError):  # a full disk, a folder that may not be read or written
                    say(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}{left}")
                else:
                    raise
                raise typer.Exit(2) from None

        return app.command()(run)

    return register


@contextmanager
def _noted_interrupts(noted: list[int]) -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt, as ever, and so do SIGTERM and SIGHUP; the first is remembered, in ``noted``.

    What comes while that is seen to is let be, but for a Ctrl-C that a second has passed before: torchrun passes on to each process
    what the terminal has sent it already. What is ignored, as by nohup, stays ignored, and what another handles is left to it."""
    last = 0.0

    def note(number, frame):
        nonlocal last
        before, last = last, time.monotonic()
        if noted and (number != signal.SIGINT or last - before < 1):
            return
        noted.append(number)
        interrupted.set()
        raise KeyboardInterrupt

    interrupted.clear()
    found = {number: signal.getsignal(number) for number in _ENDING} if current_thread() is main_thread() else {}
    ours = [number for number in found if found[number] is _ENDING[number]]
    for number in ours:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, found[number])


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


def calibration(
    folder: Path,
    tokenizer,
    calib: str,
    field: str | None,
    samples: int,
    length: int,
    seed: int,
    *,
    device,
    dtype,
    shown: bool = True,
) -> list:
    """The calibration batches of the folder's model: of what ``--calib`` names, or of text that the model writes itself, for which
    it is loaded to the device in the dtype, and let go."""
    from . import checkpoint, data, evaluate

    config = checkpoint.read_config(folder)
    if calib != data.SELF:
        tokens = data.read_calibration(Path(calib), tokenizer, field, getattr(config.get_text_config(), "vocab_size", None))
        return data.calibration_batches(tokens, samples, length, seed)
    data.check_sampling(samples, length, seed)
    first, model = data.first_token(tokenizer, config), checkpoint.load(folder, device=device, dtype=dtype)
    with progress_bar("writing", shown) as progress:
        return evaluate.own_text(model, first, samples, length, seed, progress=lambda *now: progress("tokens", *now))
