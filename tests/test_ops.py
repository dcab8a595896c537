"""The ops as torch sees them, and linear24 against fp64. The layout itself is tested in test_format.py."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from sparsekit import Sparse24, env, ops
from sparsekit.format import to_fragments
from sparsekit.ops import registry

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
ACTIVATIONS = {
    None: lambda y: y,
    "relu": lambda y: y.clamp(min=0),
    "gelu": lambda y: 0.5 * y * torch.special.erfc(-y / 2**0.5),
    "gelu_tanh": lambda y: y * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)),
    "silu": lambda y: y * torch.sigmoid(y),
}
SHAPES = [(1, 1, 1), (1, 5, 8), (3, 7, 17), (5, 33, 130), (70, 64, 256), (2, 3, 1030)]
SHAPE_IDS = ["smallest", "one token", "ragged k", "odd everything", "many tokens", "long sums"]
PAIRS = pytest.mark.parametrize("x_dtype, w_dtype", list(itertools.product(FLOATS, FLOATS)), ids=str)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- what torch checks of an op ----


@pytest.mark.parametrize(
    "shape", [(3, 16), (2, 13), (0, 8), (4, 0), (1, 1)], ids=["even", "ragged", "no rows", "no columns", "one"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_opcheck_of_the_format(shape, dtype, weight24):
    w = weight24(*shape, dtype, integers=True)
    torch.library.opcheck(torch.ops.sparsekit.compress24.default, (w,))
    torch.library.opcheck(torch.ops.sparsekit.compress24.default, (w.T.contiguous().T,))
    s = ops.compress24(w)
    torch.library.opcheck(torch.ops.sparsekit.expand24.default, (s.values, s.meta, shape[1]))


@pytest.mark.parametrize("bias, activation", [(False, None), *((True, a) for a in ACTIVATIONS)], ids=str)
def test_opcheck_of_linear24(bias, activation, weight24, device):
    s = ops.compress24(weight24(6, 13).to(device))
    b = normal(6).to(device) if bias else None
    xs = [normal(3, 13)] if activation else [normal(13), normal(2, 3, 13), normal(13, 3).T, normal(0, 13)]
    for x in xs:
        torch.library.opcheck(torch.ops.sparsekit.linear24.default, (x.to(device), s.values, s.meta, 13, b, activation))


@pytest.mark.parametrize("bias, activation", [(False, None), (True, "silu")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fragment_order_gives_the_same(dtype, bias, activation, weight24, device):
    for n, k in ((48, 128), (20, 70), (0, 8), (5, 0)):
        s, x = ops.compress24(weight24(n, k, dtype)).to(device), normal(2, 3, k, dtype=dtype).to(device)
        b = normal(n, dtype=dtype).to(device) if bias else None
        f = to_fragments(s)
        assert same_bits(ops.linear24(x, f, b, activation), ops.linear24(x, s, b, activation))
        torch.library.opcheck(torch.ops.sparsekit.linear24_fragments.default, (x, f.values, f.meta, n, k, b, activation))
        assert same_bits(torch.ops.sparsekit.expand_fragments.default(f.values, f.meta, n, k), ops.expand24(s))
        torch.library.opcheck(torch.ops.sparsekit.expand_fragments.default, (f.values, f.meta, n, k))
    with pytest.raises(ValueError, match="linear24: the last dimension of x must be k = 70"):
        ops.linear24(x, to_fragments(ops.compress24(weight24(20, 70, dtype))))
    with pytest.raises(ValueError, match=r"linear24: shape \(36, 70\) needs values"):
        ops.linear24(normal(2, 70, dtype=dtype), to_fragments(ops.compress24(weight24(20, 70, dtype)))._replace(shape=(36, 70)))
    with pytest.raises(ValueError, match=r"expand_fragments: shape \(36, 70\) needs values"):
        torch.ops.sparsekit.expand_fragments.default(*to_fragments(ops.compress24(weight24(20, 70, dtype)))[:2], 36, 70)


@pytest.mark.parametrize("k", [0, 12, 13])
def test_fakes_have_the_shapes_of_the_ops(k, weight24):
    w, x = weight24(5, k, torch.float16), normal(2, 3, k, dtype=torch.float16)
    s, far = ops.compress24(w), ops.compress24(w.to("meta"))
    assert [(t.shape, t.dtype, t.stride()) for t in far[:2]] == [(t.shape, t.dtype, t.stride()) for t in s[:2]]
    assert far.shape == s.shape
    for fake, real in ((ops.expand24(far), ops.expand24(s)), (ops.linear24(x.to("meta"), far), ops.linear24(x, s))):
        assert fake.device.type == "meta"
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


# ---- linear24 in numbers ----


@PAIRS
@pytest.mark.parametrize("activation", [None, "relu"], ids=str)
@pytest.mark.parametrize("m, n, k", SHAPES, ids=SHAPE_IDS)
def test_exact_on_integers(m, n, k, activation, x_dtype, w_dtype, weight24):
    # Every sum of these integers is exact in fp32, so one rounding at the end is all that may happen.
    w, x, bias = weight24(n, k, w_dtype, integers=True), integers(m, k, dtype=x_dtype), integers(n, dtype=x_dtype, seed=2)
    for b in (None, bias):
        want = ACTIVATIONS[activation](x.double() @ w.double().T + (0 if b is None else b.double()))
        assert torch.equal(ops.linear24(x, ops.compress24(w), b, activation), want.to(x_dtype))


@PAIRS
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_within_the_bound_of_fp32_sums(activation, x_dtype, w_dtype, weight24, device):
    # Each element: k/2 products and the bias summed in fp32, through a slope of at most 1.13, then the rounding of the result.
    for (m, n, k), scale in itertools.product(((70, 65, 256), (1, 65, 1030)), (0.1, 3.0)):
        w, x, bias = weight24(n, k, w_dtype), scale * normal(m, k), normal(n, dtype=x_dtype, seed=2)
        x = x.to(x_dtype)
        y = ops.linear24(x.to(device), ops.compress24(w).to(device), bias.to(device), activation).cpu()
        want = ACTIVATIONS[activation](x.double() @ w.double().T + bias.double())
        magnitude = x.double().abs() @ w.double().abs().T + bias.double().abs()
        bound = 1.13 * (k / 2 + 2) * 2.0**-24 * magnitude + HALF_ULP[x_dtype] * want.abs() + SMALLEST[x_dtype]
        if activation in ("gelu", "gelu_tanh", "silu"):
            bound += 4e-7 * want.abs() + 1e-7
        assert y.dtype == x_dtype and ((y.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(17,), (3, 17), (2, 3, 17), (2, 1, 3, 17), (0, 17), (2, 0, 17)], ids=str)
def test_any_rank(shape, dtype, weight24):
    w, x, bias = weight24(6, 17, dtype, integers=True), integers(*shape, dtype=dtype), integers(6, dtype=dtype, seed=2)
    y = ops.linear24(x, ops.compress24(w), bias)
    assert y.shape == (*shape[:-1], 6) and y.is_contiguous()
    assert torch.equal(y, F.linear(x.double(), w.double(), bias.double()).to(dtype))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("n", [0, 5])
def test_no_inner_columns(shape, n):
    s, bias = ops.compress24(torch.zeros(n, 0)), integers(n)
    assert torch.equal(ops.linear24(torch.zeros(shape), s), torch.zeros(*shape[:-1], n))
    assert torch.equal(ops.linear24(torch.zeros(shape), s, bias, "relu"), bias.relu().expand(*shape[:-1], n))


def strided(layout: str, dtype: torch.dtype) -> torch.Tensor:
    """x with 17 columns that does not lie in memory as (m, 17) would."""
    wide = integers(4, 6, 40, dtype=dtype)
    return {
        "every other column": wide[0, :, :34:2],
        "transposed": wide[0, :, :17].T.contiguous().T,
        "rows of a wider one": wide[0, :, 5:22],
        "every other row": wide[0, ::2, :17],
        "one row for all": wide[0, :1, :17].expand(6, 17),
        "permuted": wide[:, :, :17].transpose(0, 1),
        "inner dimensions": wide[:, 1:4, 3:20],
        "a vector with gaps": wide[0, 0, :34:2],
        "overlapping rows": wide.flatten().as_strided((9, 17), (3, 1)),
    }[layout]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        "every other column", "transposed", "rows of a wider one", "every other row", "one row for all", "permuted",
        "inner dimensions", "a vector with gaps", "overlapping rows",
    ],
)  # fmt: skip
def test_strided_x(layout, dtype, weight24):
    s, x = ops.compress24(weight24(6, 17, dtype, integers=True)), strided(layout, dtype)
    assert not x.is_contiguous()
    assert same_bits(ops.linear24(x, s), ops.linear24(x.clone(memory_format=torch.contiguous_format), s))


def test_strided_weight_and_bias(weight24):
    w, x, bias = weight24(6, 17), normal(3, 17), normal(12)[::2]
    s = ops.compress24(w)
    apart = Sparse24(s.values.T.contiguous().T, torch.stack((s.meta, s.meta), -1)[..., 0], s.shape)
    assert not (apart.values.is_contiguous() or apart.meta.is_contiguous() or bias.is_contiguous())
    assert same_bits(ops.linear24(x, apart, bias), ops.linear24(x, s, bias.clone()))


def test_the_pruned_columns_are_not_read():
    # NaN times a zero that is stored nowhere: dense arithmetic would give NaN. The empty group keeps its two lowest columns.
    w = torch.tensor([[1.0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]])
    x = torch.tensor([[1.0, 1, torch.nan, torch.inf, 0, 0, torch.nan, torch.inf, 0, torch.nan, torch.inf, 1]])
    assert ops.linear24(x, ops.compress24(w)).item() == 6


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_infinity_come_through(dtype, activation):
    # A group keeps its last column and, multiplied by zero, its first: a row sees the last columns of no group but its own.
    w, x = torch.zeros(3, 12, dtype=dtype), torch.zeros(12, dtype=dtype)
    w[[0, 1, 2], [3, 7, 11]] = 1
    x[3::4] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    y = ops.linear24(x, ops.compress24(w), None, activation)
    assert y[0].isnan() and y[1] == torch.inf
    if activation in (None, "relu"):  # the others are 0 * inf there, to torch as well
        assert y[2] == (-torch.inf if activation is None else 0)


def test_sums_beyond_fp16_become_infinity():
    s = ops.compress24(torch.tensor([[200.0, -200.0], [200, 0]]).half())
    y = ops.linear24(torch.tensor([400.0, 400.0]).half(), s)
    assert y.tolist() == [0, torch.inf]  # 80000 - 80000 is summed in fp32, 80000 is not an fp16


@pytest.mark.parametrize("m", [1, 70])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_same_bits_for_every_number_of_threads(m, dtype, weight24, monkeypatch):
    s, x = ops.compress24(weight24(65, 1030, dtype)), normal(m, 1030, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 5, None):
        monkeypatch.setattr(env, "THREADS", threads)
        assert registry.threads() == (threads or torch.get_num_threads())
        results += [ops.linear24(x, s, None, "silu") for _ in range(2)]
    assert all(same_bits(y, results[0]) for y in results)


# ---- linear24 refused ----


def refusals():
    x, bias = torch.zeros(2, 16), torch.zeros(3)
    one_of = "one of torch.float32, torch.float16 and torch.bfloat16, got "
    yield "x of fp64", x.double(), "float32", bias.double(), None, TypeError, one_of + "torch.float64 and torch.float32"
    yield "x of int8", x.char(), "float32", None, None, TypeError, one_of + "torch.int8 and torch.float32"
    yield "values of fp8", x, "float8_e4m3fn", None, None, TypeError, one_of + "torch.float32 and torch.float8_e4m3fn"
    yield "values of int8", x, "int8", None, None, TypeError, one_of + "torch.float32 and torch.int8"
    yield "x narrow", x[:, :15], "float32", None, None, ValueError, r"last dimension of x must be k = 16, got x \(2, 15\)"
    yield "x wide", torch.zeros(2, 17), "float32", None, None, ValueError, r"last dimension of x must be k = 16, got x \(2, 17\)"
    yield "x transposed", x.T, "float32", None, None, ValueError, r"last dimension of x must be k = 16, got x \(16, 2\)"
    yield "x a number", x[0, 0], "float32", None, None, ValueError, r"last dimension of x must be k = 16, got x \(\)"
    must = r"bias must be \(3,\) in torch.float32 on cpu, got "
    yield "bias short", x, "float32", bias[:2], None, ValueError, must + r"\(2,\) in torch.float32 on cpu"
    yield "bias one", x, "float32", bias[:1], None, ValueError, must + r"\(1,\) in"
    yield "bias a column", x, "float32", bias[:, None], None, ValueError, must + r"\(3, 1\) in"
    yield "bias of another dtype", x, "float32", bias.half(), None, ValueError, must + r"\(3,\) in torch.float16 on cpu"
    yield "bias elsewhere", x, "float32", bias.to("meta"), None, ValueError, must + r"\(3,\) in torch.float32 on meta"
    yield "x elsewhere", x.to("meta"), "float32", None, None, ValueError, "x and values must be on one device, got meta and cpu"
    known = "activation must be None, 'relu', 'gelu', 'gelu_tanh' and 'silu', got "
    yield "activation unknown", x, "float32", bias, "tanh", ValueError, known + "'tanh'"
    yield "activation in capitals", x, "float32", bias, "ReLU", ValueError, known + "'ReLU'"
    yield "activation empty", x, "float32", bias, "", ValueError, known + "''"


@pytest.mark.parametrize("x, dtype, bias, activation, error, text", [pytest.param(*c[1:], id=c[0]) for c in refusals()])
def test_refusals(x, dtype, bias, activation, error, text, weight24):
    s = ops.compress24(weight24(3, 16, getattr(torch, dtype), integers=True))
    with pytest.raises(error, match="^linear24: .*" + text):
        ops.linear24(x, s, bias, activation)
    if x.device.type == "cpu" and (bias is None or bias.device.type == "cpu"):  # the fake refuses alike
        with pytest.raises(error, match="^linear24: .*" + text.replace(" cpu", " meta")):
            ops.linear24(x.to("meta"), s.to("meta"), None if bias is None else bias.to("meta"), activation)


def test_a_weight_elsewhere_is_refused(weight24):
    s = ops.compress24(weight24(3, 16))
    with pytest.raises(ValueError, match="linear24: x and values must be on one device, got cpu and meta"):
        ops.linear24(torch.zeros(2, 16), s.to("meta"))


@pytest.mark.parametrize("gradients", [False, True], ids=["no grad", "grad"])
def test_what_is_no_weight_stored_24_is_refused(gradients, weight24):
    w, x = weight24(3, 16), torch.zeros(2, 16, requires_grad=gradients)
    s = ops.compress24(w)
    for other, name in ((w, "Tensor"), (tuple(s), "tuple"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"^linear24: s must be a Sparse24 or a Fragments24, got a {name}; compress24 ma"):
            ops.linear24(x, other)
        for op in (ops.expand24, ops.validate24):
            with pytest.raises(TypeError, match=f"^{op.__name__}: s must be a Sparse24, got a {name}$"):
                op(other)
    for rows in (2, 4):
        with pytest.raises(ValueError, match=rf"^linear24: values must have the {rows} rows of shape, got \(3, 8\)$"):
            ops.linear24(x, s._replace(shape=(rows, 16)))


# ---- gradients ----


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_product_has_a_gradient(activation, weight24):
    w, x, bias = weight24(6, 24), normal(3, 24), normal(6)
    s = ops.compress24(w)
    given = [x.clone().requires_grad_(), s.values.clone().requires_grad_(), bias.clone().requires_grad_()]
    y = ops.linear24(given[0], s._replace(values=given[1]), given[2], activation)
    found = torch.autograd.grad(y, given, normal(3, 6, seed=2))
    dense = [x.double().requires_grad_(), w.double().requires_grad_(), bias.double().requires_grad_()]
    want = torch.autograd.grad(ACTIVATIONS[activation](F.linear(*dense)), dense, normal(3, 6, seed=2).double())
    assert torch.allclose(found[0].double(), want[0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(found[2].double(), want[2], rtol=1e-4, atol=1e-5)
    spread = ops.expand24(s._replace(values=found[1]))
    places = ops.expand24(s._replace(values=torch.ones_like(s.values)))
    assert torch.allclose(spread.double(), want[1] * places, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="activation must be None"):
        ops.linear24(given[0], s, None, "tanh")


# ---- under torch.compile ----


@pytest.fixture
def compiled():
    """Compiles a function whole, for any size; the counter tells how often that had to be done."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def compile_(function, backend):
        counter = CompileCounterWithBackend(backend)
        return torch.compile(function, fullgraph=True, dynamic=True, backend=counter), counter

    torch.compiler.reset()
    yield compile_
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_for_every_number_of_tokens(backend, compiled, weight24):
    s, bias = ops.compress24(weight24(6, 13)), normal(6)

    def function(x):
        return ops.linear24(x * 2, s, bias, "gelu") + 1

    whole, counter = compiled(function, backend)
    for shape in ((3, 5, 13), (4, 7, 13), (9, 10, 13)):  # no two sizes alike: torch would take equal ones for the same
        x = normal(*shape)
        assert same_bits(whole(x), function(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_for_every_weight(backend, compiled, weight24):
    def function(w, x):
        s = ops.compress24(w)
        return ops.linear24(x, s), ops.expand24(s)

    whole, counter = compiled(function, backend)
    for n, k in ((6, 13), (9, 24), (5, 18)):
        w, x = weight24(n, k), normal(3, k)
        y, dense = whole(w, x)
        assert same_bits(y, function(w, x)[0]) and torch.equal(dense, w)
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match="got 4 in row 0, columns 0 to 3"):
        whole(torch.ones(6, 13), normal(3, 13))


def test_inductor(compiled, weight24, tmp_path, monkeypatch):
    # The op alone: inductor then has its strides to trust and no loop of its own to compile, which takes half a minute.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    w, bias = weight24(6, 13, integers=True), integers(6)
    s = ops.compress24(w)
    whole, counter = compiled(lambda x: ops.linear24(x, s, bias, "relu"), "inductor")
    for m in (3, 5):
        x = integers(m, 13)
        assert torch.equal(whole(x), (x @ w.T + bias).relu())
    assert counter.frame_count == 1
