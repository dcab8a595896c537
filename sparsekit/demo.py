"""The whole way once, on a real model: prune, store, reload in a new process, compare.

Each stage's result is kept in ``results.json`` in the output folder, under the settings it was made with, so that a second run
repeats only what is missing.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import __version__
from .assets import asset
from .documents import to_json, write_json, write_whole
from .errors import SparsekitError

Bar = Callable[[str], AbstractContextManager[Callable[[str, int, int], None]]]


@dataclass(frozen=True)
class Settings:
    """What the demo does with one model. Lengths in tokens."""

    seq_len: int
    samples: int
    max_tokens: int
    prompt: str
    new_tokens: int


SETTINGS = {
    "tiny": Settings(128, 128, 1 << 20, "And the LORD said unto Moses,", 48),
    "smollm2": Settings(512, 32, 16_384, "Why is the sky blue? Answer in one sentence.", 48),
}
METHODS = ("magnitude", "wanda", "sparsegpt")
DENSE_DTYPES = ("float32", "bfloat16")  # a CPU may be faster in either; the faster one is shown


def run(name: str, out: Path, as_json: bool, log: Console, bar: Bar) -> None:
    """The demo of model ``name``; prints one table, or one JSON object. Raises SparsekitError for another name."""
    if name not in SETTINGS:
        raise SparsekitError(f"the demo's model must be tiny or smollm2, got {name!r}")
    if out.exists() and not out.is_dir():
        raise SparsekitError(f"the output must be a folder, got the file {out}")
    begin = time.perf_counter()
    settings, out = SETTINGS[name], out.resolve() / name
    out.mkdir(parents=True, exist_ok=True)
    model_dir = _model(name, out, bar)
    stages = _Stages(out / "results.json", {"version": __version__, "machine": machine(), "model": name, **asdict(settings)})
    if not _is_model(out / "compressed"):
        stages.forget("sparsegpt", "compressed speed")

    dense = stages.get("dense", lambda: _evaluate(model_dir, settings, bar, "dense"))
    pruned = {m: stages.get(m, lambda m=m: _prune_and_evaluate(model_dir, m, settings, out, bar)) for m in METHODS}
    speeds = {
        dtype: stages.get(f"dense speed, {dtype}", lambda dtype=dtype: _generate(model_dir, settings, dtype, log))
        for dtype in DENSE_DTYPES
    }
    sparse = stages.get("compressed speed", lambda: _generate(out / "compressed", settings, "auto", log))
    fastest = max(speeds, key=lambda dtype: speeds[dtype]["tokens_per_second"])
    result = {
        "model": name,
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "perplexity": {"dense": dense["perplexity"], **{m: pruned[m]["perplexity"] for m in METHODS}},
        "evaluated_tokens": dense["tokens"],
        "bytes": {"dense": weight_bytes(model_dir), "compressed": weight_bytes(out / "compressed")},
        "tokens_per_second": {"dense": speeds[fastest]["tokens_per_second"], "sparse": sparse["tokens_per_second"]},
        "dense_dtype": fastest,
        "prompt": settings.prompt,
        "sentence": sparse["text"],
        "compressed": str(out / "compressed"),
    }
    if as_json:
        print(to_json(result))
    else:
        _show(result, time.perf_counter() - begin)


class _Stages:
    """Results by stage, kept in a file as they come."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.kept = path, {"settings": settings, "stages": {}}
        if path.is_file():
            try:
                kept = json.loads(path.read_text())
            except ValueError:
                kept = {}
            if isinstance(kept, dict) and kept.get("settings") == settings and isinstance(kept.get("stages"), dict):
                self.kept = kept

    def get(self, stage: str, make: Callable[[], dict]) -> dict:
        if stage not in self.kept["stages"]:
            self.kept["stages"][stage] = make()
            write_whole(self.path, lambda part: write_json(part, self.kept))
        return self.kept["stages"][stage]

    def forget(self, *stages: str) -> None:
        for stage in stages:
            self.kept["stages"].pop(stage, None)


