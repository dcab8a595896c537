"""The catalog: names of GPUs, bytes against tensors that are really stored, and advice by capability and by measured rows."""

import math
import re
from pathlib import Path

import pytest
import torch

from sparsekit import NM, Pattern, SparsekitError, Unstructured, bench, catalog, env, ops, tune
from sparsekit.catalog import capability_of, entry, recommend
from sparsekit.format import dense_to_bitmask
from sparsekit.tune import Row


@pytest.mark.parametrize(
    "name, capability",
    [
        # As drivers name them.
        ("NVIDIA A100-SXM4-80GB", (8, 0)),
        ("NVIDIA A10G", (8, 6)),
        ("NVIDIA A40", (8, 6)),
        ("NVIDIA RTX A6000", (8, 6)),
        ("NVIDIA RTX 6000 Ada Generation", (8, 9)),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0)),
        ("Quadro RTX 6000", (7, 5)),
        ("Quadro RTX 3000", (7, 5)),  # not of the GeForce series 30, 40 and 50
        ("Quadro RTX 4000", (7, 5)),
        ("Quadro RTX 5000", (7, 5)),
        ("NVIDIA RTX 2000 Ada Generation", (8, 9)),
        ("NVIDIA RTX 3000 Ada Generation Laptop GPU", (8, 9)),
        ("NVIDIA RTX 5000 Ada Generation", (8, 9)),
        ("NVIDIA GeForce RTX 2050", (8, 6)),  # Ampere, as its number does not say
        ("NVIDIA GeForce RTX 2060", (7, 5)),
        ("NVIDIA GeForce MX550", (7, 5)),
        ("Tesla V100S-PCIE-32GB", (7, 0)),
        ("NVIDIA GeForce RTX 3090", (8, 6)),
        ("NVIDIA GeForce RTX 4090", (8, 9)),
        ("NVIDIA GeForce RTX 5090", (12, 0)),
        ("NVIDIA L4", (8, 9)),
        ("NVIDIA L40S", (8, 9)),
        ("NVIDIA H100 80GB HBM3", (9, 0)),
        ("NVIDIA H100 NVL", (9, 0)),
        ("NVIDIA H200", (9, 0)),
        ("NVIDIA GH200 480GB", (9, 0)),
        ("NVIDIA B200", (10, 0)),
        ("NVIDIA GB300", (10, 3)),
        ("Tesla T4", (7, 5)),
        ("Tesla V100-SXM2-16GB", (7, 0)),
        ("Tesla P100-PCIE-16GB", (6, 0)),
        ("NVIDIA A100X", (8, 0)),
        ("GRID A100X-40C", (8, 0)),
        ("NVIDIA A40-48Q", (8, 6)),
        ("NVIDIA RTX A400", (8, 6)),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", (8, 6)),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", (8, 9)),
        ("NVIDIA RTX 4000 SFF Ada Generation", (8, 9)),
        ("NVIDIA L2", (8, 9)),
        ("NVIDIA RTX PRO 4500 Blackwell", (12, 0)),
        ("NVIDIA GB10", (12, 1)),
        ("NVIDIA Thor", (11, 0)),
        ("Orin", (8, 7)),
        ("Xavier", (7, 2)),
        ("NVIDIA TITAN RTX", (7, 5)),
        ("NVIDIA GeForce GTX 1650", (7, 5)),
        ("NVIDIA T1000", (7, 5)),
        ("Quadro GV100", (7, 0)),
        ("NVIDIA TITAN V", (7, 0)),
        ("NVIDIA TITAN X (Pascal)", (6, 1)),
        ("Quadro P4000", (6, 1)),
        ("Quadro GP100", (6, 0)),
        # As people do.
        ("a100", (8, 0)),
        ("Ada", (8, 9)),
        ("Blackwell", (10, 0)),
        ("hopper", (9, 0)),
        ("A6000", (8, 6)),
        ("RTX4090", (8, 9)),
        ("rtx_3090", (8, 6)),
        ("A100-80GB", (8, 0)),
        ("A100_80GB", (8, 0)),
        ("Lovelace", (8, 9)),
        ("Blackwell Ultra", (10, 3)),
        ("RTX A4500", (8, 6)),
        ("9.0", (9, 0)),
        ("sm_90a", (9, 0)),
        ("sm120", (12, 0)),
        ("12.1", (12, 1)),
        ((8, 9), (8, 9)),
        ("cpu", None),
        (torch.device("cpu"), None),
    ],
)
def test_names(name, capability):
    assert capability_of(name) == capability


