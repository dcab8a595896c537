"""A model folder that takes long to make: its finished pieces outlive the process that makes them."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..documents import sync, write_json, write_whole
from ..errors import SparsekitError, is_mistake
from .writing import check_new_folder, remove_folder, replace_folder, save_file, shard_name


class Unfinished:
    """A folder OUT in the making, in OUT.partial beside it: run.json says which run this is, model/ is the folder to be, and done/
    holds what is to be remembered of each weight file of model/. A file appears in either by a rename, when it is on the disk."""

    def __init__(self, out: Path, count: int):
        self.out, self.path, self.count = out, partial_folder(out), count
        self.model, self._done = self.path / "model", self.path / "done"

    def shard(self, i: int) -> Path:
        """The path of weight file i of ``count``."""
        return self.model / shard_name(i, self.count)

    def remembered(self, i: int) -> Any:
        """What was remembered of weight file i; None where it is not finished."""
        said = self._done / f"{i}.json"
        return json.loads(said.read_text()) if said.is_file() and self.shard(i).is_file() else None

    def put(
        self,
        i: int,
        tensors: dict[str, Tensor],
        metadata: dict[str, str],
        remember: Callable[[], Any],
        within: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> None:
        """Writes weight file i, each tensor ``within`` as save_file says, and then what there is to remember of it, which JSON must
        hold: that makes it finished."""
        for folder in (self.model, self._done):
            folder.mkdir(exist_ok=True)
        write_whole(self.shard(i), lambda path: save_file(tensors, path, metadata, within))
        write_whole(self._done / f"{i}.json", lambda path: write_json(path, remember()))

    def any(self) -> bool:
        """Whether a weight file is finished."""
        return any(self.remembered(i) is not None for i in range(self.count))

    def finish(self) -> None:
        """Puts the folder in its place."""
        for path in self.model.glob("*.part"):
            path.unlink()
        for path in self.model.iterdir():  # the index, the config and the like too, before OUT.partial goes
            if path.is_file():
                sync(path)
        sync(self.model)
        replace_folder(self.out, self.model)
        sync(self.out.parent)
        shutil.rmtree(self.path, ignore_errors=True)


def partial_folder(out: Path) -> Path:
    """Where the finished pieces of the folder ``out`` wait for the rest."""
    return out.with_name(f"{out.name}.partial")


@contextmanager
def unfinished(
    out: str | Path, count: int, run: dict[str, Any], *, overwrite: bool = False, resume: bool = False
) -> Iterator[Unfinished]:
    """A folder of ``count`` weight files to make, which ``finish`` puts in its place. With ``resume`` what an earlier process
    finished of the same run is there again; ``overwrite`` throws it away.

    run: what has to be the same for the pieces to belong together, by the name to say it by. A failure leaves the finished pieces,
    and tells the error so in its attribute ``left``; a user's mistake leaves nothing of a run begun here.
    Raises SparsekitError where the pieces are of another run, naming what differs, and where another process is at it."""
    work = Unfinished(check_new_folder(out, overwrite).resolve(), count)
    missing = [parent for parent in work.out.parents if not parent.exists()]
    mine = {"run.json", "run.json.part", "lock", "model", "done"}
    if work.path.exists() and not (work.path.is_dir() and {path.name for path in work.path.iterdir()} <= mine):
        raise SparsekitError(f"the folder {work.path} is needed for what is unfinished, and holds other things; move it away")
    begun = (work.path / "run.json").is_file()
    if begun and not (resume or overwrite):
        raise SparsekitError(f"{work.path} holds an unfinished run; go on with --resume, or throw it away with --overwrite")
    work.path.mkdir(parents=True, exist_ok=True)
    with open(work.path / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SparsekitError(f"one process at a time can write {work.out}, and another is at it; wait for it") from None
        if begun and resume:
            _check_begun(work.path, run)
        else:
            for path in (work.model, work.path / "done"):
                shutil.rmtree(path, ignore_errors=True)
        try:
            if not (begun and resume):
                write_whole(work.path / "run.json", lambda path: write_json(path, run))
            yield work
        except BaseException as error:
            if work.any() and ((begun and resume) or not is_mistake(error)):
                with suppress(AttributeError):
                    error.left = f"; what was finished is kept in {work.path}, and --resume goes on from there"
            else:
                remove_folder(work.path, missing)
            raise


@contextmanager
def looked_at(out: str | Path, count: int) -> Iterator[Unfinished]:
    """The same folder, as another process makes it: to read what is finished. A failure here says who knows what is left."""
    try:
        yield Unfinished(Path(out).resolve(), count)
    except BaseException as error:
        with suppress(AttributeError):
            error.left = "; rank 0 says what is left"
        raise


def _check_begun(path: Path, run: dict[str, Any]) -> None:
    try:
        found = dict(json.loads((path / "run.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise SparsekitError(f"{path / 'run.json'} must say which run is unfinished, and cannot be read: {error}") from None
    check_same(path, found, run)


def check_same(path: Path, found: dict[str, Any], run: dict[str, Any]) -> None:
    """Raises SparsekitError, naming what differs, unless ``found`` tells of the same run; ``path`` is where it does."""
    if differing := [name for name in run if found.get(name) != run[name]]:
        name, short = differing[0], not differing[0].startswith("hash")
        values = f": {found.get(name)!r} then, {run[name]!r} now" if short else ""
        others = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise SparsekitError(
            f"--resume goes on with the run that {path} is of, and its {name} differs{values}{others}; give the same, or "
            f"--overwrite without --resume"
        )
