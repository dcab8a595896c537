"""The decode kernel: its source on the emulator, against fp64. Weights reach it through to_fragments, which test_layouts.py holds
against the ISA's tables."""

import ctypes

import numpy as np
import pytest
import test_cuda_emulated as emulated
import torch
from test_cuda_emulated import ACTIVATIONS, DTYPE_CODES, INVALID_VALUE, SUCCESS, Buffer, bits, bound, sparse_weight

from sparsekit.format import Sparse24, to_fragments
from sparsekit.ops.linear import DECODE_TILES, decode_shared

pytestmark = emulated.pytestmark
emulator = emulated.emulator

CLASSES = {8: (16, 32, 64, 128), 16: (16, 32, 64, 128), 32: (32, 64, 128, 256), 64: (64, 128, 256)}  # tokens: tiles


def class_of(m: int) -> int:
    """The most tokens of the class of tiles that m tokens have."""
    return next(most for most in DECODE_TILES if m <= most)


def decode(emulator, x, fragments, bias, ldx, activation=0, tile=0, split=0, seed=0, shifts=(0, 0)):
    """Runs launch_linear24_decode_sm80 on x (m, k), its rows ldx apart with NaN between, x and y moved off their alignment by
    `shifts` bytes, the workspace full of NaN. Returns y (m, n) and the error code."""
    (m, k), n = x.shape, fragments.shape[0]
    rows = np.full(max((m - 1) * ldx + k, 0) if m else 0, -1, np.int16)
    np.lib.stride_tricks.as_strided(rows, (m, k), (2 * ldx, 2))[...] = bits(x)
    reads = [Buffer(rows, shifts[0]), Buffer(bits(fragments.values)), Buffer(fragments.meta.numpy())]
    if bias is not None:
        reads.append(Buffer(bits(bias)))
    y = Buffer(np.full((m, n), -1, np.int16), shifts[1])
    workspace = Buffer(np.full(emulator.emulated_linear24_decode_workspace(m, n, k, tile, split), 0xFF, np.uint8))
    emulated.allow(emulator, reads, [y, workspace])
    emulator.emulator_seed(ctypes.c_uint64(seed))
    code = emulator.emulated_linear24_decode_sm80(
        reads[0].address, reads[1].address, reads[2].address, reads[3].address if bias is not None else None, y.address,
        workspace.address, m, n, k, ctypes.c_int64(ldx), DTYPE_CODES[x.dtype], activation, tile, split,
    )  # fmt: skip
    y.check_border(), workspace.check_border()
    return torch.from_numpy(y.array().copy()).view(x.dtype), code


def problem(m, n, k, dtype, seed=0, integers=False):
    """x, the weight in fragment order, the dense weight, bias."""
    g = torch.Generator().manual_seed(1000 * m + 10 * n + k + seed)
    values, meta, dense = sparse_weight(n, k, dtype, g, integers)
    fragments = to_fragments(Sparse24(values, torch.from_numpy(meta), (n, k)))
    x = torch.randint(-1, 2, (m, k), generator=g) if integers else torch.randn((m, k), generator=g)
    return x.to(dtype), fragments, dense, torch.randn(n, generator=g).to(dtype)


def check(emulator, m, n, k, dtype=torch.float16, ldx=None, bias=True, activation="none", **options):
    x, fragments, dense, b = problem(m, n, k, dtype)
    code, function = ACTIVATIONS[activation]
    b = b if bias else None
    y, error = decode(emulator, x, fragments, b, ldx or k, code, **options)
    assert error == SUCCESS, emulator.emulator_error().decode()
    want = function(x.double() @ dense.double().T + (0 if b is None else b.double()))
    worst = (y.double() - want).abs() - bound(x, dense, b, want, slope=1.13)
    assert not torch.isnan(y).any(), "an output was not written, or was made from memory that nobody wrote"
    assert (worst <= 0).all(), f"beyond the bound by {worst.max():.3g} at {divmod(int(worst.argmax()), n)}"


