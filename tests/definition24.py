"""The 2:4 format operations and masks once more, in plain Python: the definition that every kernel is tested against.

Also the matrices they are tested on. Nothing here is fast, nothing is shared with the package, and Triton is not imported.
"""

import numpy as np
import torch

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
DTYPES = [*FLOATS, torch.int8]
SCORES = [torch.float64, *FLOATS, torch.float8_e5m2, torch.int8]
NOTHING = 2**63 - 1  # a word of a status where nothing was found
NIBBLES = {(0, 1): 0x4, (0, 2): 0x8, (1, 2): 0x9, (0, 3): 0xC, (1, 3): 0xD, (2, 3): 0xE}  # PTX ISA, ordered metadata
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size
SHAPES = {
    (1, 4): "one group",
    (2, 8): "one metadata byte a row",
    (5, 13): "a last group of one",
    (3, 14): "a last group of two",
    (3, 7): "a last group of three, odd in its byte",
    (66, 84): "two tiles of a transposed matrix both ways",
    (2, 2064): "two tiles of a folded matrix",
    (2, 2061): "two tiles of a matrix that does not fold",
    (0, 8): "no rows",
    (3, 0): "no columns",
}
VIEWS = ["row-major", "transposed", "rows of a wider matrix", "every third column of every second row"]


def named(case) -> str:
    return SHAPES[case] if isinstance(case, tuple) else str(case).removeprefix("torch.")


# ---- matrices ----


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory as signed integers of the same size."""
    return x.view(INTEGERS[x.element_size()])


def random_bits(shape, dtype, seed=0) -> torch.Tensor:
    """Any bit pattern but NaN: infinities, subnormals, both zeros, -128."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=g).to(torch.uint8)
    raw[raw.view(dtype)[..., 0].double().isnan()] = 0
    return raw.view(dtype)[..., 0]


