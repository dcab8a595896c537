"""Several processes that prune one model together: who does what, how sums come together, and what ends all of them.

Batches are split over the ranks. Of each block every rank gathers the statistics of its own batches; each sum goes to the one rank
that prunes the linears it belongs to, and the weights come back to all. Tensors travel through torch.distributed (gloo on CPUs,
NCCL on GPUs), everything small as JSON through its key-value store.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint import resolve_device
from ..errors import RankLost, SparsekitError, listed
from ..pruners import Pruner
from ..report import LinearReport
from .blocks import Target
from .watch import PATIENCE, Watch

T = TypeVar("T")

ARRIVAL = 300.0  # seconds that a rank waits for the others at the start
_FOREVER = timedelta(days=365)  # for a collective: a rank may work long before it joins, and the dead are found otherwise
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_sessions = itertools.count()


class World:
    """This process among the ``size`` that prune one model together: its rank and the device of its model.

    ``World()`` is a process alone: it needs no process group and every method is free. What ranks do together they do inside
    ``watched()``, all in the same order; there a rank that fails, stops or dies ends the wait of every other with its error."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None, store: dist.Store | None = None):
        self.rank, self.size, self.device = rank, size, device
        self._root, self._store = store, store
        self._turn = 0  # of gather
        self._joined = False
        self._watch: Watch | None = None

    @classmethod
    def from_environment(cls, device: str = "auto") -> World:
        """The world that torchrun made, joined: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without them, or with a
        WORLD_SIZE of 1, a process alone.

        device: as on the command line; "cuda" is the GPU numbered LOCAL_RANK, with NCCL; "cpu" is gloo. Raises SparsekitError where
        the variables are broken, the GPUs too few, or a rank does not come within 5 minutes."""
        if dist.is_available() and dist.is_initialized():
            return cls.from_group()
        size = _number("WORLD_SIZE", 1)
        if size <= 1:
            return cls(device=resolve_device(device))
        rank = _number("RANK")
        if not 0 <= rank < size:
            raise SparsekitError(f"RANK must be 0 to {size - 1} in a world of {size}, got {rank}")
        if device in ("auto", "cuda") and torch.cuda.is_available():
            local, count = _number("LOCAL_RANK", rank), torch.cuda.device_count()
            if local >= count:
                raise SparsekitError(
                    f"each process needs a GPU of its own, got {count} and LOCAL_RANK {local}; start {count} a machine"
                )
            place = torch.device("cuda", local)
            torch.cuda.set_device(place)
        elif (place := resolve_device(device)).type != "cpu":
            raise SparsekitError(f'each process takes the GPU of its LOCAL_RANK, got device {device!r}; give "cuda" or "cpu"')
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise SparsekitError(f"a world of {size} needs {name}, and it is not set; start with torchrun")
        try:
            store = next(dist.rendezvous("env://", timeout=timedelta(seconds=ARRIVAL)))[0]
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise SparsekitError(f"rank {rank} of {size} cannot meet the others at {where}: {_line(error)}") from error
        world = cls(rank, size, place, store)
        with world.watched():  # all are there before the group forms, which waits without a word
            backend = "nccl" if place.type == "cuda" else "gloo"
            store = dist.PrefixStore("group", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_FOREVER)
        world._joined = True
        return world

    @classmethod
    def from_group(cls) -> World:
        """The world of torch.distributed's default process group, which must be there already."""
        if not (dist.is_available() and dist.is_initialized()):
            raise SparsekitError("a world needs a process group, got none; call torch.distributed.init_process_group first")
        device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
        store = dist.distributed_c10d._get_default_store()  # has no public name
        return cls(dist.get_rank(), dist.get_world_size(), device, store if dist.get_world_size() > 1 else None)

    def close(self) -> None:
        """Leaves the process group that ``from_environment`` joined, when all is done."""
        if self._joined:
            dist.destroy_process_group()
            self._joined = False

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.rank == 0

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share of the items: neighbours, as many as any other's or one more. Raises SparsekitError where a rank would
        have none."""
        if self.size == 1:
            return items
        if len(items) < self.size:
            raise SparsekitError(
                f"each of {self.size} processes needs a calibration batch, got {len(items)}; give more samples or start fewer"
            )
        return items[self.rank * len(items) // self.size : (self.rank + 1) * len(items) // self.size]

    def agree(self, settings: dict[str, Any]) -> None:
        """Raises SparsekitError, naming the first that differs, unless every rank has the same settings."""
        for rank, theirs in enumerate(everyone := self.gather(settings)):
            for name in everyone[0]:
                if theirs.get(name) != everyone[0][name]:
                    raise SparsekitError(
                        f"all ranks must run with the same settings, and {name} is {theirs.get(name)!r} on rank {rank} but "
                        f"{everyone[0][name]!r} on rank 0"
                    )

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, in their order; values that JSON holds."""
        if self.size == 1:
            return [value]
        turn, self._turn = self._turn, self._turn + 1
        with self._broken():
            self._store.set(f"{turn}/{self.rank}", json.dumps(value))
            keys = [f"{turn}/{rank}" for rank in range(self.size)]
            self._wait(lambda: self._store.check(keys))
            values = [json.loads(self._store.get(key)) for key in keys]
            if turn:  # whoever is in this turn has read the one before
                self._store.delete_key(f"{turn - 1}/{self.rank}")
        return values

    def reduce_(self, tensor: Tensor, to: int) -> None:
        """Adds up the tensors of all ranks into the one of rank ``to``; what the others hold then is undefined."""
        if self.size > 1:
            self._finish(dist.reduce(tensor, to, async_op=True))

    def broadcast_(self, tensor: Tensor, source: int) -> None:
        """Copies the tensor of rank ``source`` over those of the others, whatever its dtype and strides."""
        if self.size > 1:
            held = tensor.contiguous()
            self._finish(dist.broadcast(held.view(-1).view(torch.uint8), source, async_op=True))
            if self.rank != source and held.data_ptr() != tensor.data_ptr():
                tensor.copy_(held)

    def look(self) -> None:
        """Raises SparsekitError where another rank has failed, RankLost where by no mistake of the user's; costs nothing."""
        if self._watch and self._watch.failure:
            _, text, mistake = self._watch.failure
            raise SparsekitError(text) if mistake else RankLost(text)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, an exception of this rank ends the others, and theirs ends this one, as a SparsekitError that names the rank.

        Rank 0 leaves last, since it may be the one that holds the store."""
        if self.size == 1 or self._watch:
            yield
            return
        self._store, self._turn = dist.PrefixStore(f"sparsekit/{next(_sessions)}", self._root), 0
        self._watch = Watch(self._store, self.rank, self.size)
        try:
            with self._broken():
                here = self._wait(lambda: self._watch.connected, ARRIVAL)
                if absent := self._wait_for("come", ARRIVAL if here else 0):
                    raise SparsekitError(f"{self.size} ranks must come within {ARRIVAL:.0f} s, and rank {listed(absent)} did not")
            yield
            with self._broken():
                self._wait_for("leave", None if self.leads else 0)
        except BaseException as error:
            self._watch.give_up(error)
            if (failure := self._watch.failure) and failure[0] != self.rank:
                with suppress(AttributeError):
                    error.why = failure[1]
            raise
        finally:
            self._watch.stop()
            self._watch = None

    def _wait_for(self, sign: str, limit: float | None = None) -> list[int]:
        """Waits for each rank to set the key ``sign``; the ranks that have not within the limit of seconds."""
        self._store.set(f"{sign}/{self.rank}", "")
        absent = lambda: [rank for rank in range(self.size) if not self._store.check([f"{sign}/{rank}"])]  # noqa: E731
        self._wait(lambda: not absent(), limit)
        return absent()

    def _wait(self, done, limit: float | None = None) -> bool:
        """Polls until done; False where it is not within the limit of seconds. Another rank's failure ends it, and Ctrl-C."""
        pause, begin = 1e-5, time.monotonic()
        while not done():
            self.look()
            if limit is not None and time.monotonic() - begin > limit:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
        return True

    def _finish(self, work: dist.Work) -> None:
        with self._broken():
            self._wait(work.is_completed)
            work.wait()

    @contextmanager
    def _broken(self) -> Iterator[None]:
        """A broken connection says that a rank is gone, but not which: the watch knows soon."""
        try:
            yield
        except SparsekitError:
            raise
        except RuntimeError as error:
            self._wait(lambda: False, PATIENCE)
            raise RankLost(f"the connection to another rank broke: {_line(error)}") from error


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        raise SparsekitError(f"the world's {name} must be an integer, got {text!r}; start with torchrun") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())


