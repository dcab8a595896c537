"""Which kernel runs a product: one cached lookup in measured rows.

A row is one measurement of y (m, n) = x (m, k) W' on one kind of device: the kernel with its tile and split of k, and its time.
"expand" is the kernel that every device has: the weight written out dense and the library's product, so where each sparse kernel
measured slower than that, it is what the lookup says. Rows come from a cache file, written by ``sparsekit bench --tune`` for one
machine, driver and version, else from the rows that ship with the package, else there are none and the caller's default holds.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from . import env
from .documents import to_json
from .errors import SparsekitError

EXPAND = "expand"
DENSE = "dense"  # the library's product with a weight that is dense already: the rival, kept beside the others, and no choice
FILE_VERSION = 1


class Choice(NamedTuple):
    """A kernel by name, its tile and its split of k; 0 leaves the latter two to the kernel."""

    kernel: str
    tile: int = 0
    split: int = 0


class Row(NamedTuple):
    """One measurement. dtype is the weight's, as torch names it; us the median microseconds of a call."""

    dtype: str
    m: int
    n: int
    k: int
    kernel: str
    tile: int
    split: int
    us: float


class Table:
    """The rows of one kind of device, as lookups want them: the fastest choice of each measured size."""

    def __init__(self, rows: Iterable[Row]):
        fastest: dict[tuple[str, int, int, int], Row] = {}
        for row in rows:
            place = (row.dtype, row.n, row.k, row.m)
            if row.kernel == DENSE:
                continue
            if place not in fastest or row.us < fastest[place].us:
                fastest[place] = row
        self._weights: dict[str, dict[tuple[int, int], dict[int, Choice]]] = {}
        for (dtype, n, k, m), row in fastest.items():
            of_m = self._weights.setdefault(dtype, {}).setdefault((n, k), {})
            of_m[m] = Choice(row.kernel, row.tile, row.split)

    def choose(self, dtype: str, m: int, n: int, k: int) -> Choice | None:
        """What was fastest at the nearest measured weight and, of its rows, the nearest m; sizes are compared by their ratios.

        None for a dtype without rows. A tie goes to the smaller measured size."""
        weights = self._weights.get(dtype)
        if not weights:
            return None
        of_m = weights[_nearest_weight(weights, n, k)]
        return of_m[_nearest_m(of_m, m)]


def _nearest_weight(weights: Iterable[tuple[int, int]], n: int, k: int) -> tuple[int, int]:
    return min(sorted(weights), key=lambda size: ratio(size[0], n) + ratio(size[1], k))


def _nearest_m(measured: Iterable[int], m: int) -> int:
    return min(sorted(measured), key=lambda size: ratio(size, m))


def ratio(a: int, b: int) -> float:
    """How far two sizes lie apart: the logarithm of the larger over the smaller, both at least 1."""
    return abs(math.log(max(a, 1) / max(b, 1)))


@lru_cache(maxsize=4096)
def choose(device: str, dtype: str, m: int, n: int, k: int) -> Choice | None:
    """The lookup: what to run for these sizes on a device of that key, or None where nothing was measured. No search, no I/O but
    for the first call of a device."""
    return table(device).choose(dtype, m, n, k)


@cache
def table(device: str) -> Table:
    return Table(rows(device))


def rows(device: str) -> list[Row]:
    """The rows for a device key: of its cache file, else the shipped ones of its kind, else none."""
    with suppress(OSError):
        return read(cache_file(device), device)
    return [Row(*row) for row in _shipped(device).get("rows", [])]


def measured_on(device: str) -> str:
    """Where the rows for a device key were measured, as a reader is told: "on this machine", or on what those shipped are of."""
    shipped = {} if cache_file(device).is_file() else _shipped(device)
    return f"on another {_kind(device)}, {shipped['measured']}, as shipped" if shipped.get("rows") else "on this machine"


def _shipped(device: str) -> dict:
    return json.loads((files(__package__) / "tune.json").read_text())["devices"].get(_kind(device), {})


def _kind(device: str) -> str:
    """What stands first in a key, such as the name of a GPU."""
    return device.split("; ")[0]


