"""What the compiler made of the CUDA kernels, read in the machine code: sparse tensor-core instructions, asynchronous 16-byte
copies, no spill, and registers that let the promised number of blocks share a multiprocessor. Needs nvcc, no GPU."""

import re

import pytest

from benchmarks.resources import ARCHITECTURES, CUOBJDUMP, NVCC, blocks_by_registers, compile_sass

pytestmark = pytest.mark.skipif(NVCC is None or CUOBJDUMP is None, reason="needs nvcc and cuobjdump")


def compiled(name):
    """A fixture: csrc/cuda/`name`.cu, compiled for each architecture."""

    @pytest.fixture(scope="session", params=ARCHITECTURES, ids=[f"sm_{a}" for a in ARCHITECTURES])
    def sass(request, machine_code):
        return machine_code(name, request.param)

    return sass


linear24_sm80, linear24_decode_sm80 = compiled("linear24_sm80"), compiled("linear24_decode_sm80")


EVERY_INSTRUCTION = """
#include "ptx.cuh"
using namespace sparsekit::ptx;
__global__ void every_instruction(const char *in, float *out, int bytes) {
    char *shared = dynamic_shared_memory();
    cp_async<4>(shared, in, bytes), cp_async<8>(shared + 16, in, bytes), cp_async<16>(shared + 32, in, bytes);
    cp_async_commit();
    cp_async_wait<0>();
    const uint4 v = ld_global_streaming(in);
    uint32_t a[4], b[4] = {v.x, v.y, v.z, v.w}, two[2], four[4];
    ldmatrix_x4(a, shared);
    ld_shared(four, shared + 64);
    ldmatrix_x2(two, shared);
    float d[4] = {};
    mma_sp_m16n8k32<__half, 0>(d, a, b, two[0]);
    mma_sp_m16n8k32<__nv_bfloat16, 1>(d, a, four, two[1]);
    for (int i = 0; i < 4; ++i)
        out[i] = d[i];
}
"""


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_instruction_assembles(arch, tmp_path):
    """Also those that no kernel uses yet: text inside asm is only read where it is called."""
    source = tmp_path / "every_instruction.cu"
    source.write_text(EVERY_INSTRUCTION)
    _, sass, _ = compile_sass(source, arch, tmp_path)
    (code,) = sass.values()
    found = set(re.findall(r"(?:LDGSTS|LDG\b|LDSM?\b|HMMA)\S*", code))
    for pattern in (
        r"LDGSTS\.E\.ZFILL", r"LDGSTS\.E\.64\.ZFILL", r"LDGSTS\.E\.BYPASS\.128\.ZFILL", r"LDG\.E\.NA\..*128.*",
        r"LDS\.128", r"LDSM\.16\.M88\.4", r"LDSM\.16\.M88\.2", r"HMMA\.SP\.16832\.F32", r"HMMA\.SP\.16832\.F32\.BF16",
    ):  # fmt: skip
        assert any(re.fullmatch(pattern, f) for f in found), f"no {pattern} in {sorted(found)}"


def test_every_instance_is_there(linear24_sm80):
    """Four tile classes, two dtypes, one kernel each."""
    _, sass, usage = linear24_sm80
    tiles = sorted(re.findall(r"13linear24_sm80I(6__half|13__nv_bfloat16)Li(\d+)ELi(\d+)ELi(\d+)E", " ".join(sass)))
    assert len(tiles) == len(set(tiles)) == len(sass) == len(usage) == 8
    assert {t[1:3] for t in tiles} == {("32", "8"), ("32", "16"), ("64", "64"), ("128", "128")}


