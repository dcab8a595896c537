"""What pruning a folder takes in memory: flat in depth, within a limit, and how much is asked for where the limit is too small."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import build, token_batches
from safetensors.torch import load_file
from typer.testing import CliRunner

import sparsekit
from sparsekit import SparsekitError, prune_folder
from sparsekit.cli import app
from sparsekit.pipeline import find_blocks, memory, prune_structured_folder, structured
from sparsekit.pipeline import folder as folders
from sparsekit.pipeline.memory import parse_size, shown_size
from sparsekit.pipeline.store import OnDisk
from sparsekit.pipeline.stream import Stream

MIB = 1 << 20

# Prunes argv's model after a small one, by which what is imported late and the pools of threads are there; prints the bytes added.
CHILD = """
import json, sys, torch
from models import VOCABULARY
from sparsekit import prune_folder
from sparsekit.pipeline import memory
from sparsekit.timing import peak_memory

small, folder, out, method, limit, samples = sys.argv[1:]
cpu = torch.device("cpu")
tokens = torch.randint(3, VOCABULARY, (int(samples), 4, 128), generator=torch.Generator().manual_seed(0))
prune_folder(small, out + "-small", list(tokens[:1, :, :16]), method, device="cpu", dtype=torch.float32)
before = memory.taken()
memory.taken = lambda: 0  # the limit is on what is added
report = prune_folder(folder, out, list(tokens), method, device="cpu", dtype=torch.float32, max_memory=int(limit) or None)
print(json.dumps([peak_memory(cpu) - before, report.peak_memory - before]))
"""


def child(script: str, *options) -> str:
    """What the script prints in a process of its own."""
    paths = [str(Path(sparsekit.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system: else chance keeps 10 MB of it, or none
    done = subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def added(tmp_path: Path, depth: int, method: str, limit: int = 0, samples: int = 2, **sizes) -> tuple[int, int]:
    """Bytes that pruning a model of so many blocks adds at its peak to a process, and bytes of its weights in the file."""
    if not (tmp_path / "small").exists():
        build("llama", torch.bfloat16).save_pretrained(tmp_path / "small")
    folder = tmp_path / f"model-{depth}"
    build("llama", torch.bfloat16, num_hidden_layers=depth, max_position_embeddings=128, **sizes).save_pretrained(folder)
    options = (tmp_path / "small", folder, tmp_path / f"out-{depth}", method, str(limit), str(samples))
    peak, reported = json.loads(child(CHILD, *options))
    assert reported == pytest.approx(peak, abs=16 * MIB)
    return peak, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_memory_is_flat_in_depth(tmp_path):
    sizes = dict(hidden_size=384, intermediate_size=1024)
    peaks = {depth: added(tmp_path, depth, "sparsegpt", **sizes) for depth in (4, 16)}
    assert peaks[16][1] > 3.5 * peaks[4][1]
    assert peaks[16][0] <= 1.15 * peaks[4][0]


def test_a_model_larger_than_the_limit_goes_through(tmp_path):
    """Of 24 blocks' weights and the hidden states no more than the limit is there at a time; wanda's own needs are small."""
    sizes = dict(hidden_size=384, intermediate_size=1024)
    limit = 70_000_000
    peak, weights = added(tmp_path, 24, "wanda", limit, samples=4, **sizes)
    assert weights > limit
    assert peak <= limit


STRUCTURED = """
import json, sys, torch
from models import VOCABULARY
from sparsekit.pipeline import memory, prune_structured_folder
from sparsekit.timing import peak_memory