# Of "RTX 4000", "RTX 5000" and "RTX 6000" there are two or three, of as many capabilities; the GTX Titan X is older than any here.
UNRESOLVED = ["RTX 4000", "RTX 5000", "RTX 6000", "GeForce GTX TITAN X"]
UNKNOWN = [*UNRESOLVED, "", "A1000000", "GPU", "XH100Y", "MI300X", "9", "4090", "Canada", 9.0, (9,), (9, 0.5), (-1, 0)]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names(name):
    with pytest.raises(SparsekitError, match="A100.*H200.*got" if isinstance(name, str) else r"got [9(]"):
        capability_of(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_bytes_of_two_of_four_are_those_of_the_format(dtype):
    s = ops.prune_compress24(torch.randint(1, 9, (64, 128)).to(dtype))
    assert entry("2:4", "H100").bytes_per_weight(dtype) * 64 * 128 == s.nbytes


@pytest.mark.parametrize("text", ["50%", "4:8", "4:8 pairs"])
def test_bytes_of_a_bitmask_are_those_of_the_file(text):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weight *= Pattern.parse(text).mask(weight.abs())
    values, bitmask, *_ = dense_to_bitmask(weight)
    assert entry(text, "cpu").bytes_per_weight(weight.dtype) * 64 * 128 == values.nbytes + bitmask.nbytes
    assert entry(text, "cpu").kernel is None


def test_a_block_costs_a_bit():
    assert entry("block:32x16@75%", "H100").bytes_per_weight(torch.bfloat16) == 0.25 * 2 + 1 / (32 * 16 * 8)


@pytest.mark.parametrize(
    "gpu, kernel",
    [
        ("V100", None),
        ("T4", None),
        ("A100", "linear24_sm80"),
        ("H100", "linear24_sm90a"),
        ("RTX 5090", "linear24_sm80"),
        ("cpu", "linear24_cpu"),
    ],
)
def test_who_runs_two_of_four(gpu, kernel):
    found = entry("2:4", gpu)
    assert found.kernel is None if kernel is None else kernel in found.kernel
    advice = recommend(gpu)
    assert advice.pattern == (NM(2, 4) if kernel else None) and advice.kernel == found.kernel and not advice.measured


def test_pairs_are_for_blackwell_and_run_nowhere_yet():
    assert "4-bit" in entry("4:8 pairs", "B200").unless and "4-bit" not in entry("4:8 pairs", "H100").unless


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "CACHE", tmp_path)
    tune.forget()
    yield lambda *rows: tune.write(bench.key(torch.device("cpu")), [Row(*row) for row in rows])
    monkeypatch.undo()
    tune.forget()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_this_machine_answers_from_its_rows(rows):
    assert "bench --tune" in " ".join(recommend(batch=4).why)
    rows(
        ("bfloat16", 4, 64, 64, "dense", 0, 0, 30.0),
        ("bfloat16", 4, 64, 64, "linear24_cpu", 0, 0, 20.0),
        ("bfloat16", 4, 64, 64, "expand", 0, 0, 50.0),
        ("bfloat16", 4, 128, 64, "dense", 0, 0, 30.0),
        ("bfloat16", 4, 128, 64, "linear24_cpu", 0, 0, 40.0),
        ("bfloat16", 512, 64, 64, "dense", 0, 0, 10.0),
        ("bfloat16", 512, 64, 64, "linear24_cpu", 0, 0, 40.0),
        ("bfloat16", 512, 128, 64, "linear24_cpu", 0, 0, 40.0),
        ("float32", 4, 64, 64, "linear24_cpu", 0, 0, 20.0),
    )
    few = recommend(batch=3)
    assert few.pattern == NM(2, 4) and few.measured == {(64, 64): 1.5, (128, 64): 0.75} and "0.75 to 1.50" in few.why[0]
    many = recommend(batch=700)
    assert many.pattern is None and many.measured == {(64, 64): 0.25} and "not faster" in many.why[0]
    assert recommend(batch=3, dtype=torch.float32).measured == {}
    assert tune.choose(bench.key(torch.device("cpu")), "bfloat16", 512, 64, 64).kernel == "linear24_cpu"  # dense is no choice


@pytest.mark.parametrize(
    "arguments, says", [({"batch": 0}, "at least one token, got 0"), ({"dtype": torch.int8}, "got torch.int8")]
)
def test_refused(arguments, says):
    with pytest.raises(SparsekitError, match=says):
        recommend("H100", **arguments)


def test_the_examples_of_the_error_are_known():
    assert all(capability_of(name) for name in catalog._EXAMPLES)
    assert math.isclose(entry(Unstructured(0.7), "cpu").density, 0.3)


def test_the_page_runs(capsys):
    page = (Path(__file__).parents[1] / "docs" / "pruning.md").read_text(encoding="utf-8")
    exec(re.search(r"## What it gains where\n\n```python\n(.*?)```", page, re.S)[1], {})
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["linear24_decode_sm80 up to 64 tokens, linear24_sm80 above", "1.125"] and said[4] == "2:4"
    for text in ("4:8", "1:4", "4:8 pairs", "50%", "block:32x32@50%"):  # only 2:4 runs faster anywhere
        assert all(entry(text, gpu).kernel is None for gpu in ("7.5", "8.0", "9.0", "10.0", "12.0", "cpu"))
