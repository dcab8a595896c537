"""prune24, prune_compress24, validate24, mask_nm and mask_rows, and their reference, against tests/definition24.py; and what they
refuse. compress24 and expand24 have test_format.py; each kernel has a test file of its own."""

import re
import time

import pytest
import torch
from definition24 import (
    DTYPES,
    FLOATS,
    NIBBLES,
    NOTHING,
    SCORES,
    VIEWS,
    as_bits,
    check,
    drop,
    equal,
    few_values,
    keep_nm,
    keep_rows,
    nonzero_groups,
    pack_largest,
    pack_masked,
    pack_scored,
    random_bits,
    unpack,
    viewed,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit import Sparse24, ops, reference

SHAPES = [(1, 4), (5, 13), (3, 14), (3, 7), (7, 72), (2, 135), (0, 8), (3, 0), (0, 0)]
IDS = ["one group", "a last group of one", "of two", "of three", "past 64 columns", "past 128", "no rows", "no columns", "nothing"]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=IDS)


def name(case) -> str:
    return str(case).removeprefix("torch.")


def both(op: str, device, *args):
    """What the op gives on the device and what the reference gives on the CPU, as lists of tensors."""
    there = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    for found in (getattr(torch.ops.sparsekit, op).default(*there), getattr(reference, op)(*args)):
        yield [found] if isinstance(found, torch.Tensor) else list(found)


# ---- values ----


@EVERY_SHAPE
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_the_two_largest_stay(shape, dtype, device):
    for w in (random_bits(shape, dtype), few_values(shape, dtype)):
        values, meta = pack_largest(w)
        for found in both("prune_compress24", device, w, None, None):
            assert equal(found[0], values) and equal(found[1], meta)
        for found in both("prune24", device, w, None, None):
            assert equal(found[0], unpack(values, meta, shape[1])) and found[0].is_contiguous()


@pytest.mark.parametrize("scores_dtype", SCORES, ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=name)
def test_the_two_that_score_highest_stay(scores_dtype, dtype, device):
    for shape in [(6, 16), (5, 13), (3, 71), (4, 200)]:
        w = random_bits(shape, dtype, seed=2)
        for scores in (random_bits(shape, scores_dtype, seed=3), few_values(shape, scores_dtype, seed=4)):
            values, meta = pack_scored(w, scores)
            for found in both("prune_compress24", device, w, scores, None):
                assert equal(found[0], values) and equal(found[1], meta)
            for found in both("prune24", device, w, scores, None):
                assert equal(found[0], unpack(values, meta, shape[1]))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int8], ids=name)
@pytest.mark.parametrize("per_group", [2, 1], ids=["full", "under-full"])
def test_what_a_mask_names_stays(mask_dtype, per_group, device):
    # Also where it names a zero, and nothing that it drops comes back where a group has to be filled up.
    for shape in [(6, 16), (5, 13), (3, 71), (4, 200)]:
        w = few_values(shape, torch.float16, seed=5)
        mask = nonzero_groups(torch.ones(shape, dtype=torch.uint8), per_group).to(mask_dtype)
        values, meta = pack_masked(w, mask)
        for found in both("prune_compress24", device, w, None, mask):
            assert equal(found[0], values) and equal(found[1], meta)
        for found in both("prune24", device, w, None, mask):
            assert equal(found[0], unpack(values, meta, shape[1]))


