"""SparseLinear beside the dense layer it stands for."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekit import Sparse24, SparseLinear, ops
from sparsekit.format import Fragments24, from_fragments, nbytes24, to_fragments
from sparsekit.linear import dense_weight

SIZES = pytest.mark.parametrize("k, n", [(16, 6), (13, 6), (13, 5), (1, 3)], ids=["even", "ragged k", "odd", "one input"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# ---- there and back ----


@SIZES
@DTYPES
@pytest.mark.parametrize("kind", ["bias", "no bias", "conv1d"])
def test_round_trip(kind, k, n, dtype, dense24):
    layer = dense24(k, n, kind != "no bias", dtype, kind == "conv1d")
    before = copy.deepcopy(layer.state_dict())
    sparse = SparseLinear.from_linear(layer)
    back = sparse.to_linear()
    assert type(back) is type(layer) and (sparse.in_features, sparse.out_features) == (k, n)
    assert back.state_dict().keys() == before.keys()
    for state in (back.state_dict(), layer.state_dict()):  # the layer itself is left as it was
        assert all(torch.equal(state[name], t) and state[name].dtype == t.dtype for name, t in before.items())
    assert all(not t.is_meta and t.requires_grad for t in back.parameters())
    x = normal(3, k, dtype=dtype)
    assert torch.equal(back(x), layer(x))
    shapes = [(m.nf, m.nx) if kind == "conv1d" else (m.out_features, m.in_features) for m in (back, layer)]
    assert shapes[0] == shapes[1] == (n, k)


def test_the_copies_share_no_memory(dense24):
    layer = dense24(16, 6)
    sparse = SparseLinear.from_linear(layer)
    back = sparse.to_linear()
    with torch.no_grad():
        layer.bias += 1
        back.bias += 1
        back.weight += 1
    assert torch.equal(sparse.bias, torch.arange(6).float() - 2) and torch.equal(sparse.to_linear().weight, layer.weight)


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_training_mode_is_kept(conv1d, dense24):
    for training in (True, False):
        sparse = SparseLinear.from_linear(dense24(16, 6, conv1d=conv1d).train(training))
        assert sparse.training == training == sparse.to_linear().training


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_a_weight_that_is_not_24_is_refused_by_place(conv1d, dense24):
    layer = dense24(16, 6, conv1d=conv1d)
    with torch.no_grad():
        dense_weight(layer)[4, 8:11] = 1
        dense_weight(layer)[4, 11] = 0
    with pytest.raises(ValueError, match="got 3 in row 4, columns 8 to 11; prune to 2:4 first"):
        SparseLinear.from_linear(layer)


def test_another_module_is_refused(dense24):
    """Also one whose weight has two dimensions and holds 2:4."""
    for other in (SparseLinear.from_linear(dense24(16, 6)), torch.nn.Embedding(4, 4), torch.nn.LayerNorm(4)):
        with pytest.raises(TypeError, match=f"or a transformers Conv1D, got a .*{type(other).__name__}$"):
            SparseLinear.from_linear(other)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_empty_has_the_shapes_of_the_real_one(bias, dense24):
    for layer in (dense24(13, 5, bias, torch.bfloat16), *([dense24(13, 5, dtype=torch.bfloat16, conv1d=True)] if bias else [])):
        real, empty = SparseLinear.from_linear(layer.eval()), SparseLinear.empty(layer, torch.bfloat16)
        assert all(t.is_meta for t in empty.state_dict().values())
        assert [(name, t.shape, t.dtype) for name, t in empty.state_dict().items()] == [
            (name, t.shape, t.dtype) for name, t in real.state_dict().items()
        ]
        empty.load_state_dict(real.state_dict(), assign=True)
        x = normal(3, 13, dtype=torch.bfloat16)
        assert torch.equal(empty(x), real(x)) and empty.conv1d == real.conv1d and not empty.training
        assert [p.requires_grad for p in empty.parameters()] == [p.requires_grad for p in layer.parameters()]


# ---- forward and backward ----


@SIZES
@DTYPES
@pytest.mark.parametrize("kind", ["bias", "no bias", "conv1d"])
def test_forward_is_exact_on_integers(kind, k, n, dtype, dense24):
    layer = dense24(k, n, kind != "no bias", dtype, kind == "conv1d", integers=True)
    sparse = SparseLinear.from_linear(layer)
    for shape in ((k,), (3, k), (2, 3, k), (0, k)):
        x = integers(*shape, dtype=dtype)
        want = F.linear(x.double(), dense_weight(layer).double(), None if layer.bias is None else layer.bias.double())
        with torch.no_grad():
            assert torch.equal(sparse(x), want.to(dtype)) and sparse(x).dtype == dtype


def test_forward_within_the_rounding_of_fp32(dense24):
    layer = dense24(514, 65)
    sparse, x = SparseLinear.from_linear(layer), normal(9, 514)
    want = layer.double()(x.double())
    magnitude = x.double().abs() @ layer.weight.abs().T + layer.bias.abs()
    assert ((sparse(x).double() - want).abs() <= 260 * 2.0**-24 * magnitude).all()


def test_16_bit_storage_under_fp32_activations(dense24):
    layer = dense24(16, 6, bias=False, dtype=torch.bfloat16)
    sparse, x = SparseLinear.from_linear(layer), integers(3, 16)
    y = sparse(x)
    assert y.dtype == torch.float32
    assert torch.allclose(y.double(), x.double() @ layer.weight.double().T, rtol=1e-6, atol=1e-5)
    x.requires_grad_()
    assert torch.equal(torch.autograd.grad(sparse(x).sum(), x)[0], layer.weight.float().sum(0).expand(3, 16))


@SIZES
@DTYPES
@pytest.mark.parametrize("kind", ["bias", "no bias", "conv1d"])
def test_the_gradient_of_x_is_the_dense_one(kind, k, n, dtype, dense24):
    layer = dense24(k, n, kind != "no bias", dtype, kind == "conv1d", integers=True)
    sparse = SparseLinear.from_linear(layer)
    x = integers(2, 3, k, dtype=dtype).requires_grad_()
    upstream = integers(2, 3, n, dtype=dtype)
    y = sparse(x)
    assert torch.equal(y, layer(x))
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(gradient, torch.autograd.grad(layer(x), x, upstream)[0])
    assert torch.equal(gradient.double(), (upstream.double() @ dense_weight(layer).double()).to(dtype).double())
    assert all(p.grad is None for p in sparse.parameters())


# ---- training ----


def kept(layer: nn.Module) -> torch.Tensor:
    """Whether a weight (n, k) is one of the two of its group that are stored: non-zeros, then the lowest free columns."""
    weight = dense_weight(layer)
    ranks = (
        F.pad((weight != 0).double(), (0, -weight.shape[1] % 8)).unflatten(1, (-1, 4)).sort(dim=-1, descending=True, stable=True)
    )
    mask = torch.zeros(ranks.indices.shape, dtype=torch.bool).scatter_(-1, ranks.indices[..., :2], True)
    return mask.flatten(1)[:, : weight.shape[1]]


@SIZES
@DTYPES
@pytest.mark.parametrize("kind", ["bias", "no bias", "conv1d"])
def test_gradients_are_the_dense_ones_at_the_kept_places(kind, k, n, dtype, dense24):
    layer = dense24(k, n, kind != "no bias", dtype, kind == "conv1d", integers=True)
    sparse = SparseLinear.from_linear(layer)
    upstream = integers(2, 3, n, dtype=dtype)
    for module in (layer, sparse):
        (module(integers(2, 3, k, dtype=dtype)) * upstream).sum().backward()
    dense = layer.weight.grad.T if kind == "conv1d" else layer.weight.grad
    places = kept(layer)
    assert sparse.values.grad.shape == sparse.values.shape and sparse.values.grad.dtype == dtype
    found = ops.expand24(Sparse24(sparse.values.grad, sparse.meta, (n, k)))
    assert torch.equal(found, torch.where(places, dense, 0))
    if layer.bias is not None:
        assert torch.equal(sparse.bias.grad, layer.bias.grad)


@pytest.mark.parametrize(
    "k, n, shape",
    [(0, 5, (3,)), (5, 0, (3,)), (0, 0, (2, 2)), (8, 0, ()), (0, 4, ()), (8, 5, ()), (8, 5, (0,)), (8, 5, (2, 0))],
    ids=[
        "no inputs",
        "no outputs",
        "neither",
        "no outputs of a vector",
        "a vector without inputs",
        "a vector",
        "no rows",
        "no rows, 3-D",
    ],
)
def test_gradients_where_a_size_is_zero(k, n, shape, dense24):
    layer = dense24(k, n, integers=True)
    sparse = SparseLinear.from_linear(layer)
    for module in (layer, sparse):
        x = integers(*shape, k).requires_grad_()
        y = module(x)
        y.sum().backward()
        assert y.shape == (*shape, n) and x.grad.shape == x.shape and torch.equal(x.grad, dense_weight(layer).sum(0).expand_as(x))
    assert sparse.values.grad.shape == sparse.values.shape and torch.equal(sparse.bias.grad, layer.bias.grad)


@pytest.mark.parametrize("lie", ["transposed", "one number", "one a row"])
def test_an_upstream_gradient_of_any_stride(lie, dense24):
    layer, x = dense24(24, 8, integers=True), integers(5, 24).requires_grad_()
    sparse = SparseLinear.from_linear(layer)
    upstream = {"transposed": integers(8, 5).T, "one number": integers(1).expand(5, 8), "one a row": integers(5, 1).expand(5, 8)}[
        lie
    ]
    found = torch.autograd.grad(sparse(x), [x, sparse.bias, sparse.values], upstream)
    wanted = torch.autograd.grad(layer(x), [x, layer.bias, layer.weight], upstream)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert torch.equal(ops.expand24(Sparse24(found[2], sparse.meta, (8, 24))), torch.where(kept(layer), wanted[2], 0))


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
@pytest.mark.parametrize("trained", ["x", "values", "bias"])
def test_gradcheck(trained, weight24):
    # The function is linear, so a step of 1 on integers gives its slope exactly, in fp32 too.
    s, x, bias = ops.compress24(weight24(5, 13, integers=True)), integers(3, 13), integers(5)
    sparse = SparseLinear(s, bias.clone())

    def function(t):
        given = {"x": x, "values": s.values, "bias": bias} | {trained: t}
        return torch.func.functional_call(sparse, {"values": given["values"], "bias": given["bias"]}, (given["x"],))

    t = {"x": x, "values": s.values, "bias": bias}[trained].clone().requires_grad_()
    assert torch.autograd.gradcheck(function, t, eps=1.0, atol=0, rtol=0)


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_training_goes_as_under_a_mask_and_never_loses_it(optimiser, dense24):
    torch.manual_seed(0)
    layer, x, target = dense24(24, 8), normal(64, 24), normal(64, 8, seed=2)
    sparse, places = SparseLinear.from_linear(layer), kept(layer)
    meta = sparse.meta.clone()
    dense_steps, sparse_steps = optimiser(layer.parameters(), lr=0.05), optimiser(sparse.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        for module, steps in ((layer, dense_steps), (sparse, sparse_steps)):
            loss = F.mse_loss(module(x), target)
            steps.zero_grad()
            loss.backward()
            steps.step()
        with torch.no_grad():
            layer.weight *= places  # what a mask has to be told after each step
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.allclose(sparse.to_linear().weight, layer.weight, rtol=1e-4, atol=1e-6) and torch.equal(sparse.meta, meta)
    assert torch.equal(sparse.to_linear().weight != 0, (layer.weight != 0))
    for name, state in sparse_steps.state.items():
        if name is sparse.values:
            assert all(t.numel() <= layer.weight.numel() / 2 for t in state.values() if isinstance(t, torch.Tensor))


def test_what_is_frozen_gets_no_gradient(dense24):
    layer = dense24(16, 6)
    layer.weight.requires_grad_(False)
    sparse = SparseLinear.from_linear(layer)
    assert not sparse.values.requires_grad and sparse.bias.requires_grad and not sparse.to_linear().weight.requires_grad
    sparse(normal(5, 16)).sum().backward()
    assert torch.equal(sparse.bias.grad, torch.full((6,), 5.0)) and sparse.values.grad is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_storage_that_cannot_be_trained(dtype, weight24):
    sparse = SparseLinear(ops.compress24(weight24(6, 16, dtype, integers=True)))
    assert not sparse.values.requires_grad


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(stored, dense24):
    layer = dense24(24, 8, dtype=torch.float32, integers=True)
    sparse, x = SparseLinear.from_linear(layer).to(stored), integers(5, 24).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, want = sparse(x), layer(x)
    assert y.dtype == want.dtype == torch.bfloat16 and torch.equal(y, want)
    y.float().sum().backward()
    assert sparse.values.grad.dtype == stored and x.grad.dtype == torch.float32
    assert torch.equal(x.grad, dense_weight(layer).sum(0).expand(5, 24))
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert sparse(x.to(stored)).dtype == stored


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_autocast_takes_no_other_input_than_a_dense_layer_does(dtype, dense24):
    layer = dense24(16, 6)
    with torch.autocast("cpu", torch.bfloat16):
        for module, error in ((layer, RuntimeError), (SparseLinear.from_linear(layer), TypeError)):
            with pytest.raises(error):
                module(integers(3, 16, dtype=dtype))


def test_no_gradient_is_asked_for_and_none_is_kept(dense24):
    sparse, x = SparseLinear.from_linear(dense24(16, 6)), normal(5, 16).requires_grad_()
    with torch.no_grad():
        y = sparse(x)
    assert not y.requires_grad and torch.equal(y, sparse(x.detach()))
    with torch.inference_mode():
        assert torch.equal(sparse(x), y)


# ---- as a module ----


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_copies_and_files(bias, dense24):
    sparse, x = SparseLinear.from_linear(dense24(13, 5, bias)), normal(3, 13)
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    loaded = SparseLinear.from_linear(dense24(13, 5, bias, integers=True))  # another weight of the same shape
    assert not torch.equal(loaded(x), sparse(x))
    assert str(loaded.load_state_dict(sparse.state_dict())) == "<All keys matched successfully>"
    others = (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), torch.load(file, weights_only=False), loaded)
    for other in others:
        assert type(other) is SparseLinear and torch.equal(other(x), sparse(x))
        assert other.values.data_ptr() != sparse.values.data_ptr() and other.meta.data_ptr() != sparse.meta.data_ptr()
        assert other.weight24.shape == (5, 13)
        other.weight24.validate()


def test_the_state_dict_is_the_format(dense24):
    layer = dense24(13, 5)
    sparse, s = SparseLinear.from_linear(layer), ops.compress24(layer.weight.detach())
    state = sparse.state_dict()
    assert list(state) == ["values", "bias", "meta"]
    assert torch.equal(state["values"], s.values) and torch.equal(state["meta"], s.meta) and torch.equal(state["bias"], layer.bias)
    assert list(SparseLinear.from_linear(dense24(13, 5, bias=False)).state_dict()) == ["values", "meta"]


def test_a_state_dict_of_another_size_is_refused(dense24):
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        SparseLinear.from_linear(dense24(16, 6)).load_state_dict(SparseLinear.from_linear(dense24(24, 6)).state_dict())


def broken(s: Sparse24, how: str) -> Sparse24:
    """The weight with two kept places in one column, or with a value past the last column."""
    values, meta = s.values.clone(), s.meta.clone()
    if how == "a nibble":
        meta[2, 1] = 0x40
    else:
        values[3, -1] = 1
    return Sparse24(values, meta, s.shape)


def test_a_bias_of_another_size_or_kind_is_refused(weight24):
    s = ops.compress24(weight24(6, 16))
    for bias in (torch.zeros(5), torch.zeros(6, 1), torch.zeros(6).int()):
        with pytest.raises(ValueError, match=r"^SparseLinear: bias must be \(6,\) of a float dtype, got \("):
            SparseLinear(s, bias)
    with pytest.raises(TypeError, match="s must be a Sparse24, got a Tensor"):
        SparseLinear(weight24(6, 16))


BROKEN = pytest.mark.parametrize(
    "how, says", [("a nibble", "got 0 in row 2, group 2"), ("a value past the end", "got a value in row 3, column 1[345]")]
)


@BROKEN
def test_a_weight_out_of_order_is_refused(how, says, dense24):
    with pytest.raises(ValueError, match=says):
        SparseLinear(broken(ops.compress24(dense24(13, 5).weight.detach()), how))


@BROKEN
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_state_dict_out_of_order_is_refused_and_changes_nothing(how, says, assign, dense24):
    model = nn.Sequential(SparseLinear.from_linear(dense24(13, 5)))
    before = copy.deepcopy(model.state_dict())
    values, meta, _ = broken(model[0].weight24, how)
    with pytest.raises(RuntimeError, match=rf"0\.: .*{says}"):
        model.load_state_dict({"0.values": values, "0.meta": meta, "0.bias": torch.zeros(5)}, assign=assign)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16()], ids=["to", "bfloat16"])
def test_a_cast_leaves_the_metadata(cast, dense24):
    sparse = cast(SparseLinear.from_linear(dense24(16, 6, integers=True)))
    assert (sparse.values.dtype, sparse.bias.dtype, sparse.meta.dtype) == (torch.bfloat16, torch.bfloat16, torch.uint8)
    want = SparseLinear.from_linear(dense24(16, 6, dtype=torch.bfloat16, integers=True))
    x = integers(3, 16, dtype=torch.bfloat16)
    assert torch.equal(sparse(x), want(x))


def test_to_meta(dense24):
    sparse = SparseLinear.from_linear(dense24(16, 6)).to("meta")
    y = sparse(torch.empty(2, 3, 16, device="meta"))
    assert y.is_meta and y.shape == (2, 3, 6)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_compiles_whole(bias, dense24):
    sparse = SparseLinear.from_linear(dense24(13, 5, bias))
    torch.compiler.reset()
    whole = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    for x in (normal(3, 13), normal(4, 13), normal(2, 4, 13)):
        assert torch.equal(whole(x), sparse(x))
    x = normal(3, 13).requires_grad_()
    trained = [x, *sparse.parameters()]
    for found, want in zip(torch.autograd.grad(whole(x).sum(), trained), torch.autograd.grad(sparse(x).sum(), trained)):
        assert torch.equal(found, want)
    torch.compiler.reset()


def test_repr(dense24):
    assert repr(SparseLinear.from_linear(dense24(13, 5, False, torch.float16))) == (
        "SparseLinear(in_features=13, out_features=5, bias=False, dtype=float16, 2:4)"
    )
    assert "bias=True, dtype=float32" in repr(SparseLinear.from_linear(dense24(13, 5)))


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_memory_is_nine_sixteenths(conv1d, dense24):
    layer = dense24(64, 48, dtype=torch.float16, conv1d=conv1d)
    sparse = SparseLinear.from_linear(layer)
    held = sum(t.untyped_storage().nbytes() for t in (sparse.values, sparse.meta))
    assert held * 16 == layer.weight.nbytes * 9 and held == nbytes24(48, 64, torch.float16)


# ---- in fragment order, as a CUDA device holds it ----


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def accelerator(request) -> str:
    """A device on which weights lie in fragment order: a CUDA one, or the CPU told to be like it."""
    if request.param == "emulated":
        request.getfixturevalue("in_fragments")
        return "cpu"
    return "cuda"


@pytest.mark.parametrize("k, n", [(128, 48), (70, 20)], ids=["even", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fragment_order_is_another_place_for_the_same_weight(k, n, dtype, dense24, accelerator):
    layer = dense24(k, n, dtype=dtype, integers=True).to(accelerator)
    sparse, s = SparseLinear.from_linear(layer), ops.compress24(layer.weight.detach())
    assert sparse.values.shape == to_fragments(s).values.shape and sparse.meta.dtype == torch.int32
    assert all(torch.equal(a, b) for a, b in zip(sparse.weight24[:2], s[:2])) and sparse.weight24.shape == (n, k)
    state = sparse.state_dict()
    assert torch.equal(state["values"], s.values) and torch.equal(state["meta"], s.meta)
    assert torch.equal(sparse.to_linear().weight, layer.weight)
    x = integers(3, k, dtype=dtype).to(accelerator)
    want = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        assert torch.equal(sparse(x), want.to(dtype))
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(other(x), sparse(x))


def test_fragment_order_reads_and_writes_canonical_files(dense24, accelerator):
    sparse = SparseLinear.from_linear(dense24(70, 20, dtype=torch.float16).to(accelerator))
    other = SparseLinear.from_linear(dense24(70, 20, dtype=torch.float16, integers=True).to(accelerator))
    for assign in (False, True):
        target = copy.deepcopy(other)
        parameter = target.values
        assert str(target.load_state_dict(sparse.state_dict(), assign=assign)) == "<All keys matched successfully>"
        assert torch.equal(target.values, sparse.values) and torch.equal(target.meta, sparse.meta)
        assert assign or target.values is parameter
    for wrong in (dense24(80, 20, dtype=torch.float16), dense24(70, 21, dtype=torch.float16)):
        with pytest.raises(RuntimeError, match="size mismatch for"):
            other.load_state_dict(SparseLinear.from_linear(wrong).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"bias": sparse.bias})


@BROKEN
def test_fragment_order_refuses_what_is_out_of_order(how, says, dense24, accelerator):
    sparse = SparseLinear.from_linear(dense24(13, 5, dtype=torch.float16).to(accelerator))
    before = sparse.values.clone()
    values, meta, _ = broken(sparse.weight24, how)
    with pytest.raises(RuntimeError, match=says):
        sparse.load_state_dict({"values": values, "meta": meta, "bias": sparse.bias})
    assert torch.equal(sparse.values, before)


def test_a_cast_out_of_fragment_order_and_back(dense24, accelerator):
    layer = dense24(70, 20, dtype=torch.float16, integers=True).to(accelerator)
    sparse = SparseLinear.from_linear(layer)
    parameter, fragments = sparse.values, sparse.values.clone()
    sparse.values.grad = torch.ones_like(sparse.values)
    sparse.float()
    assert sparse.values.shape == (20, 36) and sparse.values.dtype == torch.float32 and sparse.meta.dtype == torch.uint8
    assert torch.equal(sparse.to_linear().weight, layer.weight.float())
    sparse.half()
    assert sparse.values is parameter and torch.equal(sparse.values, fragments) and sparse.values.grad.shape == fragments.shape
    assert torch.equal(
        from_fragments(Fragments24(sparse.values.grad, sparse.meta, (20, 70))).values, torch.ones(20, 36).half().to(accelerator)
    )


def test_training_in_fragment_order(dense24, accelerator):
    layer = dense24(70, 20, dtype=torch.bfloat16, integers=True).to(accelerator)
    sparse, canonical = SparseLinear.from_linear(layer), SparseLinear.from_linear(layer.cpu())
    canonical._settle(fragments=False)
    x, upstream = integers(5, 70, dtype=torch.bfloat16), integers(5, 20, dtype=torch.bfloat16)
    for module, device in ((sparse, accelerator), (canonical, "cpu")):
        (module(x.to(device)) * upstream.to(device)).sum().backward()
    assert sparse.values.grad.shape == sparse.values.shape
    found = from_fragments(Fragments24(sparse.values.grad, sparse.meta, (20, 70))).values.cpu()
    assert torch.equal(found, canonical.values.grad) and torch.equal(sparse.bias.grad.cpu(), canonical.bias.grad)
    step = torch.optim.SGD(sparse.parameters(), lr=0.5)
    before = sparse.weight24
    step.step()
    assert torch.equal(sparse.weight24.values.cpu(), (before.values - 0.5 * canonical.values.grad.to(accelerator)).cpu())
    assert torch.equal(sparse.weight24.meta, before.meta)


def test_compiles_whole_in_fragment_order(dense24, accelerator):
    sparse = SparseLinear.from_linear(dense24(70, 20, dtype=torch.float16).to(accelerator)).requires_grad_(False)
    torch.compiler.reset()
    whole = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    for m in (3, 4, 7):
        x = normal(m, 70, dtype=torch.float16).to(accelerator)
        assert torch.equal(whole(x), sparse(x))
    torch.compiler.reset()


def test_memory_in_fragment_order(dense24, accelerator):
    layer = dense24(512, 48, dtype=torch.float16)
    sparse = SparseLinear.from_linear(layer.to(accelerator))
    held = sum(t.untyped_storage().nbytes() for t in (*sparse.parameters(), *sparse.buffers()) if t is not sparse.bias)
    assert held * 16 == layer.weight.nbytes * 9
