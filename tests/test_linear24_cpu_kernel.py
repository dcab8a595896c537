"""The CPU kernel of the 2:4 linear, called by address, on every instruction set that this CPU has.

The truth is the dense product in fp64 of the numbers as stored. The packer below is the format's definition written out,
independent of sparsekit.format."""

import ctypes
import functools
import math
import mmap
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from format24_cpu import paths

from sparsekit import _C

CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# The gelus as torch means them, without its 1 + erf and 1 + tanh, which cancel in the left tail even in fp64.
ACTIVATIONS = {
    "none": (0, lambda v: v),
    "relu": (1, torch.relu),
    "gelu": (2, lambda v: v * torch.special.erfc(v * -math.sqrt(0.5)) / 2),
    "gelu_tanh": (3, lambda v: v * torch.sigmoid(math.sqrt(8 / math.pi) * (v + 0.044715 * v**3))),
    "silu": (4, torch.nn.functional.silu),
}
UNIT = 2.0**-24  # the relative error of one rounding to fp32
ROUND = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of one rounding to y's dtype
SMALLEST = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}  # half the least subnormal
PAIRS = [(first, second) for first in range(4) for second in range(first + 1, 4)]


@pytest.fixture(params=paths())
def isa(request):
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@functools.cache
def weight(n, k, dtype, seed=0):
    """values, meta and the dense (n, k) weight, from random kept pairs, one group at a time."""
    chance, kp = random.Random(seed), (k + 7) // 8 * 8
    numbers = torch.randn(n, kp // 2, generator=torch.Generator().manual_seed(seed)).to(dtype)
    values, dense = torch.zeros(n, kp // 2, dtype=dtype), torch.zeros(n, kp, dtype=dtype)
    meta = [[0] * (kp // 8) for _ in range(n)]
    rows, columns, sources = [], [], []
    for row in range(n):
        for group in range(kp // 4):
            pair = chance.choice(PAIRS)
            if 4 * group + pair[1] >= k:
                pair = (0, 1)
            meta[row][group // 2] |= (pair[1] << 2 | pair[0]) << 4 * (group % 2)
            for place, column in enumerate(pair):
                if 4 * group + column < k:
                    rows.append(row)
                    columns.append(4 * group + column)
                    sources.append(2 * group + place)
    if rows:
        values[rows, sources] = numbers[rows, sources]
        dense[rows, columns] = numbers[rows, sources]
    return values, torch.tensor(meta, dtype=torch.uint8).reshape(n, kp // 8), dense[:, :k]


def linear24(x, values, meta, k, bias=None, activation="none", threads=2, y=None):
    y = x.new_full((x.shape[0], values.shape[0]), math.nan) if y is None else y
    _C.linear24_cpu(
        x.data_ptr(),
        values.data_ptr(),
        meta.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.shape[0],
        values.shape[0],
        k,
        x.stride(0),
        CODE[x.dtype],
        CODE[values.dtype],
        ACTIVATIONS[activation][0],
        threads,
    )
    return y


def activations(m, k, dtype, seed=1):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(y, x, dense, bias=None, activation="none"):
    """Every element within the worst case of its own fp32 sum and one rounding; all together within the usual case."""
    xd, wd = x.double(), dense.double()
    terms, products = x.shape[1] / 2 + 2, xd.abs() @ wd.abs().T
    exact, magnitude = xd @ wd.T, products
    if bias is not None:
        exact, magnitude = exact + bias.double(), products + bias.double().abs()
    truth = ACTIVATIONS[activation][1](exact)
    # No activation here is steeper than 1.13. Their own error is 8 roundings, and more where exp's argument is rounded.
    own = 0 if activation in ("none", "relu") else (8 + exact**2) * UNIT * truth.abs() + 2.0**-100
    worst = 1.13 * terms * UNIT * magnitude + own + ROUND[y.dtype] * truth.abs() * 1.01 + SMALLEST[y.dtype]
    error = (y.double() - truth).abs()
    assert (error <= worst).all(), f"largest error over bound {(error / worst).max():.3g}"
    if exact.numel() >= 64 and activation == "none":
        usual = ROUND[y.dtype] * truth.square().mean().sqrt() + SMALLEST[y.dtype]
        usual += UNIT * math.sqrt(terms) * (xd.square() @ wd.square().T).mean().sqrt()
        assert error.square().mean().sqrt() <= usual


SHAPES = {
    "one of each": (1, 1, 1),
    "one row of x, rows of w past a task": (1, 3001, 24),
    "two words and a short one": (2, 37, 76),
    "all of a dot tile": (4, 16, 64),
    "dot tile and its rest, rows of w short of four": (7, 19, 40),
    "last dot of AVX2": (5, 33, 96),
    "first panel of AVX2, past a slice of it": (6, 33, 1064),
    "past one vector of rows": (17, 20, 32),
    "last dot of AVX-512": (48, 21, 160),
    "first panel of AVX-512": (49, 21, 160),
    "two blocks of rows": (130, 40, 72),
    "past a slice of the widest panel": (60, 18, 1064),
    "several tasks of rows of w": (50, 700, 48),
    "past a group of blocks": (530, 18, 40),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("w_dtype", CODE, ids=str)
@pytest.mark.parametrize("x_dtype", CODE, ids=str)
def test_product(isa, x_dtype, w_dtype, shape):
    m, n, k = shape
    values, meta, dense = weight(n, k, w_dtype)
    x = activations(m, k, x_dtype)
    bias = activations(1, n, x_dtype, seed=2)[0]
    check(linear24(x, values, meta, k), x, dense)
    check(linear24(x, values, meta, k, bias), x, dense, bias)


@pytest.mark.parametrize("m", [*range(1, 145), 2049], ids=str)
def test_every_number_of_rows(isa, m):
    """Each size of tile, block and rest of every path, and one row past the rows of x taken at a time."""
    values, meta, dense = weight(19, 40, torch.float32)
    x = activations(m, 40, torch.float32)
    check(linear24(x, values, meta, 40), x, dense)


@pytest.mark.parametrize("m", [1, 7, 13, 66], ids=["dot", "first panel of AVX2", "second panel of AVX2", "panel"])
@pytest.mark.parametrize("k", [*range(1, 18), 31, 33, 63, 65, 519, 521], ids=str)
def test_tail_columns(isa, m, k):
    values, meta, dense = weight(5, k, torch.bfloat16)
    x = activations(m, k, torch.float32)
    check(linear24(x, values, meta, k), x, dense)


@pytest.mark.parametrize("m", [1, 3, 8, 20, 44, 66], ids=["dot", "dot of several rows", *["a panel"] * 4])
def test_each_pair_of_columns_in_each_group(isa, m):
    """Exact: small integers, every pair of kept columns at every place of a word, alone in its row."""
    k = 64
    n = k // 4 * len(PAIRS)
    values, meta, dense = torch.zeros(n, k // 2), torch.full((n, k // 8), 0x44, dtype=torch.uint8), torch.zeros(n, k)
    for row in range(n):
        group, (first, second) = row // len(PAIRS), PAIRS[row % len(PAIRS)]
        shift = 4 * (group % 2)
        meta[row, group // 2] = 0x44 & ~(15 << shift) | (second << 2 | first) << shift
        values[row, 2 * group], values[row, 2 * group + 1] = 1, 3
        dense[row, 4 * group + first], dense[row, 4 * group + second] = 1, 3
    x = torch.arange(m * k).float().reshape(m, k)
    assert torch.equal(linear24(x, values, meta, k), x @ dense.T)


@pytest.mark.parametrize("m", [1, 6, 66], ids=["dot", "dot or panel", "panel"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_weight_is_itself(isa, dtype, m):
    """Every 16-bit number, subnormals and infinities among them, as a weight at each of the four places of a byte of metadata."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 4)
    meta = torch.full((len(numbers), 1), 0x4E, dtype=torch.uint8)
    for place, column in enumerate((2, 3, 4, 5)):
        x = torch.zeros(m, 8)
        x[:, column] = 1
        values = torch.zeros_like(numbers)
        values[:, place] = numbers[:, place]
        y, truth = linear24(x, values, meta, 8), numbers[:, place].float()
        assert torch.equal(y.nan_to_num(7, 8, 9), truth.nan_to_num(7, 8, 9).expand(m, -1))


@pytest.mark.parametrize("m, n", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_write(isa, m, n):
    values, meta, _ = weight(n, 8, torch.float32)
    y = torch.full((4,), 7.0)
    linear24(torch.zeros(m, 8), values, meta, 8, y=y)
    assert (y == 7).all()


@pytest.mark.parametrize("m", [1, 70], ids=["dot", "panel"])
def test_no_columns_give_the_bias(isa, m):
    bias = activations(1, 21, torch.float16)[0]
    values, meta, _ = weight(21, 0, torch.float16)
    x = torch.empty(m, 0, dtype=torch.float16)
    assert torch.equal(linear24(x, values, meta, 0, bias), bias.expand(m, 21))
    assert (linear24(x, values, meta, 0) == 0).all()


def test_the_truth_of_the_gelus_is_torchs():
    v = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    for name, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        torch.testing.assert_close(
            ACTIVATIONS[name][1](v), torch.nn.functional.gelu(v, approximate=approximate), rtol=0, atol=1e-14
        )


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "none"])
def test_activation_against_fp64(isa, activation):
    """k = 0 makes y = act(bias): the activation alone, over its range, past the ends of exp and in the tails."""
    v = torch.cat([torch.linspace(-40, 40, 8001), torch.tensor([0.0, 1e-30, -1e-30, 1e-3, -1e-3, 150.0, -150.0, 1e4, -1e4])])
    v = torch.cat([v, torch.tensor([1e20, 1e30, 3e38]), -torch.tensor([1e20, 1e30, 3e38])])
    values, meta, _ = weight(len(v), 0, torch.float32)
    y = linear24(torch.empty(1, 0), values, meta, 0, v, activation)[0].double()
    truth = ACTIVATIONS[activation][1](v.double())
    # Rounding exp's argument u costs |u| roundings; u is up to v^2 for the gelus. Below e^-87 the answer is as good as 0.
    bound = (8 + (v.double().square() if activation.startswith("gelu") else v.double().abs())) * UNIT * 2 * truth.abs()
    assert ((y - truth).abs() <= bound + 1e-33).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", CODE, ids=str)
@pytest.mark.parametrize("m", [3, 66], ids=["dot", "panel"])
def test_activation_of_the_product(isa, m, dtype, activation):
    values, meta, dense = weight(37, 40, dtype)
    x, bias = activations(m, 40, dtype), activations(1, 37, dtype, seed=2)[0]
    check(linear24(x, values, meta, 40, bias, activation), x, dense, bias, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays(isa, activation):
    bias = torch.full((17,), math.nan)
    values, meta, _ = weight(17, 0, torch.float32)
    for dtype in CODE:
        assert linear24(torch.empty(1, 0, dtype=dtype), values, meta, 0, bias.to(dtype), activation).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_rounding_is_to_nearest_even(isa, dtype):
    """Every 16-bit number, the midpoints between neighbours and just beside them, to y and back as torch rounds them."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values, meta = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[0x4E]], dtype=torch.uint8)
    x = torch.zeros(len(numbers), 8, dtype=dtype)
    x[:, 2] = numbers
    y = linear24(x, values, meta, 8)[:, 0]
    assert torch.equal(y[~numbers.isnan()].float(), numbers[~numbers.isnan()].float())
    assert y[numbers.isnan()].isnan().all()
    ordered = numbers[numbers.isfinite()].float().unique()
    step = ordered.diff()
    between = torch.cat(
        [ordered[:-1] + step * part for part in (0.5, 0.499, 0.501)]
        + [torch.tensor([1e30, -1e30, 65519.9, 65520.0, 65536.0, 7e4, -1e5])]
    )
    for part in between.split(4096):
        # x = 1 in the 16-bit type, so that the sum is the fp32 weight itself and only y rounds.
        w = torch.zeros(len(part), 4)
        w[:, 0] = part
        ones = torch.ones(1, 8, dtype=dtype)
        nibbles = torch.full((len(part), 1), 0x44, dtype=torch.uint8)
        assert torch.equal(linear24(ones, w, nibbles, 8)[0], part.to(dtype))


@pytest.mark.parametrize("shape", [(1, 900, 600), (8, 700, 520), (70, 300, 520), (530, 100, 72)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(isa, shape, dtype):
    """Each shape is worth more than five threads; repeated, since tasks go to whichever thread is free."""
    m, n, k = shape
    values, meta, _ = weight(n, k, dtype)
    x = activations(m, k, dtype)
    one = linear24(x, values, meta, k, threads=1)
    for threads in (2, 5, 2, 5, 300):
        assert torch.equal(one, linear24(x, values, meta, k, threads=threads))


def test_callers_at_the_same_time(isa):
    problems = []
    for seed, m in enumerate([1, 3, 40, 70, 2, 130]):
        values, meta, _ = weight(200, 264, torch.float16, seed)
        x = activations(m, 264, torch.float32, seed)
        problems.append((x, values, meta, linear24(x, values, meta, 264, threads=1)))

    def call(i):
        x, values, meta, expected = problems[i % len(problems)]
        return torch.equal(linear24(x, values, meta, 264, threads=3), expected)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(call, range(600)))


@pytest.mark.parametrize("m", [1, 6, 66], ids=["dot", "dot or panel", "panel"])
def test_only_y_is_written_and_rows_may_lie_apart(isa, m):
    """x has NaN between and around its rows, y a mark around it."""
    n, k, gap = 21, 45, 3
    values, meta, dense = weight(n, k, torch.float16)
    wide = torch.full((m + 2, k + gap), math.nan, dtype=torch.float16)
    x = wide[1:-1, :k]
    x.copy_(activations(m, k, torch.float16))
    room = torch.full((64 + m * n + 64,), -77.0, dtype=torch.float16)
    y = room[64:-64].view(m, n)
    linear24(x, values, meta, k, y=y)
    check(y, x, dense)
    assert (room[:64] == -77).all() and (room[-64:] == -77).all()


GUARDED = """
import ctypes, mmap, sys
sys.path.insert(0, {folder!r})
import test_linear24_cpu_kernel as t

for isa in t.paths():
    t._C.set_cpu_isa(isa)
    dtypes = list(t.CODE)
    for x_dtype, w_dtype in zip(dtypes, dtypes[2:] + dtypes[:2]):
        for m, n, k in [(1, 1, 1), (1, 5, 9), (3, 7, 40), (11, 17, 31), (13, 3, 65), (66, 21, 45), (2, 4, 128), (70, 33, 512)]:
            values, meta, dense = t.weight(n, k, w_dtype)
            x, bias = t.activations(m, k, x_dtype), t.activations(1, n, x_dtype, seed=2)[0]
            at = [t.before_a_wall(part) for part in (x, values, meta, bias, x.new_empty(m, n))]
            t._C.linear24_cpu(*at, m, n, k, k, t.CODE[x_dtype], t.CODE[w_dtype], 0, 2)
            y = x.new_empty(m, n)
            ctypes.memmove(y.data_ptr(), at[4], y.nbytes)
            t.check(y, x, dense, bias)
print("done")
"""


def before_a_wall(tensor):
    """The address of a copy of the tensor that ends where readable memory ends."""
    page = mmap.PAGESIZE
    size = -(-tensor.nbytes // page) * page
    room = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    address = start + size - tensor.nbytes
    ctypes.memmove(address, tensor.data_ptr(), tensor.nbytes)
    before_a_wall.keep.append(room)
    return address


before_a_wall.keep = []


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)


def test_nothing_is_read_past_an_array():
    """Every array ends at a page that may not be touched; one step too far ends the process."""
    result = run(GUARDED.format(folder=str(Path(__file__).parent)))
    assert result.returncode == 0 and result.stdout.strip() == "done", result.stderr[-2000:]


FORK = """
import os, sys
sys.path.insert(0, {folder!r})
import test_linear24_cpu_kernel as t

values, meta, _ = t.weight(600, 520, t.torch.float32)
x = t.activations(8, 520, t.torch.float32)
t.torch.set_num_threads(2)
big = t.torch.ones(2000, 2000).exp()  # torch's threads are up
expected = t.linear24(x, values, meta, 520, threads={before})
child = os.fork()
if child == 0:
    alone = len(os.listdir("/proc/self/task"))
    same = all(bool((t.linear24(x, values, meta, 520, threads=3) == expected).all()) for _ in range(20))
    os._exit(0 if same and alone == 1 and len(os.listdir("/proc/self/task")) == 3 else 1)
status = os.waitpid(child, 0)[1]
assert bool((t.linear24(x, values, meta, 520, threads=3) == expected).all())
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
@pytest.mark.parametrize("before", [3, 1], ids=["threads used before", "first used by the child"])
def test_a_child_of_fork_has_threads_of_its_own(before):
    result = run(FORK.format(folder=str(Path(__file__).parent), before=before))
    assert result.returncode == 0, result.stderr[-2000:]


POOL = """
import array, ctypes, importlib.util, os, random, sys
from concurrent.futures import ThreadPoolExecutor

spec = importlib.util.spec_from_file_location("sparsekit._C", {module!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
assert "gomp" not in open("/proc/self/maps").read() and "iomp" not in open("/proc/self/maps").read()


def problem(m, n, k, seed):
    chance = random.Random(seed)
    x = array.array("f", (chance.randint(-3, 3) for _ in range(m * k)))
    values = array.array("f", (chance.randint(-3, 3) for _ in range(n * k // 2)))
    meta = array.array("B", (chance.choice([0x44, 0x98, 0xE9, 0xDC, 0x4E]) for _ in range(n * k // 8)))
    return x, values, meta, m, n, k


def product(p, threads):
    x, values, meta, m, n, k = p
    y = array.array("f", [float("nan")]) * (m * n)
    at = [a.buffer_info()[0] for a in (x, values, meta)]
    _C.linear24_cpu(*at, 0, y.buffer_info()[0], m, n, k, k, 0, 0, 0, threads)
    return y.tobytes()


problems = [problem(*size, seed) for seed, size in enumerate([(1, 48, 8192), (6, 200, 520), (60, 96, 264), (1, 80, 4096)])]
expected = [product(p, 1) for p in problems]
assert len(os.listdir("/proc/self/task")) == 1


def call(i):
    return product(problems[i % 4], 3) == expected[i % 4]


# Alone, where the caller is often done before its helpers and must wait; then all at once.
assert all(call(i) for i in range(400)), "alone"
assert len(os.listdir("/proc/self/task")) == 3
with ThreadPoolExecutor(4) as callers:
    assert all(callers.map(call, range(800))), "together"
child = os.fork()
if child == 0:
    os._exit(0 if all(call(i) for i in range(40)) and len(os.listdir("/proc/self/task")) == 3 else 1)
assert os.waitpid(child, 0)[1] == 0, "child"
assert all(call(i) for i in range(40)), "after the child"
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_the_pool_where_no_openmp_is_loaded():
    """Without torch the kernel's own threads do the work: the same bits, from one caller or several, and after fork."""
    result = run(POOL.format(module=_C.__file__))
    assert result.returncode == 0, result.stderr[-2000:]
