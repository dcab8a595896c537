"""The OBS step of SparseGPT over one block of columns, for many rows at once: choose, prune, make up for it by the columns left.

With U the upper factor of H^-1 = U'U and column by column: e = w_j / U_jj where j goes, w[j + 1:] -= e U[j, j + 1:]. Rows are
independent. A program owns ROWS of them and keeps a panel of whole groups of their columns in registers. Within it columns go one
by one; column j is a sum over the panel in which all others are nulled, cheap only where a panel is narrow. What the panels
before owe to this one comes first, as the product of their errors, read back from the output, and U: in fp32, as masks hang on
it.
Floors for b columns: rows * b^2 / 2 FMAs over the fp32 rate; rows * b * 13 bytes (w twice, errors, mask) over copy bandwidth.
By an H100's data sheet 4096 rows of 128 are 34 MFMA and 7 MB, 1 us and 2 us. The chain of b times (scale, select, sum over eight
threads, FMA) is what binds: some 100 cycles each by the latencies of the instructions, 8 us for any number of rows that are at
once on the chip. Hence few rows a program, and no load and no division in the chain. Not yet run on hardware.
Source: Frantar and Alistarh 2023, arXiv:2301.00774.
"""

import torch
import triton
import triton.language as tl

from .tiles import new_status, report

_ROWS = 32
_DEPTH = 16  # terms of one tl.dot, and columns of the narrowest panel: as few as it takes


@triton.jit
def beaten_by(score, place, at, other):
    """1 where member `other` of the group, whose score is in the column `at`, beats the score; a tie goes to the lower place."""
    rival = tl.sum(tl.where(at, score, 0.0), 1, keep_dims=True)
    return tl.where(place > other, rival >= score, rival > score).to(tl.int32)


