"""The Hopper kernel on a GPU, tile by tile, those too that no op calls: sums of small integers, which are exact, in the smallest
problems first. What is wrong is told by blocks of a cluster, so that the first run says where to look."""

import pytest
import torch
from test_cuda_hopper import CLUSTERS, SHARED_TILES, TILES, ring

from sparsekit import _C, ops
from sparsekit.format import to_fragments
from sparsekit.ops import linear as product
from sparsekit.ops.registry import DTYPE_CODE

pytestmark = pytest.mark.gpu
PROBLEMS = {  # of a tile's tokens, the features of its cluster and its stages: m, n, k
    "one step": lambda m, n, stages: (m, n, 64),
    "one block of 256 columns": lambda m, n, stages: (m, n, 256),
    "the ring wraps": lambda m, n, stages: (m, n, 64 * (stages + 1)),
    "past every edge": lambda m, n, stages: (m + 1, n + 4, 272),
    "one token, one feature": lambda m, n, stages: (1, 1, 16),
    "several tiles a cluster": lambda m, n, stages: (35 * m + 3, 4 * n + 8, 64 * (2 * stages + 1)),
}


def launch(tile, x, s, split=1):
    """y of NaN, written by one launch; ``s`` a Sparse24."""
    (m, k), n, f = x.shape, s.shape[0], to_fragments(s)
    values, y = s.values if tile in SHARED_TILES else f.values, x.new_full((m, n), torch.nan)
    index = x.device.index
    parts = x.new_empty(_C.linear24_sm90a_workspace(m, n, k, tile, split, index), dtype=torch.uint8)
    ran = _C.linear24_sm90a(
        x.data_ptr(), values.data_ptr(), f.meta.data_ptr(), 0, y.data_ptr(), parts.data_ptr() if parts.numel() else 0,
        m, n, k, k, DTYPE_CODE[x.dtype], 0, tile, split, index, product.raw_stream(index),
    )  # fmt: skip
    assert ran, "TMA did not take x or the values, whose rows are multiples of 16 bytes"
    return y


def problem(m, n, k, dtype, seed=0):
    """x and w of -1, 0 and 1: sums stay below 2^24, so fp32 holds them in any order."""
    g = torch.Generator("cuda").manual_seed(seed)
    w = ops.prune24(torch.randint(-1, 2, (n, k), generator=g, device="cuda").to(dtype))
    x = torch.randint(-1, 2, (m, k), generator=g, device="cuda").to(dtype)
    return x, ops.compress24(w), (x.double() @ w.double().T).to(dtype)


def where(wrong, tile):
    """The tokens' tiles and the blocks of a cluster, by features, that hold wrong outputs, and how many each."""
    features, tokens = TILES[tile]
    at, count = {}, CLUSTERS.get(tile, 2)
    for token, feature in wrong.nonzero().tolist()[:100000]:
        place = f"token tile {token // tokens}, block {feature // features % count}, warpgroup piece {feature % features // 64}"
        at[place] = at.get(place, 0) + 1
    return at


@pytest.fixture(autouse=True)
def hopper():
    if product.HOPPER not in product.gpu_kernels(torch.cuda.current_device()):
        pytest.skip("no Hopper GPU, or built without sm_90a")


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_is_exact(tile, name):
    features, tokens = TILES[tile]
    m, n, k = PROBLEMS[name](tokens, CLUSTERS.get(tile, 2) * features, ring(tile))
    for dtype in (torch.float16, torch.bfloat16):
        x, s, want = problem(m, n, k, dtype)
        y = launch(tile, x, s)
        assert torch.equal(y, want), f"{dtype}: wrong in {where(y != want, tile)}"


@pytest.mark.parametrize("tile", [tile for tile, (features, _) in TILES.items() if features != 192])
def test_every_part_is_exact(tile):
    x, s, want = problem(70, 500, 2048 + 16, torch.bfloat16)
    for split in (2, 3, 8):
        y = launch(tile, x, s, split)
        assert torch.equal(y, want), f"{split} parts: wrong in {where(y != want, tile)}"


@pytest.mark.parametrize("tile", TILES)
def test_launches_side_by_side_give_the_same_bits(tile):
    """Two streams, so that clusters of one launch start while those of another leave; real numbers, whose sums have an order."""
    x, s, _ = problem(300, 1024, 64 * (3 * ring(tile) + 4), torch.float16)
    x = torch.randn_like(x)
    first, streams, found = launch(tile, x, s), [torch.cuda.Stream(), torch.cuda.Stream()], []
    torch.cuda.synchronize()
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            found.append(launch(tile, x, s))
    torch.cuda.synchronize()
    assert all(torch.equal(y, first) for y in found)
