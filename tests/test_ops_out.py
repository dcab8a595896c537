"""out=: the ops of the 2:4 format and of masks that write to a tensor which is there already."""

import re

import pytest
import torch
from definition24 import equal, random_bits

from sparsekit import Sparse24, ops

PACKING = ("compress24", "prune_compress24")
SHAPES = [(5, 13), (3, 72), (0, 8), (4, 0)]
IDS = ["ragged", "a word and a rest", "no rows", "no columns"]


def problems(shape, device) -> dict[str, tuple[tuple, tuple[torch.Tensor, ...]]]:
    """By op: the arguments of its function, and tensors for its result that hold something else."""
    w = random_bits(shape, torch.bfloat16).to(device)
    held = ops.prune24(w)
    packed = ops.compress24(held)
    values, meta = torch.full_like(packed.values, 7), torch.full_like(packed.meta, 7)
    dense, mask = torch.full_like(w, 7), torch.ones(shape, dtype=torch.bool, device=device)
    return {
        "compress24": ((held,), (values, meta)),
        "prune_compress24": ((w, w.abs(), None), (values, meta)),
        "expand24": ((packed,), (dense,)),
        "prune24": ((w, None, mask & (torch.arange(shape[1], device=device) % 2 == 0)), (dense,)),
        "mask_nm": ((w, 2, 4, True), (mask,)),
        "mask_rows": ((w, shape[1] // 2), (mask,)),
    }


def given(op: str, shape, out):
    return Sparse24(*out, shape) if op in PACKING else out[0]


def tensors(result) -> tuple[torch.Tensor, ...]:
    return (result.values, result.meta) if isinstance(result, Sparse24) else (result,)


@pytest.mark.parametrize("op", problems((1, 4), "cpu"))
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_what_is_given_is_written_to_and_returned(op, shape, device):
    args, out = problems(shape, device)[op]
    to = given(op, shape, out)
    assert getattr(ops, op)(*args, out=to) is to
    for written, new in zip(out, tensors(getattr(ops, op)(*args)), strict=True):
        assert equal(written.cpu(), new.cpu())


@pytest.mark.parametrize("op", problems((1, 4), "cpu"))
def test_opcheck(op, device):
    args, out = problems((3, 16), device)[op]
    if op == "expand24":
        args = (args[0].values, args[0].meta, 16)
    if op == "mask_rows":
        args = (*args, True)  # checked for NaN
    torch.library.opcheck(getattr(torch.ops.sparsekit, f"{op}_out").default, (*args, *out))


@pytest.mark.parametrize("op", problems((1, 4), "cpu"))
@pytest.mark.parametrize(
    "spoil, error, text",
    [
        (lambda t: t.to(torch.float64), TypeError, "out must be torch."),
        (lambda t: t[:-1], ValueError, "out must be "),
        (lambda t: t.new_empty(t.shape[0], 2 * t.shape[1])[:, ::2], ValueError, "contiguous, got"),
    ],
    ids=["dtype", "rows", "strides"],
)
def test_another_tensor_is_refused(op, spoil, error, text):
    args, out = problems((3, 16), "cpu")[op]
    for i in range(len(out)):
        with pytest.raises(error, match=f"^{op}: .*{re.escape(text)}"):
            getattr(ops, op)(*args, out=given(op, (3, 16), [spoil(t) if j == i else t for j, t in enumerate(out)]))


@pytest.mark.parametrize("op", problems((1, 4), "cpu"))
def test_what_holds_no_result_of_the_op_is_refused(op):
    """A tuple, for one: a NamedTuple of tensors is one too, and a tensor's `values` is a method."""
    args, out = problems((3, 16), "cpu")[op]
    wrong = out[0] if op in PACKING else Sparse24(out[0], out[0], (3, 16))
    for to, kind in ((tuple(out), "tuple"), (wrong, type(wrong).__name__)):
        with pytest.raises(TypeError, match=f"^{op}: out must be a {'Sparse24' if op in PACKING else 'tensor'}, got a {kind}$"):
            getattr(ops, op)(*args, out=to)


@pytest.mark.parametrize("op", PACKING)
def test_a_form_of_another_weight_is_refused(op):
    """One column fewer has packed tensors of the same sizes."""
    args, out = problems((3, 16), "cpu")[op]
    with pytest.raises(ValueError, match=rf"^{op}: out must be of a weight \(3, 16\) as w is, got one of \(3, 15\)"):
        getattr(ops, op)(*args, out=Sparse24(*out, (3, 15)))


def test_memory_that_is_read_too_is_refused():
    room = torch.zeros(3 * 16 + 8, dtype=torch.bfloat16)
    w = room[: 3 * 16].view(3, 16)
    match = r"^prune24: out must share no memory with what is read or also written, got a tensor that does"
    for shared in (w, room[8:].view(3, 16), room[1:49].view(3, 16)):
        with pytest.raises(ValueError, match=match):
            ops.prune24(w, out=shared)
    with pytest.raises(ValueError, match=match):
        ops.prune24(torch.ones(3, 16, dtype=torch.bfloat16), scores=w, out=w)
    both = torch.zeros(200, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^compress24: out must share no memory"):
        ops.compress24(w, out=Sparse24(both[:48].view(torch.bfloat16).view(3, 8), both[47:53].view(3, 2), (3, 16)))
    beside = torch.zeros(2, 3, 16, dtype=torch.bfloat16)
    ops.prune24(beside[0], out=beside[1])  # neighbours in one storage share nothing


def test_a_gradient_is_refused():
    w, out = torch.ones(3, 16, requires_grad=True), torch.empty(3, 16)
    with pytest.raises(
        ValueError, match=r"^prune24: with out= no tensor may require a gradient, got one that does; use torch.no_grad"
    ):
        ops.prune24(w, out=out)
    with torch.no_grad():
        assert equal(ops.prune24(w, out=out), ops.prune24(w))


def test_what_the_input_must_be_is_said_all_the_same():
    w = torch.ones(3, 16)
    w[1, 5] = float("nan")
    with pytest.raises(ValueError, match=r"^prune24: w must hold no NaN, got one in row 1, column 5"):
        ops.prune24(w, out=torch.empty(3, 16))
    with pytest.raises(ValueError, match=r"^compress24: every group of four columns must hold at most two non-zeros"):
        ops.compress24(torch.ones(3, 16), out=Sparse24(torch.empty(3, 8), torch.empty(3, 2, dtype=torch.uint8), (3, 16)))


def test_one_graph():
    def function(w, out):
        ops.prune24(w, out=out)
        return out + 1

    torch.compiler.reset()
    w, out = torch.randn(3, 16), torch.empty(3, 16)
    assert equal(torch.compile(function, fullgraph=True, backend="aot_eager")(w, out), ops.prune24(w) + 1)
    assert equal(out, ops.prune24(w))


@pytest.mark.parametrize("op", ["prune24", "compress24"])
def test_a_transform_is_refused(op):
    """It would take 0 for the derivative."""
    (held,), out = problems((3, 16), "cpu")["compress24"]
    out = given(op, (3, 16), out if op in PACKING else [torch.empty_like(held)])

    def written(w):
        return tensors(getattr(ops, op)(w, out=out))[0].sum()

    for transform in (lambda: torch.func.jvp(written, (held,), (held,)), lambda: torch.func.grad(written)(held)):
        with pytest.raises(ValueError, match=f"^{op}: out= must not be given in forward mode or under torch.func"):
            transform()


def test_a_gradient_that_needs_what_was_there_is_refused():
    """Autograd is told of what is written, as of torch's own operators: without that the gradient is wrong and nothing says so."""
    x = torch.ones(3, 16, requires_grad=True)
    for op in problems((3, 16), "cpu"):
        args, out = problems((3, 16), "cpu")[op]
        before = [t._version for t in out]
        getattr(ops, op)(*args, out=given(op, (3, 16), out))
        assert all(t._version > version for t, version in zip(out, before, strict=True)), op
    exponential = x.exp()
    with torch.no_grad():
        ops.prune24(torch.ones(3, 16), out=exponential)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        exponential.sum().backward()