@pytest.mark.parametrize("how", VIEWS)
@pytest.mark.parametrize("by", ["weight", "scores", "mask"])
def test_layouts(how, by, device):
    for shape in [(70, 66), (5, 24), (1, 8), (8, 1)]:
        w, scores = random_bits(shape, torch.bfloat16), few_values(shape, torch.float32, seed=1)
        mask = nonzero_groups(torch.ones(shape, dtype=torch.uint8), 2)
        w, scores, mask = (viewed(t, how, device) for t in (w, scores, mask))
        chosen = {"weight": {}, "scores": {"scores": scores}, "mask": {"mask": mask}}[by]
        plain = {key: t.cpu().contiguous() for key, t in chosen.items()}
        s, want = ops.prune_compress24(w, **chosen), ops.prune_compress24(w.cpu().contiguous(), **plain)
        assert equal(s.values, want.values) and equal(s.meta, want.meta) and s.shape == shape
        assert equal(ops.prune24(w, **chosen), ops.expand24(want))
        assert torch.equal(ops.mask_nm(scores, 3, 5).cpu(), ops.mask_nm(scores.cpu().contiguous(), 3, 5))
        kept = shape[1] // 2
        assert torch.equal(ops.mask_rows(scores, kept).cpu(), ops.mask_rows(scores.cpu().contiguous(), kept))


@EVERY_SHAPE
@pytest.mark.parametrize("n, m", [(0, 1), (1, 1), (2, 4), (1, 4), (4, 8), (3, 7), (16, 32), (31, 32), (0, 4), (4, 4)])
@pytest.mark.parametrize("pairs", [False, True], ids=["columns", "pairs"])
def test_mask_nm(shape, n, m, pairs, device):
    for dtype in SCORES if shape == (5, 13) else [torch.float32, torch.bfloat16]:
        for scores in (few_values(shape, dtype), random_bits(shape, dtype, seed=1)):
            if pairs and dtype.is_floating_point:
                scores = torch.where(scores.double().isinf(), 1.0, scores.double()).to(dtype)  # two of them may have no sum
            for found in both("mask_nm", device, scores, n, m, pairs):
                assert found[0].dtype == torch.bool and found[0].is_contiguous()
                assert torch.equal(found[0].cpu(), keep_nm(scores, n, m, pairs) != 0)


