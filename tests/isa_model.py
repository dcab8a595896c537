"""The fragment tables of the sparse tensor-core instructions as plain loops: which lane's register holds which element.

Written from the PTX ISA ("Sparse matrix storage"; "Matrix fragments for multiply-accumulate operation with sparse matrix A"
for mma.sp and for wgmma.mma_async.sp), so that fragment layouts in the code can be checked against the tables themselves.
Registers are uint32 arrays, one row a lane. Elements stay bit patterns: a rebuilt matrix is uint16 or uint8, zero where nothing
is kept, to be viewed as the caller's dtype.
"""

import numpy as np

ORDERED_NIBBLES = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)  # second index << 2 | first index, first < second


def mma_sp_m16n8k32(a: np.ndarray, metadata: np.ndarray, selector: int) -> np.ndarray:
    """A (16, 32), 16-bit elements, of mma.sp::ordered_metadata.m16n8k32. a (32, 4) and metadata (32,) uint32, one row a lane.

    Only lanes 2 * selector and 2 * selector + 1 of each quad are asked for metadata: columns 0-15 and 16-31. Bits 0-15 of
    their word are row lane // 4, bits 16-31 row lane // 4 + 8. Raises ValueError for metadata that the ISA leaves undefined.
    """
    if selector not in (0, 1):
        raise ValueError(f"m16n8k32 with 16-bit elements: the selector must be 0 or 1, got {selector}")
    elements = np.ascontiguousarray(a, "<u4").view("<u2").reshape(32, 8)
    dense = np.zeros((16, 32), np.uint16)
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(8):
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            first_column = in_group * 4 + (0 if i < 4 else 16)
            holder = (row % 8) * 4 + 2 * selector + first_column // 16
            bit = 16 * (row // 8) + first_column % 16
            _place(dense, row, first_column, i % 2, elements[lane, i], int(metadata[holder]) >> bit & 15)
    return dense


def mma_sp_m16n8k64(a: np.ndarray, metadata: np.ndarray, selector: int = 0) -> np.ndarray:
    """A (16, 64), 8-bit elements, of mma.sp::ordered_metadata.m16n8k64. a (32, 4) and metadata (32,) uint32, one row a lane.

    All lanes give metadata: lane T has row T // 4 + 8 * (T % 2), columns 0-31 (T % 4 < 2) or 32-63.
    """
    if selector != 0:
        raise ValueError(f"m16n8k64 with 8-bit elements: the selector must be 0, got {selector}")
    elements = np.ascontiguousarray(a, "<u4").view("u1").reshape(32, 16)
    dense = np.zeros((16, 64), np.uint8)
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(16):
            row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
            first_column = in_group * 8 + (0 if i < 8 else 32) + i % 4 // 2 * 4  # a register spans two groups of four
            holder = (row % 8) * 4 + row // 8 + 2 * (first_column // 32)
            _place(dense, row, first_column, i % 2, elements[lane, i], int(metadata[holder]) >> first_column % 32 & 15)
    return dense


def wgmma_sp_m64k32(a: np.ndarray, metadata: np.ndarray, selector: int) -> np.ndarray:
    """A (64, 32), 16-bit elements, of the register form of wgmma.sp.m64nNk32. a (128, 4) and metadata (128,) uint32.

    Warp w of the warpgroup holds rows 16 w .. 16 w + 15, each warp as in mma.sp.m16n8k32.
    """
    return np.concatenate([mma_sp_m16n8k32(a[w : w + 32], metadata[w : w + 32], selector) for w in range(0, 128, 32)])


def wgmma_sp_m64k64(a: np.ndarray, metadata: np.ndarray, selector: int = 0) -> np.ndarray:
    """A (64, 64), 8-bit elements, of the register form of wgmma.sp.m64nNk64. a (128, 4) and metadata (128,) uint32."""
    return np.concatenate([mma_sp_m16n8k64(a[w : w + 32], metadata[w : w + 32], selector) for w in range(0, 128, 32)])


def b_m16n8k32(b: np.ndarray) -> np.ndarray:
    """B (32, 8), 16-bit elements, of mma.sp.m16n8k32 from b (32, 4) uint32: element i of a lane is row
    2 * (lane % 4) + i % 2 + 8 * (i // 2), column lane // 4."""
    elements = np.ascontiguousarray(b, "<u4").view("<u2").reshape(32, 8)
    matrix = np.zeros((32, 8), np.uint16)
    for lane in range(32):
        for i in range(8):
            matrix[lane % 4 * 2 + i % 2 + i // 2 * 8, lane >> 2] = elements[lane, i]
    return matrix


def d_m16n8(d: np.ndarray) -> np.ndarray:
    """C or D (16, 8) of an m16n8 instruction from d (32, 4): rows lane // 4 and + 8, columns 2 * (lane % 4) and + 1."""
    matrix = np.zeros((16, 8), d.dtype)
    for lane in range(32):
        for i in range(4):
            matrix[(lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + i % 2] = d[lane, i]
    return matrix


def _place(dense: np.ndarray, row: int, first_column: int, which: int, element: int, nibble: int) -> None:
    """Puts the first or second kept element of a group of four where its metadata nibble says."""
    if nibble not in ORDERED_NIBBLES:
        raise ValueError(f"metadata must be 4, 8, 9, C, D or E, got {nibble:X} at row {row}, column {first_column}")
    dense[row, first_column + (nibble & 3 if which == 0 else nibble >> 2)] = element