SHAPES = {  # m, n, k, ldx: every class of tokens, and each way a size can miss its tile
    "one token": (1, 32, 2048, None),
    "two": (2, 48, 512, None),
    "seven": (7, 16, 1024, None),
    "full first class": (8, 64, 512, None),
    "second class, one token over": (9, 64, 256, None),
    "full second class": (16, 64, 768, None),
    "third class, one token over": (17, 128, 256, None),
    "full third class": (32, 128, 320, None),
    "fourth class, one token over": (33, 256, 128, None),
    "full fourth class": (64, 256, 256, None),
    "more tokens than a block takes": (65, 64, 64, None),
    "three token tiles, two row blocks": (130, 264, 64, None),
    "n odd: y rows unaligned": (3, 33, 256, None),
    "n = 1": (5, 1, 512, None),
    "n = 1, four row tiles a warp": (40, 1, 128, None),
    "n a multiple of 2, not of 4": (20, 130, 64, None),
    "n past one row tile of a warp's four": (50, 81, 64, None),
    "k one group": (2, 5, 4, None),
    "k = 1": (1, 16, 1, None),
    "k odd: x rows unaligned": (5, 37, 331, None),
    "k odd, 64 tokens": (64, 64, 75, None),
    "k % 8 with an aligned ldx": (18, 70, 203, 208),
    "k % 8 = 4, ldx = k + 1: unaligned": (12, 20, 1100, 1101),
    "the last chunk has one block of 64": (4, 32, 832, None),
    "two blocks": (20, 32, 128, None),
    "three blocks and a bit": (11, 32, 456, None),
    "fewer chunks than warps": (1, 16, 600, None),
    "chunks past a round of the warps": (1, 16, 2304, None),
    "ldx > k, NaN between rows": (6, 34, 288, 352),
    "more stages than the ring": (64, 64, 1280, None),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_linear24_decode(emulator, shape, dtype):
    m, n, k, ldx = shape
    check(emulator, m, n, k, dtype, ldx, seed=m)


@pytest.mark.parametrize("m", range(1, 65))
def test_linear24_decode_every_number_of_tokens(emulator, m):
    check(emulator, m, 20, 72, seed=m)


@pytest.mark.parametrize("split", [1, 2, 3, 64])
@pytest.mark.parametrize("tokens, tile", [(t, tile) for t, tiles in CLASSES.items() for tile in tiles])
def test_linear24_decode_every_tile_and_split(emulator, tokens, tile, split):
    """Two row blocks, the second ragged; seven chunks, so that splits differ in length; 64 splits are cut down to seven."""
    check(emulator, tokens if tokens < 64 else 40, tile + 18, 1600, torch.bfloat16, tile=tile, split=split, seed=tile)


@pytest.mark.parametrize("m, tile", [(m, tile) for m in (1, 5, 8, 9, 16, 17, 32, 33, 64) for tile in DECODE_TILES[class_of(m)]])
def test_linear24_decode_shared_memory(emulator, m, tile):
    """What is asked of a device before a tile is offered is what the launch takes, at either end of each class of tokens."""
    check(emulator, m, 20, 72, tile=tile, split=1)
    assert emulator.emulator_shared_bytes() == decode_shared(m, tile)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("split", [1, 2])
def test_linear24_decode_epilogue(emulator, activation, bias, split):
    check(emulator, 6, 70, 512, bias=bias, activation=activation, split=split)


@pytest.mark.parametrize("m", [4, 16, 30, 60])  # one a class
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("shifts", [(2, 0), (0, 2)], ids=["x", "y"])
def test_linear24_decode_misaligned_pointer(emulator, shifts, split, m):
    """Every row length is aligned, one pointer is off by one element."""
    check(emulator, m, 64, 512, torch.bfloat16, shifts=shifts, split=split)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [3, 11, 29, 61])  # one a class
def test_linear24_decode_is_exact_on_small_integers(emulator, m, dtype):
    """Weights +-1 and x in -1, 0, 1: every sum is an integer of at most 200, which both dtypes hold."""
    x, fragments, dense, _ = problem(m, 66, 400, dtype, integers=True)
    for split in (1, 2):
        y, error = decode(emulator, x, fragments, None, 400, split=split)
        assert error == SUCCESS, emulator.emulator_error().decode()
        assert torch.equal(y.double(), x.double() @ dense.double().T)


