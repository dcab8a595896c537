"""The resource report of the CUDA kernels: what it reads, how it counts blocks, and that the file kept is of this source."""

import csv
from pathlib import Path

import pytest

from benchmarks import resources
from benchmarks.resources import CUOBJDUMP, KERNELS, NVCC, Compiled, Launch

KEPT = Path(__file__).resolve().parents[1] / "benchmarks/results/resources.csv"
NAMES = {
    "_ZN9sparsekit50_GLOBAL__N__b0206b52_17_linear24_sm90a_cu_a74edc7014linear24_sm90aI13__nv_bfloat16Li192ELi256ELb0EEEvN": (
        "linear24_sm90a<bfloat16, 192, 256, false>"
    ),
    "_ZN9sparsekit49_GLOBAL__N__5d_16_linear24_sm80_cu_1a13linear24_sm80I6__halfLi32ELi8ELi5EEEvN": "linear24_sm80<half, 32, 8, 5>",
    "_ZN9sparsekit12_GLOBAL__N_112linear24_sumI6__halfEEvNS0_3SumIT_EE": "linear24_sum<half>",
}


@pytest.mark.parametrize("mangled", NAMES)
def test_names(mangled):
    assert resources.instance(mangled) == NAMES[mangled]


@pytest.mark.parametrize(
    "arch, threads, registers, static, dynamic, blocks",
    [  # registers, shared memory, threads: by hand from the CUDA programming guide's table
        ("80", 256, 128, 0, 0, (2, 164, 8)),
        ("80", 256, 85, 0, 80 * 1024, (2, 2, 8)),  # registers come in eights; 1 KiB of every block is the driver's
        ("80", 32, 8, 0, 163 * 1024, (256, 1, 32)),  # 64 blocks of a warp fit by threads, 32 by the block count
        ("90a", 384, 168, 1024, 227 * 1024, (1, 1, 5)),
        ("120", 512, 40, 1024, 99 * 1024, (3, 1, 3)),
        ("120", 128, 255, 1024, 100 * 1024, (2, 0, 12)),  # more than a block may have there
    ],
)
def test_blocks(arch, threads, registers, static, dynamic, blocks, monkeypatch):
    monkeypatch.setattr(resources, "nvcc_version", lambda: "1.2.3")
    name = next(mangled for mangled, kernel in NAMES.items() if "sum" in kernel)
    code = "LDL.64 R0\n STL R1\n LDG.E.NA.128 R4\n LDGSTS.E.BYPASS.128 R1\n LDG.E.64 R2\n HMMA.SP.16832.F32 R0\n UTMALDG.2D"
    usage = f"REG:{registers} STACK:8 SHARED:{static} LOCAL:16 CONSTANT[0]:1"
    compiled = Compiled("", {name: code}, {name: usage})
    (row,) = resources.resources(arch, compiled, [Launch("linear24_sum<half>", 3, threads, dynamic)])
    assert (row["blocks_by_registers"], row["blocks_by_shared"], row["blocks_by_threads"]) == blocks
    assert row["blocks"] == min(blocks)
    want = dict(architecture=f"sm_{arch}", kernel="linear24_sum<half>", tile=3, threads=threads, registers=registers)
    want |= dict(shared_static=static, shared_dynamic=dynamic, stack=8, local=16, spills=2, product="HMMA.SP", products=1)
    want |= dict(loads_128=2, loads_tma=1, nvcc="1.2.3")
    assert {key: row[key] for key in want} == want
    with pytest.raises(RuntimeError, match="none launches linear24_sum<half>"):
        resources.resources(arch, compiled, [])


@pytest.mark.skipif(NVCC is None or CUOBJDUMP is None, reason="needs nvcc and cuobjdump")
def test_the_kept_report_is_of_this_source(machine_code, tmp_path):
    """Every instance in every tile, with the memory that its launcher asks for; what another compiler makes may differ."""
    asked = resources.launches(tmp_path)
    made = [
        {name: "" if value is None else str(value) for name, value in row.items()}
        for kernel, architectures in KERNELS.items()
        for arch in architectures
        for row in resources.resources(arch, machine_code(kernel, arch), asked)
    ]
    kept = list(csv.DictReader(KEPT.open()))
    assert not [row for row in made if row["spills"] != "0" or row["local"] != "0" or row["stack"] != "0"]
    if kept[0]["nvcc"] != resources.nvcc_version():
        source = ("architecture", "kernel", "tile", "threads", "shared_dynamic")
        made, kept = ([[row[name] for name in source] for row in rows] for rows in (made, kept))
    assert made == kept, "the report is of another source: python -m benchmarks.resources --out benchmarks/results/resources.csv"
