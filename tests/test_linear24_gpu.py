"""Every CUDA kernel of the product on a GPU, against fp64: each tile and split, every class of shape, odd strides, a thousand
random shapes. Their sources run without a GPU in test_cuda_emulated.py, test_cuda_decode.py and test_cuda_hopper.py."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sparsekit import ops
from sparsekit.format import to_fragments
from sparsekit.ops import linear as product
from sparsekit.tune import EXPAND, Choice

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16]
HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
KERNELS = [product.DECODE, product.HOPPER, product.MMA_SP, EXPAND]
SHAPES = [
    (1, 1, 1),
    (1, 4096, 4096),
    (3, 7, 17),
    (16, 130, 200),
    (17, 64, 256),
    (64, 1000, 1030),
    (65, 129, 96),
    (130, 1000, 2050),  # few tiles, so that k is split
    (300, 576, 576),
    (513, 1024, 2048),
]
SLOPE = {None: 1.0, "relu": 1.0, "gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1}
EXACT = {
    None: lambda y: y,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def problem(m: int, n: int, k: int, dtype: torch.dtype, seed: int = 0):
    g = torch.Generator("cuda").manual_seed(seed)
    w = ops.prune24(torch.randn(n, k, generator=g, device="cuda").to(dtype))
    x = torch.randn(m, k, generator=g, device="cuda").to(dtype)
    return x, w, torch.randn(n, generator=g, device="cuda").to(dtype)


def poison() -> None:
    """Fills what the allocator will hand out next with NaN, so that what a kernel leaves unwritten shows."""
    torch.empty(1 << 24, dtype=torch.float32, device="cuda").fill_(torch.nan)


def check(y, x, w, bias, activation=None) -> None:
    """Each element within its rounding and that of fp32 sums; and the RMS error well inside."""
    dtype, total = x.dtype, 0.0 if bias is None else bias.double()
    want = EXACT[activation](x.double() @ w.double().T + total)
    magnitude = x.double().abs() @ w.double().abs().T + abs(total)
    bound = SLOPE[activation] * (x.shape[-1] / 32 + 18) * 2.0**-24 * magnitude + HALF_ULP[dtype] * want.abs() + SMALLEST[dtype]
    bound += 4e-7 * want.abs() + 1e-7
    error = (y.double() - want).abs()
    assert y.dtype == dtype and not torch.isnan(y).any() and (error <= bound).all()
    if want.numel() and want.norm() > 0:
        assert error.norm() <= HALF_ULP[dtype] * want.norm()


def choices(kernel: str, m: int) -> list[Choice]:
    """In every tile and split; the one of the launcher's choice last."""
    index = torch.cuda.current_device()
    if kernel == EXPAND:
        return [Choice(EXPAND)]
    if kernel not in product.gpu_kernels(index):
        pytest.skip(f"this GPU and this build have no {kernel}")
    if kernel == product.DECODE and m > product.DECODE_TOKENS:
        return []
    return [*(Choice(kernel, tile, split) for tile, split in product.variants(kernel, m, index)), Choice(kernel)]


# The sanitizer slows a kernel down by ten and more: it sees one dtype, which differs in its mma alone, and shapes up to 130 tokens.
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.sanitize)], ids=str)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_every_kernel_at_every_shape(kernel, dtype, m, n, k):
    x, w, bias = problem(m, n, k, dtype)
    f = to_fragments(ops.compress24(w))
    for choice in choices(kernel, m):
        poison()
        y = product.run_on_gpu(choice, x, f, bias, None)
        check(y, x, w, bias)
        assert torch.equal(product.run_on_gpu(choice, x, f, bias, None), y), "two runs differ"


@pytest.mark.sanitize
@pytest.mark.parametrize("kernel", KERNELS[:3])
@pytest.mark.parametrize("activation", EXACT, ids=str)
def test_every_activation(kernel, activation):
    for m in (5, 100):
        x, w, bias = problem(m, 70, 200, torch.float16)
        for choice in choices(kernel, m)[-1:]:
            for b in (None, bias):
                check(product.run_on_gpu(choice, x, to_fragments(ops.compress24(w)), b, activation), x, w, b, activation)


