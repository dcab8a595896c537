"""Fragment order (Fragments24 of format.py) back to a dense weight in one pass: for a product by the library.

A program owns a row tile of 16 rows and a k256 block or two, both contiguous in fragment order: a thread reads 16 bytes of values,
the registers a0..a3 of a lane, and its groups are exchanged through shared memory so that it writes 16 bytes of a row.
Memory floor for a dense weight of b bytes: b / 2 + rows * cols / 8 read, b written.
"""

import torch
import triton
import triton.language as tl

from .bits import as_bits
from .pack24 import place_pairs


@triton.jit(do_not_specialize=["rows", "blocks", "chunks"])
def expand_fragments_kernel(
    values_ptr,  # [row tile][k64 block][k32 step][lane][a0..a3], bits of the kept weights
    meta_ptr,  # [row tile][k256 block][lane][k64 block of it] int32
    w_ptr,  # [rows, cols]
    rows, cols, blocks, chunks,  # of 64 and of 256 columns
    PAIRS: tl.constexpr,  # of values in a register: 1 of 16 bits, 2 of 8
    CHUNKS: tl.constexpr,  # k256 blocks of a program
):  # fmt: skip
    STEPS: tl.constexpr = 2 // PAIRS
    PER_BLOCK: tl.constexpr = 512  # values of a row tile in 64 columns
    programs = tl.cdiv(chunks, CHUNKS)
    row_tile, chunk0 = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs * CHUNKS
    at = tl.arange(0, CHUNKS * 4 * PER_BLOCK)
    left = (blocks - chunk0 * 4) * PER_BLOCK
    kept = tl.load(values_ptr + (row_tile * blocks + chunk0 * 4) * PER_BLOCK + at, mask=at < left, other=0)
    word = tl.arange(0, CHUNKS * 128)
    meta = tl.load(meta_ptr + (row_tile * chunks + chunk0) * 128 + word, mask=word < (chunks - chunk0) * 128, other=0)

    # [k64 block][step][lane / 4][lane % 4][column half][row half][pair], the registers being [column half][row half].
    first, second = tl.split(tl.reshape(kept, [CHUNKS * 4, STEPS, 8, 4, 2, 2, PAIRS, 2]))
    quarter = tl.reshape(tl.arange(0, 4), [1, 1, 1, 4, 1, 1, 1])
    half = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 1, 2, 1])
    pair = tl.reshape(tl.arange(0, PAIRS), [1, 1, 1, 1, 1, 1, PAIRS])
    if PAIRS == 1:  # lane % 4 of a word is [step][column half]; it holds 16 columns of a row, and of the row 8 below
        meta = tl.permute(tl.reshape(meta, [CHUNKS, 8, 2, 2, 4]), (0, 4, 2, 1, 3))
        meta = tl.reshape(meta, [CHUNKS * 4, 2, 8, 1, 2, 1, 1]) >> (half * 16 + quarter * 4)
    else:  # it is [column half][row half]; the word holds 32 columns of a row
        meta = tl.permute(tl.reshape(meta, [CHUNKS, 8, 2, 2, 4]), (0, 4, 1, 2, 3))
        meta = tl.reshape(meta, [CHUNKS * 4, 1, 8, 1, 2, 2, 1]) >> (quarter * 8 + pair * 4)
    nibble = tl.broadcast_to(meta & 15, first.shape)
    w0, w1, w2, w3 = place_pairs(first, second, nibble)
    w = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., pair, column of two, half of the group]
    w = tl.permute(tl.reshape(w, [CHUNKS * 4, STEPS, 8, 4, 2, 2, PAIRS * 4]), (5, 2, 0, 1, 4, 3, 6))
    w = tl.reshape(w, [16, CHUNKS * 256])
    row, col = row_tile * 16 + tl.arange(0, 16)[:, None], chunk0 * 256 + tl.arange(0, CHUNKS * 256)[None, :]
    tl.store(w_ptr + row * cols + col, w, mask=(row < rows) & (col < cols))


def expand_fragments(values: torch.Tensor, meta: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """values and meta of a Fragments24 of that shape -> dense (rows, cols) in the dtype of values, of 1 or 2 bytes.

    Both contiguous; meta holds valid nibbles only (4, 8, 9, C, D, E)."""
    w = torch.empty((rows, cols), dtype=values.dtype, device=values.device)
    if rows == 0 or cols == 0:
        return w
    blocks, chunks = values.shape[1], meta.shape[1]
    together = min(chunks, values.element_size() % 2 + 1)  # 4 KiB of values
    expand_fragments_kernel[(values.shape[0] * triton.cdiv(chunks, together),)](
        as_bits(values), meta, as_bits(w), rows, cols, blocks, chunks,
        PAIRS=2 // values.element_size(), CHUNKS=together,
    )  # fmt: skip
    return w