def test_products_are_sparse_and_copies_are_wide(linear24_sm80):
    _, sass, _ = linear24_sm80
    for name, code in sass.items():
        products = re.findall(r"HMMA\S*", code)
        kind = "HMMA.SP.16832.F32" + (".BF16" if "bfloat16" in name else "")
        assert products and set(products) == {kind}, f"{name}: {sorted(set(products))}"
        tile_n, tile_m = (int(v) for v in re.search(r"Li(\d+)ELi(\d+)E", name).groups())
        warp_n, warp_m = (64 if tile_n == 128 else 32), min(tile_m, 64)
        assert len(products) == 2 * (warp_n // 16) * (warp_m // 8), f"{name}: {len(products)} products in a step"
        copies = re.findall(r"LDGSTS\S*", code)
        assert set(copies) == {"LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.128.ZFILL"}, f"{name}: {sorted(set(copies))}"
        # Metadata by 16 bytes, once before the loop and once in it; only misaligned x, and bias, come by the element.
        loads = [load for load in re.findall(r"LDG\.\S*", code) if "U16" not in load]
        assert len(loads) == 2 * warp_n // 16, f"{name}: {loads}"
        assert all(".NA" in load and ".128" in load for load in loads), f"{name}: {loads}"
        assert len(re.findall(r"LDS\.128", code)) >= 2 * warp_n // 16, name
        assert re.findall(r"LDSM\S*", code) == ["LDSM.16.M88.4"] * (2 * warp_m // 8), name
        stages = int(re.search(r"Li(\d+)EEE", name)[1])
        assert [int(n, 16) for n in re.findall(r"DEPBAR\.LE SB0, (0x\d+)", code)] == [stages - 2], name


def check_registers(compiled, blocks):
    """Nothing is spilled, and blocks(name) blocks of so many threads share a multiprocessor's registers."""
    notes, sass, usage = compiled
    assert "warning" not in notes.lower(), notes
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", notes)
    assert len(spills) == len(sass) == len(usage) and set(spills) == {("0", "0", "0")}
    for name, code in sass.items():
        assert not re.search(r"\b(STL|LDL)\b", code), f"{name} uses local memory"
        registers = int(re.search(r"REG:(\d+)", usage[name])[1])
        count, threads = blocks(name)
        assert blocks_by_registers(registers, threads) >= count, f"{name}: {registers} registers"


def test_nothing_spills_and_two_blocks_fit(linear24_sm80):
    check_registers(linear24_sm80, lambda name: (2, 128))


DECODE = {8: (4, 256), 16: (8, 256), 32: (16, 256), 64: (64, 128)}  # tokens: products a stage, threads a block


def decode_tokens(name):
    """The class of a decode kernel; None is the kernel that sums parts."""
    found = re.search(r"20linear24_decode_sm80I(?:6__half|13__nv_bfloat16)Li(\d+)E", name)
    return int(found[1]) if found else None


def test_decode_has_every_instance(linear24_decode_sm80):
    _, sass, _ = linear24_decode_sm80
    for dtype in ("6__half", "13__nv_bfloat16"):
        tokens = [decode_tokens(name) for name in sass if dtype in name]
        assert len(tokens) == 5 and set(tokens) == {*DECODE, None}


def test_decode_reads_weights_by_16_bytes_and_multiplies_sparse(linear24_decode_sm80):
    """Values by cp.async past L1, metadata by streaming loads; only misaligned x, and bias, come by the element. What is stored
    for later stages is shared memory's: four stages less one are on their way at each wait."""
    _, sass, _ = linear24_decode_sm80
    for name, code in sass.items():
        tokens = decode_tokens(name)
        if tokens is None:
            assert not re.search("HMMA|LDGSTS", code) and "LDG.E.128" in code, name
            continue
        products, copies = re.findall(r"HMMA\S*", code), re.findall(r"LDGSTS\S*", code)
        assert set(products) == {"HMMA.SP.16832.F32" + (".BF16" if "bfloat16" in name else "")}, name
        assert len(products) == DECODE[tokens][0], f"{name}: {len(products)} products in a stage"
        assert set(copies) == {"LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.128.ZFILL"}, f"{name}: {sorted(set(copies))}"
        loads = set(re.findall(r"LDG\.\S*", code))
        assert {load for load in loads if "U16" not in load} == {load for load in loads if ".NA" in load and ".128" in load}, name
        assert len(loads) == 2 and set(re.findall(r"LDSM\S*", code)) == {"LDSM.16.M88.4"}, f"{name}: {sorted(loads)}"
        assert re.findall(r"DEPBAR\.LE SB0, (0x\d+)", code).count("0x2") == 1, name


def test_decode_does_not_spill_and_two_blocks_fit(linear24_decode_sm80):
    check_registers(linear24_decode_sm80, lambda name: (2, DECODE.get(decode_tokens(name), (0, 128))[1]))
