"""The machine code of the Hopper kernel: which instructions, in which order, and that the compiler drains nothing."""

import re

import pytest
from test_cuda_hopper import CLUSTERS, REGISTER_TILES, TILES

from benchmarks.resources import CUOBJDUMP, NVCC, compile_sass


@pytest.fixture(scope="session")
def sass(machine_code):
    return machine_code("linear24_sm90a", "90a")


def instance(name):
    """(dtype, features, tokens, blocks a cluster, register form) of a mangled kernel name."""
    return re.search(r"14linear24_sm90aI(6__half|13__nv_bfloat16)Li(\d+)ELi(\d+)ELi(\d)ELb([01])E", name).groups()


def products(sass):
    """Of the machine code, what multiplies: all but the kernels that sum parts."""
    return {name: code for name, code in sass[1].items() if "12linear24_sumI" not in name}


def test_the_machine_code_has_the_tiles_of_the_launcher(sass):
    """Ten tiles, two dtypes, one kernel each, and two that sum parts."""
    found = [(form == "1", (int(n), int(m)), int(cluster)) for _, n, m, cluster, form in map(instance, products(sass))]
    wanted = [(tile in REGISTER_TILES, shape, CLUSTERS.get(tile, 2)) for tile, shape in TILES.items()] * 2
    assert sorted(found) == sorted(wanted) and len(sass[2]) == 22


def test_ptxas_has_nothing_to_say(sass):
    """C7510 to C7519 tell that every wgmma is drained, C7508 that setmaxnreg is ignored."""
    notes, code, _ = sass
    assert not re.search(r"\(C\d+\)|warning", notes), notes
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", notes)
    assert len(spills) == len(code) and set(spills) == {("0", "0", "0")}


def test_products_are_sparse_and_one_group_stays_in_flight(sass):
    """A step: its products back to back, the wait that leaves one group, the release, the loads."""
    for name, code in products(sass).items():
        dtype, n, m, _, form = instance(name)
        pieces, halves = (2 if n == "256" else 1), (2 if (n, m) == ("192", "256") else 1)
        product = rf"HGMMA\.SP\.64x{int(m) // halves}x32\.F32{'.BF16' if 'bfloat' in dtype else ''} "
        words = "|".join((product, r"HGMMA", r"WARPGROUP\.DEPBAR\.LE gsb0, 0x[01]", r"LDG\.E\.64 ", r"LDG\.E\.NA\.LTC256B\.128 ",
                          r"WARPGROUP\.ARRIVE", r"SYNCS\.ARRIVE\.TRANS64\.RED", r"MEMBAR", r"CCTL"))  # fmt: skip
        found = re.findall(words, code)
        inside = found[found.index("WARPGROUP.ARRIVE") : found.index("WARPGROUP.DEPBAR.LE gsb0, 0x0")]
        letters = {"HGMMA.": "P", "HGMMA": "?", "WARPGR": "", "LDG.E.": "L", "SYNCS.": "R", "MEMBAR": "M", "CCTL": "M"}
        kind = {"WARPGROUP.ARRIVE": "F", "WARPGROUP.DEPBAR.LE gsb0, 0x1": "W"}
        text = "".join(kind.get(word) or letters[word[:6]] for word in inside)
        step = "F" + "P" * 2 * pieces * halves + "WR"
        loads = "L" * 2 * pieces * int(form)  # of values; metadata in the first and third step
        want = "".join(step + loads + "L" * pieces * (i % 2 == 0) for i in range(4))
        assert text == want, f"{name}: {text}"
        assert found.count("WARPGROUP.DEPBAR.LE gsb0, 0x0") == 1