@triton.jit(do_not_specialize=["n"])
def obs_block_kernel(
    w_ptr,  # [batch, rows, cols] fp32
    upper_ptr,  # [batch, cols, cols] fp32
    given_ptr,  # [batch, rows, cols] uint8, contiguous: non-zero where kept; read where M is 0
    mask_ptr, errors_ptr,  # [batch, rows, cols] uint8 and fp32, contiguous
    loss_ptr,  # [batch, rows] fp32
    status_ptr,  # [1] int64: first row, counted over the batch, with a NaN
    rows, cols,
    w_batch_stride, w_row_stride, upper_batch_stride, upper_row_stride,
    n, M: tl.constexpr,  # n of M members of a group are kept
    WIDTH: tl.constexpr,  # columns a member has: 1, or 2 for pairs
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = M * WIDTH if M > 0 else COLS  # of a group; under a given mask a panel is one
    PANEL: tl.constexpr = COLS // SIZE * SIZE
    batch = tl.program_id(1).to(tl.int64)
    row0 = tl.program_id(0).to(tl.int64) * ROWS
    row = (row0 + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, COLS)[None, :]
    w_ptr += batch * w_batch_stride + row * w_row_stride
    upper_ptr += batch * upper_batch_stride
    upper_row_stride = tl.cast(upper_row_stride, tl.int64)
    flat = (batch * rows + row) * cols
    loss = tl.zeros([ROWS, 1], tl.float32)
    bad = tl.zeros([ROWS, 1], tl.int32)
    for begin in range(0, cols, PANEL):
        end = tl.minimum(begin + PANEL, cols)
        col = begin + lane
        real = col < end
        inside = (row < rows) & real
        w = tl.load(w_ptr + col, mask=inside, other=0.0)
        for first in range(0, begin, DEPTH):
            done = first + tl.arange(0, DEPTH)
            across, down = done[None, :], done[:, None]
            e = tl.load(errors_ptr + flat + across, mask=(row < rows) & (across < begin), other=0.0)
            u = tl.load(upper_ptr + down * upper_row_stride + col, mask=(down < begin) & real, other=0.0)
            w -= tl.dot(e, u, input_precision="ieee")
        inverse = tl.div_rn(1.0, tl.load(upper_ptr + col * (upper_row_stride + 1), mask=real, other=1.0))
        if M == 0:
            kept = tl.load(given_ptr + flat + col, mask=inside, other=1) != 0
        else:
            kept = tl.full([ROWS, COLS], 1, tl.int1)
        for group in range(begin, end, SIZE):
            if M > 0:
                score = w * inverse
                score *= score
                if WIDTH == 2:  # of a pair both columns hold the sum; a column past the end adds nothing
                    both = tl.sum(tl.reshape(score, [ROWS, COLS // 2, 2]), 2, keep_dims=True)
                    score = tl.reshape(tl.broadcast_to(both, [ROWS, COLS // 2, 2]), [ROWS, COLS])
                score = tl.where(col // WIDTH * WIDTH < end, score, -1.0)  # what is not there loses to every real one
                place = (lane + (begin - group)) // WIDTH
                beaten = tl.zeros([ROWS, COLS], tl.int32)
                if M <= 8:
                    for other in tl.static_range(M):
                        beaten += beaten_by(score, place, col == group + other * WIDTH, other)
                else:
                    for other in range(M):
                        beaten += beaten_by(score, place, col == group + other * WIDTH, other)
                kept = tl.where((col >= group) & (col < group + SIZE), beaten < n, kept)
            for j in tl.range(group, group + SIZE, loop_unroll_factor=4):  # past the end w is zero, and U is not read
                u = tl.load(upper_ptr + j * upper_row_stride + col, mask=(col > j) & real, other=0.0)
                e = tl.sum(tl.where((col == j) & ~kept, w * inverse, 0.0), 1, keep_dims=True)
                w = tl.fma(-e, u, w)
        bad |= tl.max((w != w).to(tl.int32), 1, keep_dims=True)
        e = tl.where(kept, 0.0, w * inverse)
        loss += tl.sum(e * e, 1, keep_dims=True)
        tl.store(errors_ptr + flat + col, e, mask=inside)
        tl.store(mask_ptr + flat + col, kept.to(tl.uint8), mask=inside)
        tl.store(w_ptr + col, tl.where(kept, w, 0.0), mask=inside)
        tl.debug_barrier()  # the next panels read the errors that other threads wrote
    tl.store(loss_ptr + batch * rows + row, tl.where(bad != 0, float("nan"), loss), mask=row < rows)
    report(status_ptr, bad != 0, batch * rows + row0, 0, 1, ROWS, 1)


def obs(
    w: torch.Tensor, upper: torch.Tensor, mask: torch.Tensor | None = None, n: int = 0, m: int = 0, pairs: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prunes w ([batch,] rows, b) in place by upper ([batch,] b, b) -> mask, errors, loss ([batch,] rows), status (1,) int64.

    w fp32 with a unit column stride, upper fp32 of any strides. Kept is what the bool mask, of w's shape, keeps, or of every m
    columns (pairs: pairs of columns) the n of the highest (w / U_jj)^2 when the first is reached; a tie goes to the lower
    column; 1 <= m <= 32.
    errors (w's shape): e_j = w_j / U_jj of what went, else 0; loss: the sum of e^2 of a row, NaN where the row held or came to
    one. status[0] is the first such row, counted over the batch, tiles.NOTHING where there is none."""
    *batches, rows, cols = w.shape
    batch = batches[0] if batches else 1
    errors = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    out = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    loss = torch.zeros(w.shape[:-1], dtype=torch.float32, device=w.device)
    status = new_status(1, w.device)
    if w.numel() == 0:
        return out, errors, loss, status
    width = 2 if pairs else 1
    panel = max(_DEPTH, triton.next_power_of_2(m * width)) if mask is None else _DEPTH
    upper = upper if upper.stride(-1) == 1 else upper.contiguous()
    given = (out if mask is None else mask.contiguous()).view(torch.uint8)
    obs_block_kernel[(triton.cdiv(rows, _ROWS), batch)](
        w, upper, given, out.view(torch.uint8), errors, loss, status, rows, cols,
        w.stride(0) if batches else 0, w.stride(-2), upper.stride(0) if batches else 0, upper.stride(-2),
        n, M=0 if mask is not None else m, WIDTH=width,
        ROWS=_ROWS, COLS=panel, DEPTH=_DEPTH, maxnreg=128 if panel < 64 else 255,  # left to choose, ptxas spills for one more block
    )  # fmt: skip
    return out, errors, loss, status
