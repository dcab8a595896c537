"""How tests of Triton kernels run where there is no CUDA device: in Triton's interpreter, which has to be chosen before Triton is
imported, so in a process of their own."""

import contextlib
import os
import subprocess
import sys

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


@pytest.fixture
def launches(monkeypatch):
    """The launches of the ops need no CUDA device where there is none."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
