"""SparseLinear under torch.func, torch.export and second derivatives, beside the dense layer. The numbers are small integers, so
that every sum is exact and equal means equal."""

import copy
import io
import re
from pathlib import Path

import pytest
import safetensors.torch as safetensors
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from sparsekit import Sparse24, SparseLinear, ops
from sparsekit.format import Fragments24, from_fragments
from sparsekit.linear import dense_weight

X_TRANSFORMS = {
    "vmap": lambda f, x: vmap(f)(x),
    "vmap along the second axis": lambda f, x: vmap(f, in_dims=1)(x.T.contiguous()),
    "vmap of vmap": lambda f, x: vmap(vmap(f))(torch.stack([x, -x])),
    "grad": lambda f, x: grad(lambda z: f(z).square().sum())(x),
    "grad of vmap": lambda f, x: grad(lambda z: vmap(f)(z).square().sum())(x),
    "vmap of grad": lambda f, x: vmap(grad(lambda z: f(z).square().sum()))(x),
    "vjp": lambda f, x: vjp(f, x)[1](f(x))[0],
    "jvp": lambda f, x: jvp(f, (x,), (x.sign(),))[1],
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(lambda z: f(z).square().sum())(x[0]),
    "jacrev of jacrev": lambda f, x: jacrev(jacrev(lambda z: f(z).square().sum()))(x[0]),
    "grad of grad": lambda f, x: grad(lambda z: grad(lambda y: f(y).square().sum())(z).sum())(x),
}


def squares(module, parameters, x):
    return functional_call(module, parameters, (x,)).square().sum()


P_TRANSFORMS = {
    "grad": lambda m, p, x: grad(lambda q: squares(m, q, x))(p),
    "a gradient a sample": lambda m, p, x: vmap(grad(lambda q, z: squares(m, q, z)), in_dims=(None, 0))(p, x),
    "grad of vmap": lambda m, p, x: grad(lambda q: vmap(lambda z: squares(m, q, z))(x).sum())(p),
    "grad of a gradient of x": lambda m, p, x: grad(lambda q: grad(lambda z: squares(m, q, z))(x).sum())(p),
    "vjp": lambda m, p, x: vjp(lambda q: functional_call(m, q, (x,)), p)[1](torch.ones(len(x), m.out_features, dtype=x.dtype))[0],
    "jacfwd": lambda m, p, x: jacfwd(lambda q: squares(m, q, x))(p),
}


@pytest.fixture(params=["canonical", "in fragments"])
def layers(request, dense24):
    """A function (seed) -> a dense layer of -1, 0 and 1 and a sparse one that holds the same, in either order."""

    def make(seed: int = 0):
        layer = dense24(20, 6, dtype=torch.float32, integers=True)
        torch.manual_seed(seed)
        with torch.no_grad():
            layer.weight.copy_(ops.prune24(layer.weight.clamp(-1, 1)[torch.randperm(6)]))
            layer.bias.copy_(torch.randint(-2, 3, (6,)))
        if request.param == "in fragments":
            request.getfixturevalue("in_fragments")
            layer.half()
        return layer, SparseLinear.from_linear(layer)

    return make