@pytest.mark.sanitize
@pytest.mark.parametrize("kernel", KERNELS[:3])
@pytest.mark.parametrize("offset, gap", [(0, 8), (8, 24), (1, 3), (0, 1)], ids=["aligned", "aligned, apart", "odd", "odd rows"])
def test_rows_of_a_wider_x(kernel, offset, gap):
    for m in (3, 130):
        x, w, bias = problem(m, 96, 256, torch.bfloat16)
        wide = torch.full((m, 256 + offset + gap), torch.nan, dtype=x.dtype, device="cuda")
        wide[:, offset : offset + 256] = x
        view = wide[:, offset : offset + 256]
        for choice in choices(kernel, m)[-1:]:
            check(product.run_on_gpu(choice, view, to_fragments(ops.compress24(w)), bias, None), x, w, bias)


@pytest.mark.parametrize("kernel", KERNELS[:3])
def test_rows_that_overlap_and_a_row_of_any_stride(kernel):
    """The kernels want rows that lie apart: an expanded x, one row seen from every place, and a column seen as a row."""
    for m in (1, 3, 130):
        x, w, bias = problem(m, 96, 256, torch.bfloat16)
        views = [x[:1].expand(m, 256), torch.cat([x[0], x[0]])[: 255 + m].unfold(0, 256, 1) if m < 256 else x]
        views += [x.T.contiguous().T] if m > 1 else [x[0, :, None].clone().T]
        for view in views:
            for choice in choices(kernel, m)[-1:]:
                check(product.run_on_gpu(choice, view, to_fragments(ops.compress24(w)), bias, None), view, w, bias)


@pytest.mark.parametrize("hundred", range(10))
def test_a_thousand_random_shapes(hundred):
    chance = random.Random(hundred)
    for i in range(100 * hundred, 100 * hundred + 100):
        m, n, k = (
            chance.choice([1, 2, chance.randint(1, 64), chance.randint(65, 600)]),
            chance.randint(1, 700),
            chance.randint(1, 900),
        )
        dtype = DTYPES[i % 2]
        x, w, bias = problem(m, n, k, dtype, seed=i)
        poison()
        y = ops.linear24(x, to_fragments(ops.compress24(w)), bias if i % 3 else None)
        check(y, x, w, bias if i % 3 else None)


def test_nothing_to_do():
    for m, n, k in ((0, 64, 64), (4, 0, 64), (4, 64, 0)):
        x, w, bias = problem(m, n, k, torch.float16)
        y = ops.linear24(x, to_fragments(ops.compress24(w)), bias)
        assert torch.equal(y, bias.expand(m, n) if k == 0 else x.new_zeros(m, n))


def test_in_a_cuda_graph_and_on_another_stream():
    x, w, bias = problem(8, 512, 1024, torch.bfloat16)
    f = to_fragments(ops.compress24(w))
    want = ops.linear24(x, f, bias)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(ops.linear24(x, f, bias), want)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear24(x, f, bias)
    for seed in range(3):
        x.copy_(problem(8, 512, 1024, torch.bfloat16, seed + 1)[0])
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, ops.linear24(x, f, bias))


def test_threads_that_launch_at_once():
    """One kernel with blocks of 74 and of 128 KiB of shared memory: what a thread allows must hold while another launches."""
    problems = {m: problem(m, 256, 2048, torch.bfloat16, seed=m) for m in (1, 2, 4, 8)}
    held = {m: (x, to_fragments(ops.compress24(w)), bias) for m, (x, w, bias) in problems.items()}
    torch.cuda.synchronize()

    def run(m: int) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [product.run_on_gpu(Choice(product.DECODE, 16, 1), *held[m], None) for _ in range(300)]
            assert all(torch.equal(y, found[0]) for y in found[::50])
            torch.cuda.current_stream().synchronize()
            return found[0]

    if product.DECODE not in product.gpu_kernels(torch.cuda.current_device()):
        pytest.skip("no kernel for few tokens on this GPU")
    with ThreadPoolExecutor(len(held)) as pool:
        for m, y in zip(held, pool.map(run, held), strict=True):
            check(y, *problems[m])


def test_memory_of_a_call_is_its_output():
    x, w, _ = problem(8, 4096, 4096, torch.bfloat16)
    f = to_fragments(ops.compress24(w))
    ops.linear24(x, f)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = ops.linear24(x, f)
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + (4 << 20)
