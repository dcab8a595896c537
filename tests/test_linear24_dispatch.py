"""Which CUDA kernel a product calls and with what, seen without a GPU: the bindings are replaced by what writes down its arguments
under the names that the bindings give them."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from sparsekit import _C, ops
from sparsekit.format import from_fragments, to_fragments
from sparsekit.ops import linear as product
from sparsekit.ops.registry import DTYPE_CODE
from sparsekit.tune import EXPAND, Choice

pytestmark = pytest.mark.skipif(not _C.cuda_archs(), reason="built without CUDA")


def names(function: str) -> list[str]:
    """The arguments of a binding, in order, from its signature."""
    signature = getattr(_C, function).__doc__.splitlines()[0]
    return re.findall(r"(\w+): ", signature[signature.index("(") :])


class Recorder:
    """Stands in for the extension. workspace: what a kernel asks for; takes: whether TMA takes x."""

    def __init__(self, workspace: int = 0, takes: bool = True):
        self.workspace, self.takes, self.calls = workspace, takes, []

    def __getattr__(self, name: str):
        def call(*args):
            given = dict(zip(names(name), args, strict=True))
            self.calls.append((name, given))
            return self.takes if name == "linear24_sm90a" else self.workspace if name.endswith("_workspace") else None

        return call


@pytest.fixture
def record(monkeypatch):
    def start(**settings) -> Recorder:
        recorder = Recorder(**settings)
        monkeypatch.setattr(product, "_C", recorder)
        monkeypatch.setattr(product, "raw_stream", lambda index: 77)
        return recorder

    return start


def problem(m: int, dtype: torch.dtype = torch.bfloat16, n: int = 20, k: int = 70):
    w = ops.prune24(torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(dtype))
    wide = torch.randn(m, k + 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    return wide[:, :k], to_fragments(ops.compress24(w)), torch.randn(n).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "choice", [Choice(product.DECODE, 32, 4), Choice(product.HOPPER, 3, 2), Choice(product.MMA_SP, 2)], ids=lambda c: c.kernel
)
def test_every_argument_is_in_its_place(choice, dtype, record):
    x, f, bias = problem(3, dtype)
    recorder = record(workspace=4096)
    y = product.run_on_gpu(choice, x, f, bias, "silu")
    assert y.shape == (3, 20) and y.dtype == dtype
    name, given = recorder.calls[-1]
    assert name == choice.kernel
    want = {"x": x.data_ptr(), "values": f.values.data_ptr(), "meta": f.meta.data_ptr(), "bias": bias.data_ptr(), "y": y.data_ptr()}
    want |= {"m": 3, "n": 20, "k": 70, "ldx": 80, "dtype": DTYPE_CODE[dtype], "activation": 4, "tile": choice.tile, "stream": 77}
    assert {key: given[key] for key in want} == want and given["device"] == x.device.index
    if choice.kernel != product.MMA_SP:
        assert given["split"] == choice.split and given["workspace"] != 0
        asked = {"m": 3, "n": 20, "k": 70, "tile": choice.tile, "split": choice.split, "device": x.device.index}
        assert recorder.calls[0] == (f"{choice.kernel.removesuffix('_sm80')}_workspace", asked)


K, normal = 70, partial(torch.randn, dtype=torch.bfloat16)  # a cast would lay the views out anew
ROWS = {  # x, and whether its rows can be read where they lie
    "contiguous": (lambda: normal(3, K), True),
    "apart": (lambda: normal(3, K + 10)[:, :K], True),
    "one row, of a column": (lambda: normal(K, 1).T, True),
    "one row, expanded": (lambda: normal(K).expand(1, K), True),
    "no row": (lambda: normal(0, K), True),
    "one row seen three times": (lambda: normal(K).expand(3, K), False),
    "each row a step on": (lambda: normal(K + 2).unfold(0, K, 1), False),
    "transposed": (lambda: normal(K, 3).T, False),
    "every second column": (lambda: normal(3, 2 * K)[:, ::2], False),
    "one number a row": (lambda: normal(3, 1).expand(3, K), False),
    "three dimensions, a view": (lambda: normal(2, 3, K + 2)[..., :K], True),
    "three dimensions, expanded": (lambda: normal(1, 3, K).expand(2, 3, K), False),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("kernel", [product.DECODE, product.MMA_SP])
def test_rows_lie_apart(case, kernel, record):
    """A launcher refuses rows less than k apart, and torch gives one row and no row any stride."""
    make, read_in_place = ROWS[case]
    x, (_, f, bias) = make(), problem(3)
    recorder = record()
    product.run_on_gpu(Choice(kernel), x, f, bias, None)
    given = recorder.calls[-1][1]
    assert given["ldx"] >= given["k"] == K and given["m"] == x.shape[:-1].numel()
    rows, m, ldx = product._rows(x, apart=True)
    assert (m, ldx) == (given["m"], given["ldx"]) and torch.equal(rows, x.reshape(-1, K))
    assert (rows.data_ptr() == x.data_ptr()) == read_in_place
    if len(rows) > 1:
        assert rows.stride() == (ldx, 1)


@pytest.mark.parametrize("kernel", [product.DECODE, product.HOPPER, product.MMA_SP])
def test_a_weight_in_a_larger_buffer_is_brought_to_where_it_can_be_read(kernel, record):
    x, f, _ = problem(3)
    views = []
    for t in f[:2]:
        buffer = t.new_empty(t.numel() + 1)
        views.append(buffer[1:].view(t.shape).copy_(t))
        assert views[-1].data_ptr() % 16
    recorder = record()
    product.run_on_gpu(Choice(kernel), x, f._replace(values=views[0], meta=views[1]), None, None)
    given = recorder.calls[-1][1]
    assert given["values"] % 16 == given["meta"] % 16 == 0
    product.run_on_gpu(Choice(kernel), x, f, None, None)
    given = recorder.calls[-1][1]
    assert (given["values"], given["meta"]) == (f.values.data_ptr(), f.meta.data_ptr()), "else no copy is made"


@pytest.mark.parametrize("kernel", [product.DECODE, product.HOPPER])
def test_what_is_not_there_is_a_null(kernel, record):
    x, f, _ = problem(3)
    recorder = record()
    product.run_on_gpu(Choice(kernel), x, f, None, None)
    _, given = recorder.calls[-1]
    assert (given["bias"], given["workspace"], given["activation"], given["tile"], given["split"]) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "choice, m, takes, called",
    [
        (Choice(product.DECODE, 32, 4), product.DECODE_TOKENS + 1, True, (product.MMA_SP, 0)),  # measured for fewer tokens
        (Choice(product.HOPPER, 3), 100, False, (product.MMA_SP, 0)),  # rows that TMA cannot take
        (Choice(product.MMA_SP, 4), 1, True, (product.MMA_SP, 4)),
        (Choice(product.HOPPER, 5), 1, True, (product.HOPPER, 5)),
    ],
)
def test_a_kernel_that_cannot_is_replaced(choice, m, takes, called, record):
    x, f, bias = problem(m)
    recorder = record(takes=takes)
    product.run_on_gpu(choice, x, f, bias, None)
    name, given = recorder.calls[-1]
    assert (name, given["tile"]) == called


@pytest.mark.parametrize("canonical", [False, True], ids=["fragments", "canonical"])
def test_expanding_calls_no_kernel_of_the_product(canonical, record, monkeypatch):
    """Neither order is brought into the other first: one pass over the weight."""
    x, f, bias = problem(3)
    want = ops.linear24(x, f, bias, "relu")
    given = from_fragments(f) if canonical else f
    recorder = record()
    for turn in ("from_fragments", "to_fragments"):
        monkeypatch.setattr(product, turn, lambda *_: pytest.fail("turned"))
    assert torch.allclose(product.run_on_gpu(Choice(EXPAND), x, given, bias, "relu").float(), want.float(), rtol=2e-2, atol=2e-2)
    assert recorder.calls == []


@pytest.mark.parametrize(
    "capability, kernels",
    [
        ((9, 0), [product.DECODE, product.HOPPER, product.MMA_SP]),
        ((8, 0), [product.DECODE, product.MMA_SP]),
        ((12, 0), [product.DECODE, product.MMA_SP]),
        ((7, 5), []),
    ],
)
def test_kernels_by_capability(capability, kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    monkeypatch.setattr(_C, "cuda_archs", lambda: ["80", "90a", "120"])  # this build may be for one card alone
    if not hasattr(_C, product.HOPPER):
        kernels = [kernel for kernel in kernels if kernel != product.HOPPER]
    for cached in (product._has_mma_sp, product._has_hopper, product.default_choice):
        cached.cache_clear()
    try:
        assert product.gpu_kernels(0) == kernels
        if kernels:
            assert product.default_choice(0, 1) == product.default_choice(0, 64) == Choice(product.DECODE)
            assert product.default_choice(0, 65) == Choice(kernels[1])
    finally:
        for cached in (product._has_mma_sp, product._has_hopper, product.default_choice):
            cached.cache_clear()


def test_parts_are_measured_where_tiles_are_few():
    tokens = 1, product.HOPPER_SPLIT_TOKENS, product.HOPPER_SPLIT_TOKENS + 1
    tried = {m: product.variants(product.HOPPER, m, 0) for m in tokens}
    *few, many = tried.values()
    assert many == [(tile, 0) for tile in product.HOPPER_TILES]  # the launcher's own choice of parts
    assert few[0] == few[1] and set(many) < set(few[0]) and len(set(few[0])) == len(few[0])
    assert {split for tile, split in few[0] if tile == 2} == {0, *product.HOPPER_SPLITS}


SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "untold": None}  # KiB that a block may have


@pytest.fixture(params=SHARED)
def shared(request, monkeypatch) -> int:
    """A device with that much shared memory a block; an older torch does not tell it, and then it is the least of all."""
    told = SHARED[request.param]
    held = SimpleNamespace(**({} if told is None else {"shared_memory_per_block_optin": told}))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: held)
    product._decode_tiles.cache_clear()
    yield told or 99 << 10
    product._decode_tiles.cache_clear()


def test_a_tile_that_does_not_fit_is_not_offered(shared):
    for m in range(1, product.DECODE_TOKENS + 1):
        tiles = {tile for tile, _ in product.variants(product.DECODE, m, 0)}
        known = next(tiles for most, tiles in product.DECODE_TILES.items() if m <= most)
        assert tiles == {tile for tile in known if product.decode_shared(m, tile) <= shared} and known[-1] in tiles
    offered = {tile for tile, _ in product.variants(product.DECODE, 16, 0)}
    assert offered == {227 << 10: {16, 32, 64, 128}, 163 << 10: {32, 64, 128}, 99 << 10: {64, 128}}[shared]
    assert product.variants(product.DECODE, product.DECODE_TOKENS + 1, 0) == []


def test_a_tile_measured_for_the_nearest_tokens_becomes_one_that_fits(shared, monkeypatch):
    """17 tokens are nearest to 16, whose smallest tile they have not; and 5 to 4, whose x is smaller."""
    monkeypatch.setattr(product, "gpu_key", lambda index: "a GPU")
    monkeypatch.setattr(product, "_has_hopper", lambda index: True)
    for m in range(1, product.DECODE_TOKENS + 1):
        offered = {tile for tile, _ in product.variants(product.DECODE, m, None)}
        for tile in (16, 32, 64, 128, 256):
            monkeypatch.setattr(product.tune, "choose", lambda *_, tile=tile: Choice(product.DECODE, tile, 4))
            chosen = product.chosen_on_gpu(torch.empty(m, 64), torch.float16, 64, 64)
            assert chosen.tile in offered and chosen[::2] == (product.DECODE, 4) and (tile not in offered or chosen.tile == tile)
    for choice in (Choice(product.DECODE), Choice(product.MMA_SP, 4), Choice(product.HOPPER, 5, 2), Choice(EXPAND)):
        monkeypatch.setattr(product.tune, "choose", lambda *_, choice=choice: choice)
        assert product.chosen_on_gpu(torch.empty(17, 64), torch.float16, 64, 64) == choice


@pytest.mark.parametrize("capability, built", [((9, 0), False), ((8, 0), True), ((9, 0), True)], ids=str)
def test_rows_of_a_kernel_that_is_not_there_choose_none(capability, built, monkeypatch):
    """The rows that ship for a card, or were measured on it, may be of a build for more architectures than this one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    monkeypatch.setattr(product, "gpu_key", lambda index: "a GPU")
    build = SimpleNamespace(cuda_archs=lambda: ["80"], **({product.HOPPER: None} if built else {}))
    monkeypatch.setattr(product, "_C", build)
    monkeypatch.setattr(product.tune, "choose", lambda *_: Choice(product.HOPPER, 5))
    held = (product._has_mma_sp, product._has_hopper, product.default_choice)
    for cached in held:
        cached.cache_clear()
    try:
        wanted = Choice(product.HOPPER, 5) if built and capability == (9, 0) else Choice(product.MMA_SP)
        assert product.chosen_on_gpu(torch.empty(100, 64), torch.float16, 64, 64) == wanted
    finally:
        for cached in held:
            cached.cache_clear()


