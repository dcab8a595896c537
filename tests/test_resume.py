"""Runs that were killed, interrupted or refused: what is left, and that going on gives the bytes of a run that was left alone."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import build, token_batches
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sparsekit
from sparsekit import SparsekitError, prune_folder
from sparsekit.checkpoint import unfinished, writing
from sparsekit.cli import app
from sparsekit.pipeline import folder as folders
from sparsekit.pipeline import loop

KJV, CALIB = Path(__file__).parent / "data" / "kjv1m", Path(__file__).parents[1] / "examples" / "data" / "kjv.calib.txt"
BATCHES = token_batches((3, 16), (1, 11))
BLOCKS = 5
TIMES = {"seconds", "phases", "peak_memory"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Five blocks, tied, stored narrower than computed with."""
    path = tmp_path_factory.mktemp("models") / "model"
    build("llama, tied", torch.bfloat16, num_hidden_layers=BLOCKS).save_pretrained(path)
    return path


def run(model: Path, out: Path, **changes) -> sparsekit.report.PruneReport:
    return prune_folder(model, out, **{"batches": BATCHES, "device": "cpu", "dtype": torch.float32, **changes})


def timeless(value):
    """A report without what a clock or the machine's memory decides."""
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if name not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def content(folder: Path) -> dict[str, bytes | dict]:
    held = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: timeless(json.loads(data)) if name == "report.json" else data for name, data in held.items()}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("whole") / "out"
    run(model, out)
    return content(out)


def stop_at(monkeypatch, target: int, error: BaseException) -> None:
    """The pruning of matrix number ``target`` fails with the error."""
    prune, seen = loop._prune, []

    def failing(*arguments):
        seen.append(arguments)
        if len(seen) == target:
            raise error
        return prune(*arguments)

    monkeypatch.setattr(loop, "_prune", failing)


# ---- killed ----


