"""sparsekit bench: what it measures, what it keeps, and that products then choose by it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from sparsekit import SparsekitError, bench, env, ops, tune
from sparsekit.cli import app
from sparsekit.ops import linear as product
from sparsekit.tune import EXPAND, Choice

CPU = torch.device("cpu")
KJV1M = "tests/data/kjv1m"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        bench, "time_us", lambda calls: {name: (call(), float(i + 1))[1] for i, (name, call) in enumerate(calls.items())}
    )
    tune.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    tune.forget()


@pytest.mark.parametrize("dtype", product.LINEAR_DTYPES, ids=str)
def test_rows(dtype):
    seen = []
    rows = bench.measure(CPU, dtype, ((8, 24), (5, 13)), (1, 3), progress=lambda *step: seen.append(step))
    name = str(dtype).removeprefix("torch.")
    assert [row[:5] for row in rows] == [
        (name, m, n, k, kernel)
        for n, k in ((8, 24), (5, 13))
        for m in (1, 3)
        for kernel in (EXPAND, product.SPARSE_CPU, bench.DENSE)
    ]
    assert [row.us for row in rows] == [1.0, 2.0, 3.0] * 4 and [step[1:] for step in seen] == [(i, 4) for i in range(4)]


def test_the_kernels_are_run(monkeypatch):
    ran = []
    monkeypatch.setattr(product, "run_on_cpu", lambda choice, x, s, *_: ran.append((choice, tuple(x.shape), s.shape)))
    bench.measure(CPU, torch.float32, ((8, 24),), (3,))
    assert ran == [(Choice(kernel), (3, 24), (8, 24)) for kernel in (EXPAND, product.SPARSE_CPU)]


def test_what_is_kept_is_what_products_choose_by(cache, monkeypatch, weight24):
    path = bench.save(CPU, bench.measure(CPU, torch.float32, ((8, 24),), (1, 3)))  # by the clock above, to expand is the faster
    assert path.parent == cache
    # The dense rows are kept as the rival, and never chosen.
    assert tune.speedups(bench.key(CPU), "float32", 2) and bench.DENSE in path.read_text()
    expanded = []
    monkeypatch.setattr(product, "_expanded", lambda *args, old=product._expanded: expanded.append(1) or old(*args))
    ops.linear24(torch.randn(3, 24), ops.compress24(weight24(8, 24)))
    assert len(expanded) == 1


def test_rows_of_other_sizes_stay(cache):
    bench.save(CPU, bench.measure(CPU, torch.float32, ((8, 24),), (1, 3)))
    path = bench.save(CPU, bench.measure(CPU, torch.float32, ((8, 24), (16, 8)), (3,)))
    rows = tune.read(path, bench.key(CPU))
    assert sorted({row[:4] for row in rows}) == [("float32", m, n, k) for m, n, k in ((1, 8, 24), (3, 8, 24), (3, 16, 8))]
    assert len(rows) == 9


@pytest.mark.parametrize("shapes, tokens", [((), (1,)), (((8, 0),), (1,)), (((8, 8),), ()), (((8, 8),), (0,))])
def test_sizes_that_are_refused(shapes, tokens):
    with pytest.raises(SparsekitError, match="there must be shapes and tokens of 1 or more, got"):
        bench.measure(CPU, torch.float32, shapes, tokens)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64], ids=str)
def test_dtypes_that_are_refused(dtype):
    with pytest.raises(SparsekitError, match="one that a product takes, got torch"):
        bench.measure(CPU, dtype, ((8, 8),), (1,))


def test_fp32_is_refused_on_a_gpu():
    with pytest.raises(SparsekitError, match="a GPU multiplies 2:4 weights of float16 and bfloat16, got torch"):
        bench.measure(torch.device("cuda"), torch.float32, ((8, 8),), (1,))


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_the_command(cache):
    done = run("--shape", "8x24", "--tokens", "1", "--tokens", "3", "--device", "cpu", "--dtype", "bfloat16")
    assert done.exit_code == 0 and not cache.exists()
    assert done.stdout.count("8x24") == 6 and "linear24_cpu" in done.stdout and "bfloat16" in done.stdout
    found = json.loads(run("--shape", "8x24", "--tokens", "1", "--device", "cpu", "--tune", "--json").stdout)
    assert [row["kernel"] for row in found["rows"]] == [EXPAND, product.SPARSE_CPU, bench.DENSE]
    assert found["device"] == bench.key(CPU) and json.loads(open(found["file"]).read())["device"] == found["device"]


def test_the_linears_of_a_model(request):
    folder = request.config.rootpath / KJV1M
    found = json.loads(run(str(folder), "--tokens", "2", "--device", "cpu", "--json").stdout)
    # q and o, k and v, gate and up, down: by the config, heads of 32 over a width of 128.
    assert [(row["n"], row["k"]) for row in found["rows"][::3]] == [(128, 128), (64, 128), (384, 128), (128, 384)]


def test_a_damaged_file_is_replaced():
    rows = bench.measure(CPU, torch.float32, ((8, 24),), (1,))
    path = bench.save(CPU, rows)
    path.write_text("half a fi")
    assert tune.read(bench.save(CPU, rows), bench.key(CPU)) == rows


@pytest.mark.parametrize("place", ["a file", "under a file", "the file is a folder"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(place, cache, monkeypatch):
    if place == "the file is a folder":
        tune.cache_file(bench.key(CPU)).mkdir(parents=True)
    else:
        cache.write_text("")
        monkeypatch.setattr(env, "CACHE", cache if place == "a file" else cache / "a" / "b")
    monkeypatch.setattr(bench, "measure", lambda *_, **__: pytest.fail("measured"))
    done = run("--shape", "8x8", "--tokens", "1", "--device", "cpu", "--tune")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "must be a folder that rows can be kept in, got" in done.stderr and str(env.CACHE) in done.stderr.replace("\n", "")


@pytest.mark.parametrize("folder", [".", "not/yet"], ids=["there", "to be made"])
def test_the_check_leaves_nothing(folder, cache, monkeypatch):
    cache.mkdir()
    monkeypatch.setattr(env, "CACHE", cache / folder)
    bench.check_writable(CPU)
    assert not [*cache.iterdir()]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--shape", "8"), "--shape must be out x in, such as \"4096x11008\", got '8'"),
        (("--shape", "8x0"), "got '8x0'"),
        (("--shape", "8x8", "--tokens", "0"), "there must be shapes and tokens of 1 or more"),
        (("--shape", "8x8", "--dtype", "int8"), "the dtype must be auto, float32"),
        (("nowhere",), "nowhere"),
    ],
)
def test_arguments_that_are_refused(arguments, says):
    done = run(*arguments)
    assert done.exit_code == 2 and says in done.stderr and done.stderr.count("\n") == 1
