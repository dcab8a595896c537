"""Patterns against a sort written out in Python, and their text."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekit import NM, Block, PairNM, Pattern, SparsekitError, Unstructured, ops
from sparsekit.patterns import keep_top

inf, nan = torch.inf, torch.nan


def top(scores: list[float], kept: int) -> list[bool]:
    """Whether each is among the ``kept`` highest; a tie goes to the lower place."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return [j in order[:kept] for j in range(len(scores))]


def nm_mask(scores: list[list[float]], n: int, m: int) -> list[list[bool]]:
    groups = [[row[j : j + m] for j in range(0, len(row), m)] for row in scores]
    return [[bit for group in row for bit in top(group, n)] for row in groups]


def ties(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Scores of which many are equal, infinities and both zeros among them."""
    levels = torch.tensor([-inf, -1, -0.0, 0.0, 0.5, 1, 1, 2, inf], dtype=dtype)
    return levels[torch.randint(len(levels), shape, generator=torch.Generator().manual_seed(seed))]


# ---- text ----


@pytest.mark.parametrize(
    "text",
    [
        "2:4",
        "4:8",
        "1:4",
        "0:4",
        "4:4",
        "3:7",
        "16:32",
        "4:8 pairs",
        "0:2 pairs",
        "32:64 pairs",
        "50%",
        "33.3%",
        "0%",
        "100%",
        "0.001%",
        "29%",
        "99.99%",
        "block:32x32@50%",
        "block:1x8@33.3%",
    ],
)
def test_text_comes_back(text):
    assert str(Pattern.parse(text)) == text and Pattern.parse(str(Pattern.parse(text))) == Pattern.parse(text)


@pytest.mark.parametrize(
    "text, pattern",
    [
        (" 2 : 4 ", NM(2, 4)),
        (" 4 :8  pairs ", PairNM(4, 8)),
        ("\t50 %\n", Unstructured(0.5)),
        (".5%", Unstructured(0.005)),
        ("50.%", Unstructured(0.5)),
        ("02:04", NM(2, 4)),
        (" block : 4 x 016 @ 50 % ", Block(4, 16, 0.5)),
    ],
)
def test_loose_text(text, pattern):
    assert Pattern.parse(text) == pattern and Pattern.parse(pattern) is pattern


@given(st.floats(0, 1))
def test_any_share_comes_back_from_its_text(share):
    assert Pattern.parse(str(Unstructured(share))).share == share


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2:4:8",
        "half",
        "2/4",
        "0.5",
        "50",
        "%",
        "2:",
        ":4",
        "2.5:4",
        "-1:4",
        "1e1%",
        "nan%",
        "50%%",
        "block:4x4",
        "block:4@50%",
        "4x4@50%",
        None,
        0.5,
    ],
)
def test_unknown_text_lists_the_known(text):
    with pytest.raises(SparsekitError) as caught:
        Pattern.parse(text)
    for part in ("2:4", "4:8", "1:4", "50%", "block:32x32@50%", "N kept of M", f"got {text!r}"):
        assert part in str(caught.value)


@pytest.mark.parametrize("n, m", [(5, 4), (0, 0), (1, 0), (-1, 4), (-4, -4), (2.0, 4), (True, 4)])
def test_impossible_nm(n, m):
    with pytest.raises(SparsekitError, match=f"0 <= N <= M weights of M >= 1, got {n}:{m}"):
        NM(n, m)


@pytest.mark.parametrize("text, got", [("101%", "101%"), ("-1%", "-1%"), ("100.0001%", "100.0001%"), ("1000%", "1000%")])
def test_impossible_share(text, got):
    with pytest.raises(SparsekitError, match=f"must lie in 0% to 100%, got {got}$"):
        Pattern.parse(text)


def test_a_share_of_nan_or_infinity():
    for share in (nan, inf, -inf):
        with pytest.raises(SparsekitError, match="must lie in 0% to 100%"):
            Unstructured(share)


def test_pruned_is_the_other_convention():
    assert NM.pruned(1, 4) == NM(3, 4) and NM.pruned(2, 4) == NM(2, 4) and str(NM.pruned(3, 8)) == "5:8"
    with pytest.raises(SparsekitError, match="got -1:4"):
        NM.pruned(5, 4)


def test_patterns_are_values():
    assert {NM(2, 4): 1}[Pattern.parse("2:4")] == 1 and NM(2, 4) != NM(4, 8) and Unstructured(0.5) == Pattern.parse("50%")
    assert NM(1, 4).sparsity == 0.75 and Unstructured(0.3).sparsity == 0.3


# ---- masks ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "n, m", [(2, 4), (1, 4), (4, 8), (3, 4), (2, 3), (3, 7), (0, 4), (4, 4), (1, 1), (0, 1), (5, 70), (50, 100)]
)
@pytest.mark.parametrize("k", [0, 1, 3, 4, 13, 130])
def test_nm_against_a_sort(n, m, k, dtype):
    # 5:70 and 50:100 are groups too long for the batched sort; of 130 columns their last group lacks some.
    scores = ties(5, k, seed=n + m + k, dtype=dtype)
    assert NM(n, m).mask(scores).tolist() == nm_mask(scores.tolist(), n, m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", ["0%", "100%", "50%", "33.3%", "99%", "29%"])
@pytest.mark.parametrize("shape", [(7, 100), (1, 64), (1, 65), (3, 5), (0, 4), (4, 0), (1, 1)], ids=str)
def test_unstructured_against_a_sort(shape, share, dtype):
    # 64 and 65: the two sides of the change from a sort to a selection.
    scores, pattern = ties(*shape, dtype=dtype), Pattern.parse(share)
    exact = Fraction(share.rstrip("%")) / 100

    def kept(numel: int) -> int:
        return numel - exact * numel // 1

    whole = pattern.mask(scores)
    assert whole.flatten().tolist() == top(scores.flatten().tolist(), kept(scores.numel())) and whole.shape == scores.shape
    rows = pattern.mask(scores, rowwise=True)
    assert rows.tolist() == [top(row, kept(shape[1])) for row in scores.tolist()] and rows.shape == scores.shape


def pair_mask(scores: list[list[float]], n: int, m: int) -> list[list[bool]]:
    pairs = [[sum(row[j : j + 2]) for j in range(0, len(row), 2)] for row in scores]
    return [[bit for bit in row for _ in "ab"][: len(scores[0])] for row in nm_mask(pairs, n // 2, m // 2)]


@pytest.mark.parametrize("n, m", [(4, 8), (2, 4), (0, 2), (2, 2), (6, 10), (32, 64)])
@pytest.mark.parametrize("k", [0, 1, 2, 7, 8, 30, 129])
def test_pairs(n, m, k):
    scores = ties(5, k).clamp(-2, 3)  # of which every two have a sum
    pattern = PairNM(n, m)
    mask = pattern.mask(scores)
    assert mask.tolist() == pair_mask(scores.tolist(), n, m)
    weight = torch.where(mask, torch.randn(5, k, generator=torch.Generator().manual_seed(1)), 0)
    assert pattern.check(weight) is None and pattern.sparsity == 1 - n / m
    if k >= m and n < m:
        weight[3, :m] = 1
        assert pattern.check(weight) == f"row 3, columns 0 to {m - 1} hold {m // 2} pairs with a non-zero"


@pytest.mark.parametrize("n, m", [(3, 8), (4, 7), (6, 4), (-2, 4), (0, 0), (2, 66)])
def test_pairs_that_are_refused(n, m):
    with pytest.raises(SparsekitError, match=f"an even N of an even M, 0 <= N <= M and 2 <= M <= 64, got {n}:{m}"):
        PairNM(n, m)


@pytest.mark.parametrize("kept, text", [(-1, "from 0 to the 12 columns of scores, got -1"), (13, "got 13")])
@pytest.mark.parametrize("choose", [keep_top, ops.mask_rows], ids=lambda f: f.__name__)
def test_counts_that_are_refused(choose, kept, text):
    with pytest.raises(ValueError, match=text):
        choose(torch.zeros(2, 12), kept)


@given(st.data())
def test_any_scores(data):
    levels = st.sampled_from([-inf, -2.0, -0.0, 0.0, 1.0, 1.5, inf])
    rows, k = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 70))
    scores = data.draw(st.lists(st.lists(levels, min_size=k, max_size=k), min_size=rows, max_size=rows))
    tensor = torch.tensor(scores).view(rows, k)
    m = data.draw(st.integers(1, 70))
    n = data.draw(st.integers(0, m))
    assert NM(n, m).mask(tensor).tolist() == nm_mask(scores, n, m)
    kept = data.draw(st.integers(0, k))
    assert keep_top(tensor, kept).tolist() == [top(row, kept) for row in scores]


@pytest.mark.parametrize("layout", ["transposed", "every other column"])
def test_masks_do_not_depend_on_strides(layout):
    scores = ties(12, 80)
    strided = scores.T.contiguous().T if layout == "transposed" else torch.stack((scores, -scores), -1).view(12, 160)[:, ::2]
    assert not strided.is_contiguous()
    for pattern in (NM(2, 4), NM(3, 7), Unstructured(0.4)):
        assert torch.equal(pattern.mask(strided), pattern.mask(scores))
        assert torch.equal(pattern.mask(strided, rowwise=True), pattern.mask(scores, rowwise=True))


@pytest.mark.parametrize("equal", [0.0, -inf, inf, 3.0])
@pytest.mark.parametrize("k", [12, 200])
def test_all_equal_keeps_the_lowest_columns(equal, k):
    scores = torch.full((3, k), equal)
    assert torch.equal(Unstructured(0.25).mask(scores, rowwise=True), torch.arange(k).expand(3, k) < 0.75 * k)
    assert torch.equal(NM(1, 4).mask(scores), torch.arange(k).expand(3, k) % 4 == 0)


@pytest.mark.parametrize("k", [8, 200])
@pytest.mark.parametrize("column", [0, 7])
@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(0, 4), NM(4, 4), Unstructured(0.0), Unstructured(0.5), Unstructured(1.0)], ids=str
)
def test_nan_is_refused(pattern, column, k):
    scores = torch.ones(3, k)
    scores[1, column] = nan
    for rowwise in (False, True):
        with pytest.raises(ValueError, match="no NaN"):
            pattern.mask(scores, rowwise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_than_16_million_scores(dtype):
    # torch.quantile stops at 2^24 elements, and fp16 has only 2^16 values, so nearly every score ties.
    scores = torch.randn(4097, 4099, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert scores.numel() > 2**24
    mask = Unstructured(0.7).mask(scores)
    assert (~mask).sum().item() == 7 * scores.numel() // 10
    lowest_kept, highest_gone = scores[mask].min(), scores[~mask].max()
    assert lowest_kept >= highest_gone
    if dtype == torch.float16:
        tied = mask.flatten()[(scores == lowest_kept).flatten()]
        assert lowest_kept == highest_gone and torch.equal(tied, tied.sort(descending=True, stable=True).values)


@given(st.integers(0, 10**8), st.integers(0, 2**40))
def test_the_number_removed_is_exact(millionths, numel):
    share = Fraction(millionths, 10**8)
    text = f"{millionths // 10**6}.{millionths % 10**6:06d}%"
    assert Pattern.parse(text).removed(numel) == share * numel // 1


def test_the_number_removed_of_known_cases():
    assert Unstructured(0.29).removed(100) == 29  # 0.29 * 100 is 28.999999999999996
    assert Unstructured(1 / 3).removed(3) == 1 and Unstructured(2 / 3).removed(9) == 6
    assert Unstructured(0.5).removed(128256 * 8192) == 128256 * 4096  # an embedding of a billion weights: not one more
    assert Unstructured(0.5).removed(2**31 + 1) == 2**30


# ---- blocks ----


def block_mask(scores: list[list[float]], pattern: Block, rowwise: bool) -> list[list[bool]]:
    """Whole blocks kept, by sums written out."""
    n, k = len(scores), len(scores[0])
    blocks = [(scores[i : i + pattern.rows], j) for i in range(0, n, pattern.rows) for j in range(0, k, pattern.cols)]
    flat = [sum(sum(row[j : j + pattern.cols]) for row in rows) for rows, j in blocks]
    across = -(-k // pattern.cols)
    sums = [flat[i : i + across] for i in range(0, len(flat), across)]
    removed = Fraction(pattern.share).limit_denominator(1000)
    if rowwise:
        kept = [top(line, len(line) - removed * len(line) // 1) for line in sums]
    else:
        bits = iter(top(flat, len(flat) - removed * len(flat) // 1))
        kept = [[next(bits) for _ in line] for line in sums]
    return [[kept[i // pattern.rows][j // pattern.cols] for j in range(k)] for i in range(n)]


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    "text", ["block:2x3@50%", "block:1x4@40%", "block:4x1@75%", "block:5x50@50%", "block:2x2@0%", "block:3x3@100%"]
)
@pytest.mark.parametrize("shape", [(6, 12), (5, 13), (1, 1)], ids=["whole blocks", "ragged in both", "less than one"])
def test_blocks_against_sums(shape, text, dtype, rowwise):
    pattern = Pattern.parse(text)
    scores = ties(*shape, seed=3).clamp(-2, 3).to(dtype)  # small halves and integers: every sum is exact
    mask = pattern.mask(scores, rowwise)
    assert mask.tolist() == block_mask(scores.tolist(), pattern, rowwise)
    assert torch.equal(mask, pattern.mask(scores.T.contiguous().T, rowwise))
    assert pattern.check(torch.where(mask, 1.0, 0.0), rowwise) is None


# Sums that the scores' own dtype would round to equals, or to infinity.
@pytest.mark.parametrize(
    "dtype, scores",
    [
        (torch.float32, [2.0**24, 0, 2.0**24, 1]),
        (torch.bfloat16, [2.0**24, 0, 2.0**24, 1]),
        (torch.float16, [60000, 50000, 60000, 60000]),
        (torch.float8_e4m3fn, [448, 0, 448, 1]),
    ],
    ids=str,
)
def test_blocks_are_added_up_in_fp64(dtype, scores):
    mask = Block(1, 2, 0.5).mask(torch.tensor([scores]).to(dtype))
    assert mask.tolist() == [[False, False, True, True]]


def test_check_of_blocks():
    pattern, w = Block(2, 2, 0.5), torch.ones(4, 6)
    w[:2, :2] = 0
    assert pattern.check(w) == "the weight has 1 blocks of zeros, 3 are asked for"
    w[2:, 2:] = 0
    assert pattern.check(w) is None
    assert Block(2, 3, 0.5).check(w, rowwise=True) == "line of blocks 0 has 0 blocks of zeros, 1 are asked for"
    w[0, 1] = nan
    assert pattern.check(w) == "the weight has 2 blocks of zeros, 3 are asked for"


def test_a_block_of_nan():
    scores = torch.ones(4, 6)
    scores[2, 5] = nan
    with pytest.raises(ValueError, match="scores must hold no NaN, got one in row 2, column 5"):
        Block(2, 2, 0.5).mask(scores)


@pytest.mark.parametrize(
    "rows, cols, share, says",
    [
        (0, 4, 0.5, "one row and one column, got 0x4"),
        (2.5, 4, 0.5, "one row and one column, got 2.5x4"),
        (4, 4, 1.5, "0% to 100%, got 150%"),
        (4, 4, "0.5", "a number from 0 to 1, got '0.5'"),
        (4, 4, True, "a number from 0 to 1, got True"),
    ],
)
def test_blocks_that_are_refused(rows, cols, share, says):
    with pytest.raises(SparsekitError, match=says):
        Block(rows, cols, share)


# ---- on the way ----


@given(st.sampled_from(["2:4", "1:8", "4:8 pairs", "2:8 pairs", "50%", "block:2x3@40%"]), st.floats(0, 1), st.floats(0, 1))
def test_partway_is_monotone_and_ends_at_the_pattern(text, a, b):
    pattern, (low, high) = Pattern.parse(text), sorted((a, b))
    assert pattern.partway(1.0) == pattern and pattern.partway(0.0).sparsity == 0
    assert 0 <= pattern.partway(low).sparsity <= pattern.partway(high).sparsity <= pattern.sparsity
    assert type(pattern.partway(low)) is type(pattern)


def test_partway_counts_whole_weights():
    assert [NM(2, 4).partway(share) for share in (0.4, 0.5, 0.99)] == [NM(4, 4), NM(3, 4), NM(3, 4)]
    assert [PairNM(4, 8).partway(share) for share in (0.4, 0.5)] == [PairNM(8, 8), PairNM(6, 8)]


# ---- check ----


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 7), NM(1, 4), NM(0, 4), NM(4, 4), NM(50, 100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_a_masked_weight_holds_its_pattern(pattern, dtype):
    w = torch.randint(1, 8, (9, 130), generator=torch.Generator().manual_seed(0)).float()
    w = torch.where(pattern.mask(w), w, -0.0).to(dtype)
    assert pattern.check(w) is None and pattern.check(w.T.contiguous().T) is None


@pytest.mark.parametrize(
    "pattern, place, text",
    [
        (NM(2, 4), (2, 7), "row 2, columns 4 to 7 hold 3 non-zeros"),
        (NM(4, 8), (1, 3), "row 1, columns 0 to 7 hold 5 non-zeros"),
        (NM(0, 1), (0, 9), "row 0, columns 9 to 9 hold 1 non-zeros"),
        (NM(1, 4), (2, 9), "row 2, columns 8 to 9 hold 2 non-zeros"),
    ],
    ids=["2:4", "4:8", "0:1", "tail"],
)
def test_check_says_where(pattern, place, text):
    w = torch.zeros(4, 10)
    w[:, ::4] = torch.tensor(1.0) if pattern.n else 0
    if pattern.n > 1:
        w[:, 1::4] = 1
    assert pattern.check(w) is None
    w[place] = nan  # not a zero either
    w[3] = 1  # the first bad group is named
    assert pattern.check(w) == text


def test_check_of_unstructured():
    w = torch.ones(3, 10)
    w[:, :3] = 0
    assert Unstructured(0.3).check(w) is None and Unstructured(0.3).check(w, rowwise=True) is None
    w[1, 0], w[2, 5] = 1, 0
    assert Unstructured(0.3).check(w) is None
    assert Unstructured(0.3).check(w, rowwise=True) == "row 1 has 2 zeros, 3 are asked for"
    w[0, 0] = nan
    assert Unstructured(0.3).check(w) == "the weight has 8 zeros, 9 are asked for"


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_an_empty_weight_holds_every_pattern(shape):
    for pattern in (NM(0, 3), NM(2, 4), Unstructured(0.5), Unstructured(1.0)):
        assert pattern.check(torch.ones(shape)) is None and pattern.mask(torch.ones(shape)).shape == shape


@pytest.mark.parametrize(
    ("text", "brief"),
    [
        ("69.9951171875%", "70%"),
        ("58.35774739583334%", "58.36%"),
        ("0.00123456%", "0.001235%"),
        ("block:4x4@33.333333%", "block:4x4@33.33%"),
    ],
)
def test_a_share_is_rounded_for_readers_alone(text, brief):
    assert Pattern.parse(text).brief == brief and str(Pattern.parse(text)) == text
    assert Pattern.parse("2:4").brief == "2:4"