@EVERY_SHAPE
@pytest.mark.parametrize("dtype", SCORES, ids=name)
def test_mask_rows(shape, dtype, device):
    for scores in (few_values(shape, dtype), random_bits(shape, dtype, seed=1)):
        for kept in sorted({0, shape[1] // 3, shape[1]}):
            there = scores.to(device)
            for found in (ops.mask_rows(there, kept), ops.mask_rows(there, kept, check=False), reference.mask_rows(scores, kept)):
                assert torch.equal(found.cpu(), keep_rows(scores, kept) != 0)


def test_a_nan_that_is_not_checked_for(device):
    """The rows without one are kept as ever."""
    scores = few_values((4, 70), torch.float32)
    scores[2, 5] = torch.nan
    found, rest = ops.mask_rows(scores.to(device), 30, check=False).cpu(), [0, 1, 3]
    assert torch.equal(found[rest], keep_rows(scores[rest], 30) != 0)


@pytest.mark.parametrize("k", [72, 70, 65, 1, 0])
def test_validate24(k, device):
    s = ops.prune_compress24(random_bits((9, k), torch.float16).to(device))
    ops.validate24(s)
    assert torch.ops.sparsekit.validate24.default(*s[:2], k).tolist() == [NOTHING, NOTHING]
    if k:
        values, meta = s.values.clone(), s.meta.clone()
        meta[4, -1] = 0x40  # 0 is no nibble
        values[7] = 1.0  # not zero in what is past k, either
        want = check(values.cpu(), meta.cpu(), k)
        assert torch.ops.sparsekit.validate24.default(values, meta, k).tolist() == want
        bad = Sparse24(values, meta, (9, k))
        with pytest.raises(ValueError) as said:
            bad.validate()
        with pytest.raises(ValueError, match=re.escape(str(said.value))):
            ops.validate24(bad)
    for call in (ops.validate24, ops.expand24):
        with pytest.raises(ValueError, match="values must have the 8 rows of shape, got 9"):
            call(Sparse24(s.values, s.meta, (8, k)))
        with pytest.raises(ValueError, match="shape must be"):
            call(Sparse24(s.values, s.meta, (9, k, 1)))


@pytest.mark.parametrize("bad", [None, "nibble", "value"])
def test_validate24_of_strided_tensors(bad):
    s = ops.prune_compress24(random_bits((9, 70), torch.float16))
    meta, values = s.meta.clone(), s.values.clone()
    if bad == "nibble":
        meta[5, 3] = 0xF4
    if bad == "value":
        meta[6, -1], values[6, -1] = 0xD4, 1.0  # group 17 keeps column 71 of 70
    apart = Sparse24(values.T.contiguous().T, torch.stack((meta, meta), -1)[..., 0], (9, 70))
    assert not apart.values.is_contiguous() and not apart.meta.is_contiguous()
    status = torch.ops.sparsekit.validate24.default(apart.values, apart.meta, 70).tolist()
    assert status == check(values, meta, 70)
    assert (status == [NOTHING, NOTHING]) == (bad is None)


# ---- gradients ----


def slots(s: Sparse24) -> torch.Tensor:
    """The column of every stored value."""
    nibbles = torch.stack([s.meta & 15, s.meta >> 4], -1).flatten(1)
    return (torch.stack([nibbles & 3, nibbles >> 2], -1) + 4 * torch.arange(nibbles.shape[1])[:, None]).flatten(1)


@pytest.mark.parametrize("by", ["weight", "scores", "mask"])
@pytest.mark.parametrize("k", [16, 13])
def test_gradients(by, k):
    w = few_values((5, k), torch.float32).requires_grad_()
    mask = nonzero_groups(torch.ones(5, k, dtype=torch.bool), 1)
    chosen = {"weight": {}, "scores": {"scores": few_values((5, k), torch.float32, seed=1)}, "mask": {"mask": mask}}[by]
    s = ops.prune_compress24(w.detach(), **chosen)
    kept = torch.zeros(5, 16, dtype=torch.bool).scatter(1, slots(s), True)[:, :k]
    if by == "mask":
        kept &= mask  # what fills up a group is not kept
    upstream = torch.arange(5 * k).view(5, k).float() + 1
    (found,) = torch.autograd.grad((ops.prune24(w, **chosen) * upstream).sum(), w)
    assert torch.equal(found, torch.where(kept, upstream, 0))
    packed = torch.nn.functional.pad(upstream, (0, 16 - k)).gather(1, slots(s))
    (found,) = torch.autograd.grad((ops.prune_compress24(w, **chosen).values * packed).sum(), w)
    assert torch.equal(found, torch.where(kept, upstream, 0))


def test_gradients_of_the_packed_form():
    s = ops.prune_compress24(random_bits((5, 13), torch.float32))
    values, upstream = s.values.clone().requires_grad_(), torch.arange(65).view(5, 13).float() + 1
    (found,) = torch.autograd.grad((ops.expand24(s._replace(values=values)) * upstream).sum(), values)
    assert torch.equal(found, torch.nn.functional.pad(upstream, (0, 3)).gather(1, slots(s)))
    w = ops.expand24(s).requires_grad_()
    (found,) = torch.autograd.grad((ops.compress24(w).values * found).sum(), w)
    assert torch.equal(found, ops.expand24(s._replace(values=torch.nn.functional.pad(upstream, (0, 3)).gather(1, slots(s)))))
    assert not ops.compress24(w).meta.requires_grad and not ops.mask_nm(w, 2, 4).requires_grad


@pytest.mark.parametrize("dtype", [dtype for dtype in FLOATS if dtype != torch.float32], ids=name)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_every_dtype(dtype, masked):
    """Those of fp32 above: small integers, which every dtype holds."""
    w = few_values((5, 16), torch.float32)
    mask = nonzero_groups(torch.ones(5, 16, dtype=torch.bool), 1) if masked else None
    for call in (
        lambda w: ops.prune24(w, mask=mask),
        lambda w: ops.prune_compress24(w, mask=mask).values,
        lambda w: ops.compress24(ops.prune24(w, mask=mask)).values,
        lambda w: ops.expand24(ops.prune_compress24(w, mask=mask)),
    ):
        found, want = w.to(dtype).requires_grad_(), w.clone().requires_grad_()
        for x in (found, want):
            call(x).float().square().sum().backward()
        assert found.grad.dtype == dtype and torch.equal(found.grad.float(), want.grad)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_gradients_under_compile(backend):
    w = few_values((6, 24), torch.float32).requires_grad_()
    torch.compiler.reset()
    whole = torch.compile(lambda w: (ops.prune24(w) ** 2).sum(), fullgraph=True, backend=backend)
    assert torch.equal(torch.autograd.grad(whole(w), w)[0], 2 * ops.prune24(w.detach()))
    torch.compiler.reset()


@pytest.mark.parametrize("by", ["weight", "scores", "mask"])
@pytest.mark.parametrize("k", [16, 13])
def test_transforms(by, k):
    """torch.func and forward mode find what the columns that are kept give: nothing else, and not a silent zero."""
    w, along = few_values((5, k), torch.float32), torch.arange(5 * k).view(5, k).float() + 1
    mask = nonzero_groups(torch.ones(5, k, dtype=torch.bool), 1)
    chosen = {"weight": {}, "scores": {"scores": few_values((5, k), torch.float32, seed=1)}, "mask": {"mask": mask}}[by]
    kept = torch.zeros(5, 16, dtype=torch.bool).scatter(1, slots(ops.prune_compress24(w, **chosen)), True)[:, :k]
    if by == "mask":
        kept &= mask
    pruned = ops.prune24(w, **chosen)
    for call in (
        lambda w: ops.prune24(w, **chosen),
        lambda w: ops.expand24(ops.prune_compress24(w, **chosen)),
    ):
        found, tangent = torch.func.jvp(call, (w,), (along,))
        assert equal(found, pruned) and found.is_contiguous() and torch.equal(tangent, torch.where(kept, along, 0))
        with torch.autograd.forward_ad.dual_level():
            dual = call(torch.autograd.forward_ad.make_dual(w, along))
            assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, torch.where(kept, along, 0))
        gradient = torch.func.grad(lambda w, call=call: (call(w) * along).sum())(w)
        assert torch.equal(gradient, torch.where(kept, along, 0))
        assert equal(torch.func.vmap(call)(torch.stack([w, w])), torch.stack([pruned, pruned]))
    held = ops.prune24(w)
    packed = ops.compress24(held)
    found, tangent = torch.func.jvp(lambda w: ops.compress24(w).values, (held,), (along,))
    assert equal(found, packed.values) and torch.equal(
        tangent, torch.nn.functional.pad(along, (0, 16 - k)).gather(1, slots(packed))
    )


def test_transforms_refuse_what_the_ops_refuse():
    nan = torch.full((3, 8), torch.nan)
    for op in (ops.prune24, ops.prune_compress24, ops.compress24):
        with pytest.raises(ValueError, match=f"^{op.__name__}: w must hold no NaN, got one in row 0, column 0"):
            torch.func.jvp(lambda w, op=op: op(w)[0], (nan,), (nan,))
    s = ops.prune_compress24(torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"^expand24: for k = 16 values must be \(n, 8\)"):
        torch.func.vmap(lambda v: ops.expand24(s._replace(values=v, shape=(3, 16))))(torch.stack([s.values]))


# ---- properties ----


@st.composite
def weights(draw):
    make = draw(st.sampled_from([random_bits, few_values]))
    shape = (draw(st.integers(0, 7)), draw(st.integers(0, 140)))
    return make(shape, draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 2**31)))