def ternary(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def written_out(sparse: SparseLinear, values: torch.Tensor) -> torch.Tensor:
    """The dense gradient whose kept places `values` holds, zeros elsewhere."""
    if sparse.meta.dtype == torch.int32:
        values = from_fragments(Fragments24(values, sparse.meta, (6, 20))).values
    return ops.expand24(Sparse24(values.contiguous(), sparse.weight24.meta, (6, 20)))


def check_gradients(sparse, found, dense):
    ones = written_out(sparse, torch.ones_like(sparse.values.detach()))
    one_by_one = found["values"].reshape(-1, *sparse.values.shape)
    wanted = dense["weight"].reshape(-1, 6, 20) * ones
    assert torch.equal(torch.stack([written_out(sparse, v) for v in one_by_one]), wanted)
    assert torch.equal(found["bias"], dense["bias"]) and found["bias"].abs().sum() > 0 < wanted.abs().sum()


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("transform", X_TRANSFORMS)
def test_transforms_of_the_input(transform, trained, layers):
    """Frozen too: then nothing but a transform tells that a derivative is wanted."""
    layer, sparse = layers()
    layer.requires_grad_(trained), sparse.requires_grad_(trained)
    x = ternary(3, 20, dtype=layer.weight.dtype)
    found, want = (X_TRANSFORMS[transform](module, x) for module in (sparse, layer))
    assert torch.equal(found, want) and found.dtype == x.dtype and want.abs().sum() > 0


@pytest.mark.parametrize("transform", P_TRANSFORMS)
def test_transforms_of_the_parameters(transform, layers):
    layer, sparse = layers()
    x = ternary(3, 20, dtype=layer.weight.dtype)
    found, dense = (P_TRANSFORMS[transform](m, {name: p.detach() for name, p in m.named_parameters()}, x) for m in (sparse, layer))
    check_gradients(sparse, found, dense)


def test_an_ensemble_under_vmap_trains(layers):
    """The weights are the batch, and require gradients outside of vmap."""
    pairs = [layers(seed) for seed in (0, 1)]
    x = ternary(3, 20, dtype=pairs[0][0].weight.dtype)
    results = []
    for members in zip(*pairs, strict=True):
        parameters, buffers = stack_module_state(list(members))
        base = copy.deepcopy(members[0]).to("meta")
        y = vmap(lambda p, b, base=base: functional_call(base, (p, b), (x,)))(parameters, buffers)
        y.square().sum().backward()
        results.append((y, parameters))
    (want, dense), (found, stacked) = results
    assert torch.equal(found, want) and not torch.equal(want[0], want[1])
    for i, (_, sparse) in enumerate(pairs):
        check_gradients(sparse, {name: p.grad[i] for name, p in stacked.items()}, {name: p.grad[i] for name, p in dense.items()})


def test_autograd_goes_through_vmap_where_the_layer_is_frozen(layers):
    layer, sparse = layers()
    found, want = (ternary(3, 20, dtype=layer.weight.dtype).requires_grad_() for _ in range(2))
    vmap(sparse.requires_grad_(False))(found).square().sum().backward()
    layer(want).square().sum().backward()
    assert torch.equal(found.grad, want.grad)


@pytest.mark.parametrize("transform", ["vmap", "grad", "a gradient a sample"])
def test_compiled_transforms(transform, layers):
    """torch.compile does not see that a gradient is wanted inside of a transform: without care it is zero."""
    layer, sparse = layers()
    x = ternary(3, 20, dtype=layer.weight.dtype)
    torch.compiler.reset()
    if transform in X_TRANSFORMS:
        whole = torch.compile(lambda z: X_TRANSFORMS[transform](sparse, z), fullgraph=True, backend="aot_eager")
        assert torch.equal(whole(x), X_TRANSFORMS[transform](layer, x))
    else:
        p = {name: p.detach() for name, p in sparse.named_parameters()}
        dense = P_TRANSFORMS[transform](layer, {name: p.detach() for name, p in layer.named_parameters()}, x)
        whole = torch.compile(lambda q, z: P_TRANSFORMS[transform](sparse, q, z), fullgraph=True, backend="aot_eager")
        check_gradients(sparse, whole(p, x), dense)
    torch.compiler.reset()


def test_functional_call_takes_a_state_dict(layers):
    (layer, sparse), (other, _) = layers(0), layers(1)
    x = ternary(3, 20, dtype=layer.weight.dtype)
    before = sparse.meta
    state = SparseLinear.from_linear(other)
    given = {"values": state.values, "meta": state.meta, "bias": state.bias}
    assert torch.equal(functional_call(sparse, given, (x,)), other(x)) and sparse.meta is before
    assert torch.equal(functional_call(sparse, dict(state.named_parameters()) | dict(state.named_buffers()), (x,)), other(x))


@pytest.mark.parametrize("trained", ["x", "values", "bias"])
def test_second_derivatives(trained, layers):
    layer, sparse = layers()
    x, upstream = ternary(3, 20, dtype=layer.weight.dtype), ternary(3, 6, dtype=layer.weight.dtype)
    results = []
    for module in (sparse, layer):
        z = x.clone().requires_grad_()
        (first,) = torch.autograd.grad((module(z).square() * upstream).sum(), z, create_graph=True)
        of = {"x": z, "values": next(module.parameters()), "bias": module.bias}[trained]
        (second,) = torch.autograd.grad(first.sum(), of)
        results.append(second)
    found, want = results
    if trained == "values":
        want, found = want * written_out(sparse, torch.ones_like(sparse.values.detach())), written_out(sparse, found)
    assert torch.equal(found, want) and want.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")
def test_gradgradcheck(weight24):
    """Two of the three operands of a product of small integers: a step of 1 gives a bilinear function's slopes exactly."""
    s, x = ops.compress24(weight24(4, 11, integers=True)), ternary(2, 11, dtype=torch.float32)

    def function(z, values):
        return ops.linear24(z, Sparse24(values, s.meta, s.shape))

    given = (x.requires_grad_(), s.values.clone().requires_grad_())
    upstream = ternary(2, 4, dtype=torch.float32).requires_grad_()
    assert torch.autograd.gradgradcheck(function, given, upstream, eps=1.0, atol=0, rtol=0)


@pytest.mark.parametrize("dims", [(0, 0), (None, 0), (1, None)], ids=str)
def test_every_op_is_batched_by_vmap(dims, weight24):
    """One result, two results, and a batch along any axis; an empty batch has no result whose sizes are known."""
    a = torch.stack([weight24(4, 16, seed=seed) for seed in (1, 2)], 1 if dims[0] == 1 else 0)
    each = [a.select(1 if dims[0] == 1 else 0, i) for i in (0, 1)]
    if dims[0] is not None:
        values, meta, _ = (torch.stack(t) if i < 2 else t for i, t in enumerate(zip(*map(ops.compress24, each), strict=True)))
        found = vmap(torch.ops.sparsekit.compress24, in_dims=dims[0])(a)
        assert torch.equal(found[0], values) and torch.equal(found[1], meta)
    scores = torch.stack([w.abs() for w in each])
    found = vmap(lambda w, s: torch.ops.sparsekit.prune24(w, s, None), in_dims=(None, 0))(each[0], scores)
    assert torch.equal(found, torch.stack([ops.prune24(each[0], scores=s) for s in scores]))
    with pytest.raises(ValueError, match="must hold one or more, got none"):
        vmap(torch.ops.sparsekit.compress24)(torch.zeros(0, 4, 16))


def test_forward_mode_refuses_what_others_do(layers):
    layer, sparse = layers()
    wrong = ternary(3, 21, dtype=layer.weight.dtype)
    with pytest.raises(ValueError, match="the last dimension of x must be k = 20"):
        jvp(sparse, (wrong,), (wrong,))
    with pytest.raises(TypeError, match="x and values must be one of"):
        jvp(sparse, (wrong[:, :20].double(),), (wrong[:, :20].double(),))


def test_the_page_runs():
    """docs/linear.md: its code, in order, and what it says of the shapes."""
    names: dict = {}
    page = (Path(__file__).resolve().parents[1] / "docs/linear.md").read_text(encoding="utf-8")
    for block in re.findall(r"(?m)^```python\n(.*?)^```", page, re.S):
        exec(block, names)
    sparse, x, y, layer = (names[name] for name in ("sparse", "x", "y", "layer"))
    assert names["each"]["values"].shape == (len(x), *sparse.values.shape) == (8, 256, 512)
    assert torch.allclose(y, layer(x), rtol=2**-7, atol=2**-7) and sparse.values.grad.shape == sparse.values.shape


# ---- exported ----


@pytest.mark.parametrize("root", [True, False], ids=["root", "inside"])
def test_export(root, layers):
    """Also as the root, whose module has a ``meta`` of its own; any number of tokens."""
    layer, sparse = layers()
    model = sparse if root else nn.Sequential(sparse, nn.ReLU())
    x = ternary(3, 20, dtype=layer.weight.dtype)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=64)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for found in (program, torch.export.load(file)):
        for m in (3, 7):
            x = ternary(m, 20, dtype=layer.weight.dtype)
            assert torch.equal(found.module()(x), model(x))
    assert not any("expand" in str(node.target) for node in program.graph.nodes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_holds_the_op_and_is_refused_where_it_would_lose_gradients(layers):
    layer, sparse = layers()
    x = ternary(3, 20, dtype=layer.weight.dtype)
    with torch.no_grad():
        traced = torch.jit.trace(sparse, (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    more = ternary(7, 20, dtype=layer.weight.dtype)
    assert torch.equal(torch.jit.load(file)(more), sparse(more)) and torch.equal(traced(more), sparse(more))
    with pytest.raises(RuntimeError, match=r"linear24: torch\.jit\.trace must run under torch\.no_grad\(\), got gradients on"):
        torch.jit.trace(sparse, (x,))
    assert torch.equal(torch.jit.trace(sparse.requires_grad_(False), (x,))(more), sparse(more))


def test_the_metadata_are_saved_under_their_name(layers, tmp_path):
    _, sparse = layers()
    assert list(sparse.state_dict()) == ["values", "bias", "meta"] and [name for name, _ in sparse.named_buffers()] == ["metadata"]
    assert dense_weight(sparse.to_linear()).equal(ops.expand24(sparse.weight24))
    other = copy.deepcopy(sparse)
    safetensors.save_model(sparse, str(tmp_path / "layer.safetensors"))
    with torch.no_grad():
        other.values.zero_(), other.meta.fill_(0x44)
    assert safetensors.load_model(other, str(tmp_path / "layer.safetensors")) == (set(), [])
    assert torch.equal(other.values, sparse.values) and torch.equal(other.meta, sparse.meta)
    other.meta = other.meta.clone()
    assert other.meta is other.metadata and torch.equal(other.meta, sparse.meta)