@pytest.mark.parametrize("tokens, tile", [(t, tile) for t, tiles in CLASSES.items() for tile in (tiles[0], tiles[-1])])
def test_linear24_decode_does_not_depend_on_the_schedule(emulator, tokens, tile):
    """k long enough that the ring is used twice; the schedule, the landing of each copy and the order of the blocks change
    with the seed."""
    x, fragments, dense, bias = problem(tokens, 33, 2500 if tile < 128 else 700, torch.float16)
    k = x.shape[1]
    for split in (1, 2):
        results = [decode(emulator, x, fragments, bias, k, tile=tile, split=split, seed=s) for s in range(1, 5)]
        for y, error in results:
            assert error == SUCCESS, emulator.emulator_error().decode()
            assert torch.equal(y.view(torch.int16), results[0][0].view(torch.int16))
        want = x.double() @ dense.double().T + bias.double()
        assert ((results[0][0].double() - want).abs() <= bound(x, dense, bias, want, 1.0)).all()


@pytest.mark.parametrize("tokens, tile", [(t, tile) for t, tiles in CLASSES.items() for tile in (tiles[0], tiles[-1])])
@pytest.mark.parametrize("split", [1, 3])
def test_linear24_decode_streams_weights_once(emulator, tokens, tile, split):
    """Every byte of values and metadata is read once, x by each row block once. n does not fill the last block, k not the last
    chunk, the chunks neither the splits nor the warps."""
    n, k = tile + 64, 64 * 29
    check(emulator, tokens, n, k, tile=tile, split=split)
    blocks, chunks = k // 64, -(-k // 256)
    tiles, row_blocks = n // 16, -(-n // tile)
    read = [emulator.emulator_bytes_read(i) for i in range(4)]
    assert read == [row_blocks * tokens * k * 2, tiles * blocks * 1024, tiles * chunks * 512, read[3]]


@pytest.mark.parametrize("m", [1, 3, 8, 16, 32, 64])
def test_linear24_decode_has_no_bank_conflicts(emulator, m):
    emulator.emulator_bank_conflicts()
    check(emulator, m, 64, 512)
    assert emulator.emulator_bank_conflicts() == 0