@settings(max_examples=60)
@given(weights(), st.randoms(use_true_random=False))
def test_properties_of_the_form(w, chance):
    s = ops.prune_compress24(w)
    ops.validate24(s)
    assert set(torch.stack([s.meta & 15, s.meta >> 4]).flatten().tolist()) <= set(NIBBLES.values())
    held = ops.expand24(s)
    assert equal(held, ops.prune24(w))
    again = ops.compress24(held)
    assert again.shape == s.shape and equal(ops.expand24(again), held)
    twice = ops.compress24(ops.expand24(again))
    assert equal(twice.values, again.values) and equal(twice.meta, again.meta)
    assert equal(ops.prune24(held), held)
    rows = torch.tensor(chance.sample(range(len(w)), len(w)), dtype=torch.int64)
    raw = w.view(torch.uint8) if w.dtype.itemsize == 1 else w
    moved = ops.prune_compress24(raw[rows].view(w.dtype))
    assert equal(moved.meta, s.meta[rows])
    assert equal(ops.expand24(moved), (held.view(raw.dtype)[rows]).view(w.dtype))


@settings(max_examples=60)
@given(weights(), st.data())
def test_a_mask_keeps_exactly_n_and_none_that_scores_less(scores, data):
    m = data.draw(st.integers(1, 32))
    n = data.draw(st.integers(0, m))
    mask = ops.mask_nm(scores, n, m)
    for start in range(0, scores.shape[1], m):
        kept, group = mask[:, start : start + m], scores[:, start : start + m].double()
        assert (kept.sum(1) == min(n, group.shape[1])).all()
        least, most = group.masked_fill(~kept, float("inf")).amin(1), group.masked_fill(kept, -float("inf")).amax(1)
        assert (least >= most).all()