def share_out(costs: Sequence[float], size: int) -> list[int]:
    """The rank of each piece of work: the dearest first, each to the rank that has least to do by then, the lowest of equals."""
    load, owners = [0.0] * size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


def unite(world: World, pruners: Mapping[Target, Pruner]) -> None:
    """Makes all ranks share statistics alike and know the tokens of all.

    A rank whose batches never reached a linear (an expert) learns from the others with which it shares its input. Raises
    SparsekitError where two ranks saw it share otherwise."""
    if world.size == 1:
        return
    held, first = list(pruners.values()), {}
    leaders = [first.setdefault(id(pruner.statistics), i) for i, pruner in enumerate(held)]
    everyone = world.gather([leaders, [pruner.statistics.tokens for pruner in held]])
    for i, pruner in enumerate(held):
        seen = {theirs[i] for theirs, tokens in everyone if tokens[i] or theirs[i] != i} or {i}
        if len(seen) > 1:
            raise SparsekitError("linears of a block must share their inputs alike in every batch; give batches of one kind")
        pruner.statistics = held[seen.pop()].statistics
    for i in {first[id(pruner.statistics)] for pruner in held}:
        held[i].statistics.tokens = sum(tokens[i] for _, tokens in everyone)


def collect(world: World, pruners: Mapping[Target, Pruner]) -> list[int]:
    """The rank that prunes each linear; its statistics hold the sums over all batches there alone.

    Linears that share a statistic stay together, so that it is factored once: k^3 + n k^2 operations for k inputs and n outputs."""
    if world.size == 1:
        return [0] * len(pruners)
    held, groups = list(pruners.values()), {}
    for i, pruner in enumerate(held):
        groups.setdefault(id(pruner.statistics), []).append(i)
    rows, costs = [target.weight.shape[0] for target in pruners], []
    for group in groups.values():
        columns = float(held[group[0]].statistics.sum.shape[0])
        costs.append(columns**3 + sum(rows[i] for i in group) * columns**2)
    owners = [0] * len(held)
    for group, rank in zip(groups.values(), share_out(costs, world.size)):
        statistics = held[group[0]].statistics
        world.reduce_(statistics.sum, rank)
        if rank != world.rank:
            statistics.sum = statistics.sum.new_empty(0)  # the memory is for those of this rank
        for i in group:
            owners[i] = rank
    return owners


def spread(
    world: World, owners: Sequence[int], weights: Sequence[Tensor], rows: Sequence[LinearReport | None]
) -> list[LinearReport]:
    """Copies each weight from its owner to all, and the row that reports of it; a rank gives None in place of the others' rows."""
    if world.size == 1:
        return list(rows)
    for weight, owner in zip(weights, owners):
        world.broadcast_(weight, owner)
    everyone = world.gather([row and asdict(row) for row in rows])
    found = [everyone[owner][i] for i, owner in enumerate(owners)]
    return [LinearReport.from_dict(row) for row in found]


def check_weights(world: World, what: str, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raises SparsekitError unless the parameters, by name, have the same bits on every rank."""
    if world.size == 1:
        return
    seen = hashlib.sha256()
    for name, weight in parameters:
        # The sum of the bits taken for integers is exact, in whatever order a device adds.
        bits = None if weight.is_meta else weight.detach().contiguous().view(-1).view(_BITS[weight.element_size()])
        seen.update(f"{name} {tuple(weight.shape)} {weight.dtype} {bits is not None and int(bits.sum())};".encode())
    world.agree({f"the hash of the weights {what}": seen.hexdigest()[:16]})
