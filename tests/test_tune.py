"""The lookup of measured rows, on invented ones; their file; and that the product does what the rows say."""

import json
import math
import os

import pytest
import torch

from sparsekit import SparsekitError, env, ops, tune
from sparsekit.ops import linear as product
from sparsekit.tune import DENSE, EXPAND, Choice, Row, Table

DEVICE = "Invented GPU; sm_90; driver 1; CUDA 2"


def row(m, n, k, kernel, us, tile=0, split=0, dtype="float16") -> Row:
    return Row(dtype, m, n, k, kernel, tile, split, us)


ROWS = [
    row(1, 4096, 4096, "decode", 5.0, 1, 2),
    row(1, 4096, 4096, "decode", 4.0, 2, 4),
    row(1, 4096, 4096, EXPAND, 9.0),
    row(64, 4096, 4096, "decode", 12.0, 3),
    row(64, 4096, 4096, EXPAND, 11.5),
    row(4096, 4096, 4096, "hopper", 90.0, 5),
    row(4096, 4096, 4096, EXPAND, 95.0),
    row(1, 1024, 16384, "decode", 6.0, 7, 8),
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, looked up afresh before and after."""
    monkeypatch.setattr(env, "CACHE", tmp_path / "cache")
    tune.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    tune.forget()


@pytest.mark.parametrize(
    "m, n, k, want",
    [
        (1, 4096, 4096, Choice("decode", 2, 4)),  # the faster of two
        (64, 4096, 4096, Choice(EXPAND)),  # every sparse kernel was slower
        (4096, 4096, 4096, Choice("hopper", 5)),
        (7, 4096, 4096, Choice("decode", 2, 4)),  # 7 is nearer to 1 than to 64, by ratio
        (9, 4096, 4096, Choice(EXPAND)),
        (8, 4096, 4096, Choice("decode", 2, 4)),  # as near to both: the smaller
        (0, 4096, 4096, Choice("decode", 2, 4)),
        (10**6, 4096, 4096, Choice("hopper", 5)),
        (1, 5000, 3500, Choice("decode", 2, 4)),
        (1, 1500, 12000, Choice("decode", 7, 8)),  # another weight is nearer, with its one m
        (4096, 1024, 16384, Choice("decode", 7, 8)),
    ],
)
def test_the_nearest_measured_size_decides(m, n, k, want):
    assert Table(ROWS).choose("float16", m, n, k) == want
    assert Table(reversed(ROWS)).choose("float16", m, n, k) == want


def test_nearest_is_by_ratio():
    table = Table([row(m, 64, 64, f"at {m}", 1.0) for m in (1, 10, 100, 1000)])
    for m in range(1, 3000):
        measured = int(table.choose("float16", m, 64, 64).kernel.split()[1])
        assert all(abs(math.log(measured / m)) <= abs(math.log(other / m)) + 1e-12 for other in (1, 10, 100, 1000))


def test_what_was_not_measured(cache):
    assert Table([]).choose("float16", 1, 64, 64) is None
    assert Table(ROWS).choose("bfloat16", 1, 4096, 4096) is None
    assert tune.choose(DEVICE, "float16", 1, 64, 64) is None
    assert not cache.exists()  # a lookup writes nothing


def test_rows_are_kept_by_device(cache):
    path = tune.write(DEVICE, ROWS)
    assert path.parent == cache and [p.name for p in cache.iterdir()] == [path.name]
    assert tune.choose(DEVICE, "float16", 1, 4096, 4096) == Choice("decode", 2, 4)
    assert tune.choose(DEVICE.replace("driver 1", "driver 2"), "float16", 1, 4096, 4096) is None
    tune.write(DEVICE, [row(1, 4096, 4096, "other", 1.0)])  # what was looked up before is forgotten
    assert tune.choose(DEVICE, "float16", 1, 4096, 4096) == Choice("other")
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_a_lookup_reads_once(cache, monkeypatch):
    tune.write(DEVICE, ROWS)
    reads = []
    monkeypatch.setattr(tune, "read", lambda *args, read=tune.read: reads.append(args) or read(*args))
    for m in (1, 1, 2, 64, 1):
        tune.choose(DEVICE, "float16", m, 4096, 4096)
    assert len(reads) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 2, "device": "DEVICE", "rows": []}',
        '{"version": 1, "device": "another", "rows": []}',
        '{"version": 1, "device": "DEVICE", "rows": [[1, 2]]}',
        '{"version": 1, "device": "DEVICE", "rows": [["float16", 1, 1, 1, "decode", "1", 0, 1.0]]}',
        '{"version": 1, "device": "DEVICE", "rows": [["float16", 1, 1, 1, "decode", -1, 0, 1.0]]}',
        '{"version": 1, "device": "DEVICE", "rows": [["float16", 0, 1, 1, "decode", 0, 0, 1.0]]}',
        '{"version": 1, "device": "DEVICE", "rows": [["float16", 1, 1, 1, "decode", 0, 0, NaN]]}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_damaged_file_is_refused(text, cache):
    path = tune.write(DEVICE, ROWS)
    path.write_text(text.replace("DEVICE", DEVICE))
    tune.forget()
    with pytest.raises(
        SparsekitError, match=r"must hold rows of version 1 for 'Invented GPU; .*; delete it or run sparsekit bench"
    ):
        tune.choose(DEVICE, "float16", 1, 1, 1)


def test_a_file_of_other_bytes_is_refused(cache):
    tune.write(DEVICE, ROWS).write_bytes(b"\xff\xfe\x00rows")
    tune.forget()
    with pytest.raises(SparsekitError, match="must hold rows of version 1"):
        tune.choose(DEVICE, "float16", 1, 1, 1)


def test_a_failed_write_leaves_the_old_file(cache, monkeypatch):
    path = tune.write(DEVICE, ROWS)
    before = path.read_text()
    monkeypatch.setattr(tune.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tune.write(DEVICE, [])
    assert path.read_text() == before and [p.name for p in cache.iterdir()] == [path.name]


def test_whom_the_folder_is_for_reads_the_file(cache):
    former = os.umask(0o022)
    try:
        assert tune.write(DEVICE, ROWS).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(former)


def test_shipped_rows_serve_where_no_file_is(cache, monkeypatch):
    shipped = json.dumps({"version": 1, "devices": {"Invented GPU": {"measured": "2026-01-01", "rows": [list(r) for r in ROWS]}}})

    class Files:
        def joinpath(self, name):
            return self

        __truediv__ = joinpath

        def read_text(self):
            return shipped

    monkeypatch.setattr(tune, "files", lambda package: Files())
    assert tune.choose(DEVICE, "float16", 1, 4096, 4096) == Choice("decode", 2, 4)
    assert tune.measured_on(DEVICE) == "on another Invented GPU, 2026-01-01, as shipped"
    assert tune.measured_on("Another GPU; sm_90") == "on this machine"
    tune.write(DEVICE, [row(1, 64, 64, "mine", 1.0)])
    assert tune.choose(DEVICE, "float16", 1, 4096, 4096) == Choice("mine") and tune.measured_on(DEVICE) == "on this machine"


def test_what_ships_can_be_read():
    shipped = json.loads((tune.files("sparsekit") / "tune.json").read_text())
    assert shipped["version"] == tune.FILE_VERSION
    for device in shipped["devices"].values():
        assert device["measured"] and all(isinstance(Row(*r), Row) for r in device["rows"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias, activation", [(False, None), (True, "silu")])
def test_the_product_does_what_the_rows_say(dtype, bias, activation, cache, monkeypatch, weight24):
    w, x = weight24(6, 24, dtype, integers=True), torch.arange(72).view(3, 24).sub(30).to(dtype)
    s, b = ops.compress24(w), torch.arange(6).to(dtype) if bias else None
    expanded = []
    monkeypatch.setattr(product, "_expanded", lambda *args, old=product._expanded: expanded.append(1) or old(*args))
    plain = ops.linear24(x, s, b, activation)
    assert not expanded
    key = product.cpu_key(product.threads())
    tune.write(key, [row(3, 6, 24, EXPAND, 1.0, dtype=str(dtype).removeprefix("torch."))])
    assert torch.allclose(ops.linear24(x, s, b, activation).float(), plain.float(), rtol=2e-2) and len(expanded) == 1
    tune.write(key, [row(3, 6, 24, product.SPARSE_CPU, 1.0, dtype=str(dtype).removeprefix("torch."))])
    assert torch.equal(ops.linear24(x, s, b, activation), plain) and len(expanded) == 1


def test_the_times_of_the_nearest_product(cache):
    tune.write(DEVICE, [*ROWS, row(1, 4096, 4096, DENSE, 8.0), row(64, 4096, 4096, DENSE, 10.0), row(9, 64, 64, DENSE, 1.0)])
    assert tune.times(DEVICE, "float16", 2, 5000, 4000) == (1, 4096, 4096, 8.0, 4.0)  # of two kernels the faster
    assert tune.times(DEVICE, "float16", 9, 4096, 4096) == (64, 4096, 4096, 10.0, 11.5)
    assert tune.times(DEVICE, "float16", 4096, 4096, 4096) is None  # there no dense product was measured
    assert tune.times(DEVICE, "float16", 9, 64, 64) is None  # nor here a kernel
    assert tune.times(DEVICE, "bfloat16", 1, 4096, 4096) is None
    assert tune.speedups(DEVICE, "float16", 9) == {(4096, 4096): 10.0 / 11.5}