small, folder, out = sys.argv[1:]
cpu = torch.device("cpu")
tokens = torch.randint(3, VOCABULARY, (2, 4, 128), generator=torch.Generator().manual_seed(0))
asked = dict(layers=1, heads=2, ffn=0.25, device="cpu", dtype=torch.float32)
prune_structured_folder(small, out + "-small", list(tokens[:, :, :16]), **asked)
before = memory.taken()
prune_structured_folder(folder, out, list(tokens), **asked)
print(peak_memory(cpu) - before)
"""


def test_taking_parts_out_needs_no_more_than_it_says(tmp_path, monkeypatch):
    """The estimate is above what is taken, and less than twice that."""
    build("llama", torch.bfloat16).save_pretrained(tmp_path / "small")
    sizes = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=5, max_position_embeddings=128)
    build("llama", torch.bfloat16, **sizes).save_pretrained(tmp_path / "model")
    peak = json.loads(child(STRUCTURED, tmp_path / "small", tmp_path / "model", tmp_path / "out"))
    monkeypatch.setattr(memory, "taken", lambda: 0)
    tokens = torch.zeros(2, 4, 128, dtype=torch.long)
    asked = dict(layers=1, heads=2, ffn=0.25, device="cpu", dtype=torch.float32)
    with pytest.raises(SparsekitError, match=r"at least .*: it takes .* for the weights of the whole model") as error:
        prune_structured_folder(tmp_path / "model", tmp_path / "none", list(tokens), max_memory=1, **asked)
    said = parse_size(re.search(r"at least (\S+),", str(error.value))[1])
    assert 0.5 * said < peak <= said


@pytest.mark.parametrize("asked", [{"layers": 1}, {"heads": 2}])
def test_parts_of_a_model_that_does_not_fit_are_refused_before_its_weights_are_read(asked, tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(structured, "load", None)
    monkeypatch.setattr(memory, "free", lambda device: 100_000)
    said = r"holds the whole model and needs \S+ of free memory, and cpu has 97.7KiB: it takes .* for the weights of the whole"
    with pytest.raises(SparsekitError, match=said) as error:
        prune_structured_folder(tmp_path / "model", tmp_path / "out", token_batches((2, 16)), device="cpu", **asked)
    assert ("for a batch's gradients" in str(error.value)) == ("heads" in asked)
    with pytest.raises(SparsekitError, match=r"--max-memory must be at least \S+, got 1MiB: .*; structured pruning holds all"):
        prune_structured_folder(
            tmp_path / "model", tmp_path / "out", token_batches((2, 16)), device="cpu", max_memory="1MiB", **asked
        )
    assert os.listdir(tmp_path) == ["model"]


def test_what_is_free_is_told():
    assert 1 << 20 < memory.free(torch.device("cpu")) < 1 << 50


def test_hidden_states_go_to_disk_where_memory_is_short_and_change_nothing(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path / "model")
    batches = token_batches(*[(4, 32)] * 8)
    prune_folder(tmp_path / "model", tmp_path / "whole", batches, device="cpu")
    stores = []
    run = folders.run
    monkeypatch.setattr(folders, "run", lambda source, *a, **k: (stores.append(source.store), run(source, *a, **k))[1])
    for name, limit in (("ample", "1TiB"), ("short", None)):
        if limit is None:  # all but the last byte of what it takes to keep them in memory
            monkeypatch.setattr(memory, "taken", lambda: 0)
            with pytest.raises(SparsekitError) as error:
                prune_folder(tmp_path / "model", tmp_path / name, batches, device="cpu", max_memory=1)
            need = parse_size(re.search(r"at least (\S+),", str(error.value))[1])
            limit = need + 8 * 4 * 32 * 32 * 4 - 1024
        prune_folder(tmp_path / "model", tmp_path / name, batches, device="cpu", max_memory=limit)
        for path in (tmp_path / "whole").glob("*.safetensors"):
            assert (tmp_path / name / path.name).read_bytes() == path.read_bytes()
    assert [type(store) for store in stores] == [type(None), OnDisk]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "obs", "sparsegpt"])
def test_a_limit_too_small_says_how_much_is_needed(method, tmp_path, monkeypatch):
    """Before anything is run, and nothing is left; what it says is enough is enough."""
    build("llama").save_pretrained(tmp_path / "model")
    batches = token_batches((2, 16))
    monkeypatch.setattr(memory, "taken", lambda: 300 * MIB)
    with pytest.raises(SparsekitError, match=r"at least \S+, got 1MiB: it takes 300MiB for the program, ") as error:
        prune_folder(tmp_path / "model", tmp_path / "out", batches, method, device="cpu", max_memory="1MiB")
    assert ("a factor" in str(error.value)) == (method in ("obs", "sparsegpt"))
    assert os.listdir(tmp_path) == ["model"]
    enough = re.search(r"at least (\S+),", str(error.value))[1]
    prune_folder(tmp_path / "model", tmp_path / "out", batches, method, device="cpu", max_memory=enough)


RAGGED = [(3, 16, 0), (3, 16, 0), (2, 24, 0), (3, 16, 5), (3, 16, 6), (1, 40, 7)]  # rows, tokens, padding


def ragged(rows: int, tokens: int, padding: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, :padding] = 0
    return {"input_ids": token_batches((rows, tokens))[0], "attention_mask": mask}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_masks_and_positions_of_ragged_batches_are_counted(name, attention, tmp_path):
    """What the blocks are called with, held once for batches alike, is what was reckoned or less, and no small part of it."""
    model = build(name)
    model.set_attn_implementation(attention)
    batches = [ragged(*one) for one in RAGGED]
    stream = Stream(model, find_blocks(model), batches)
    held: dict[int, int] = {}

    def look(value) -> None:
        if isinstance(value, torch.Tensor):
            held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            [look(one) for one in value]
        elif isinstance(value, dict):
            [look(one) for one in value.values()]

    look(stream.calls)
    lazy = SimpleNamespace(model=model, dtype=torch.float32)
    reckoned = memory._arguments(lazy, batches)
    assert sum(held.values()) <= reckoned <= 6 * sum(held.values())
    assert memory._arguments(lazy, batches[:1]) == memory._arguments(lazy, batches[:2]) < reckoned


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_text_of_its_own_takes_the_whole_model(device, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "taken", lambda: 0)
    kjv = Path(__file__).parent / "data" / "kjv1m"
    command = ["prune", str(kjv), "--out", str(tmp_path / "out"), "--calib", "self", "--samples", "2", "--seq-len", "16"]
    done = CliRunner().invoke(app, [*command, "--device", device, "--max-memory", "100KB"])
    assert done.exit_code == 2 and not any(tmp_path.iterdir())
    if device == "cpu":
        assert "for the whole model that writes the text and" in done.stderr and "; calibrate on a text" in done.stderr
        parameters = sum(t.numel() for path in kjv.glob("*.safetensors") for t in load_file(path).values())
        assert parse_size(re.search(r"at least (\S+),", done.stderr)[1]) >= 4 * parameters
    done = CliRunner().invoke(app, [*command, "--device", device, "--max-memory", "lots"])
    assert done.exit_code == 2 and "got 'lots'" in done.stderr


def test_an_offload_folder_of_no_use_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    arguments = tmp_path / "model", tmp_path / "out", token_batches((2, 16))
    with pytest.raises(SparsekitError, match=r"--offload must be a folder that is there, got .*missing"):
        prune_folder(*arguments, device="cpu", max_memory="1GiB", offload=tmp_path / "missing")
    with pytest.raises(SparsekitError, match=r"--offload is where --max-memory puts hidden states, got .* without it"):
        prune_folder(*arguments, device="cpu", offload=tmp_path)
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("1.5 MiB", 3 << 19), ("2KiB", 2048), ("3GB", 3 * 10**9), ("4TB", 4 * 10**12), ("7", 7), (9, 9), ("5B", 5)],
)
def test_sizes(text, size):
    assert parse_size(text) == size
    assert size <= parse_size(shown_size(size)) <= 1.1 * size + 103


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "8 gibibytes", "8Gi", "0", "0.0001B", "1e3", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(SparsekitError, match=re.escape(repr(text))):
        parse_size(text)
