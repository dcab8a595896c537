"""Pruning a model folder into another, with one block in memory at a time, in pieces that outlive the process."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..checkpoint import check_format, check_model_folder, resolve_device, weight_files
from ..checkpoint.lazy import LazyModel
from ..checkpoint.unfinished import Unfinished, check_same, looked_at, partial_folder, unfinished
from ..checkpoint.writing import compressed_shapes, metadata_of, put_right, tensors_of, write_beside, write_index
from ..criteria import Criterion
from ..data import hash_batches
from ..errors import SparsekitError
from ..linear import compress, is_linear
from ..patterns import Pattern
from ..plan import FILE as PLAN_FILE
from ..plan import Plan, parse, patterns_in
from ..pruners import identity, method_named, method_text
from ..report import BlockReport, LinearReport, PruneReport
from ..timing import Phases
from .blocks import Target, find_blocks, find_targets
from .loop import run
from .memory import parse_size, store_within
from .source import Progress
from .store import OnDisk, Store
from .world import World


def prune_folder(
    folder: str | Path,
    out: str | Path,
    batches: Iterable[Tensor | Mapping[str, Tensor]] = (),
    method: str | Criterion = "sparsegpt",
    pattern: str | Pattern | Plan | Mapping[str, Tensor] = "2:4",
    *,
    format: str = "compressed",
    skip: Iterable[str] = (),
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
    group: str | None = None,
    tokenizer=None,
    overwrite: bool = False,
    resume: bool = False,
    max_memory: str | int | None = None,
    offload: str | Path | None = None,
    progress: Progress | None = None,
    world: World | None = None,
) -> PruneReport:
    """Prunes the model of a Hugging Face folder into the folder ``out``, block by block: for models that do not fit in memory.

    batches, method, pattern, group, skip: as for ``prune``, which this equals bit for bit; a plan is kept in ``out``.
    format: as for ``save``. device, dtype: where and in what to compute, as for ``load``; a weight is stored in the dtype it had.
    Each block is a weight file of ``out``, finished in OUT.partial beside it until all are. After an interruption they stay there,
    and the same call with ``resume`` goes on from them, to the same bytes.
    max_memory: what the process may hold, such as "8GiB"; hidden states that would exceed it wait in a file in the folder
    ``offload``, by default in OUT.partial.
    world: the processes that prune it together, as for ``prune``, and its device. Each reads ``folder``, rank 0 alone writes; to
    resume, all must see what it wrote.
    Raises SparsekitError for what cannot be pruned, where max_memory is too little for one block, where ``out`` or OUT.partial
    stand in the way unless ``overwrite``, and for resuming what is another run, naming what differs; then nothing is left that was
    not there."""
    pattern, skip, batches = parse(pattern), tuple(skip), list(batches)
    kind, limit = method_named(method, patterns_in(pattern), group), None if max_memory is None else parse_size(max_memory)
    if offload is not None and limit is None:
        raise SparsekitError(f"--offload is where --max-memory puts hidden states, got {offload} without it; leave it out")
    if offload is not None and not Path(offload).is_dir():
        raise SparsekitError(f"--offload must be a folder that is there, got {offload}")
    check_format(format)
    folder, out, world = check_model_folder(folder), Path(out), World() if world is None else world
    place = resolve_device(device) if world.device is None else world.device
    with world.watched():
        lazy = LazyModel(folder, find_blocks, dtype, place)
        this = {
            "hash of the calibration batches": hash_batches(batches),
            "method": method_text(method),
            **identity(method),
            "pattern": str(pattern),
            "group": group,
            "format": format,
            "skipped names": list(skip),
            "device": place.type,
            "dtype": str(lazy.dtype).removeprefix("torch."),
            "number of processes": world.size,
            "version of sparsekit": __version__,
        }
        world.agree(this)
        this = {"hash of the weights": _hash_files(folder), **this}  # with their times, which need not be those of another machine
        if resume:
            finished = _finished(out, this, overwrite) if world.leads else None
            if found := world.gather(finished and finished.to_dict())[0]:
                return PruneReport.from_dict(found)
        outside = _share_out(lazy)
        count = len(lazy.blocks) + len(outside)
        how = dict(overwrite=overwrite, resume=resume)
        with unfinished(out, count, this, **how) if world.leads else looked_at(out, count) as work:
            world.gather(None)  # the others look at it when rank 0 has made it
            store = None
            offload = None if offload is None else Path(offload)
            if limit is not None:
                names = {module: name for name, module in lazy.model.named_modules()}
                targets, mine = find_targets(lazy.blocks, names, skip, pattern), world.part(batches) if kind.gathers else batches
                store = store_within(limit, offload or work.path, lazy, targets, mine, kind, group)
            source = _Lazy(lazy, work, format, store, offload, world.leads)
            report = run(source, batches, method, pattern, skip, progress, world, group=group)
            report.fingerprint = this
            if world.leads:
                if isinstance(pattern, Plan):
                    pattern.save(work.model / PLAN_FILE)
                _finish(source, outside, report, tokenizer)
            report.format = world.gather(report.format)[0]
    return report


def _finish(source: _Lazy, outside: list[list[str]], report: PruneReport, tokenizer) -> None:
    """Writes what stands outside the blocks, and what stands beside the weights, and puts the folder in its place."""
    work, lazy = source.work, source.lazy
    for i, parts in enumerate(outside, len(lazy.blocks)):
        if work.remembered(i) is None:
            source.write_outside(i, parts)
    said = [work.remembered(i) for i in range(work.count)]
    write_index(work.model, {work.shard(i).name: piece["tensors"] for i, piece in enumerate(said)})
    report.format = "compressed" if any(piece["compressed"] for piece in said) else "dense"
    write_beside(work.model, lazy.model, lazy.stored, report.format == "compressed", tokenizer, report)
    work.finish()


class Reading:
    """A folder's blocks, each in memory from ``enter`` to ``leave`` and left as it is."""

    def __init__(self, lazy: LazyModel, store: Store | None = None):
        self.lazy, self.model, self.blocks, self.device, self.store = lazy, lazy.model, lazy.blocks, lazy.device, store

    def dense(self) -> Reading:
        return self

    def keep(self) -> Store:
        return OnDisk(tempfile.gettempdir())

    @contextmanager
    def capturing(self) -> Iterator[None]:
        head = self.model.get_output_embeddings()
        unused = {f"{name}." for name, module in self.model.named_modules() if module is head}
        tops = [top for top, names in self.lazy.outside.items() if not all(n.rpartition(".")[0] + "." in unused for n in names)]
        with self._filled([0, *tops]):
            yield

    def surrounding(self) -> AbstractContextManager:
        return self._filled(self.lazy.outside)

    @contextmanager
    def _filled(self, parts: Iterable[int | str]) -> Iterator[None]:
        self.lazy.fill(parts)
        try:
            yield
        finally:
            self.lazy.drop(parts)

    @contextmanager
    def whole(self) -> Iterator[None]:
        parts = [*range(len(self.blocks)), *self.lazy.outside]
        try:
            for i in range(len(self.blocks)):  # one at a time: a part is there twice while it is read
                self.lazy.fill([i])
            self.lazy.fill(self.lazy.outside)
            yield
        finally:
            self.lazy.drop(parts)

    def enter(self, i: int) -> tuple[BlockReport, list[LinearReport]] | None:
        self.lazy.fill([i])
        return None

    def rounded(self, target: Target, weight: Tensor) -> Tensor:
        return weight.to(self.lazy.stored_dtype(target.tensor)).to(weight.dtype)

    def leave(self, i: int, told: BlockReport, rows: list[LinearReport]) -> None:
        self.lazy.drop([i])


