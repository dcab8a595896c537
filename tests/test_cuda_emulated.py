"""The CUDA sources, compiled for the host and run on tests/emulator, against fp64. The emulator is tested first: its mma.sp
against the ISA's tables, and each kind of fault it promises to catch with a kernel that has it. Weights reach the kernels
through to_fragments, which test_layouts.py holds against the ISA's tables."""

import ctypes
import pathlib
import shutil
import subprocess
import tempfile
from functools import cache

import isa_model
import numpy as np
import pytest
import torch

from sparsekit.format import Sparse24, to_fragments

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "csrc/cuda" / name for name in ("linear24_sm80.cu", "linear24_decode_sm80.cu")]
SOURCES += [ROOT / "tests/emulator" / name for name in ("entry.cpp", "faults.cpp")]
COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build the emulator with")

DTYPE_CODES = {torch.float16: 1, torch.bfloat16: 2}
ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half an ulp, relative
TINIEST = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}  # half of the smallest subnormal
ACTIVATIONS = {
    "none": (0, lambda v: v),
    "relu": (1, torch.relu),
    "gelu": (2, torch.nn.functional.gelu),
    "gelu_tanh": (3, lambda v: torch.nn.functional.gelu(v, approximate="tanh")),
    "silu": (4, torch.nn.functional.silu),
}
SUCCESS, INVALID_VALUE, LAUNCH_FAILURE = 0, 1, 719


@cache
def built_emulator() -> ctypes.CDLL:
    include = ROOT / "tests/emulator"
    # Fortified libcs forbid setjmp between stacks, which is the point here.
    flags = "-std=c++20 -O2 -U_FORTIFY_SOURCE -DSPARSEKIT_CUDA -shared -fPIC -Wall -Wextra -Werror".split()
    flags += [
        "-Wno-unknown-pragmas",
        "-Wno-clobbered",
        "-Wno-unknown-warning-option",
        f"-I{include}",
        "-include",
        "ptx_host.h",
    ]
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder) / "emulator.so"
        command = [COMPILER, *flags, "-x", "c++", *SOURCES, "-o", library]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        loaded = ctypes.CDLL(str(library))
    loaded.emulator_error.restype = ctypes.c_char_p
    loaded.emulator_bank_conflicts.restype = ctypes.c_long
    loaded.emulator_bytes_read.restype = ctypes.c_size_t
    loaded.emulated_linear24_decode_workspace.restype = ctypes.c_int64
    return loaded


@pytest.fixture(scope="session")
def emulator():
    """To pytest another fixture in each file that takes it, and built once."""
    return built_emulator()


class Buffer:
    """An array of exactly the bytes a kernel may touch, in the middle of NaN bytes that it may not, `shift` bytes past a
    128-byte boundary."""

    BORDER = 512

    def __init__(self, content: np.ndarray, shift: int = 0):
        self.shape, self.dtype, self.bytes = content.shape, content.dtype, content.nbytes
        self.storage = np.full(self.bytes + 2 * self.BORDER + 128 + shift, 0xFF, np.uint8)
        self.start = -self.storage.ctypes.data % 128 + self.BORDER + shift
        self.storage[self.start : self.start + self.bytes] = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        self.address = ctypes.c_void_p(self.storage.ctypes.data + self.start)

    def array(self) -> np.ndarray:
        return self.storage[self.start : self.start + self.bytes].view(self.dtype).reshape(self.shape)

    def check_border(self) -> None:
        end = self.start + self.bytes
        outside = np.concatenate([self.storage[: self.start], self.storage[end:]])
        assert (outside == 0xFF).all(), "wrote outside its memory"


def allow(emulator, reads, writes):
    emulator.emulator_forget_memory()
    for buffer, writable in [(b, 0) for b in reads] + [(b, 1) for b in writes]:
        emulator.emulator_allow(buffer.address, ctypes.c_size_t(buffer.bytes), writable)


def bits(t: torch.Tensor) -> np.ndarray:
    return t.contiguous().view(torch.int16).numpy()