def machine() -> str:
    """Processor, threads and torch of this machine, for a table's caption."""
    import torch

    from .timing import cpu_name

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def weight_bytes(folder: Path) -> int:
    """Bytes of the folder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _model(name: str, out: Path, bar: Bar) -> Path:
    """The dense model's folder: the shipped one, or the one fetched at the first run."""
    if name == "tiny":
        return asset("kjv1m")
    folder = out / "dense"
    if not _is_model(folder):
        from .integrations.gguf import fetch_smollm2

        try:
            with bar("fetching SmolLM2-135M-Instruct:") as progress:
                fetch_smollm2(folder, progress)
        except (ImportError, RuntimeError, ValueError) as error:
            raise SparsekitError(f"SmolLM2 cannot be fetched: {error}") from error
    return folder


def _evaluate(folder: Path, settings: Settings, bar: Bar, what: str, model=None) -> dict:
    """Perplexity on the held-out text, of a model or of the one in the folder."""
    import torch

    from . import checkpoint, data, evaluate

    tokens = data.read_tokens(asset("text", "kjv.test.txt"), checkpoint.load_tokenizer(folder))
    if model is None:
        model = checkpoint.load(folder, dtype="auto" if torch.cuda.is_available() else torch.float32)
    with bar(f"evaluating {what}") as progress:
        return evaluate.perplexity(
            model, tokens, settings.seq_len, settings.max_tokens, progress=lambda done, total: progress("", done, total)
        )


def _prune_and_evaluate(model_dir: Path, method: str, settings: Settings, out: Path, bar: Bar) -> dict:
    """Prunes to 2:4 and evaluates; SparseGPT's model is stored compressed and evaluated in a new process."""
    import torch

    from . import checkpoint, data, linear, pipeline

    model = checkpoint.load(model_dir, dtype="auto" if torch.cuda.is_available() else torch.float32)
    tokenizer = checkpoint.load_tokenizer(model_dir)
    tokens = data.read_tokens(asset("text", "kjv.calib.txt"), tokenizer)
    batches = data.calibration_batches(tokens, settings.samples, settings.seq_len)
    with bar(f"pruning, {method}") as progress:
        report = pipeline.prune(model, batches, method, "2:4", progress=progress)
    stored = checkpoint.stored_dtype(model_dir)
    if method != "sparsegpt":
        for weight in model.parameters():  # rounded as they would be in a file; buffers are never stored
            weight.data = weight.data.to(stored).to(weight.dtype)
        return _evaluate(model_dir, settings, bar, method, model)
    model.to(stored)
    linear.compress(model)
    checkpoint.save(model, out / "compressed", tokenizer=tokenizer, overwrite=True, report=report)
    del model
    text = str(asset("text", "kjv.test.txt"))
    size = ("--seq-len", str(settings.seq_len), "--max-tokens", str(settings.max_tokens))
    with bar("evaluating the compressed model in a new process"):
        return _new_process("eval", str(out / "compressed"), "--text", text, *size)


def _generate(folder: Path, settings: Settings, dtype: str, log: Console) -> dict:
    """A sentence and its speed, in a new process."""
    with log.status(f"generating from {folder.name}, {dtype}"):
        return _new_process(
            "generate",
            str(folder),
            "--prompt",
            settings.prompt,
            "--max-new-tokens",
            str(settings.new_tokens),
            "--dtype",
            dtype,
        )


def _new_process(*arguments: str) -> dict:
    # Beside the package: in a source tree without a built extension the child would find that tree first.
    beside = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "sparsekit", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=beside)
    if done.returncode:
        raise SparsekitError(f"sparsekit {arguments[0]} failed in a new process: {done.stderr.strip()}")
    return json.loads(done.stdout)


def _show(result: dict, seconds: float) -> None:
    sizes, speeds = result["bytes"], result["tokens_per_second"]
    table = Table(
        "", "perplexity", "bytes on disk", "tokens/s",
        title=f"{result['model']} at 2:4, {result['evaluated_tokens']:,} held-out tokens\n{result['machine']}",
    )  # fmt: skip
    ppl = {name: f"{value:.2f}" for name, value in result["perplexity"].items()}
    table.add_row("dense", ppl["dense"], f"{sizes['dense']:,}", f"{speeds['dense']:.1f} ({result['dense_dtype']})")
    table.add_row("magnitude", ppl["magnitude"], "", "")
    table.add_row("wanda", ppl["wanda"], "", "")
    table.add_row("sparsegpt, compressed", ppl["sparsegpt"], f"{sizes['compressed']:,}", f"{speeds['sparse']:.1f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{result['prompt']!r} -> {result['sentence']!r}", markup=False)
    console.print(f"compressed model: {result['compressed']}; {seconds:.0f} s", markup=False)
