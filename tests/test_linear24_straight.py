"""A plain call on a CPU goes past torch's dispatcher to the kernel. Whatever would see or change the op there still sees it, and
the results are those of the op."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekit import ops
from sparsekit.linear import SparseLinear
from sparsekit.ops import gradient
from sparsekit.ops import linear as product

OP = torch.ops.sparsekit.linear24


class Straight(Exception):
    """The dispatcher was asked."""


@pytest.fixture
def s(weight24):
    return ops.compress24(weight24(20, 48, integers=True))  # sums are exact, so every way gives the same bits


@pytest.fixture
def x():
    return torch.randint(-4, 5, (3, 48), generator=torch.Generator().manual_seed(1)).float()


@pytest.fixture
def no_dispatch(monkeypatch):
    def refuse(*_):
        raise Straight

    monkeypatch.setattr(gradient, "call", refuse)


@pytest.fixture
def no_kernel(monkeypatch):
    """The kernel that a call goes straight to, replaced: what is registered as the op's stays."""

    def refuse(*_):
        raise Straight

    monkeypatch.setattr(product, "_linear24_cpu", refuse)


def op(x, s, bias=None):
    return OP.default(x, s.values, s.meta, s.shape[1], bias, None)


def test_a_plain_call_asks_nobody(x, s, no_dispatch):
    bias = torch.randn(20)
    want = op(x, s, bias)
    assert torch.equal(ops.linear24(x, s, bias), want)
    assert torch.equal(
        ops.linear24(x, s._replace(values=torch.nn.Parameter(s.values, False)), torch.nn.Parameter(bias, False)), want
    )
    layer = SparseLinear(s, bias)
    with torch.no_grad():
        assert torch.equal(layer(x[None]), want[None])
    with torch.inference_mode():
        assert torch.equal(layer(x), want) and ops.linear24(x, s).is_inference()
    with pytest.raises(Straight):
        layer(x)  # it trains


def test_modes_see_the_op(x, s, no_kernel):
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for mode in (Dispatch, Function):
        seen.clear()
        with mode():
            assert torch.equal(ops.linear24(x, s), op(x, s))
        assert seen.count(OP.default) == 2


def test_a_subclass_sees_the_op(x, s, no_kernel):
    class Logged(torch.Tensor):
        seen = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen += func is OP.default
            return super().__torch_function__(func, types, args, kwargs or {})

    want = op(x, s)
    for given in ((x.as_subclass(Logged), s), (x, s._replace(values=s.values.as_subclass(Logged)))):
        Logged.seen = 0
        assert torch.equal(torch.Tensor(ops.linear24(*given)), want) and Logged.seen == 1


def test_a_trace_holds_the_op(x, s, no_kernel):
    graph = make_fx(lambda x: ops.linear24(x, s))(x)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [OP.default]
    assert torch.equal(graph(x + 1), op(x + 1, s))


def test_a_profile_lists_the_op(x, s, no_kernel):
    with torch.profiler.profile() as profile:
        ops.linear24(x, s)
    assert "sparsekit::linear24" in [event.key for event in profile.key_averages()]


def lazies():
    """Real tensors whose numbers are not those in their memory."""
    yield "negated later", lambda t: torch._neg_view(t)
    yield "zeros without memory", lambda t: torch._efficientzerotensor(t.shape)


@pytest.mark.parametrize("place", ["x", "values", "bias"])
@pytest.mark.parametrize("lazy", [pytest.param(make, id=name) for name, make in lazies()])
def test_what_is_not_yet_worked_out_is(lazy, place, x, s):
    given = {"x": x, "values": s.values, "bias": torch.arange(20.0)}
    late = given | {place: lazy(given[place])}
    done = given | {place: late[place].clone().resolve_neg()}
    assert late[place].is_neg() or late[place]._is_zerotensor()
    got, want = (ops.linear24(t["x"], s._replace(values=t["values"]), t["bias"]) for t in (late, done))
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "given", [(None, None), ([1.0], None), (torch.zeros(2, 48), [1.0])], ids=["none", "a list", "a list as bias"]
)
def test_what_is_no_tensor_is_refused_as_before(given, s):
    with torch.no_grad(), pytest.raises((TypeError, RuntimeError, AttributeError)) as straight:
        ops.linear24(given[0], s, given[1])
    with pytest.raises(type(straight.value)) as dispatched:
        op(given[0], s, given[1])
    assert str(straight.value) == str(dispatched.value)


# ---- how SparseLinear finds its tensors ----


def test_a_weight_that_is_no_parameter_is_used(x, s):
    """Wrappers that shard or normalise a weight take the parameter away and set a tensor by its name at each call."""
    layer = SparseLinear(s)
    del layer.values, layer.metadata
    layer.values, layer.metadata = 2 * s.values, s.meta.clone()
    assert not layer._parameters and not layer._buffers and torch.equal(layer(x), 2 * op(x, s))


def test_another_weight_in_its_place_is_used(x, s):
    layer = SparseLinear(s, requires_grad=False)
    before = layer(x)
    layer.values.data = -s.values
    assert torch.equal(layer(x), -before)
    layer.values = torch.nn.Parameter(3 * s.values, requires_grad=False)
    assert torch.equal(layer(x), 3 * before)
    layer.metadata = torch.full_like(s.meta, 0x44)
    assert torch.equal(layer(x), op(x, s._replace(values=3 * s.values, meta=layer.metadata)))