class Times(NamedTuple):
    """Microseconds of one product at a measured size y (m, n) = x (m, k) W': of the dense product, and of the fastest kernel for a
    2:4 weight, "expand" included."""

    m: int
    n: int
    k: int
    dense: float
    sparse: float


def timed(device: str, dtype: str) -> dict[tuple[int, int], dict[int, Times | None]]:
    """The times by weight (n, k) and m; None where the dense product or a kernel was not measured."""
    fastest: dict[tuple[int, int], dict[int, dict[bool, float]]] = {}
    for row in rows(device):
        if row.dtype == dtype:
            best = fastest.setdefault((row.n, row.k), {}).setdefault(row.m, {})
            best[row.kernel == DENSE] = min(best.get(row.kernel == DENSE, math.inf), row.us)
    return {
        (n, k): {m: Times(m, n, k, best[True], best[False]) if len(best) == 2 else None for m, best in of_m.items()}
        for (n, k), of_m in fastest.items()
    }


def times(device: str, dtype: str, m: int, n: int, k: int) -> Times | None:
    """What was measured at the nearest weight and, of its rows, the nearest m, sizes compared as ``choose`` compares them; None
    where that is not both a kernel and the dense product. How near it is, is for the caller to judge."""
    found = timed(device, dtype)
    if not found:
        return None
    of_m = found[_nearest_weight(found, n, k)]
    return of_m[_nearest_m(of_m, m)]


def speedups(device: str, dtype: str, m: int) -> dict[tuple[int, int], float]:
    """How many times as fast as the dense product the fastest kernel ran, by weight (n, k), at the measured m nearest to the one
    asked for; weights without a dense row there are left out."""
    found = {size: of_m[_nearest_m(of_m, m)] for size, of_m in timed(device, dtype).items()}
    return {size: best.dense / best.sparse for size, best in found.items() if best}


def forget() -> None:
    """Reads the rows anew at the next lookup, for one who has written them."""
    choose.cache_clear()
    table.cache_clear()


# ---- the cache file ----


def cache_file(device: str) -> Path:
    """Where a device's rows are kept: under SPARSEKIT_CACHE, by default ~/.cache/sparsekit. The name is made of the key."""
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in device)
    return env.CACHE / f"tune-{name}.json"


def check_writable(device: str) -> None:
    """Raises SparsekitError where write() could not. Leaves nothing behind."""
    path = cache_file(device)
    try:
        if path.is_dir():
            raise IsADirectoryError(f"a folder named {path.name}")
        with tempfile.TemporaryFile(dir=next(folder for folder in path.parents if folder.exists())):  # write() makes the others
            pass
    except OSError as error:
        raise SparsekitError(
            f"{path.parent} must be a folder that rows can be kept in, got {error.strerror or error}; set SPARSEKIT_CACHE"
        ) from error


def write(device: str, rows: list[Row]) -> Path:
    """Writes the rows of a device to its cache file, in one rename, and forgets what was read before. Returns the file."""
    path = cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(to_json(row) for row in rows)
    text = f'{{"version": {FILE_VERSION}, "device": {to_json(device)}, "rows": [\n{lines}\n]}}\n'
    partial = path.with_name(f"{path.name}.{os.getpid()}")  # read by whom the folder is for, unlike what mkstemp makes
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    forget()
    return path


def read(path: Path, device: str) -> list[Row]:
    """The rows in a cache file. Raises FileNotFoundError where there is none, SparsekitError where it is another thing."""
    try:
        found = json.loads(path.read_bytes())
        if found["version"] != FILE_VERSION or found["device"] != device:
            raise ValueError(f"version {found['version']} of {found['device']!r}")
        rows = [Row(*row) for row in found["rows"]]
        if not all(isinstance(a, t) for row in rows for a, t in zip(row, (str, int, int, int, str, int, int, (int, float)))):
            raise ValueError("a row of other types")
        if not all(0 < row.us < math.inf and min(row[1:4]) > 0 <= min(row.tile, row.split) for row in rows):
            raise ValueError("a row of sizes or a time that cannot be")
        return rows
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SparsekitError(
            f"{path} must hold rows of version {FILE_VERSION} for {device!r}, got {error}; delete it or run sparsekit bench --tune"
        ) from error