def test_killed_at_ten_moments_and_resumed(model, tmp_path):
    """SIGKILL, spread over the whole run; each of the ten goes on to the bytes of the run that was left alone."""
    beside = {"PYTHONPATH": os.pathsep.join([str(Path(sparsekit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, Path(__file__).parent / "killed.py", model, tmp_path, "10", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **beside, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    hits = json.loads(done.stdout)["hits"]
    assert len(hits) == 10 and len({found for _, found in hits}) >= 3, "at different blocks"
    wanted = content(tmp_path / "whole")
    assert len([name for name in wanted if name.endswith(".safetensors")]) > BLOCKS
    for i in range(10):
        assert content(tmp_path / f"killed-{i}") == wanted, hits[i]
    assert content(tmp_path / "timed") == wanted
    assert sorted(os.listdir(tmp_path)) == sorted(["timed", "whole", *(f"killed-{i}" for i in range(10))])


REPLACING = """
import os, signal, sys
from pathlib import Path
from sparsekit.checkpoint import writing

rename, left = Path.rename, [int(sys.argv[2])]
def renaming(self, target):
    rename(self, target)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = renaming
parts = Path(sys.argv[1] + ".partial", "model")
(parts / "config.json").write_text("new")
writing.replace_folder(Path(sys.argv[1]), parts)
"""


@pytest.mark.parametrize("renames, stands", [(1, "old"), (2, "new")], ids=["between the renames", "before the old one goes"])
def test_killed_while_it_replaced_a_folder(renames, stands, tmp_path):
    """Whoever looks at the folder next finds it whole: the old one where no other has come, the new one alone where one has."""
    out, other = tmp_path / "out", tmp_path / "out.replaced-by-sparsekit-notes"
    for folder in (out, tmp_path / "out.partial" / "model", other):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("old")
    beside = {"PYTHONPATH": os.pathsep.join([str(Path(sparsekit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", REPLACING, out, str(renames)]
    assert subprocess.run(command, env={**os.environ, **beside}).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("out.replaced-by-sparsekit-[0-9]*"))) == 1 and out.exists() == (stands == "new")
    with pytest.raises(SparsekitError, match="exists and is not empty"):
        writing.check_new_folder(out)
    assert (out / "config.json").read_text() == stands
    assert list(tmp_path.glob("out.replaced-by-sparsekit-*")) == [other], "another's folder is left alone"


def test_what_a_living_process_has_moved_is_left_to_it(tmp_path):
    (tmp_path / "out.replaced-by-sparsekit-1").mkdir()
    writing.check_new_folder(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out.replaced-by-sparsekit-1"]


def test_an_overwriting_run_killed_between_the_renames_goes_on(model, whole, tmp_path, monkeypatch):
    """Nothing of the old folder is lost to a run without --overwrite; with both it is replaced after all."""
    out, rename = tmp_path / "out", Path.rename
    run(model, out, method="magnitude")
    was = tree(out)

    def failing(self, target):
        if self.name == "model":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        patch.setattr(writing, "put_right", lambda folder: None)  # as one that is killed there
        with pytest.raises(KeyboardInterrupt):
            run(model, out, overwrite=True)
    assert not out.exists()
    with pytest.raises(SparsekitError, match="exists and is not empty"):
        run(model, out, resume=True)
    assert tree(out) == was
    run(model, out, overwrite=True, resume=True)
    assert content(out) == whole and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("format", ["compressed", "dense"])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_interrupted_in_a_block_it_goes_on_from_there(method, format, model, tmp_path, monkeypatch):
    run(model, tmp_path / "whole", method=method, format=format)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 7 * 3 + 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt) as error:
            run(model, out, method=method, format=format)
    assert error.value.left == f"; what was finished is kept in {out}.partial, and --resume goes on from there"
    assert not out.exists()
    pruned = []
    prune = loop._prune
    monkeypatch.setattr(loop, "_prune", lambda target, *rest: (pruned.append(target.name), prune(target, *rest))[1])
    told = []
    report = run(model, out, method=method, format=format, resume=True, progress=lambda *now: told.append(now))
    assert {name.split(".")[2] for name in pruned} == {"3", "4"}, "what is finished is not pruned again"
    assert len(report.linears) == 7 * BLOCKS
    assert content(out) == content(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
    assert told[-1][1:] == (BLOCKS, BLOCKS)


def test_a_full_disk_leaves_what_is_finished(model, whole, tmp_path, monkeypatch):
    written = []
    save = unfinished.save_file

    def full(tensors, path, metadata, within):
        written.append(path)
        if len(written) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, metadata, within)

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "save_file", full)
        with pytest.raises(OSError, match="No space left") as error:
            run(model, tmp_path / "out")
    assert "--resume goes on" in error.value.left
    assert len(list((tmp_path / "out.partial" / "model").glob("model-*.safetensors"))) == 2
    run(model, tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == whole
    assert os.listdir(tmp_path) == ["out"]


def test_the_command_says_how_to_go_on(tmp_path, monkeypatch):
    command = ["prune", str(KJV), "--out", str(tmp_path / "out"), "--method", "magnitude"]
    with monkeypatch.context() as patch:
        stop_at(patch, 10, KeyboardInterrupt())
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 130
    partial = f"{tmp_path / 'out'}.partial"
    assert done.stderr == f"sparsekit: interrupted; what was finished is kept in {partial}, and --resume goes on from there\n"
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert done.stderr == (
        f"sparsekit: {partial} holds an unfinished run; go on with --resume, or throw it away with --overwrite\n"
    )
    assert CliRunner().invoke(app, [*command, "--resume"]).exit_code == 0
    assert os.listdir(tmp_path) == ["out"]
    # Once more: it is finished already, and says the same.
    done = CliRunner().invoke(app, [*command, "--resume", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["linears"] == json.loads((tmp_path / "out" / "report.json").read_text())["linears"]


@pytest.mark.parametrize("calib", [CALIB, "self"], ids=["a text", "self"])
def test_two_runs_of_one_seed_are_the_same_bytes_and_of_another_are_not(calib, tmp_path):
    """The whole command, from the choice of sequences, or the writing of them, to the files."""
    made = {}
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        command = ["prune", KJV, "--out", tmp_path / name, "--calib", calib, "--samples", 4, "--seq-len", 24, "--seed", seed]
        done = CliRunner().invoke(app, [str(part) for part in command])
        assert done.exit_code == 0, done.stderr
        made[name] = content(tmp_path / name)
    assert made["first"] == made["second"]
    weights = [name for name in made["first"] if name.endswith(".safetensors")]
    assert weights and [name for name in weights if made["first"][name] != made["other"][name]]


def test_a_rank_that_writes_nothing_leaves_it_to_rank_0_to_say_what_is_left(tmp_path):
    with pytest.raises(KeyboardInterrupt) as error, unfinished.looked_at(tmp_path / "out", 3):
        raise KeyboardInterrupt
    assert error.value.left == "; rank 0 says what is left" and not any(tmp_path.iterdir())


# ---- another run ----


@pytest.fixture(scope="module")
def done(model, tmp_path_factory) -> Path:
    """A run that is finished."""
    out = tmp_path_factory.mktemp("done") / "out"
    run(model, out)
    return out


@pytest.fixture
def half(model, tmp_path, monkeypatch) -> Path:
    """A run that was interrupted in its third block."""
    with monkeypatch.context() as patch:
        stop_at(patch, 16, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out")
    return tmp_path / "out"


def touched(model: Path, where: Path) -> Path:
    """The same model with another weight, in a file of the same name, size and header."""
    copy = Path(shutil.copytree(model, where / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


OTHERS = {
    "method": ({"method": "wanda"}, "its method differs: 'sparsegpt' then, 'wanda' now"),
    "pattern": ({"pattern": "1:4"}, "its pattern differs: '2:4' then, '1:4' now"),
    "format": ({"format": "dense"}, "its format differs: 'compressed' then, 'dense' now"),
    "skip": ({"skip": ["*.o_proj"]}, r"its skipped names differs: \[\] then"),
    "dtype": ({"dtype": torch.bfloat16}, "its dtype differs: 'float32' then, 'bfloat16' now"),
    "one token": ({"batches": [BATCHES[0], BATCHES[1] + (torch.arange(11) == 5)]}, "its hash of the calibration batches differs;"),
    "order of batches": ({"batches": BATCHES[::-1]}, "its hash of the calibration batches differs;"),
    "two things": ({"method": "wanda", "pattern": "1:4"}, r"its method differs: .* now \(and 1 more\)"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_run_is_not_gone_on_with(other, model, half):
    changes, says = OTHERS[other]
    was = tree(half.parent)
    with pytest.raises(SparsekitError, match=says) as error:
        run(model, half, **changes, resume=True)
    assert "\n" not in str(error.value)
    assert tree(half.parent) == was


def test_other_weights_and_another_version_are_not_gone_on_with(model, half, monkeypatch):
    was = tree(half.parent)
    with pytest.raises(SparsekitError, match="its hash of the weights differs;"):
        run(touched(model, half.parent.parent), half, resume=True)
    monkeypatch.setattr(folders, "__version__", "0.0.9")
    with pytest.raises(SparsekitError, match=rf"its version of sparsekit differs: '{sparsekit.__version__}' then, '0.0.9' now"):
        run(model, half, resume=True)
    assert tree(half.parent) == was


def test_a_record_of_the_run_that_says_nothing_is_named(model, half):
    for text in ("", "{", "null", "[1]", '"other"'):
        Path(f"{half}.partial", "run.json").write_text(text)
        with pytest.raises(SparsekitError, match=r"run\.json must say which run is unfinished, and cannot be read: ") as error:
            run(model, half, resume=True)
        assert "\n" not in str(error.value)


def test_without_resume_it_is_refused_or_thrown_away(model, half, whole):
    was = tree(half.parent)
    with pytest.raises(SparsekitError, match=r"out\.partial holds an unfinished run; go on with --resume, or throw it away"):
        run(model, half)
    assert tree(half.parent) == was
    run(model, half, method="wanda", overwrite=True)
    assert content(half) != whole
    assert os.listdir(half.parent) == ["out"]


def test_one_process_at_a_time(model, half):
    with open(f"{half}.partial/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        was = tree(half.parent)
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(SparsekitError, match="another is at it"):
                run(model, half, **how)
        assert tree(half.parent) == was


def test_other_things_of_that_name_are_left_alone(model, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").write_text("mine")
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(SparsekitError, match="holds other things; move it away"):
            run(model, tmp_path / "out", **how)
    assert tree(tmp_path) == {"out.partial/notes": b"mine"}


def test_a_refusal_leaves_nothing_of_its_own_and_all_of_an_earlier_run(model, half, tmp_path_factory):
    """NaN in the last block: the blocks before it are of no use, to a run that cannot come about."""
    copy = Path(shutil.copytree(model, tmp_path_factory.mktemp("broken") / "model"))
    tensors = load_file(copy / "model.safetensors")
    tensors[f"model.layers.{BLOCKS - 1}.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    where = half.parent / "a" / "b"
    was = tree(half.parent)
    with pytest.raises(SparsekitError, match=rf"NaN or Inf in model\.layers\.{BLOCKS - 1}\.mlp\.up_proj"):
        run(copy, where)
    assert tree(half.parent) == was and sorted(os.listdir(half.parent)) == ["out.partial"]


def test_a_finished_block_that_was_changed_is_named(model, half):
    shard = next(Path(f"{half}.partial", "model").glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(SparsekitError, match=r"model-00002-of-\d+\.safetensors is not a whole safetensors file"):
        run(model, half, resume=True)


@pytest.mark.parametrize("other", OTHERS)
def test_another_run_that_is_finished_is_not_gone_on_with(other, model, done):
    changes, says = OTHERS[other]
    was = tree(done.parent)
    with pytest.raises(SparsekitError, match=rf"the run that {done} is of, and {says}"):
        run(model, done, **changes, resume=True)
    assert tree(done.parent) == was


def test_a_finished_run_without_a_fingerprint_is_only_in_the_way(model, done, tmp_path):
    """As save writes it; and as an older version's report might be."""
    copy = Path(shutil.copytree(done, tmp_path / "out"))
    report = json.loads((copy / "report.json").read_text())
    for fingerprint in ({}, None, [], "other"):
        (copy / "report.json").write_text(json.dumps({**report, "fingerprint": fingerprint}))
        with pytest.raises(SparsekitError, match="exists and is not empty; give another, or --overwrite"):
            run(model, copy, resume=True)


@pytest.mark.parametrize("resume", [False, True], ids=["overwrite", "overwrite and resume"])
def test_what_an_older_version_finished_is_overwritten(resume, model, whole, tmp_path, monkeypatch):
    """Its report may say less than today's; without overwrite it is refused, and stays."""
    with monkeypatch.context() as patch:
        patch.setattr(folders, "__version__", "0.0.9")
        run(model, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for row in report["linears"]:
        del row["peak_memory"], row["seconds"]["write"]
    (tmp_path / "out" / "report.json").write_text(json.dumps(report))
    was = tree(tmp_path)
    with pytest.raises(SparsekitError, match="its version of sparsekit differs" if resume else "exists and is not empty"):
        run(model, tmp_path / "out", resume=resume)
    assert tree(tmp_path) == was
    run(model, tmp_path / "out", overwrite=True, resume=resume)
    assert content(tmp_path / "out") == whole and os.listdir(tmp_path) == ["out"]


def test_to_resume_what_is_finished_leaves_another_run_alone(model, tmp_path, monkeypatch):
    run(model, tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_at(patch, 16, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", method="wanda", overwrite=True)
    was = tree(tmp_path)
    run(model, tmp_path / "out", resume=True)
    assert tree(tmp_path) == was
