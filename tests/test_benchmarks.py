"""The benchmarks of the memory-bound ops: that a row says what was measured, and that a rival does the same work."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsekit

ROOT = Path(__file__).resolve().parents[1]
OPS = ["compress24", "expand24", "expand_fragments", "mask_nm", "mask_rows", "prune24", "prune_compress24", "validate24"]
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}


def module(op: str):
    return __import__(f"benchmarks.{op}", fromlist=["problem"])


@pytest.mark.parametrize("op", OPS)
def test_rows(op, monkeypatch):
    from benchmarks import memory_bound

    monkeypatch.setattr(memory_bound, "SHAPES", {"tiny": (64, 128), memory_bound.REFERENCE_SHAPE: (32, 64)})
    monkeypatch.setattr(memory_bound, "uncached", lambda nbytes: 2)
    monkeypatch.setattr(memory_bound, "time_us", lambda calls, **_: {name: (call(), 2.0)[1] for name, call in calls.items()})
    rows = list(memory_bound.rows(module(op).problem, "cpu", ["tiny", memory_bound.REFERENCE_SHAPE]))
    dtypes = [dtype for dtype in ("bf16", "fp16", "fp32", "fp8", "int8") if op != "expand_fragments" or dtype != "fp32"]
    assert [(r["layer"], r["dtype"], r["layout"]) for r in rows] == [
        ("tiny", "bf16", "row-major"),
        *((memory_bound.REFERENCE_SHAPE, dtype, "row-major") for dtype in dtypes),
        (memory_bound.REFERENCE_SHAPE, "bf16", "transposed"),
    ]
    for row in rows:
        assert row["us"] == row["copy_us"] == 2 and row["of_copy"] == 1
        if op not in ("expand_fragments", "validate24"):
            assert row["new_us"] == row["fresh_copy_us"] == 2 and row["of_fresh_copy"] == 1
        assert row["gbps"] == row["copy_gbps"] == round(row["bytes"] / 2e3, 2)
        assert ("turned_copy_us" in row) == (row["layout"] == "transposed")


@pytest.mark.parametrize("op", OPS)
def test_both_sides_of_a_share_use_memory_alike(op):
    """Beside of_copy nothing new is made; each call is on other memory than the one before, until all have had their turn."""
    from benchmarks import memory_bound

    w = memory_bound.weight(32, 64, torch.bfloat16, "cpu")
    problems = [module(op).problem(w.clone()) for _ in range(3)]
    seen = {}

    def call_each(calls, seconds):
        for name, call in calls.items():
            results = [call() for _ in range(6)]
            seen[name] = [getattr(r, "values", r) if isinstance(r, sparsekit.Sparse24) else r for r in results]
        return dict.fromkeys(calls, 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_bound, "time_us", call_each)
        memory_bound.cpu_times(problems[0], problems[1:])
    for name in ("op", "copy") if problems[0].writes else ():
        at = [t.data_ptr() for t in seen[name]]
        assert at[:3] == at[3:] and len(set(at)) == 3, name
    for name in ("new", "fresh") if problems[0].writes else ():
        assert len({t.data_ptr() for t in seen[name]}) == 6, name
    assert ("new" in seen) == problems[0].writes


def test_what_is_installed_to_use_the_package_is_enough_for_a_benchmark():
    """cases.py runs tests."""
    files = (ROOT / "benchmarks").glob("*.py")
    assert [path.name for path in files if re.search(r"^(import|from) pytest", path.read_text(), re.M)] == ["cases.py"]


def test_a_copy_that_turns_over_moves_as_many_bytes():
    from benchmarks.memory_bound import turned_copy_of, weight

    w = weight(32, 64, torch.bfloat16, "cpu", transposed=True)
    made = turned_copy_of(32 * 48 * 4, w)()
    assert made.shape == (32, 48) and made.is_contiguous() and made.dtype == w.dtype and (made == 1).all()


def test_no_cache_holds_half_of_the_problems():
    from benchmarks.memory_bound import uncached

    assert uncached(1 << 40) == 1  # one that no cache holds
    assert uncached(1) == 1 + 2 * (uncached(2) - 1) > 1 << 20


def test_a_fresh_copy_has_memory_of_its_own():
    from benchmarks.memory_bound import fresh_copy_of

    copy = fresh_copy_of(1000)
    one, other = copy(), copy()
    assert one.nbytes == 500 and one.data_ptr() != other.data_ptr() and torch.equal(one, other)


@pytest.mark.parametrize("op, share", [("compress24", 1 + 9 / 16), ("expand24", 1 + 9 / 16),
                                       ("expand_fragments", 1 + 5 / 8),  # 128 columns take the metadata of 256
                                       ("prune_compress24", 1 + 9 / 16),
                                       ("prune24", 2), ("mask_nm", 1.5), ("mask_rows", 1.5), ("validate24", 1 / 16)])  # fmt: skip
def test_bytes(op, share):
    from benchmarks.memory_bound import weight

    w = weight(64, 128, torch.bfloat16, "cpu")
    assert module(op).problem(w).nbytes == share * w.nbytes


@pytest.mark.parametrize(
    "op", ["compress24", "expand24", "expand_fragments", "mask_nm", "mask_rows", "prune24", "prune_compress24"]
)
def test_a_rival_gives_the_same(op):
    # The rivals' sorts are not stable: no ties, in a row or in a group of four.
    distinct = torch.randperm(64 * 128, generator=torch.Generator().manual_seed(0)).view(64, 128).float()
    w = (distinct.unflatten(1, (-1, 4)).argsort(-1) + 1).flatten(1).half() if "compress" in op or "expand" in op else distinct
    problem = module(op).problem(w)
    ((name, rival),) = problem.rivals.items()
    ours, theirs = problem.op(), rival()
    if isinstance(ours, sparsekit.Sparse24):
        held = sparsekit.ops.expand24(ours)
        assert torch.equal(torch.sparse._semi_structured_conversions.sparse_semi_structured_to_dense_cutlass(*theirs), held)
    else:
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("pattern, rivals", [("2:4", ["torch_sort"]), ("3:5", []), ("16:32", ["torch_sort"])])
def test_mask_nm_has_a_rival_where_m_divides_the_columns(pattern, rivals):
    n, m = module("mask_nm").pattern(pattern).n, module("mask_nm").pattern(pattern).m
    problem = module("mask_nm").problem(torch.randn(4, 64), n, m)
    assert [*problem.rivals] == rivals
    for call in (problem.op, *problem.rivals.values()):
        assert int(call().sum()) == 4 * (64 // m * n + min(n, 64 % m))


@pytest.mark.parametrize("pattern", ["3:64", "1:33", "50%", "5:4", "two"])
def test_mask_nm_refuses_another_pattern(pattern):
    command = [sys.executable, "-m", "benchmarks.mask_nm", "--device", "cpu", "--pattern", pattern]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    *_, error = done.stderr.splitlines()
    assert error.startswith("mask_nm.py: error: argument --pattern: ") and pattern in error.partition(", got ")[2]


def test_rows_of_the_product(monkeypatch):
    from benchmarks import linear24

    monkeypatch.setattr(linear24, "CPU_SHAPES", {"tiny": (48, 96)})
    monkeypatch.setattr(linear24, "CPU_TOKENS", (1, 3))
    monkeypatch.setattr(linear24, "copy_gbps", lambda: 10.0)
    times = {"sparse": 2.0, "float32": 4.0, "bfloat16": 3.0, "float16": 5.0}
    monkeypatch.setattr(linear24, "time_us", lambda calls: {name: (call(), times[name])[1] for name, call in calls.items()})
    rows = linear24.rows("cpu", quick=False)
    wanted = "m,n,k,dtype,kernel,sparse_us,sparse_eager_us,dense_us,cusparselt_us,torch_cutlass_us,rel_err,tflops,gbps,copy_gbps"
    for row, m in zip(rows, (1, 3), strict=True):
        assert {*wanted.split(","), "sm_mhz", "watts"} <= row.keys() and (row["m"], row["n"], row["k"]) == (m, 48, 96)
        assert row["dense_us"] == 3 and row["dense_dtype"] == "bfloat16" and row["speedup"] == 1.5
        assert row["tflops"] == round(2 * m * 48 * 96 / 2e6, 4) and row["gbps"] == round(9 / 16 * 48 * 96 * 2 / 2e3, 2)
        assert 0 < row["rel_err"] < 1e-5


@pytest.mark.parametrize("text", ["2:4", "4:8 pairs", "30%"])
def test_rows_of_sparsegpt(text):
    from benchmarks import sparsegpt

    row = sparsegpt.row("tiny", 40, 200, text, tokens=300, device="cpu", repeats=1)
    wanted = "rows,cols,pattern,gram_ms,factor_ms,loop_ms,trailing_ms,error_ms,prune_ms,eager_loop_ms,speedup,prune_speedup,rel_err"
    assert {*wanted.split(",")} <= row.keys() and (row["rows"], row["cols"], row["pattern"]) == (40, 200, text)
    assert row["rows_apart"] == 0 and 0 < row["rel_err"] < 1e-5 and row["output_error"] < row["output_error_masked"]
    assert (
        row["eager_loop_ms"] > 0 and row["factor_ms"] + row["loop_ms"] + row["trailing_ms"] + row["error_ms"] < row["prune_ms"] * 2
    )


def test_a_whole_model_by_phase():
    pytest.importorskip("transformers")
    from benchmarks import sparsegpt
    from sparsekit.pruners import METHODS, SparseGPT

    row = sparsegpt.model_row("llama-2-7b", "2:4", "cpu", blocks=2, samples=3, seq_len=20, **TINY)
    assert (row["blocks"], row["tokens"], row["pattern"]) == (2, 60, "2:4") and METHODS["sparsegpt"] is SparseGPT
    phases = [row[f"{phase}_s"] for phase in ("forward", "gram", "factor", "loop", "trailing", "error")]
    assert min(phases) >= 0 and sum(phases) == pytest.approx(row["total_s"], abs=0.01) and 0 < row["output_error"] < 1


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_decoding(tied, monkeypatch):
    pytest.importorskip("transformers")
    from benchmarks import decode

    monkeypatch.setattr(decode, "copy_gbps", lambda: 2.0)
    times = {"bfloat16": 4000.0, "float32": 3200.0, "sparse": 1600.0}
    monkeypatch.setattr(decode, "time_us", lambda calls, _: {name: (call(), times[name])[1] for name, call in calls.items()})
    found = list(decode.rows("llama-2-7b", "cpu", 2, [1, 3], 6, **TINY, tie_word_embeddings=tied))
    linears, around = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3), 50 * 32 + 5 * 32  # weights
    for row, batch in zip(found, (1, 3), strict=True):
        assert (row["model"], row["blocks"], row["batch"], row["context"]) == ("llama-2-7b", 2, batch, 6)
        assert (row["dense_ms"], row["dense_dtype"], row["sparse_ms"], row["speedup"]) == (0.4, "float32", 0.2, 2.0)
        assert row["dense_tokens_s"] == 2500 * batch and row["sparse_tokens_s"] == 5000 * batch
        assert row["weight_bytes_dense"] == 4 * (linears + around) and row["weight_bytes_sparse"] == linears * 9 / 8 + 2 * around
        assert row["floor_ms"] == round(row["weight_bytes_sparse"] / 2e6, 4) and row["copy_gbps"] == 2
        assert 0 < row["bf16_rel_err"] < 0.03 and 0 < row["rel_err"] < 2 * row["bf16_rel_err"]


def test_decoding_is_the_model_without_a_cache():
    """In fp32, against one pass of fp64 over all tokens with two of every four weights kept by brute force; and again from the
    prompt's end, as a graph's replay does."""
    pytest.importorskip("transformers")
    from benchmarks import decode
    from benchmarks.measure import relative_error

    dense = decode.random_model("llama-2-7b", "cpu", torch.float32, 3, **TINY).requires_grad_(False).eval()
    kept = {name: p.clone() for name, p in dense.named_parameters()}
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    sparse, written = decode.rebuilt(dense, decode.sparse_linear), decode.rebuilt(dense, decode.WrittenDense)
    assert sum(isinstance(module, sparsekit.SparseLinear) for module in sparse.modules()) == 3 * 7
    assert sparse.lm_head.weight is dense.lm_head.weight
    found = {}
    with torch.no_grad():
        for name, model in (("sparse", sparse), ("written", written), ("dense", dense)):
            decoding = decode.Decoding(model, ids[:, :7], ids[:, 7:])
            found[name] = decoding.all_steps().clone()
            decoding.logits.zero_()
            assert torch.equal(decoding.all_steps(), found[name]), name
        decode.in_fp32(decode.rebuilt(dense.bfloat16(), decode.WrittenDense))
        assert dense.lm_head.weight.dtype == torch.bfloat16, "who shares a parameter keeps it"
        whole = dense.double()
        whole.load_state_dict(kept)
        truth = {"dense": whole(input_ids=ids, use_cache=False).logits}
        for name, p in whole.named_parameters():
            if name.endswith("_proj.weight"):
                groups = p.unflatten(1, (-1, 4))
                groups.scatter_(-1, groups.abs().argsort(-1)[..., :2], 0)
        truth["sparse"] = truth["written"] = whole(input_ids=ids, use_cache=False).logits
    for name, logits in found.items():
        wanted = truth[name][:, 7:].transpose(0, 1)
        assert relative_error(logits, wanted) < 1e-5, name
    assert relative_error(found["sparse"], truth["dense"][:, 7:].transpose(0, 1)) > 0.1


@pytest.mark.parametrize(
    "arguments, error",
    [
        ([], "argument --model: a whole model must run on a GPU, got --device cpu; say --blocks N for some of its blocks"),
        (["--blocks", "0"], "argument --blocks: must be at least 1, got 0"),
        (["--model", "smollm2-135m", "--batch", "1", "0"], "argument --batch: must be at least 1, got 0"),
        (["--model", "smollm2-135m", "--context", "-1"], "argument --context: must be at least 1, got -1"),
    ],
)
def test_decoding_refuses(arguments, error, monkeypatch, capsys):
    from benchmarks import decode

    monkeypatch.setattr(sys, "argv", ["decode.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit, match="2"):
        decode.main()
    assert f"decode.py: error: {error}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--model", "llama-2-7b"], "argument --model: a whole model must run on a GPU, got --device cpu; say --blocks N"),
        (
            ["--pattern", "block:4x4@50%"],
            "argument --pattern: must be N:M, N:M pairs or a share, which the paper's loop knows, got",
        ),
        (["--pattern", "5:4"], "argument --pattern: N:M must keep 0 <= N <= M weights of M >= 1, got 5:4"),
    ],
)
def test_sparsegpt_refuses(arguments, error, monkeypatch, capsys):
    from benchmarks import sparsegpt

    monkeypatch.setattr(sys, "argv", ["sparsegpt.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit, match="2"):
        sparsegpt.main()
    assert f"sparsegpt.py: error: {error}" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_the_command(suffix, tmp_path):
    out = tmp_path / f"rows{suffix}"
    command = [sys.executable, "-m", "benchmarks.validate24", "--device", "cpu", "--layers", "Llama-3-8B kv", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert done.stdout == text
    rows = json.loads(text)["rows"] if suffix == ".json" else list(csv.DictReader(text.splitlines()))
    (row,) = rows
    assert row["layer"] == "Llama-3-8B kv" and float(row["us"]) > 0 and 0 < float(row["of_copy"])
    if suffix == ".json":
        assert json.loads(text)["machine"]["threads"] == torch.get_num_threads()


def test_a_figure_that_is_no_number_is_null(tmp_path, capsys):
    # A kernel that is wrong on one size must not take the other rows with it; NaN is no word of JSON.
    from benchmarks import measure

    measure.write([{"us": 1.5, "rel_err": float("nan")}, {"us": float("inf"), "rel_err": 0.0}], True, tmp_path / "rows.json")
    text = (tmp_path / "rows.json").read_text()
    assert text == capsys.readouterr().out
    rows = json.loads(text, parse_constant=pytest.fail)["rows"]
    assert rows == [{"us": 1.5, "rel_err": None}, {"us": None, "rel_err": 0.0}]


def test_the_roofline(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import roofline

    row = {"m": "2", "n": "64", "k": "128", "dtype": "bfloat16", "sparse_us": "2.0", "dense_us": "4.0", "copy_gbps": "10"}
    found = roofline.points([row])
    operations = 2 * 2 * 64 * 128
    packed, dense = 9 / 16 * 64 * 128 * 2, 64 * 128 * 2
    around = 2 * (2 * 128 + 2 * 64)
    assert found == {
        "2:4": [(pytest.approx(operations / (packed + around)), operations / 2e6)],
        "dense": [(pytest.approx(operations / (dense + around)), operations / 4e6)],
    }
    rows, picture = tmp_path / "rows.csv", tmp_path / "roofline.svg"  # which tells the caption in a comment, letter by letter
    rows.write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    command = [sys.executable, "-m", "benchmarks.roofline", rows, "--card", "a card's name", "--out", picture]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "on a card's name" in picture.read_text() and "<svg" in picture.read_text()


def test_a_row_that_cannot_be_made_leaves_the_others(tmp_path, capsys):
    """Each is on disk when the next is begun; a column that comes late is one of all rows."""
    from benchmarks import measure

    out, seen = tmp_path / "rows.csv", []

    def row(i: int) -> dict | None:
        seen.append(out.read_text() if out.exists() else "")
        if i == 2:
            raise RuntimeError("two cannot be made\nand more")
        return None if i == 3 else {"i": i} | ({"late": "x"} if i == 4 else {})

    with pytest.raises(SystemExit, match=r"1 rows could not be made, the first of \(2,\)"):
        measure.write(measure.attempted(row, [(i,) for i in range(5)]), False, out)
    assert seen == ["", "i\n0\n", *["i\n0\n1\n"] * 3] and out.read_text() == "i,late\n0,\n1,\n4,x\n"
    said = capsys.readouterr()
    assert said.out == out.read_text() and "no row of (2,): two cannot be made" in said.err and [*tmp_path.iterdir()] == [out]


def test_rivals_have_as_many_weights_and_one_that_a_graph_cannot_hold_is_left_out(monkeypatch, capsys):
    from benchmarks import gpu
    from sparsekit import ops

    def graph_us(calls, most):
        for variants in calls.values():
            assert len(variants) == most == 1 and variants[0]() is not None

    def refuses(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(gpu, "graph_us", graph_us)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "_cslt_compress", lambda w: w, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda w, b: 7, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda w, b, alg_id: w @ b if alg_id == 7 else None, raising=False)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", refuses, raising=False)
    held, x = [ops.prune_compress24(torch.randn(64, 64).half()) for _ in range(3)], torch.randn(2, 64).half()
    rivals = gpu.rivals_of(x, held)
    assert [*rivals] == ["cusparselt"] and "torch_cutlass does not take m, n, k = (2, 64, 64): operation" in capsys.readouterr().err
    assert all(torch.equal(call(), ops.expand24(s) @ x.t()) for call, s in zip(rivals["cusparselt"], held, strict=True))


def test_a_product_s_quick_rows_come_first():
    from benchmarks import linear24

    few, every = linear24.gpu_cases(quick=True), linear24.gpu_cases(quick=False)
    assert every[: len(few)] == few and len({*every}) == len(every) == 10 * 11 + 5
    assert {m for _, m, *_ in every[:110]} >= {1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192}


def test_the_steps_of_the_gpu_evidence(tmp_path, monkeypatch):
    from benchmarks import gpu_evidence

    monkeypatch.setattr(gpu_evidence.shutil, "which", lambda name: name)
    for quick, minutes in gpu_evidence.MINUTES.items():
        groups = gpu_evidence.steps(tmp_path, quick)
        steps = [*gpu_evidence.build((9, 0)), *(step for group in groups for step in group)]
        assert len({step.name for step in steps}) == len(steps), "one would write over another's log"
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+", step.name) and step.estimate <= step.limit <= 60 * minutes for step in steps)
        assert all(step.still is None or 0 < step.still <= 90 for step in steps)
        whole = 60 + 10 + sum(max(step.estimate for step in group) for group in groups)
        assert whole <= 60 * minutes, f"{whole} s"
    names = [group[0].name for group in groups]
    assert names[:5] == ["tests-0", "linear24", *gpu_evidence.MEMORY_BOUND[:2], "decode"]
    full = [group[0].name for group in gpu_evidence.steps(tmp_path, False)]
    assert set(gpu_evidence.MEMORY_BOUND) == set(OPS) < set(full)
    assert full.index("tune-8192x8192") < full.index("linear24"), "its rows are of the kernels that were measured to be best"
    for step in (step for group in groups for step in group):  # of the quick run, which has every argument
        if step.name in ("prune_compress24", "linear24", "decode", "sparsegpt", "roofline"):  # the others share the first one's
            done = subprocess.run([*step.command[:3], "--help"], cwd=ROOT, capture_output=True, text=True)
            known = set(done.stdout.replace("[", " ").replace("]", " ").split())
            assert done.returncode == 0 and {a for a in step.command if a.startswith("--")} <= known, step.name


def test_without_a_sanitizer_the_evidence_fails(tmp_path, monkeypatch):
    from benchmarks import gpu_evidence

    monkeypatch.setattr(gpu_evidence.shutil, "which", lambda name, path=None: None)
    (step,) = (group[0] for group in gpu_evidence.steps(tmp_path, False) if group[0].name == "sanitizer")
    done = subprocess.run(step.command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("compute-sanitizer must be on the path")


@pytest.mark.parametrize("capability, arch", [((9, 0), "90a"), ((8, 9), "89"), ((12, 0), "120")])
def test_the_build_is_for_the_card_alone(capability, arch):
    from benchmarks import gpu_evidence

    build, built = gpu_evidence.build(capability)
    assert build.env["SPARSEKIT_CUDA_ARCHS"] == arch == built.command[-1]


def test_a_build_for_another_card_is_none():
    from benchmarks import gpu_evidence

    done = subprocess.run(gpu_evidence.build((1, 0))[1].command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("the package must be built for 10, and is for ")


@pytest.mark.parametrize("name, folder", [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3")])
def test_a_card_has_a_folder(name, folder):
    from benchmarks import gpu_evidence

    assert gpu_evidence.folder_name(name) == folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_no_evidence(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_evidence", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "gpu_evidence: a CUDA device must be there for torch to use, found none\n"
    assert not (tmp_path / "out").exists()


def test_the_readme_shows_what_the_results_say():
    from benchmarks import readme

    text = (ROOT / "README.md").read_text()
    assert "<!-- demo table: " in text and "<!-- speed table: " in text
    assert readme.written(text) == text, "run python -m benchmarks.readme"


def test_the_speeds_of_a_cpu_say_what_turning_over_takes(tmp_path, monkeypatch):
    from benchmarks import readme

    monkeypatch.setattr(readme, "ROOT", tmp_path)
    (tmp_path / "cpu").mkdir()
    row = {"layer": "Llama-2-7B down", "n": 4096, "k": 11008, "dtype": "bf16", "us": 20, "of_copy": 0.5, "copy_us": 10}
    for name, us in (("expand24", 100.0), ("mask_rows", 40.0)):
        rows = [row | {"layout": "row-major"}, row | {"layout": "transposed", "turned_copy_us": us}]
        machine = {"cpu": "X", "threads": 2, "date": "2026-01-02"}
        (tmp_path / "cpu" / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    assert readme.speed(tmp_path / "cpu").splitlines()[2:] == [
        "| `expand24` 4096 x 11008 | 20 us |  | 0.50 (0.50) |",
        "| `mask_rows` 4096 x 11008 | 20 us |  | 0.50 (0.50) |",
        "",
        "X, 2 threads, 2026-01-02. All rows are in [cpu](cpu).",
        "torch's copy that only turns a transposed matrix over: 0.10 to 0.25 of a copy's speed.",
    ]


def test_the_speeds_of_a_gpu(tmp_path, monkeypatch):
    from benchmarks import linear24, memory_bound, readme, sparsegpt

    of_a_gpu = {name for name, *_ in linear24.gpu_cases(quick=True)}
    assert {*readme.LAYERS} <= of_a_gpu | {*memory_bound.SHAPES} and len({*readme.LAYERS} & of_a_gpu) == 2
    assert {*readme.PRUNED} <= {*sparsegpt.LAYERS}
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    folder = tmp_path / "h200"
    folder.mkdir()
    (folder / "summary.json").write_text('{"machine": {"gpu": "A card", "cpu": "X", "threads": 16, "date": "2026-01-02"}}')
    (folder / "linear24.csv").write_text(
        "layer,m,n,k,sparse_us,dense_us,cusparselt_us,torch_cutlass_us,gbps,copy_gbps\n"
        "Llama-3-8B down,1,4096,14336,10,16,,12.5,3000,4000\nsquare 8192,8192,8192,8192,1000.4,1500,1100,,30,4000\n"
        "Llama-3-8B up,1,14336,4096,1,2,3,4,5,6\n"
    )
    (folder / "decode.csv").write_text(
        "model,blocks,batch,dense_ms,sparse_ms,dense_dtype,floor_ms\nllama-2-7b,32,1,3.5,2.5,bfloat16,2.0\n"
    )
    (folder / "compress24.csv").write_text(
        "layer,n,k,dtype,layout,us,of_copy,torch_from_dense_us\nLlama-2-7B down,4096,11008,bf16,row-major,40,0.8,400\n"
        "Llama-2-7B down,4096,11008,fp32,row-major,80,0.9,\nLlama-2-7B down,4096,11008,bf16,transposed,50,0.64,\n"
    )
    assert readme.speed(folder).splitlines()[2:] == [
        "| `linear24` 4096 x 14336, 1 token | 10 us | dense 16 us, 1.6; torch's CUTLASS 12.5 us, 1.25 | 0.75 |",
        "| `linear24` 8192 x 8192, 8192 tokens | 1 ms | dense 1.5 ms, 1.5; cuSPARSELt 1.1 ms, 1.1 |  |",
        "| a token of llama-2-7b, 32 blocks, 1 at a time | 2.5 ms | dense bfloat16 3.5 ms, 1.4 | 0.80 |",
        "| `compress24` 4096 x 11008 | 40 us | torch (from_dense) 400 us, 10 | 0.80 (0.64) |",
        "",
        "A card, 2026-01-02. All rows are in [h200](h200).",
    ]