def few_values(shape, dtype, seed=0) -> torch.Tensor:
    """Nearly every group has a tie; both zeros are there where the dtype has two."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, shape, generator=g).double()
    x[(torch.rand(shape, generator=g) < 0.5) & (x == 0)] = -0.0
    return x.to(dtype)


def for_sums(shape, dtype, seed):
    """Numbers whose pairs sum to a number: infinities of one sign alone."""
    scores = random_bits(shape, dtype, seed)
    as_bits(scores)[(scores.double() == -float("inf"))] = 0
    return scores


def viewed(x: torch.Tensor, how: str, device="cpu") -> torch.Tensor:
    """The same matrix on the device, laid out in another way."""
    (rows, cols), bits = x.shape, as_bits(x).to(device)
    if how == "row-major":
        out = bits.contiguous()
    elif how == "transposed":
        out = bits.t().contiguous().t()
    elif how == "rows of a wider matrix":
        out = bits.new_full((rows, cols + 16), 77)[:, 8 : 8 + cols].copy_(bits)
    else:
        out = bits.new_full((2 * rows + 1, 3 * cols + 1), 77)[1::2, 1::3].copy_(bits)
    return out.view(x.dtype)


def equal(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Same dtype, shape and bits."""
    assert got.dtype == want.dtype and got.shape == want.shape
    return torch.equal(got.cpu().contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


# ---- the definition ----


def best(scores: list[float], n: int) -> list[int]:
    """Places of the n highest, ties to the lower place, in order."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n])


def pack(w: torch.Tensor, choose) -> tuple[torch.Tensor, torch.Tensor]:
    """values and meta of w; choose(row, first column of the group) -> the two columns of the group that stay, counted from 0."""
    rows, cols = w.shape
    blocks = -(-cols // 8)
    padded = torch.zeros((rows, 8 * blocks), dtype=w.dtype)
    as_bits(padded)[:, :cols] = as_bits(w)
    if w.dtype.is_floating_point:
        as_bits(padded)[padded.double() == 0] = 0
    columns, meta = [], torch.zeros((rows, blocks), dtype=torch.uint8)
    for row in range(rows):
        columns.append([])
        for group in range(2 * blocks):
            two = choose(row, 4 * group)
            columns[row] += [4 * group + c for c in two]
            meta[row, group // 2] |= NIBBLES[tuple(two)] << (4 * (group % 2))
    places = torch.tensor(columns, dtype=torch.int64).reshape(rows, 4 * blocks)
    return as_bits(padded).gather(1, places).view(w.dtype), meta


def pack_by(w: torch.Tensor, keys: torch.Tensor, missing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """values and meta of w with the two highest keys of each group kept; `missing` is the key of a column past the end."""
    known = keys.double().tolist()
    return pack(w, lambda row, col: best((known[row][col : col + 4] + 4 * [missing])[:4], 2))


def pack_largest(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pack_by(w, w.double().abs(), 0.0)


def pack_scored(w: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pack_by(w, scores, -float("inf"))


def pack_masked(w: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pack_by(drop(w, mask != 0), mask != 0, 0.0)


def pack_nonzero(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w has at most two non-zeros in a group."""
    return pack_by(w, w.double() != 0, 0.0)


def column(nibble: int, which: int) -> int:
    """Of the group's four, where its first or second kept value belongs."""
    return nibble >> 2 * which & 3


def unpack(values: torch.Tensor, meta: torch.Tensor, cols: int) -> torch.Tensor:
    rows, blocks = meta.shape
    w = torch.zeros((rows, 8 * blocks), dtype=values.dtype)
    for row, held in enumerate(meta.tolist()):
        for place in range(4 * blocks):
            group = place // 2
            col = 4 * group + column(held[group // 2] >> 4 * (group % 2) & 15, place % 2)
            as_bits(w)[row, col] = as_bits(values)[row, place]
    return as_bits(w)[:, :cols].contiguous().view(values.dtype)


def check(values: torch.Tensor, meta: torch.Tensor, cols: int) -> list[int]:
    """Where the first nibble is that none of NIBBLES is, and the first value but zero that belongs to a column >= cols."""
    status, (rows, blocks) = [NOTHING, NOTHING], meta.shape
    held, numbers = meta.tolist(), values.double().tolist()
    for row in range(rows):
        for place in range(4 * blocks):
            group = place // 2
            nibble = held[row][group // 2] >> 4 * (group % 2) & 15
            if nibble not in NIBBLES.values():
                status[0] = min(status[0], row * 2 * blocks + group)
            if numbers[row][place] != 0 and 4 * group + column(nibble, place % 2) >= cols:
                status[1] = min(status[1], row * 4 * blocks + place)
    return status


def clean(status: torch.Tensor) -> bool:
    return set(status.tolist()) == {NOTHING}


def drop(w: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, as_bits(w), 0).view(w.dtype)


def nonzero_groups(w: torch.Tensor, per_group: int, seed=1) -> torch.Tensor:
    """w with at most per_group non-zeros left in each group, often fewer."""
    order = torch.rand((w.shape[0], -(-w.shape[1] // 4), 4), generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return drop(w, (order < per_group).flatten(1)[:, : w.shape[1]])


def keep_nm(scores: torch.Tensor, n: int, m: int, pairs: bool = False) -> torch.Tensor:
    kind = np.float64 if scores.dtype == torch.float64 else np.float32
    values, width = scores.double().numpy().astype(kind), 2 if pairs else 1
    mask = np.zeros(values.shape, dtype=np.uint8)
    for row in range(values.shape[0]):
        for start in range(0, values.shape[1], m * width):
            group = values[row, start : start + m * width]
            members = [group[i : i + width].sum(dtype=kind) for i in range(0, len(group), width)]
            for i in best(members, min(n, len(members))):
                mask[row, start + i * width : start + (i + 1) * width] = 1
    return torch.from_numpy(mask)


def keep_rows(scores: torch.Tensor, k: int) -> torch.Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.uint8)
    for row, values in enumerate(scores.double().tolist()):
        mask[row, best(values, k)] = 1
    return mask