@settings(max_examples=60)
@given(weights())
def test_the_ways_to_prune_agree(w):
    mask = ops.mask_nm(w.double().abs(), 2, 4)
    by_weight, by_scores, by_mask = ops.prune24(w), ops.prune24(w, scores=w.double().abs()), ops.prune24(w, mask=mask)
    assert equal(by_scores, by_weight) and equal(by_mask, by_weight)


# ---- what torch checks of an op ----


@pytest.mark.parametrize("shape", [(3, 16), (2, 13), (0, 8), (4, 0)], ids=["even", "ragged", "no rows", "no columns"])
def test_opcheck(shape, device):
    w, scores = random_bits(shape, torch.bfloat16).to(device), few_values(shape, torch.float32).to(device)
    mask = ops.mask_nm(scores, 2, 4)
    for chosen in ((None, None), (scores, None), (None, mask)):
        torch.library.opcheck(torch.ops.sparsekit.prune24.default, (w, *chosen))
        torch.library.opcheck(torch.ops.sparsekit.prune_compress24.default, (w.T.contiguous().T, *chosen))
    learnt = few_values(shape, torch.float32, seed=2).to(device).requires_grad_()
    for chosen in ((None, None), (scores, None), (None, mask)):
        torch.library.opcheck(torch.ops.sparsekit.prune24.default, (learnt, *chosen))
        torch.library.opcheck(torch.ops.sparsekit.prune_compress24.default, (learnt, *chosen))
    held = ops.prune24(learnt).detach().requires_grad_()
    torch.library.opcheck(torch.ops.sparsekit.compress24.default, (held,))
    packed = ops.compress24(held.detach())
    torch.library.opcheck(torch.ops.sparsekit.expand24.default, (packed.values.requires_grad_(), packed.meta, shape[1]))
    torch.library.opcheck(torch.ops.sparsekit.mask_nm.default, (scores, 2, 4, False))
    torch.library.opcheck(torch.ops.sparsekit.mask_nm.default, (scores.T.contiguous().T, 1, 3, True))
    torch.library.opcheck(torch.ops.sparsekit.mask_rows.default, (scores, shape[1] // 2, True))
    s = ops.prune_compress24(w)
    torch.library.opcheck(torch.ops.sparsekit.validate24.default, (s.values, s.meta, shape[1]))


def test_one_graph_for_every_weight():
    def function(w, scores):
        s = ops.prune_compress24(w, scores)
        return ops.prune24(w, scores), ops.expand24(s), ops.mask_nm(scores, 2, 4), ops.mask_rows(scores, 3)

    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((6, 13), (9, 24), (5, 18)):
        w, scores = random_bits(shape, torch.float16), random_bits(shape, torch.float32)
        for found, want in zip(whole(w, scores), function(w, scores)):
            assert equal(found, want)
    assert counter.frame_count == 1
    torch.compiler.reset()


# ---- what is refused ----


def refusals():
    w, ones = torch.zeros(3, 10), torch.ones(3, 10, dtype=torch.bool)
    nan = torch.zeros(3, 10)
    nan[1, 7] = nan[2, 0] = torch.nan
    over = torch.zeros(3, 10, dtype=torch.bool)
    over[1, 4:7] = over[2] = True
    tail = torch.zeros(3, 11, dtype=torch.bool)
    tail[2, 8:] = True
    for op in ("prune24", "prune_compress24"):
        yield op, (w.double(),), TypeError, "w must be one of .*torch.int8, got torch.float64"
        yield op, (w[0],), ValueError, r"w must be \(out_features, in_features\), got shape \(10,\)"
        yield op, (w, w, ones), ValueError, "at most one of scores and mask must be given, got both"
        yield op, (w, w.int()), TypeError, "scores must be one of .*torch.float8_e5m2, got torch.int32"
        yield op, (w, None, w), TypeError, "mask must be one of torch.bool, torch.uint8 and torch.int8, got torch.float32"
        yield op, (w, w[:2]), ValueError, r"scores must be \(3, 10\) on cpu as w is, got \(2, 10\) on cpu"
        yield op, (w, None, ones.T), ValueError, r"mask must be \(3, 10\) on cpu as w is, got \(10, 3\) on cpu"
        yield op, (w, w.to("meta")), ValueError, r"scores must be \(3, 10\) on cpu as w is, got \(3, 10\) on meta"
        yield op, (nan,), ValueError, "w must hold no NaN, got one in row 1, column 7"
        yield op, (w, nan), ValueError, "scores must hold no NaN, got one in row 1, column 7"
        yield op, (w, None, over), ValueError, "mask must keep at most two of every four columns, got 3 in row 1, columns 4 to 7"
        yield op, (tail.half(), None, tail), ValueError, "of every four columns, got 3 in row 2, columns 8 to 10"
    yield "mask_nm", (w.int(), 2, 4), TypeError, "scores must be one of .*, got torch.int32"
    yield "mask_nm", (w[0], 2, 4), ValueError, r"scores must be \(rows, columns\), got shape \(10,\)"
    for n, m in ((5, 4), (-1, 4), (0, 0), (2, 33)):
        yield "mask_nm", (w, n, m), ValueError, f"0 <= n <= m and 1 <= m <= 32, got n = {n}, m = {m}"
    yield "mask_nm", (nan, 2, 4), ValueError, "scores must hold no NaN, got one in row 1, column 7"
    lost = torch.zeros(3, 10)
    lost[2, 6], lost[2, 7] = torch.inf, -torch.inf
    yield "mask_nm", (lost, 2, 4, True), ValueError, "must have a sum, got inf and -inf in row 2, columns 6 and 7"
    yield "mask_rows", (w.int(), 2), TypeError, "scores must be one of .*, got torch.int32"
    yield "mask_rows", (w[0], 2), ValueError, r"scores must be \(rows, columns\), got shape \(10,\)"
    for kept in (-1, 11):
        yield "mask_rows", (w, kept), ValueError, f"kept must be from 0 to the 10 columns of scores, got {kept}"
    yield "mask_rows", (nan, 3), ValueError, "scores must hold no NaN, got one in row 1, column 7"


@pytest.mark.parametrize("op, args, error, text", [pytest.param(*c, id=f"{c[0]} {i}") for i, c in enumerate(refusals())])
def test_refusals(op, args, error, text):
    with pytest.raises(error, match=f"^{op}: .*{text}"):
        getattr(ops, op)(*args)
    if "NaN" in text or "got 3" in text or "sum" in text or "meta" in text:
        return  # a fake has no data to refuse
    with pytest.raises(error, match=f"^{op}: .*{text.replace('cpu', 'meta')}"):
        getattr(ops, op)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("pattern", ["quiet", "negative", "smallest", "all ones"])
def test_every_nan_is_found(dtype, pattern):
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    top = torch.tensor(torch.nan, dtype=torch.float32).to(dtype).view(kind)
    sign = torch.tensor(1 << (8 * dtype.itemsize - 1), dtype=torch.int64).to(kind)
    inf = torch.tensor([448.0 if dtype == torch.float8_e4m3fn else torch.inf]).to(dtype).view(kind)[0]
    bits = {
        "quiet": top,
        "negative": top | sign,
        "smallest": inf + 1,
        "all ones": torch.full_like(top, -1 if kind != torch.uint8 else 255),
    }
    w = torch.zeros(5, 77, dtype=kind)
    w[3, 76] = bits[pattern]
    w = w.view(dtype)
    assert w.double().isnan().sum() == 1
    for call in (ops.compress24, ops.prune24, lambda t: ops.mask_nm(t, 2, 4), lambda t: ops.mask_rows(t, 5)):
        with pytest.raises(ValueError, match="no NaN, got one in row 3, column 76"):
            call(w)


@pytest.mark.parametrize("op", ["prune24", "prune_compress24"])
def test_the_first_row_with_a_nan_is_named_whichever_has_it(op):
    """The weight's where both have one there; the op and its reference say the same."""
    w, scores = torch.ones(6, 16), torch.ones(6, 16)
    w[4, 1] = scores[2, 9] = scores[4, 0] = float("nan")
    for call in (getattr(ops, op), getattr(reference, op)):
        with pytest.raises(ValueError, match=f"^{op}: scores must hold no NaN, got one in row 2, column 9"):
            call(w, scores, None)
        with pytest.raises(ValueError, match=f"^{op}: w must hold no NaN, got one in row 4, column 1"):
            call(w, scores.nan_to_num(1.0).where(torch.arange(6)[:, None] != 4, float("nan")), None)


def test_a_large_weight_compresses_in_less_than_a_second():
    """Llama-2-7B's down_proj; no loop of Python goes over 11 million groups in that time."""
    w = torch.zeros(4096, 11008, dtype=torch.bfloat16)
    w[:, 1::4], w[:, 3::4] = 1, -2
    begin = time.perf_counter()
    s = ops.compress24(w)
    assert time.perf_counter() - begin < 1
    assert (s.meta == NIBBLES[1, 3] * 0x11).all() and (s.values[:, ::2] == 1).all() and (s.values[:, 1::2] == -2).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_expanding_keeps_every_bit(dtype):
    """Of NaNs too, which validate24 does not look for."""
    raw = torch.randint(0, 256, (64, 72 * dtype.itemsize), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    values = raw.view(dtype)
    assert values.double().isnan().any() or dtype == torch.int8
    meta = ops.prune_compress24(few_values((64, 144), torch.float32)).meta
    for found in (ops.expand24(Sparse24(values, meta, (64, 144))), reference.expand24(values, meta, 144)):
        assert torch.equal(reference.take24(as_bits(found), meta), as_bits(values))


def test_the_weight_is_left_as_it_is():
    w = random_bits((9, 70), torch.float32)
    before = w.clone()
    ops.prune24(w), ops.prune_compress24(w), ops.mask_nm(w, 2, 4), ops.mask_rows(w, 7)
    assert equal(w, before)
    assert equal(ops.prune24(drop(w, torch.zeros(9, 70, dtype=torch.bool))), torch.zeros(9, 70))
