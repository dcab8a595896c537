"""total += x' x for activations in fp16 or bf16. It is symmetric: only tiles on and below the diagonal are computed.

A program owns one tile of the lower triangle, runs over all tokens in one order, with sums in fp32 on tensor cores, whose
products of 16-bit operands are exact, and writes its tile and the tile's mirror image. Programs go by rows of tiles: neighbours
share operands.
Floors: tokens * k^2 / 2 FMAs over the rate of the tensor cores, half of a square product; 6 k^2 bytes (the lower triangle read,
the whole written) and x over copy bandwidth. By an H100's data sheet 2048 tokens of 4096 take 35 us by the one and 35 us by the
other: with fewer tokens a call the sum's own traffic binds. Not yet run on hardware.
"""

import torch
import triton
import triton.language as tl

_BLOCK_TOKENS = 64


@triton.jit
def gram_kernel(
    x_ptr,  # [tokens, k] fp16 or bf16
    sum_ptr,  # [k, k] fp32
    tokens, k,
    x_row_stride, sum_row_stride,
    BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    # Program p is tile (i, j) of the triangle, j <= i, where i (i + 1) / 2 + j = p.
    p = tl.program_id(0)
    i = ((tl.sqrt(8.0 * p + 1.0) - 1.0) * 0.5).to(tl.int32)
    i -= (i * (i + 1) // 2 > p).to(tl.int32)
    i += ((i + 1) * (i + 2) // 2 <= p).to(tl.int32)
    j = p - i * (i + 1) // 2
    row = i * BLOCK + tl.arange(0, BLOCK)
    col = j * BLOCK + tl.arange(0, BLOCK)
    token = tl.arange(0, BLOCK_TOKENS)[:, None]
    left_ptr = x_ptr + row[None, :]
    right_ptr = x_ptr + col[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, tokens, BLOCK_TOKENS):
        at = (start + token).to(tl.int64) * x_row_stride
        here = start + token < tokens
        left = tl.load(left_ptr + at, mask=here & (row < k)[None, :], other=0.0)  # [BLOCK_TOKENS, BLOCK]
        right = tl.load(right_ptr + at, mask=here & (col < k)[None, :], other=0.0)
        total = tl.dot(left.T, right, total)
    inside = (row < k)[:, None] & (col < k)[None, :]
    ptrs = sum_ptr + row[:, None].to(tl.int64) * sum_row_stride + col[None, :]
    total += tl.load(ptrs, mask=inside, other=0.0)
    tl.store(ptrs, total, mask=inside)
    if i != j:
        mirror_ptrs = sum_ptr + col[:, None].to(tl.int64) * sum_row_stride + row[None, :]
        tl.store(mirror_ptrs, total.T, mask=(col < k)[:, None] & (row < k)[None, :])


def gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """total (k, k) fp32 += x' x, x (tokens, k) fp16 or bf16. Unit column strides. total is symmetric, before as after."""
    tokens, k = x.shape
    if tokens == 0 or k == 0:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    block = 128 if k > 2048 else 64  # 136 tiles of 64 in the triangle of 1024, 136 of 128 in that of 2048
    tiles = triton.cdiv(k, block)
    gram_kernel[(tiles * (tiles + 1) // 2,)](
        x, total, tokens, k, x.stride(0), total.stride(0),
        BLOCK=block, BLOCK_TOKENS=_BLOCK_TOKENS, num_warps=8 if block == 128 else 4, num_stages=4 if block == 64 else 3,
    )  # fmt: skip
