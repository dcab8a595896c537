"""A process that prunes a folder in children of its own, and kills them: ``python killed.py FOLDER OUT KILLS SEED``.

The children are forks, so that they pay for no import. Prints one JSON object: seconds of the run that is left alone; of each kill,
the moment as a share of them, and how many weight files it found finished."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from models import token_batches

from sparsekit.pipeline import prune_folder


def prune(folder: Path, out: Path, resume: bool) -> None:
    prune_folder(folder, out, token_batches((3, 16), (1, 11)), device="cpu", dtype=torch.float32, resume=resume)


def child(folder: Path, out: Path, resume: bool) -> int:
    pid = os.fork()
    if not pid:
        try:
            prune(folder, out, resume)
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def killed(folder: Path, out: Path, after: float) -> bool:
    """Whether a run that began was still at it after so many seconds."""
    pid = child(folder, out, True)  # nothing to resume
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def main(folder: Path, out: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)  # and no pool of threads to lose in a fork
    prune(folder, out / "whole", False)  # and imports what is imported late
    begin = time.perf_counter()
    assert os.waitpid(child(folder, out / "timed", False), 0)[1] == 0
    seconds = time.perf_counter() - begin
    chance, hits = random.Random(seed), []
    for i in range(kills):
        made = out / f"killed-{i}"
        share = (i + chance.random()) / kills
        while not killed(folder, made, share * seconds):
            shutil.rmtree(made)  # it was at its end before, on a machine that is less busy than when a run was timed
            share *= 0.75
        hits.append([share, len(list((out / f"{made.name}.partial" / "model").glob("model-*")))])
        assert os.waitpid(child(folder, made, True), 0)[1] == 0
    print(json.dumps({"seconds": seconds, "hits": hits}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
