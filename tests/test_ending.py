"""What a command that does not come to its end leaves behind and says: a full disk, Ctrl-C, SIGTERM and SIGHUP."""

import errno
import os
import pty
import re
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from test_cli import CALIB, MODEL, assert_refused, content, invoke, process
from transformers import PreTrainedTokenizerFast

from sparsekit import SparsekitError
from sparsekit.checkpoint import unfinished


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    """The kernel's own refusal, in a process that may write files of 200 KB at most."""
    done = process(
        *("prune", MODEL, "--out", tmp_path / "a" / "out", "--method", "magnitude"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert_refused(done, "File too large.*nothing was written")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")

    def no_space(tensors, path, *_):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(unfinished, "save_file", no_space)
    done = invoke("prune", MODEL, "--out", tmp_path / "out", "--method", "magnitude", "--overwrite")
    assert_refused(done, "No space left on device; nothing was written")
    assert content(tmp_path) == {"out": None, "out/config.json": b"mine"}


def test_a_disk_that_is_full_when_the_tokenizer_comes(tmp_path, monkeypatch):
    """All blocks are finished by then. Its library, in Rust, raises an Exception and no OSError; the refusal is the kernel's."""
    save = PreTrainedTokenizerFast.save_pretrained
    full = lambda self, folder: self.backend_tokenizer.save("/dev/full")  # noqa: E731
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    done = invoke("prune", MODEL, "--out", tmp_path / "out", "--method", "magnitude")
    assert_refused(done, "No space left on device: .*; what was finished is kept in .*, and --resume goes on from there")
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
    assert invoke("prune", MODEL, "--out", tmp_path / "out", "--method", "magnitude", "--resume").exit_code == 0
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out" / "tokenizer.json").is_file()


def test_ctrl_c_while_pruning_leaves_nothing(tmp_path):
    """A real signal to a real process with a terminal, once its progress bar shows a block."""
    terminal, stderr = pty.openpty()
    options = ("--samples", "96", "--seq-len", "128", "--device", "cpu")
    running = subprocess.Popen(
        [sys.executable, "-m", "sparsekit", "prune", MODEL, "--calib", CALIB, "--out", tmp_path / "out", *options],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
    )
    os.close(stderr)
    seen = b""
    try:
        while b"model.layers.0" not in seen:
            seen += os.read(terminal, 4096)
        running.send_signal(signal.SIGINT)
        while chunk := read_or_nothing(terminal):
            seen += chunk
        stdout, _ = running.communicate(timeout=60)
    finally:
        running.kill()
        os.close(terminal)
    assert running.returncode == 130
    assert stdout == b""
    assert b"Traceback" not in seen
    assert seen.replace(b"\r", b"").rstrip().endswith(b"sparsekit: interrupted; nothing was written")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_that_ends_as_another_error_is_still_one(tmp_path, monkeypatch):
    """What Python raises beneath a library in C can end as that library's error, about a file that it calls broken."""
    write, shards = unfinished.save_file, []

    def interrupt_at_the_second(tensors, path, *more):
        if shards:
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            raise SparsekitError("the file is not whole")
        shards.append(path)
        write(tensors, path, *more)

    monkeypatch.setattr(unfinished, "save_file", interrupt_at_the_second)
    done = invoke("prune", MODEL, "--out", tmp_path / "out", "--method", "magnitude")
    assert done.exit_code == 130 and "the file is not whole" not in done.output
    assert "interrupted; what was finished is kept in" in done.stderr and "--resume" in done.stderr
    assert os.listdir(tmp_path) == ["out.partial"]
    monkeypatch.setattr(unfinished, "save_file", write)
    assert invoke("prune", MODEL, "--out", tmp_path / "out", "--method", "magnitude", "--resume").exit_code == 0
    assert invoke("inspect", tmp_path / "none").exit_code == 2  # the next mistake is one


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_is_told_of_and_comes_once(name, tmp_path, monkeypatch):
    """As a scheduler sends it, or a connection that is lost; torchrun passes on to each process what it got itself."""
    write, number, shards = unfinished.save_file, getattr(signal, name), []

    def end_at_the_second(tensors, path, *more):
        if shards:
            try:
                signal.raise_signal(number)
            finally:
                for again in (number, signal.SIGINT, signal.SIGTERM):
                    signal.raise_signal(again)
                shards.append("what is seen to after it")
        shards.append(path)
        write(tensors, path, *more)

    monkeypatch.setattr(unfinished, "save_file", end_at_the_second)
    before = signal.getsignal(number)
    done = invoke("prune", MODEL, "--out", tmp_path / "out", "--method", "magnitude")
    assert done.exit_code == 128 + number and shards[-1] == "what is seen to after it"
    assert re.fullmatch(rf"sparsekit: ended by {name}; what was finished is kept in \S+, and --resume goes on .*\n", done.stderr)
    assert signal.getsignal(number) == before and os.listdir(tmp_path) == ["out.partial"]


def test_what_nohup_ignores_stays_ignored(tmp_path, monkeypatch):
    write = unfinished.save_file
    monkeypatch.setattr(unfinished, "save_file", lambda *given: (signal.raise_signal(signal.SIGHUP), write(*given)))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert invoke("prune", MODEL, "--out", tmp_path / "out", "--method", "magnitude").exit_code == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def read_or_nothing(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the last process on the other side has gone
        return b""


def test_ctrl_c_while_writing_keeps_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")

    def interrupted(tensors, path, *_):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(unfinished, "save_file", interrupted)
    done = invoke("prune", MODEL, "--out", tmp_path / "out", "--method", "magnitude", "--overwrite")
    assert done.exit_code == 130
    assert (done.stdout, done.stderr) == ("", "sparsekit: interrupted; nothing was written\n")
    assert content(tmp_path) == {"out": None, "out/config.json": b"mine"}
