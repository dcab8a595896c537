"""How tests of Triton kernels run where there is no CUDA device: in Triton's interpreter, which has to be chosen before Triton is
imported, so in a process of their own."""

import contextlib
import os
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IN_A_PROCESS_OF_ITS_OWN = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"


def run_in_the_interpreter(file: str, folder) -> None:
    """Runs a file of tests; none may fail or be skipped."""
    command = [
        sys.executable,
        "-c",
        "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))",
        "-p",
        "no:cacheprovider",
        file,
    ]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    """New memory is full of an odd byte, so what a kernel leaves unwritten shows."""
    patch, empty = pytest.MonkeyPatch(), torch.empty

    def poisoned(*args, **kwargs):
        fresh = empty(*args, **kwargs)
        if fresh.numel():
            fresh.view(torch.uint8).fill_(0x5B)
        return fresh

    patch.setattr(torch, "empty", poisoned)
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="module")
def patched_once():
    """The interpreter puts its own functions into Triton's language at each call of a device function and takes them out after each
    launch, which is half of its time: here they come once, and stay until the module is done."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    patch, patch_language, scopes = pytest.MonkeyPatch(), interpreter._patch_lang, {}

    @cache
    def modules(fn):
        """What is patched for a function: the modules of the language that it can see."""
        return frozenset(id(held) for held in fn.__globals__.values() if held is language or held is language.core)

    def once(fn):
        if modules(fn) not in scopes:
            scopes[modules(fn)] = patch_language(fn)
        return SimpleNamespace(restore=lambda: None)

    patch.setattr(interpreter, "_patch_lang", once)
    yield
    patch.undo()
    for scope in reversed(scopes.values()):
        scope.restore()


@pytest.fixture
def launches(monkeypatch):
    """The launches of the ops need no CUDA device where there is none."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