@pytest.fixture
def multiprocessors(emulator):
    yield emulator.emulator_multiprocessors
    emulator.emulator_multiprocessors(1)


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 32, 33, 64, 200])
@pytest.mark.parametrize("n, k", [(1, 1), (64, 16384), (63, 8192), (1000, 4096), (100000, 64)])
def test_linear24_decode_workspace(emulator, multiprocessors, m, n, k):
    """Parts of fp32, rows padded to 16 bytes, none where nothing is split. By default 132 multiprocessors get more blocks where n
    is small, but no block less than a chunk of 256 columns."""
    part, chunks = m * -(-n // 4) * 16, -(-k // 256)
    multiprocessors(132)
    split, rest = divmod(emulator.emulated_linear24_decode_workspace(m, n, k, 0, 0), part)
    assert rest == 0 and (1 < split <= chunks if n in (63, 64) else split != 1)
    assert split == 0 or n not in (1, 100000)
    for asked in (1, 2, 1000):
        got = min(asked, chunks)
        assert emulator.emulated_linear24_decode_workspace(m, n, k, 64, asked) == (part * got if got > 1 else 0)


@pytest.mark.parametrize("m", [1, 8, 16, 32, 64])
def test_linear24_decode_where_the_default_splits(emulator, multiprocessors, m):
    multiprocessors(20)
    assert emulator.emulated_linear24_decode_workspace(m, 40, 8192, 0, 0) > 0
    check(emulator, m, 40, 8192)


@pytest.mark.parametrize("m", [2, 16, 31, 90])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear24_decode_without_columns(emulator, m, bias):
    """k = 0: an empty sum, so act(bias)."""
    _, fragments, _, b = problem(m, 35, 0, torch.float16)
    y, error = decode(emulator, torch.zeros((m, 0)).half(), fragments, b if bias else None, 0, activation=1, split=2)
    assert error == SUCCESS, emulator.emulator_error().decode()
    assert torch.equal(y, (torch.relu(b) if bias else torch.zeros(35).half()).expand(m, 35))


@pytest.mark.parametrize("m, n", [(0, 8), (8, 0), (0, 0)])
def test_linear24_decode_without_outputs(emulator, m, n):
    values, meta = torch.zeros((n, 32)).half(), torch.full((n, 8), 0x44, dtype=torch.uint8)
    y, error = decode(emulator, torch.zeros((m, 64)).half(), to_fragments(Sparse24(values, meta, (n, 64))), None, 64)
    assert error == SUCCESS and y.shape == (m, n)


@pytest.mark.parametrize(
    "wrong",
    [dict(m=-1), dict(n=-1), dict(k=-1), dict(ldx=7), dict(dtype=0), dict(dtype=3), dict(activation=5), dict(activation=-1),
     dict(k=2**31 - 1, ldx=2**31 - 1), dict(tile=8), dict(tile=24), dict(tile=256), dict(tile=-16), dict(split=-1),
     dict(m=40, tile=32), dict(values=8), dict(meta=24), dict(split=2, k=512, ldx=512),
     dict(split=2, k=512, ldx=512, workspace=8)],
    ids=str,
)  # fmt: skip
def test_linear24_decode_refuses(emulator, wrong):
    """Nothing is launched: no memory is allowed here, so a launch would be a failure of another kind."""
    a = dict(m=1, n=8, k=8, ldx=8, dtype=1, activation=0, tile=0, split=0, values=0, meta=0, workspace=0) | wrong
    emulator.emulator_forget_memory()
    pointers = [ctypes.c_void_p(a[name]) for name in ("values", "meta")]
    code = emulator.emulated_linear24_decode_sm80(
        None, *pointers, None, None, ctypes.c_void_p(a["workspace"]), a["m"], a["n"], a["k"], ctypes.c_int64(a["ldx"]),
        a["dtype"], a["activation"], a["tile"], a["split"],
    )  # fmt: skip
    assert code == INVALID_VALUE


@pytest.mark.parametrize(
    "m, n, k, split, why",
    [
        (64, 4096, 4096, 8, "16 chunks in 7 parts would be three rounds, in 8 they are two"),
        (64, 4096, 14336, 8, "56 chunks in 7 parts are 8 rounds, in 8 parts 7"),
        (16, 4096, 4096, 2, "64 blocks of two warps a row tile: more than two parts would be more blocks than multiprocessors"),
        (64, 3584, 3584, 7, "9 parts fit, but 7 leave as few rounds"),
        (64, 5120, 5120, 5, "6 parts fit, and leave no fewer rounds than 5"),
        (16, 4288, 4096, 2, "67 blocks, which leave half of the multiprocessors idle"),
        (1, 4096, 4096, 1, "256 blocks"),
        (1, 1024, 4096, 1, "64 blocks of two rounds: half of that is not worth a launch"),
        (8, 1024, 4096, 4, "32 blocks of four rounds"),
    ],
    ids=str,
)
def test_linear24_decode_splits_by_default_for_the_fewest_rounds(emulator, multiprocessors, m, n, k, split, why):
    multiprocessors(132)
    bytes_of_a_part = m * -(-n // 4) * 16
    assert emulator.emulated_linear24_decode_workspace(m, n, k, 0, 0) == (split * bytes_of_a_part if split > 1 else 0)


def test_linear24_decode_sets_the_same_limit_of_shared_memory_at_every_launch(emulator):
    """Two threads launch at once, each for other sizes: the limit that one sets must hold for the other. The emulator refuses a
    limit that changes."""
    for m in (1, 8, 3, 16, 9, 32, 17, 64, 33):
        for tile in DECODE_TILES[class_of(m)]:
            check(emulator, m, 20, 72, tile=tile, split=1)
