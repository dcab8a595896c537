"""CUTLASS's layouts of a 2:4 operand for sm_90, evaluated as CuTe evaluates them: shape:stride, coordinate to index.

Written from the layout expressions in CUTLASS (sm90_sparse_config.inl, mma_traits_sm90_gmma_sparse.hpp) and from what its
compressor does (sm90_sparse_gemm_compressor.hpp), so that the converters can be checked against expressions, not against
themselves. Weights are bit patterns: uint16 or uint8 arrays.
"""

from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """Nested shape and stride of the same structure. Called with a coordinate a mode, gives the index; an integer coordinate of a
    nested mode runs through it first mode fastest."""

    shape: tuple
    stride: tuple

    def __call__(self, *coordinate: int) -> int:
        return _index(coordinate, self.shape, self.stride)


def _index(coordinate, shape, stride) -> int:
    if not isinstance(shape, tuple):
        return coordinate * stride
    if isinstance(coordinate, tuple):
        return sum(map(_index, coordinate, shape, stride))
    total = 0
    for mode, step in zip(shape, stride):
        coordinate, inner = divmod(coordinate, size(mode))
        total += _index(inner, mode, step)
    return total


def size(shape) -> int:
    return int(np.prod([size(mode) for mode in shape])) if isinstance(shape, tuple) else shape


def ordered(shape: tuple, order: tuple) -> Layout:
    """A compact layout: the mode with the lowest number in `order` has stride 1, the next one follows it, and so on."""
    modes, numbers = _leaves(shape), _leaves(order)
    strides, stride = [0] * len(modes), 1
    for i in sorted(range(len(modes)), key=numbers.__getitem__):
        strides[i], stride = stride, stride * modes[i]
    return Layout(shape, _like(shape, iter(strides)))


def _leaves(tree) -> list:
    return [leaf for branch in tree for leaf in _leaves(branch)] if isinstance(tree, tuple) else [tree]


def _like(tree, leaves):
    return tuple(_like(branch, leaves) for branch in tree) if isinstance(tree, tuple) else next(leaves)


def metadata_layout(n: int, k: int, bits: int, tile_k: int) -> Layout:
    """Of E for A (n, k), in logical elements, eight to a byte: an atom of 64 rows by tile_k columns, atoms down the rows first."""
    steps = tile_k // (512 // bits)
    atom = ordered(((8, 2, 4), (16, 2, steps)), ((3, 1, 5), (0, 4, 2))) if bits == 16 else ordered((64, tile_k), (1, 0))
    rows, columns = -(-n // 64), -(-k // tile_k)
    shape = (atom.shape[0], rows), (atom.shape[1], columns)
    return Layout(shape, ((atom.stride[0], 64 * tile_k), (atom.stride[1], rows * 64 * tile_k)))


def compress(w: np.ndarray, tile_k: int, signed_zero: bool) -> tuple[np.ndarray, np.ndarray]:
    """Compressed A and E of w (n, k), k a multiple of 4, with at most two non-zeros a group, as CUTLASS's compressor writes them.

    Non-zeros stand in their order; -0.0, where the dtype has it, is none. One alone gets column 3 beside it, or column 0 before it
    where it is in column 3 itself; an empty group gets nibble 0. What lies outside of A is zero."""
    n, k = w.shape
    bits = 8 * w.itemsize
    layout, magnitude = metadata_layout(n, k, bits, tile_k), (1 << bits - signed_zero) - 1
    values = np.zeros((n, -(-k // (256 // bits)) * (256 // bits) // 2), w.dtype)
    metadata = np.zeros(size(layout.shape) // 8, np.uint8)
    for row in range(n):
        for group in range(k // 4):
            chunk = w[row, 4 * group : 4 * group + 4]
            columns = [c for c in range(4) if chunk[c] & magnitude]
            if len(columns) == 1:
                columns = [0, 3] if columns == [3] else [columns[0], 3]
            for i, column in enumerate(columns):
                values[row, 2 * group + i] = chunk[column]
            nibble = columns[1] << 2 | columns[0] if columns else 0
            metadata[layout(row, 4 * group) // 8] |= nibble << 4 * (group % 2)
    return values, metadata


# Of one wgmma.sp of 64 rows: (thread, value) to row + 64 * column. Values of A are logical columns, four to a group of which two
# are held; values of E are bits of a register, one for each logical column, so that a nibble stands at the columns it describes.
A_64X32 = Layout(((4, 8, 4), (4, 2, 2)), ((256, 1, 16), (64, 8, 1024)))
A_64X64 = Layout(((4, 8, 4), (8, 2, 2)), ((512, 1, 16), (64, 8, 2048)))
E_64X32 = Layout(((2, 2, 8, 4), (16, 2)), ((1024, 0, 1, 16), (64, 8)))
E_64X64 = Layout(((2, 2, 8, 4), (32,)), ((8, 2048, 1, 16), (64,)))


def wgmma_sp(a: np.ndarray, metadata: np.ndarray, a_layout: Layout, e_layout: Layout, selector: int = 0) -> np.ndarray:
    """A (64, columns) of a (128, elements) and metadata (128,) uint32. E's layout names the threads of selector 0; those of
    selector 1 are the two behind them."""
    columns = size(a_layout.shape) // 64
    nibbles = np.zeros((64, columns // 4), np.uint8)
    for thread in range(128):
        for bit in range(0, 32, 4):
            column, row = divmod(e_layout(thread, bit), 64)
            holder = thread ^ 2 if selector else thread
            if columns == 64 or holder % 4 // 2 == selector:
                nibbles[row, column // 4] = int(metadata[holder]) >> bit & 15
    dense = np.zeros((64, columns), a.dtype)
    for thread in range(128):
        for value in range(0, size(a_layout.shape[1]), 4):
            column, row = divmod(a_layout(thread, value), 64)
            nibble = int(nibbles[row, column // 4])
            dense[row, column + (nibble & 3)] = a[thread, value // 2]
            dense[row, column + (nibble >> 2)] = a[thread, value // 2 + 1]
    return dense
