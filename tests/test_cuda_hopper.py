"""The Hopper kernel: its source on the emulated cluster, against fp64. The emulator's wgmma.sp is tested first, against the ISA's
tables, and each kind of fault it promises to catch with a kernel that has it."""

import ctypes
import itertools
import re
import subprocess

import isa_model
import numpy as np
import pytest
import torch
from test_cuda_emulated import (
    ACTIVATIONS,
    COMPILER,
    DTYPE_CODES,
    INVALID_VALUE,
    LAUNCH_FAILURE,
    ROOT,
    SUCCESS,
    Buffer,
    allow,
    bits,
    bound,
    sparse_weight,
)

from sparsekit import _C
from sparsekit.format import Sparse24, to_fragments

NOT_SUPPORTED = 801
REGISTER_TILES = {1: (128, 64), 2: (128, 128), 3: (256, 128), 4: (128, 256), 5: (192, 192), 6: (256, 128), 7: (128, 256)}
SHARED_TILES = {8: (256, 128), 9: (128, 256), 10: (192, 256)}  # features x tokens
TILES = REGISTER_TILES | SHARED_TILES
CLUSTERS = {6: 4, 7: 4}  # blocks along the features; two in the others


@pytest.fixture(scope="session")
def hopper(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler to build the emulator with")
    library = tmp_path_factory.mktemp("hopper") / "hopper.so"
    flags = "-std=c++20 -O2 -U_FORTIFY_SOURCE -DSPARSEKIT_CUDA -shared -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas".split()
    flags += ["-Wno-clobbered", "-Wno-unknown-warning-option", f"-I{ROOT / 'tests/emulator'}", "-include", "hopper_host.h"]
    flags.append("-Wno-psabi")  # GCC tells of a change of version 4.6 to arguments aligned like tensor maps
    names = ["csrc/cuda/linear24_sm90a.cu", "tests/emulator/hopper.cpp", "tests/emulator/hopper_faults.cpp"]
    command = [COMPILER, *flags, "-x", "c++", *(ROOT / name for name in names), "-o", library]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.emulator_error.restype = ctypes.c_char_p
    loaded.emulated_linear24_sm90a_workspace.restype = ctypes.c_int64
    return loaded


def pointer(array: np.ndarray | None):
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


# --- the emulator: wgmma.sp, TMA, and the faults it promises to catch


def swizzle(rows: np.ndarray) -> np.ndarray:
    """A tile of uint16, 32 or 64 a row, as a 64- or 128-byte swizzle keeps it: eight 16-byte chunks, 128 bytes, are permuted by
    the number of their 128-byte line, modulo 8 or 4 (CUDA C++ guide, "Swizzle patterns")."""
    mask = rows.shape[1] // 8 - 1
    lines = rows.reshape(-1, 8, 8)
    chunk, line = np.arange(8)[None, :], np.arange(len(lines))[:, None]
    return np.take_along_axis(lines, (chunk ^ (line & mask))[..., None], 1).reshape(rows.shape)


def descriptor(address: int, row_bytes: int) -> ctypes.c_uint64:
    """PTX ISA, "Matrix descriptor": the address, the distance of groups of eight rows, the swizzle (1: 128 bytes, 2: 64)."""
    return ctypes.c_uint64(address >> 4 | (8 * row_bytes >> 4) << 32 | (128 // row_bytes) << 62)


@pytest.mark.parametrize("form, selector", [*itertools.product(["registers", "shared"], [0, 1])])
@pytest.mark.parametrize("count", [32, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_emulated_wgmma_is_the_isa_table(hopper, dtype, count, form, selector):
    """b: columns 32.. of 64 in each row; a in the shared form: kept columns 16.. of 32, as the kernel's second step has it."""
    g, n = torch.Generator().manual_seed(selector), 2 * count
    a = bits(torch.randn((128, 8), generator=g).to(dtype)).view(np.uint32).copy()
    b = torch.randn((256, 64), generator=g).to(dtype)
    nibbles = np.array(isa_model.ORDERED_NIBBLES)[torch.randint(6, (128, 8), generator=g).numpy()]
    metadata = (nibbles << np.arange(0, 32, 4)).sum(1).astype(np.uint32)
    metadata.reshape(32, 2, 2)[:, 1 - selector] = 0xFFFFFFFF  # the other pair of lanes must not be read
    dense = isa_model.wgmma_sp_m64k32(a, metadata, selector)
    kept = np.zeros((64, 32), np.uint16)  # the dense fragment of half the columns (test_cuda_emulated.py)
    for lane, register, half in itertools.product(range(128), range(4), range(2)):
        row = lane // 32 * 16 + lane % 32 // 4 + 8 * (register % 2)
        kept[row, 16 + lane % 4 * 2 + half + 8 * (register // 2)] = a[lane].view(np.uint16)[register * 2 + half]
    d = torch.randn((128, count), generator=g).numpy()

    def matrix(d):  # D of m64nN: 8-column pieces, each warp's as those of an m16n8
        pieces = d.reshape(4, 32, count // 4, 4)
        return np.block([[isa_model.d_m16n8(pieces[w, :, j]) for j in range(count // 4)] for w in range(4)])

    want = torch.from_numpy(matrix(d)).double()
    want += torch.from_numpy(dense.view(np.int16)).view(dtype).double() @ b[:n, 32:].double().T
    tiles = [np.ascontiguousarray(swizzle(t)) for t in (kept, bits(b).view(np.uint16))]
    registers = a if form == "registers" else None
    hopper.emulator_seed(ctypes.c_uint64(count))
    code = hopper.emulated_wgmma_sp(
        pointer(d), pointer(registers), pointer(tiles[0]), pointer(tiles[1]), pointer(metadata),
        descriptor(256 * 128 + 32, 64), descriptor(64, 128), count, DTYPE_CODES[dtype], selector,
    )  # fmt: skip
    assert code == SUCCESS, hopper.emulator_error().decode()
    torch.testing.assert_close(torch.from_numpy(matrix(d)).double(), want, rtol=2.0**-23, atol=2.0**-40)


@pytest.mark.parametrize("row, column", [(0, 0), (3, 32), (-2, -5), (60, 80), (100, 0), (0, 128)], ids=str)
@pytest.mark.parametrize("box", [(16, 64, 128), (16, 32, 64), (8, 24, 0)], ids=["128 B", "64 B", "plain"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_emulated_tma_load(hopper, row, column, box, blocks):
    """Boxes inside, across each edge and outside of a (64, 100) matrix whose rows are 104 apart."""
    rows, columns, width = box
    matrix = np.random.default_rng(0).integers(1, 65535, (64, 104)).astype(np.uint16)
    outside = np.zeros((200, 300), np.uint16)
    outside[64 : 64 + 64, 100:200] = matrix[:, :100]
    want = np.ascontiguousarray(outside[64 + row : 64 + row + rows, 100 + column : 100 + column + columns])
    want = swizzle(want) if width else want
    source, out = Buffer(matrix.ravel()[: 63 * 104 + 100]), np.full((2, rows, columns), 0xFFFF, np.uint16)
    allow(hopper, [source], [])
    for seed in range(4):
        hopper.emulator_seed(ctypes.c_uint64(seed))
        code = hopper.emulated_tma_load(
            source.address, 64, 100, ctypes.c_int64(208), rows, columns, width, row, column, blocks, pointer(out)
        )
        assert code == SUCCESS, hopper.emulator_error().decode()
        for block in range(2):
            assert (out[block] == (want if blocks >> block & 1 else 0)).all()


@pytest.mark.parametrize(
    "wrong",
    [dict(shift=2), dict(row_bytes=200), dict(rows=0), dict(columns=0), dict(box_rows=257), dict(box_columns=128)],
    ids=str,
)
def test_emulated_tensor_map_refuses(hopper, wrong):
    a = dict(shift=0, row_bytes=256, rows=64, columns=100, box_rows=16, box_columns=64) | wrong
    source, out = Buffer(np.zeros((64, 128), np.uint16), a["shift"]), np.zeros((2, 257, 128), np.uint16)
    allow(hopper, [source], [])
    code = hopper.emulated_tma_load(
        source.address, a["rows"], a["columns"], ctypes.c_int64(a["row_bytes"]), a["box_rows"], a["box_columns"], 128, 0, 0, 3,
        pointer(out),
    )  # fmt: skip
    assert code == (NOT_SUPPORTED if wrong != {} else SUCCESS)


NEVER, SOME, EVERY = 0, 1, 32  # of 32 seeds show it, at least
FAULTS = {  # in the order of hopper_faults.cpp; the message of a failed launch, without one the sums are wrong
    "none": (NEVER, ""),
    "no wait for the load": (SOME, ""),
    "wait for the wrong parity": (SOME, "never come"),
    "no wait for the products": (SOME, ""),
    "stage released before its products are done": (SOME, ""),
    "stage taken without the other block's release": (SOME, ""),
    "stage taken without any release": (SOME, "more arrivals"),
    "stage released by one warp for all": (SOME, ""),
    "operand changed in flight": (EVERY, "changed while it was in flight"),
    "sum changed in flight": (EVERY, "written while it was in flight"),
    "no fence": (EVERY, "without a wgmma.fence"),
    "barrier not initialised": (EVERY, "no mbarrier has been initialised"),
    "barrier's initialisation not fenced": (EVERY, "was not fenced"),
    "an arrival too many": (EVERY, "more arrivals"),
    "bytes not announced": (EVERY, "never come"),
    "misaligned target": (EVERY, "multiple of 1024"),
    "no tensor map": (EVERY, "not encoded"),
    "multicast past the cluster": (EVERY, "not there"),
    "block leaves early": (SOME, "has left|on their way"),
    "descriptor past shared memory": (EVERY, "bytes of shared memory"),
    "descriptor past its swizzle": (EVERY, "past the 128 bytes of its swizzle"),
    "descriptors differ": (EVERY, "differs within the warpgroup"),
    "invalid metadata": (EVERY, "no valid metadata"),
    "a warp stays away": (EVERY, "never come"),
    "named barrier of two counts": (EVERY, "among threads that say"),
    "load outside the memory": (EVERY, "outside the memory"),
    "block's rank in a descriptor": (EVERY, "descriptor of a kind"),
    "more bytes than a barrier counts": (EVERY, "counts to 2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_emulator_catches(hopper, fault):
    number, (shows, message) = list(FAULTS).index(fault), FAULTS[fault]
    rows = 63 if fault == "load outside the memory" else 64  # the map says 64
    x = np.random.default_rng(number).integers(-8, 8, (rows, 6 * 64)).astype(np.float16)
    sums = np.zeros(64, np.float32)
    sums[:rows] = x.reshape(rows, -1, 4)[:, :, :2].sum((1, 2), dtype=np.float32)
    lane, i = np.arange(128)[:, None], np.arange(32)[None, :]
    want = np.broadcast_to(sums[i // 4 * 8 + lane % 4 * 2 + i % 2], (2, 128, 32))
    wrong = failed = 0
    for seed in range(32):
        source, target = Buffer(x), Buffer(np.zeros((2, 128, 32), np.float32))
        allow(hopper, [source], [target])
        hopper.emulator_seed(ctypes.c_uint64(seed))
        code = hopper.emulated_hopper_fault(source.address, rows, 6 * 64, target.address, number)
        if code == LAUNCH_FAILURE:
            failed += 1
            assert message and re.search(message, hopper.emulator_error().decode()), hopper.emulator_error().decode()
            continue
        assert code == SUCCESS
        wrong += (target.array() != want).any()
    assert wrong + failed >= shows and (shows > NEVER or wrong + failed == 0)
    assert failed == 32 or shows < EVERY


# --- linear24_sm90a


def linear24(hopper, x, values, meta, bias, ldx, tile, activation=0, seed=0, multiprocessors=4, split=1):
    """Runs launch_linear24_sm90a on x (m, k), its rows ldx apart with NaN between, and a workspace of NaN. Returns y (m, n) and the
    error code."""
    (m, k), n = x.shape, meta.shape[0]
    rows = np.full(max((m - 1) * ldx + k, 0) if m else 0, -1, np.int16)
    np.lib.stride_tricks.as_strided(rows, (m, k), (2 * ldx, 2))[...] = bits(x)
    fragments = to_fragments(Sparse24(values, torch.from_numpy(meta), (n, k)))
    a = values if tile in SHARED_TILES else fragments.values
    reads = [Buffer(rows), Buffer(bits(a)), Buffer(fragments.meta.numpy())]
    if bias is not None:
        reads.append(Buffer(bits(bias)))
    y = Buffer(np.full((m, n), -1, np.int16))
    hopper.emulator_seed(ctypes.c_uint64(seed))
    hopper.emulator_multiprocessors(multiprocessors)
    workspace = Buffer(np.full(hopper.emulated_linear24_sm90a_workspace(m, n, k, tile, split), 0xFF, np.uint8))
    allow(hopper, reads, [y, workspace])
    code = hopper.emulated_linear24_sm90a(
        reads[0].address, reads[1].address, reads[2].address, reads[3].address if bias is not None else None, y.address,
        workspace.address if workspace.array().size else None, m, n, k, ctypes.c_int64(ldx), DTYPE_CODES[x.dtype], activation, tile,
        split,
    )  # fmt: skip
    y.check_border(), workspace.check_border()
    return torch.from_numpy(y.array().copy()).view(x.dtype), code


def check(hopper, m, n, k, dtype, tile, ldx=None, bias=True, activation="none", seed=0, split=1):
    g = torch.Generator().manual_seed(1000 * m + 10 * n + k + seed)
    values, meta, dense = sparse_weight(n, k, dtype, g)
    x, b = torch.randn((m, k), generator=g).to(dtype), torch.randn(n, generator=g).to(dtype) if bias else None
    code, function = ACTIVATIONS[activation]
    y, error = linear24(hopper, x, values, meta, b, ldx or -(-k // 8) * 8, tile, code, seed, split=split)
    assert error == SUCCESS, hopper.emulator_error().decode()
    want = function(x.double() @ dense.double().T + (0 if b is None else b.double()))
    worst = (y.double() - want).abs() - bound(x, dense, b, want, slope=1.13)
    assert not torch.isnan(y).any(), "an output was not written, or was made from memory that nobody wrote"
    assert (worst <= 0).all(), f"beyond the bound by {worst.max():.3g} at {divmod(int(worst.argmax()), n)}"


def ring(tile):  # stages of x, see the head of linear24_sm90a.cu
    return {1: 12, 2: 12, 3: 12, 4: 6, 5: 8, 6: 12, 7: 6, 8: 6, 9: 5, 10: 4}[tile]


SHAPES = {  # of the tile's features and tokens: m, n, k, ldx: each way a size can miss its tile
    "one token, one row tile": lambda n, m: (1, 16, 16, 16),
    "full tiles": lambda n, m: (m, 2 * n, 256, 256),
    "one over": lambda n, m: (m + 1, 2 * n + 4, 272, 272),
    "one under; n odd, y rows unaligned": lambda n, m: (m - 1, 2 * n - 1, 240, 240),
    "second block has no feature; n of 2": lambda n, m: (m // 2 + 3, n - 30, 64, 64),
    "n = 1, half a token tile": lambda n, m: (m // 2, 1, 128, 128),
    "k odd, past a k256 block; NaN between rows": lambda n, m: (30, 70, 267, 288),
    "k = 1": lambda n, m: (7, 40, 9, 16),
    "the ring wraps three times": lambda n, m: (9, 20, 40 * 64, 40 * 64),
    "several tiles a cluster": lambda n, m: (2 * m + 5, 4 * n + 8, 336, 336),
    "more token tiles than a raster group": lambda n, m: (9 * m + 1, 24, 16, 16),
}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear24_sm90a(hopper, shape, tile):
    m, n, k, ldx = SHAPES[shape](*TILES[tile])
    check(hopper, m, n, k, torch.float16, tile, ldx, seed=tile)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_linear24_sm90a_is_exact_on_small_integers(hopper, tile, dtype):
    """Weights +-1 and x in -1, 0, 1: every sum is an integer of at most 160, which both dtypes hold."""
    (n, m), g = TILES[tile], torch.Generator().manual_seed(tile)
    values, meta, dense = sparse_weight(n + 70, 320, dtype, g, integers=True)
    x = torch.randint(-1, 2, (m + 3, 320), generator=g).to(dtype)
    y, error = linear24(hopper, x, values, meta, None, 320, tile, seed=tile)
    assert error == SUCCESS, hopper.emulator_error().decode()
    assert torch.equal(y.double(), x.double() @ dense.double().T)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_linear24_sm90a_epilogue(hopper, activation, bias, dtype):
    check(hopper, 19, 70, 64, dtype, 3, bias=bias, activation=activation)


@pytest.mark.parametrize("tile", TILES)
def test_linear24_sm90a_does_not_depend_on_the_schedule(hopper, tile):
    """Threads, landings and the order of clusters change with the seed, the tiles of a cluster with the multiprocessors."""
    (n, m), g = TILES[tile], torch.Generator().manual_seed(tile)
    values, meta, dense = sparse_weight(4 * n + 24, 64 * (ring(tile) + 1), torch.float16, g)
    x, bias = torch.randn((m + 9, dense.shape[1]), generator=g).half(), torch.randn(len(dense), generator=g).half()
    results = [
        linear24(hopper, x, values, meta, bias, x.shape[1], tile, seed=seed, multiprocessors=multiprocessors)
        for seed, multiprocessors in [(1, 1), (2, 2), (3, 5), (4, 132)]
    ]
    for y, error in results:
        assert error == SUCCESS, hopper.emulator_error().decode()
        assert torch.equal(y.view(torch.int16), results[0][0].view(torch.int16))
    want = x.double() @ dense.double().T + bias.double()
    assert ((results[0][0].double() - want).abs() <= bound(x, dense, bias, want, 1.0)).all()


SPLIT_SHAPES = {  # of the tile's features and tokens: m, n, k, split
    "one part a k256 block": lambda n, m: (m, 2 * n, 1024, 4),
    "parts of 1 and 2 blocks, the last one short": lambda n, m: (m - 1, 2 * n - 1, 5 * 256 - 65, 3),
    "more parts than blocks; n of 2": lambda n, m: (9, 2, 300, 9),
    "several tiles a part; k odd": lambda n, m: (m + 5, 2 * n + 8, 777, 2),
    "a part wraps the ring": lambda n, m: (3, 20, 2 * 15 * 64, 2),
}


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 7, 8, 9])
@pytest.mark.parametrize("shape", SPLIT_SHAPES)
def test_linear24_sm90a_split(hopper, shape, tile):
    """Fewer multiprocessors than units, so that a cluster goes from one part to another."""
    m, n, k, split = SPLIT_SHAPES[shape](*TILES[tile])
    check(hopper, m, n, k, torch.float16, tile, seed=tile, split=split)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_linear24_sm90a_split_epilogue(hopper, activation, bias, dtype):
    check(hopper, 19, 70, 520, dtype, 1, bias=bias, activation=activation, split=3)


def test_linear24_sm90a_split_does_not_depend_on_the_schedule(hopper):
    """And one part is what no split gives; tiles of 192 features have one whatever is asked."""
    g = torch.Generator().manual_seed(0)
    values, meta, _ = sparse_weight(300, 1100, torch.float16, g)
    x, bias = torch.randn((70, 1100), generator=g).half(), torch.randn(300, generator=g).half()

    def run(tile, split, seed=1, multiprocessors=4):
        y, error = linear24(hopper, x, values, meta, bias, 1104, tile, seed=seed, multiprocessors=multiprocessors, split=split)
        assert error == SUCCESS, hopper.emulator_error().decode()
        return y.view(torch.int16)

    three = [run(1, 3, seed, multiprocessors) for seed, multiprocessors in [(1, 1), (2, 2), (3, 5), (4, 132)]]
    assert all(torch.equal(y, three[0]) for y in three)
    assert not torch.equal(three[0], run(1, 1))  # other parts are rounded elsewhere
    assert torch.equal(run(5, 3), run(5, 1))


@pytest.mark.parametrize("m, n, k", [(100, 1022, 4096), (1, 1, 256), (256, 4096, 14336)])
def test_linear24_sm90a_workspace(hopper, m, n, k):
    """Parts of fp32, rows padded to 16 bytes; as many as asked for, at most one a k256 block; none of one."""
    part, ask = m * -(-n // 4) * 16, hopper.emulated_linear24_sm90a_workspace
    for split in (1, 2, 5, 64, 1000):
        got = min(split, k // 256, 64)
        assert ask(m, n, k, 2, split) == (part * got if got > 1 else 0)
    assert ask(m, n, k, 5, 4) == ask(0, n, k, 1, 4) == ask(m, 0, k, 1, 4) == 0
    assert ask(m, n, k, 11, 1) == ask(m, n, k, -1, 1) == ask(m, n, k, 1, -1) == ask(-1, n, k, 1, 1) == -1


@pytest.mark.parametrize(
    "m, n, k, tile, split, why",
    [
        (1024, 4096, 4096, 3, 1, "128 blocks of 256 x 128 are nearly a wave"),
        (512, 4096, 4096, 2, 1, "64 of those are not, 128 of 128 x 128 are"),
        (512, 3840, 4096, 2, 1, "a second part does not fit beside 120"),
        (256, 4096, 4096, 2, 2, "64 blocks, twice"),
        (128, 4096, 4096, 2, 4, "32 blocks, four times"),
        (128, 1024, 4096, 2, 8, "k is cut until a part is two k256 blocks"),
        (128, 1024, 4096 - 256, 2, 7, "15 blocks, so no eighth part"),
        (128, 1024, 14336, 2, 16, "8 blocks 16 times"),
        (128, 128, 65536, 2, 64, "so many parts and no more"),
        (256, 1024, 512, 1, 1, "too short to be cut: the small tile, whose 64 blocks are more"),
        (256, 2816, 2048, 2, 3, "44 blocks, three times"),
        (256, 2816, 1536, 2, 2, "a third part would cost more than it saves: 256 x 2816 x 2 x 3 is 2816 k"),
        (256, 4096, 800, 2, 1, "and so would a second: 256 x 4096 x 1 x 2 is 2621 k"),
        (64, 1024, 4096, 1, 8, "one token tile of 64"),
        (1, 1, 1, 1, 1, "nothing to cut"),
        (2**31 - 1025, 2**31 - 1025, 2**31 - 1025, 3, 1, "no overflow"),
    ],
)  # fmt: skip
def test_linear24_sm90a_chooses(hopper, m, n, k, tile, split, why):
    """On the 132 multiprocessors of an H200."""
    plan = hopper.emulated_linear24_sm90a_plan(m, n, k, 0, 0, 132)
    assert (plan & 0xFFFF, plan >> 16) == (tile, split), why
    assert hopper.emulated_linear24_sm90a_plan(m, n, k, tile, 0, 132) == plan


@pytest.mark.parametrize("multiprocessors, tile", [(4, 3), (5, 2), (9, 2), (10, 1)])
def test_linear24_sm90a_runs_what_it_chooses(hopper, multiprocessors, tile):
    """130 x 512: 4 blocks of 256 x 128 or 8 of 128 x 128; up to an eighth of the multiprocessors may idle."""
    assert hopper.emulated_linear24_sm90a_plan(130, 512, 64, 0, 0, multiprocessors) == tile | 1 << 16
    hopper.emulator_multiprocessors(multiprocessors)
    check(hopper, 130, 512, 64, torch.float16, 0, split=0)


def test_linear24_sm90a_runs_the_parts_it_chooses(hopper):
    g = torch.Generator().manual_seed(0)
    values, meta, dense = sparse_weight(40, 2048, torch.float16, g)
    x = torch.randn((70, 2048), generator=g).half()
    y, error = linear24(hopper, x, values, meta, None, 2048, 0, multiprocessors=9, split=0)
    assert error == SUCCESS, hopper.emulator_error().decode()
    four, _ = linear24(hopper, x, values, meta, None, 2048, 2, multiprocessors=9, split=4)
    assert torch.equal(y.view(torch.int16), four.view(torch.int16))
    want = x.double() @ dense.double().T
    assert ((y.double() - want).abs() <= bound(x, dense, None, want, 1.0)).all()


@pytest.mark.parametrize("tile", [1, 8])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear24_sm90a_without_columns(hopper, tile, bias):
    """k = 0: an empty sum, so act(bias)."""
    b = torch.randn(35, generator=torch.Generator().manual_seed(tile)).half() if bias else None
    empty = torch.zeros((35, 0), dtype=torch.float16)
    y, error = linear24(hopper, empty[:1].expand(90, 0), empty, np.zeros((35, 0), np.uint8), b, 0, tile, activation=1)
    assert error == SUCCESS, hopper.emulator_error().decode()
    assert torch.equal(y, (torch.zeros(35) if b is None else torch.relu(b)).half().expand(90, 35))


@pytest.mark.parametrize("m, n", [(0, 8), (8, 0), (0, 0)])
def test_linear24_sm90a_without_outputs(hopper, m, n):
    x, values = torch.zeros((m, 64)).half(), torch.zeros((n, 32)).half()
    y, error = linear24(hopper, x, values, np.full((n, 8), 0x44, np.uint8), None, 64, 0)
    assert error == SUCCESS and y.shape == (m, n)


def test_linear24_sm90a_reaches_past_two_gib(hopper):
    """Rows of x are found with 64-bit offsets: the second starts 4 GiB after the first, in memory that is reserved, not touched."""
    ldx, k, g = 2**31 + 64, 64, torch.Generator().manual_seed(0)
    values, meta, dense = sparse_weight(32, k, torch.float16, g)
    x, fragments = torch.randn((2, k), generator=g).half(), to_fragments(Sparse24(values, torch.from_numpy(meta), (32, k)))
    memory, w, e = np.zeros(ldx + k + 8, np.int16), Buffer(bits(fragments.values)), Buffer(fragments.meta.numpy())
    memory = memory[-memory.ctypes.data % 16 // 2 :]
    memory[:k], memory[ldx : ldx + k] = bits(x)
    y = Buffer(np.full((2, 32), -1, np.int16))
    allow(hopper, [w, e], [y])
    hopper.emulator_allow(pointer(memory), ctypes.c_size_t(memory.nbytes), 0)
    code = hopper.emulated_linear24_sm90a(
        pointer(memory), w.address, e.address, None, y.address, None, 2, 32, k, ctypes.c_int64(ldx), 1, 0, 1, 1
    )
    assert code == SUCCESS, hopper.emulator_error().decode()
    want = x.double() @ dense.double().T
    worst = (torch.from_numpy(y.array()).view(torch.float16).double() - want).abs() - bound(x, dense, None, want, 1)
    assert (worst <= 0).all()


REFUSED = [dict(m=-1), dict(n=-1), dict(k=-1), dict(ldx=7), dict(ldx=2**62), dict(dtype=0), dict(dtype=3), dict(activation=5),
           dict(activation=-1), dict(tile=-1), dict(tile=11), dict(split=-1),
           dict(k=512, ldx=512, split=2), dict(k=512, ldx=512, split=2, workspace=8), dict(k=2**31 - 1, ldx=2**31 - 1)]  # fmt: skip
UNSUPPORTED = [dict(ldx=12), dict(x=8), dict(values=8), dict(meta=8), dict(ldx=2**39), dict(k=8, tile=8), dict(values=8, tile=9)]


@pytest.mark.parametrize("wrong", REFUSED + UNSUPPORTED, ids=str)
def test_linear24_sm90a_refuses(hopper, wrong):
    """Nothing is launched: no memory is allowed here, so a launch would be a failure of another kind."""
    a = dict(x=1024, values=1024, meta=1024, workspace=0, m=2, n=8, k=8, ldx=8, dtype=1, activation=0, tile=0, split=1)
    a |= {name: value + 1024 if name in ("x", "values", "meta", "workspace") else value for name, value in wrong.items()}
    hopper.emulator_forget_memory()
    code = hopper.emulated_linear24_sm90a(
        *(ctypes.c_void_p(a[name]) for name in ("x", "values", "meta")), None, None, ctypes.c_void_p(a["workspace"]),
        a["m"], a["n"], a["k"], ctypes.c_int64(a["ldx"]), a["dtype"], a["activation"], a["tile"], a["split"],
    )  # fmt: skip
    assert code == (NOT_SUPPORTED if wrong in UNSUPPORTED else INVALID_VALUE)


def test_a_map_that_the_driver_refuses_is_an_error(hopper):
    """Where TMA can take x, it is no cause to run another kernel: that one would be tested and timed under this one's name."""
    hopper.emulator_refuse_maps(1)
    try:
        for tile in TILES:
            code = hopper.emulated_linear24_sm90a(
                *(ctypes.c_void_p(2048) for _ in range(3)), None, None, None, 2, 8, 256, ctypes.c_int64(256), 1, 0, tile, 1
            )
            assert code == INVALID_VALUE
    finally:
        hopper.emulator_refuse_maps(0)


def test_linear24_sm90a_binding():
    """It is there where the build has sm_90a, and checks before it launches."""
    assert hasattr(_C, "linear24_sm90a") == ("90a" in _C.cuda_archs())
    if "90a" not in _C.cuda_archs():
        pytest.skip("built without sm_90a")
    right = dict(x=64, values=64, meta=64, bias=0, y=64, workspace=0, m=1, n=8, k=8, ldx=8, dtype=1, activation=0, tile=0, split=0,
                 device=0, stream=0)  # fmt: skip
    wrong = dict(m=-1, k=2**31, x=0, values=0, meta=0, y=0, dtype=0, activation=5, tile=11, split=-1, device=-1)
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"linear24_sm90a: {name} must be"):
            _C.linear24_sm90a(**right | {name: value})
    with pytest.raises(TypeError):
        _C.linear24_sm90a(**right | {"x": torch.zeros(64)})
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"^linear24_sm90a: .*CUDA"):
            _C.linear24_sm90a(**right)