@pytest.mark.parametrize("archs, driver", [(["80", "90a"], "13000"), ([], "unknown")], ids=["with CUDA", "without"])
def test_rows_are_kept_under_the_card_and_all_that_runs_on_it(archs, driver, monkeypatch):
    """Rows measured with another driver are another's."""
    build = SimpleNamespace(cuda_archs=lambda: archs, **({"cuda_driver": lambda: 13000} if archs else {}))
    monkeypatch.setattr(product, "_C", build)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    key = product.gpu_key.__wrapped__(0)
    assert key == f"NVIDIA H200; sm_90; driver {driver}; CUDA {torch.version.cuda}; sparsekit {product.__version__}"


@pytest.mark.gpu
def test_variants_are_what_the_launchers_offer():
    for m in (1, 16, 17, 32, 33, 64):
        offered = product.variants(product.DECODE, m, 0)
        assert len(set(offered)) == len(offered) >= 8
        for tile, split in offered:
            assert _C.linear24_decode_workspace(m, 4096, 4096, tile, split, 0) >= 0
    for m in (1, 256, 257) if product.HOPPER in product.gpu_kernels(0) else ():
        for tile, split in product.variants(product.HOPPER, m, 0):
            assert _C.linear24_sm90a_workspace(m, 1024, 4096, tile, split, 0) >= 0