def test_loads_are_wide_and_by_tma(sass):
    for name, code in products(sass).items():
        _, n, _, _, form = instance(name)
        pieces, starts = (2 if n == "256" else 1), (2 if n == "128" else 1)  # 128: also ahead of a tile's way out
        loads = re.findall(r"UTMALDG\S*", code)
        assert loads == ["UTMALDG.2D.MULTICAST"] + ["UTMALDG.2D"] * (form == "0"), f"{name}: {loads}"
        wide = re.findall(r"LDG\.E\.NA\.LTC256B\.128 ", code)
        assert len(wide) == ((4 + 3 * starts) * 2 * pieces if form == "1" else 0), f"{name}: {len(wide)} loads of values"
        assert len(re.findall(r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT", code)) >= 5, name
        assert re.findall(r"USETMAXREG\.(\w+)", code) == ["TRY_ALLOC", "DEALLOC"], name
        assert not re.search(r"\b(STL|LDL)\b", code), f"{name} uses local memory"


def test_registers_fit_the_pool(sass):
    """What a block starts with, and what its consumers take of it: the numbers of Tile in linear24_sm90a.cu."""
    for name, code in products(sass).items():
        groups = 3 if instance(name)[1] == "192" else 2
        started = int(re.search(r"REG:(\d+)", sass[2][name])[1])
        assert started * (groups + 1) * 128 <= 65536, name
        consumers, producer = (160, 32) if groups == 3 else (232, 40)
        assert groups * consumers + producer <= (groups + 1) * started, name
        assert max(map(int, re.findall(r"\bR(\d+)\b", code))) < consumers, name
        loading = code[code.index("USETMAXREG.DEALLOC") : code.index("UTMALDG")]
        assert max(map(int, re.findall(r"\bR(\d+)\b", loading))) < producer, name


def test_a_cluster_starts_without_a_wait_for_memory(sass):
    """MEMBAR stands before the last barrier alone, where sums are on their way to memory."""
    for name, code in products(sass).items():
        start, end = re.split(r"UCGABAR_WAIT", code)[:2]
        assert "MEMBAR" not in start and "MEMBAR.ALL.GPU" in end, name
        assert "UTMACCTL.PF" in start, name


EVERY_PRODUCT = """
#include "wgmma.cuh"
using namespace sparsekit::ptx;
template <typename T, int SELECTOR, int COUNT> __device__ void both(float *out, const uint32_t (&a)[4], uint64_t b) {
    float d[COUNT] = {};
    wgmma_fence();
    wgmma_sp<T, SELECTOR>(d, a, b, a[0]);
    wgmma_sp<T, SELECTOR>(d, b + 1, b, a[0]);
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < COUNT; ++i)
        out[i] += d[i];
}
__global__ void every_product(float *out, uint4 a, uint64_t b) {
    const uint32_t fragment[4] = {a.x, a.y, a.z, a.w};
    both<__half, 0, 32>(out, fragment, b), both<__nv_bfloat16, 1, 32>(out, fragment, b);
    both<__half, 1, 64>(out, fragment, b), both<__nv_bfloat16, 0, 64>(out, fragment, b);
    both<__half, 0, 96>(out, fragment, b), both<__nv_bfloat16, 1, 96>(out, fragment, b);
    both<__half, 1, 128>(out, fragment, b), both<__nv_bfloat16, 0, 128>(out, fragment, b);
}
"""


def test_every_product_assembles(tmp_path):
    """Also those that no kernel uses yet: text inside asm is only read where it is called."""
    if NVCC is None or CUOBJDUMP is None:
        pytest.skip("needs nvcc and cuobjdump")
    source = tmp_path / "every_product.cu"
    source.write_text(EVERY_PRODUCT)
    _, code, _ = compile_sass(source, "90a", tmp_path)
    products = re.findall(r"HGMMA\.SP\.64x(\d+)x32\.F32(\S*) [^;]*?, (0x[01])[,;]? ", *code.values())
    want = [(str(n), t, "0x1" if (t == "") == (n in (128, 256)) else "0x0") for n in (64, 128, 192, 256) for t in ("", ".BF16")]
    assert sorted(products) == sorted(want * 2)