def sparse_weight(n, k, dtype, generator, integers=False):
    """A random canonical Sparse24, made from its definition: values (n, kp/2), meta (n, kp/8) and the dense weight (n, k)."""
    kp = -(-k // 8) * 8
    nibbles = np.array(isa_model.ORDERED_NIBBLES)[torch.randint(6, (n, kp // 4), generator=generator).numpy()]
    if integers:
        kept = torch.randint(0, 2, (n, kp // 4, 2), generator=generator).mul(2).sub(1).to(dtype)
    else:
        kept = torch.randn((n, kp // 4, 2), generator=generator).to(dtype)
    columns = torch.from_numpy(np.stack([nibbles & 3, nibbles >> 2], -1)) + torch.arange(kp // 4)[:, None] * 4
    kept[columns >= k] = 0  # padding
    dense = torch.zeros((n, kp), dtype=dtype).scatter_(1, columns.reshape(n, -1), kept.reshape(n, -1))[:, :k]
    meta = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).astype(np.uint8)
    return kept.reshape(n, kp // 2), meta, dense


def fragments_of(values, meta, k):
    """Both arrays in fragment order, as numpy."""
    f = to_fragments(Sparse24(values, torch.from_numpy(meta), (len(meta), k)))
    return bits(f.values), f.meta.numpy()


def linear24(emulator, x, fragments, n, bias, ldx, activation=0, seed=0, shifts=(0, 0), tile=0):
    """Runs launch_linear24_sm80 on x (m, k), its rows ldx apart with NaN between; shifts move x and y off their alignment by so
    many bytes. Returns y (m, n) and the error code."""
    m, k = x.shape
    rows = np.full(max((m - 1) * ldx + k, 0) if m else 0, -1, np.int16)
    np.lib.stride_tricks.as_strided(rows, (m, k), (2 * ldx, 2))[...] = bits(x)
    reads = [Buffer(rows, shifts[0]), *map(Buffer, fragments)]
    if bias is not None:
        reads.append(Buffer(bits(bias)))
    y = Buffer(np.full((m, n), -1, np.int16), shifts[1])
    allow(emulator, reads, [y])
    emulator.emulator_seed(ctypes.c_uint64(seed))
    code = emulator.emulated_linear24_sm80(
        reads[0].address, reads[1].address, reads[2].address, reads[3].address if bias is not None else None, y.address,
        m, n, k, ctypes.c_int64(ldx), DTYPE_CODES[x.dtype], activation, tile,
    )  # fmt: skip
    y.check_border()
    return torch.from_numpy(y.array().copy()).view(x.dtype), code


def bound(x, dense, bias, want, slope):
    """|error| of one element: the output's rounding, and fp32 sums of k / 32 steps, the parts over warps, bias and activation,
    each within 2^-24 of the sum of magnitudes, carried through an activation of at most that slope."""
    magnitude = x.double().abs() @ dense.double().abs().T + (0 if bias is None else bias.double().abs())
    roundings = x.shape[1] // 32 + 16
    return ROUNDOFF[x.dtype] * want.abs() + TINIEST[x.dtype] + 1.01 * slope * roundings * 2.0**-24 * magnitude


def check(emulator, m, n, k, dtype, ldx=None, bias=True, activation="none", seed=0, **options):
    g = torch.Generator().manual_seed(1000 * m + 10 * n + k + seed)
    values, meta, dense = sparse_weight(n, k, dtype, g)
    x, b = torch.randn((m, k), generator=g).to(dtype), torch.randn(n, generator=g).to(dtype) if bias else None
    code, function = ACTIVATIONS[activation]
    y, error = linear24(emulator, x, fragments_of(values, meta, k), n, b, ldx or k, code, seed, **options)
    assert error == SUCCESS, emulator.emulator_error().decode()
    want = function(x.double() @ dense.double().T + (0 if b is None else b.double()))
    worst = (y.double() - want).abs() - bound(x, dense, b, want, slope=1.13)
    assert not torch.isnan(y).any(), "an output was not written, or was made from memory that nobody wrote"
    assert (worst <= 0).all(), f"beyond the bound by {worst.max():.3g} at {divmod(int(worst.argmax()), n)}"


# --- the ISA model and the emulator

WGMMA = {  # per element size: the model, kept elements a lane, CUTLASS's ELayout (mma_traits_sm90_gmma_sparse.hpp)
    16: (isa_model.wgmma_sp_m64k32, 8, [(2, 64 * 16), (2, 0), (8, 1), (4, 16)], [(16, 64), (2, 8)]),
    8: (isa_model.wgmma_sp_m64k64, 16, [(2, 8), (2, 64 * 32), (8, 1), (4, 16)], [(32, 64)]),
}


def layout(index, modes):
    """A CuTe layout: index split over the modes' sizes, first fastest, times their strides."""
    offset = 0
    for size, stride in modes:
        index, offset = index // size, offset + index % size * stride
    return offset


@pytest.mark.parametrize("element_bits", WGMMA)
def test_isa_model_metadata_is_the_elayout_of_cutlass(element_bits):
    """A second source for the metadata tables. One nibble is changed at a time; the group of four that moves must be the one
    that CUTLASS's layout names (bit b of lane T: row + 64 * column)."""
    model, _, lane_modes, bit_modes = WGMMA[element_bits]
    arguments = (0,) if element_bits == 16 else ()
    a, plain = np.full((128, 4), 0xFFFFFFFF, np.uint32), np.full(128, 0x44444444, np.uint32)
    before = model(a, plain, *arguments) != 0
    for lane in [*range(32), 37, 70, 127]:  # one warp whole, one lane of each other
        for bit in range(0, 32, 4):
            metadata = plain.copy()
            metadata[lane] ^= (0x4 ^ 0xE) << bit
            moved = np.argwhere((model(a, metadata, *arguments) != 0) != before)
            offset = layout(lane, lane_modes) + layout(bit, bit_modes)
            group = [(offset % 64, offset // 64 + i) for i in range(4)]
            asked = element_bits == 8 or lane % 4 < 2  # selector 0
            assert [tuple(m) for m in moved] == (group if asked else [])


@pytest.mark.parametrize("element_bits", WGMMA)
def test_isa_model_values_are_the_dense_fragment(element_bits):
    """The kept elements lie as in the dense instruction of half the columns: with all nibbles 4, dropping the zeros leaves
    that instruction's table (row lane / 4, + 8 for odd registers; a register's elements, then lanes, then + half)."""
    model, count, _, _ = WGMMA[element_bits]
    numbers = np.arange(128 * count).reshape(128, count)
    arguments = (np.full(128, 0x44444444, np.uint32), *((0,) if element_bits == 16 else ()))
    digits = [(numbers >> shift & 255).astype(f"<u{element_bits // 8}").view("<u4") for shift in (0, 8)]
    dense = sum(model(digit, *arguments).astype(int) << shift for digit, shift in zip(digits, (0, 8), strict=True))
    kept = dense.reshape(64, -1, 4)[:, :, :2].reshape(64, 2 * count)
    per_register = 32 // element_bits
    for lane in range(128):
        for i in range(count):
            register = i // per_register
            row = lane // 32 * 16 + lane % 32 // 4 + 8 * (register % 2)
            column = lane % 4 * per_register + i % per_register + 4 * per_register * (register // 2)
            assert kept[row, column] == numbers[lane, i]


@pytest.mark.parametrize("nibble", [0x0, 0x1, 0x5, 0x6, 0xA, 0xF])
def test_isa_model_refuses_metadata_that_the_isa_leaves_undefined(nibble):
    metadata = np.full(32, 0x44444444, np.uint32)
    metadata[5] ^= (0x4 ^ nibble) << 8
    with pytest.raises(ValueError, match=f"got {nibble:X} at row"):
        isa_model.mma_sp_m16n8k32(np.zeros((32, 4), np.uint32), metadata, 0)
    isa_model.mma_sp_m16n8k32(np.zeros((32, 4), np.uint32), metadata, 1)  # lane 5 is not asked


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_emulated_mma_is_the_isa_table(emulator, dtype, selector):
    g = torch.Generator().manual_seed(selector)
    a, b = (bits(torch.randn((32, 8), generator=g).to(dtype)).view(np.uint32).copy() for _ in range(2))
    nibbles = np.array(isa_model.ORDERED_NIBBLES)[torch.randint(6, (32, 8), generator=g).numpy()]
    metadata = (nibbles << np.arange(0, 32, 4)).sum(1).astype(np.uint32)
    metadata.reshape(8, 2, 2)[:, 1 - selector] = 0xFFFFFFFF  # the other pair of lanes must not be read
    d = torch.randn((32, 4), generator=g).numpy()
    want = torch.from_numpy(isa_model.d_m16n8(d)).double() + (
        torch.from_numpy(isa_model.mma_sp_m16n8k32(a, metadata, selector).view(np.int16)).view(dtype).double()
        @ torch.from_numpy(isa_model.b_m16n8k32(b).view(np.int16)).view(dtype).double()
    )
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (d, a, b, metadata)]
    assert emulator.emulated_mma_sp_m16n8k32(*pointers, DTYPE_CODES[dtype], selector) == SUCCESS
    torch.testing.assert_close(torch.from_numpy(isa_model.d_m16n8(d)).double(), want, rtol=2.0**-23, atol=2.0**-40)


FAULTS = {
    "no wait": (1, None),
    "no barrier": (2, None),
    "misaligned cp.async": (3, "multiple of 16"),
    "read past the end": (4, "outside the memory"),
    "write past the end": (5, "outside the memory"),
    "uninitialised shared memory": (6, None),
    "past shared memory": (7, "past the block's shared memory"),
    "diverged warp": (8, "diverged"),
    "lost thread": (9, "never come"),
    "invalid metadata": (10, "no valid metadata"),
}


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_emulator_catches(emulator, fault):
    """message None: the fault shows as a wrong result under some of 16 seeds; otherwise as a failed launch under every one."""
    number, message = FAULTS.get(fault, (0, None))
    pieces = np.arange(64 * 4, dtype=np.uint32).reshape(64, 4)
    wrong = 0
    for seed in range(16):
        source, target = Buffer(pieces), Buffer(np.full_like(pieces, 0xFFFFFFFF))
        allow(emulator, [source], [target])
        emulator.emulator_seed(ctypes.c_uint64(seed))
        code = emulator.emulated_fault(source.address, target.address, number)
        if message is None:
            assert code == SUCCESS, emulator.emulator_error().decode()
            rows = (target.array() != pieces[::-1]).any(1)
            assert (target.array()[rows] == 0xFFFFFFFF).all(), "what is not there yet must read as poison"
            wrong += rows.any()
        else:
            assert code == LAUNCH_FAILURE and message in emulator.emulator_error().decode()
    assert wrong == 0 if fault == "none" or message else wrong > 0


# --- linear24_sm80

SHAPES = {  # m, n, k, ldx: every tile class, and each way a size can miss its tile
    "one token": (1, 32, 256, None),
    "full small tile": (8, 64, 512, None),
    "second small class, one row over": (9, 32, 256, None),
    "its last m": (16, 40, 320, None),
    "middle class, one row over": (17, 64, 128, None),
    "its last m, tiles of n": (64, 192, 192, None),
    "large class, one row over": (65, 128, 64, None),
    "second large token tile, n past a tile": (130, 136, 192, None),
    "n odd: y rows unaligned": (3, 33, 64, None),
    "n = 1": (20, 1, 72, None),
    "n a multiple of 2, not of 4": (70, 130, 64, None),
    "k one group": (2, 5, 4, None),
    "k odd: x rows unaligned": (5, 37, 75, None),
    "k % 8 with an aligned ldx": (18, 70, 203, 208),
    "k % 8 = 4, ldx = k + 1: unaligned": (66, 20, 100, 101),
    "k % 16 = 8": (4, 35, 200, None),
    "k % 64 = 16": (33, 66, 144, None),
    "k past a step of one warp": (7, 32, 320, 328),
    "a chunk for one warp of two, 64 of the next": (40, 64, 320, None),
    "a round of the warps and a bit": (16, 32, 1096, None),
    "three rounds and a chunk": (2, 16, 3328, None),
    "an odd number of chunks between two": (24, 80, 1344, None),
    "n past one row tile of a warp's four": (80, 81, 128, None),
    "ldx > k, NaN between rows": (12, 34, 96, 160),
    "more steps than stages and chunks of metadata": (128, 128, 832, None),
    "more token tiles than a raster group": (1025, 130, 8, None),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_linear24_sm80(emulator, shape, dtype):
    m, n, k, ldx = shape
    check(emulator, m, n, k, dtype, ldx, seed=m)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear24_sm80_epilogue(emulator, activation, bias):
    check(emulator, 19, 70, 64, torch.float16, bias=bias, activation=activation)


@pytest.mark.parametrize("tile", range(1, 5))
@pytest.mark.parametrize("m", [1, 21, 70])
def test_linear24_sm80_every_tile_takes_every_m(emulator, m, tile):
    check(emulator, m, 50, 712, torch.bfloat16, tile=tile, seed=tile)


@pytest.mark.parametrize("m, tile", [(8, 1), (9, 2), (16, 2), (17, 3), (64, 3), (65, 4)])
def test_linear24_sm80_chooses_the_tile_by_m(emulator, m, tile):
    """The tiles run different numbers of blocks."""
    g = torch.Generator().manual_seed(m)
    values, meta, _ = sparse_weight(300, 64, torch.float16, g)
    fragments, x = fragments_of(values, meta, 64), torch.randn((m, 64), generator=g).half()
    blocks = []
    for asked in (0, *range(1, 5)):
        _, error = linear24(emulator, x, fragments, 300, None, 64, tile=asked)
        assert error == SUCCESS
        blocks.append(emulator.emulator_blocks())
    assert blocks[1:] == [-(-300 // n) * -(-m // tokens) for n, tokens in ((32, 8), (32, 16), (64, 64), (128, 128))]
    assert blocks[0] == blocks[tile]


@pytest.mark.parametrize("m", [4, 16, 50, 90])  # one a tile class
@pytest.mark.parametrize("shifts", [(2, 0), (0, 2)], ids=["x", "y"])
def test_linear24_sm80_misaligned_pointer(emulator, shifts, m):
    """Every row length is aligned, one pointer is off by one element."""
    check(emulator, m, 64, 328, torch.bfloat16, shifts=shifts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [3, 11, 33, 129])  # one a tile class
def test_linear24_sm80_is_exact_on_small_integers(emulator, m, dtype):
    """Weights +-1 and x in -1, 0, 1: every sum is an integer of at most 96, which both dtypes hold."""
    g = torch.Generator().manual_seed(m)
    values, meta, dense = sparse_weight(66, 192, dtype, g, integers=True)
    x = torch.randint(-1, 2, (m, 192), generator=g).to(dtype)
    y, error = linear24(emulator, x, fragments_of(values, meta, 192), 66, None, 192, seed=m)
    assert error == SUCCESS, emulator.emulator_error().decode()
    assert torch.equal(y.double(), x.double() @ dense.double().T)


@pytest.mark.parametrize("shape", [(5, 40, 2600), (14, 33, 2072), (60, 70, 968), (140, 130, 584)])
def test_linear24_sm80_does_not_depend_on_the_schedule(emulator, shape):
    """One shape a tile class, k long enough that stages and metadata registers are used again; the schedule, the landing of each
    copy and the order of the blocks change with the seed."""
    m, n, k = shape
    g = torch.Generator().manual_seed(k)
    values, meta, dense = sparse_weight(n, k, torch.float16, g)
    fragments = fragments_of(values, meta, k)
    x, bias = torch.randn((m, k), generator=g).half(), torch.randn(n, generator=g).half()
    results = [linear24(emulator, x, fragments, n, bias, k, seed=seed) for seed in range(1, 5)]
    for y, error in results:
        assert error == SUCCESS, emulator.emulator_error().decode()
        assert torch.equal(y.view(torch.int16), results[0][0].view(torch.int16))
    want = x.double() @ dense.double().T + bias.double()
    assert ((results[0][0].double() - want).abs() <= bound(x, dense, bias, want, 1.0)).all()


@pytest.mark.parametrize("m", [8, 16, 64, 128])  # one a tile class, full tiles
def test_linear24_sm80_has_no_bank_conflicts(emulator, m):
    emulator.emulator_bank_conflicts()
    check(emulator, m, 128, 512, torch.float16)
    assert emulator.emulator_bank_conflicts() == 0


def test_linear24_sm80_reaches_past_two_gib(emulator):
    """Row offsets are 64-bit: the second row of x starts 4 GiB after the first, in memory that is reserved but not touched."""
    ldx, k, g = 2**31 + 64, 64, torch.Generator().manual_seed(0)
    values, meta, dense = sparse_weight(32, k, torch.float16, g)
    x = torch.randn((2, k), generator=g).half()
    memory, (w, e) = np.zeros(ldx + k, np.int16), map(Buffer, fragments_of(values, meta, k))
    memory[:k], memory[ldx:] = bits(x)
    y = Buffer(np.full((2, 32), -1, np.int16))
    allow(emulator, [w, e], [y])
    address = ctypes.c_void_p(memory.ctypes.data)
    emulator.emulator_allow(address, ctypes.c_size_t(memory.nbytes), 0)
    code = emulator.emulated_linear24_sm80(address, w.address, e.address, None, y.address, 2, 32, k, ctypes.c_int64(ldx), 1, 0, 0)
    assert code == SUCCESS, emulator.emulator_error().decode()
    want = x.double() @ dense.double().T
    worst = (torch.from_numpy(y.array()).view(torch.float16).double() - want).abs() - bound(x, dense, None, want, 1)
    assert (worst <= 0).all()


@pytest.mark.parametrize("m", [2, 90])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear24_sm80_without_columns(emulator, m, bias):
    """k = 0: an empty sum, so act(bias)."""
    b = torch.randn(35, generator=torch.Generator().manual_seed(m)).half() if bias else None
    empty = torch.zeros((35, 0), dtype=torch.float16)
    fragments = fragments_of(empty, np.zeros((35, 0), np.uint8), 0)
    y, error = linear24(emulator, empty[:1].expand(m, 0), fragments, 35, b, 0, activation=1)
    assert error == SUCCESS, emulator.emulator_error().decode()
    assert torch.equal(y, (torch.zeros(35) if b is None else torch.relu(b)).half().expand(m, 35))


@pytest.mark.parametrize("m, n", [(0, 8), (8, 0), (0, 0)])
def test_linear24_sm80_without_outputs(emulator, m, n):
    x, values = torch.zeros((m, 64)).half(), torch.zeros((n, 32)).half()
    y, error = linear24(emulator, x, fragments_of(values, np.full((n, 8), 0x44, np.uint8), 64), n, None, 64)
    assert error == SUCCESS and y.shape == (m, n)


@pytest.mark.parametrize(
    "wrong",
    [dict(m=-1), dict(n=-1), dict(k=-1), dict(ldx=7), dict(dtype=0), dict(dtype=3), dict(activation=5), dict(activation=-1),
     dict(k=2**31 - 1, ldx=2**31 - 1), dict(tile=-1), dict(tile=5), dict(values=8), dict(meta=8)],
    ids=str,
)  # fmt: skip
def test_linear24_sm80_refuses(emulator, wrong):
    """Nothing is launched: no memory is allowed here, so a launch would be a failure of another kind."""
    a = dict(m=1, n=8, k=8, ldx=8, dtype=1, activation=0, tile=0, values=0, meta=0) | wrong
    emulator.emulator_forget_memory()
    pointers = [ctypes.c_void_p(a[name]) for name in ("values", "meta")]
    code = emulator.emulated_linear24_sm80(
        None, *pointers, None, None, a["m"], a["n"], a["k"], ctypes.c_int64(a["ldx"]), a["dtype"], a["activation"], a["tile"]
    )
    assert code == INVALID_VALUE