class _Lazy(Reading):
    """A folder's blocks: read when their turn comes, written when it is over, in memory in between."""

    def __init__(
        self, lazy: LazyModel, work: Unfinished, format: str, store: Store | None, offload: Path | None = None, writes: bool = True
    ):
        super().__init__(lazy, store)
        self.work, self.format, self.writes, self.offload = work, format, writes, offload
        self._prefix = {block: f"{name}." for name, block in lazy.model.named_modules()}

    def dense(self) -> Reading:
        return Reading(self.lazy, self.store)

    def keep(self) -> Store:
        if self.offload or self.writes:
            return OnDisk(self.offload or self.work.path)
        return super().keep()  # a rank of another machine may not see what rank 0 writes

    def enter(self, i: int) -> tuple[BlockReport, list[LinearReport]] | None:
        said = self.work.remembered(i)
        if said is None:
            return super().enter(i)
        self.lazy.fill_block(i, self.work.shard(i))
        return BlockReport(**said["block"]), [LinearReport.from_dict(row) for row in said["linears"]]

    def leave(self, i: int, told: BlockReport, rows: list[LinearReport]) -> None:
        if self.writes and self.work.remembered(i) is None:
            begin = time.perf_counter()
            phases = Phases(torch.device("cpu"))  # what is timed waits for a GPU itself
            block, prefix = self.blocks[i], self._prefix[self.blocks[i]]
            of_tensor = lambda name: phases(name.rpartition(".")[0])  # noqa: E731
            for name, tensor in block.state_dict(keep_vars=True).items():
                if tensor.is_floating_point():
                    with of_tensor(prefix + name):
                        tensor.data = tensor.data.to(self.lazy.stored_dtype(prefix + name))
            dense = {name: module for name, module in block.named_modules() if is_linear(module)}
            swapped = compress(block, lambda name: phases(prefix + name)) if self.format == "compressed" else []
            tensors = {prefix + name: make().detach() for name, make in tensors_of(block, self.format).items()}

            def remember() -> dict[str, Any]:
                spent = phases.seconds()
                for row in rows:
                    if row.name in spent:
                        row.seconds["write"] = spent[row.name]
                told.seconds["write"] = time.perf_counter() - begin - sum(row.seconds.get("write", 0) for row in rows)
                return {"block": asdict(told), "linears": [asdict(row) for row in rows]}

            shapes = {prefix + name: shape for name, shape in compressed_shapes(block).items()}
            self._put(i, tensors, shapes, remember, of_tensor)
            for name in swapped:
                block.set_submodule(name, dense[name])
        super().leave(i, told, rows)

    def write_outside(self, i: int, parts: list[str]) -> None:
        """Makes weight file i of what stands outside the blocks, as it is in the folder."""
        self.lazy.fill(parts)
        names = {name for part in parts for name in self.lazy.names(part)}
        made = {name: make().detach() for name, make in tensors_of(self.model, "dense").items() if name in names}
        stored = {name: t.to(self.lazy.stored_dtype(name)) if t.is_floating_point() else t for name, t in made.items()}
        self._put(i, stored, {}, dict)
        self.lazy.drop(parts)

    def _put(
        self,
        i: int,
        tensors: dict[str, Tensor],
        compressed: dict[str, tuple[int, int]],
        remember: Callable[[], dict],
        within: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> None:
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        metadata = metadata_of(compressed)
        self.work.put(i, tensors, metadata, lambda: {**remember(), "compressed": len(compressed), "tensors": sizes}, within)


def _share_out(lazy: LazyModel) -> list[list[str]]:
    """What stands outside the blocks, by weight files: none larger than the largest block, but for one of a single tensor."""
    room = max(lazy.nbytes(i, stored=True) for i in range(len(lazy.blocks)))
    files: list[list[str]] = []
    filled = 0
    for top in lazy.outside:
        size = lazy.nbytes(top, stored=True)
        if not files or filled + size > room:
            files.append([])
            filled = 0
        files[-1].append(top)
        filled += size
    return files


def _hash_files(folder: Path) -> str:
    """Of the config, and of each weight file its header, size and time: to read a model to its end takes long."""
    seen = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(path for path, _ in weight_files(folder)):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            seen.update(file.read(length))
        seen.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns};".encode())
    return seen.hexdigest()[:16]


def _finished(out: Path, this: dict[str, Any], overwrite: bool) -> PruneReport | None:
    """The report of the folder, where this run has finished it already. Raises SparsekitError, naming what differs, where another
    has, unless that is to be overwritten or this one has been begun."""
    put_right(out.resolve())  # a killed process may have left it beside its place
    try:
        found = json.loads((out / "report.json").read_text())
    except (OSError, ValueError):
        return None
    then = found.get("fingerprint") if isinstance(found, dict) else None
    if then != this:
        if then and isinstance(then, dict) and not overwrite and not (partial_folder(out) / "run.json").exists():
            check_same(out, then, this)
        return None
    if not (partial_folder(out) / "model").exists():  # left by a process that ended just before it would have removed it
        shutil.rmtree(partial_folder(out), ignore_errors=True)
    return PruneReport.from_dict(found)
