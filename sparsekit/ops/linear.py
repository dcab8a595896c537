"""The product with a weight stored 2:4."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import __version__, reference, tune
from ..errors import listed
from ..format import Fragments24, Sparse24, check_fragments, check_layout, from_fragments, in_transform, to_fragments
from ..timing import cpu_name
from ..tune import Choice
from . import gradient
from .registry import _C, DTYPE_CODE, define, raw_stream, say_once, stacked, straight, threads

LINEAR_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GPU_DTYPES = (torch.float16, torch.bfloat16)  # of which a GPU has kernels
DECODE, HOPPER, MMA_SP, SPARSE_CPU = "linear24_decode_sm80", "linear24_sm90a", "linear24_sm80", "linear24_cpu"
DECODE_TOKENS = 64  # the most that the decode kernel takes
# What csrc/launch.h offers of tiles and splits. The decode kernel's tiles are rows of the weight, by the most tokens they are for.
DECODE_TILES, DECODE_SPLITS = {16: (16, 32, 64, 128), 32: (32, 64, 128, 256), 64: (64, 128, 256)}, (1, 2, 4, 8)
HOPPER_TILES, MMA_SP_TILES = range(1, 8), range(1, 5)
# Up to so many tokens the first tiles can leave multiprocessors idle, so that parts of k are worth measuring.
HOPPER_SPLIT_TOKENS, HOPPER_SPLIT_TILES, HOPPER_SPLITS = 256, range(1, 4), (1, 2, 4, 8, 16)
_DTYPE_NAME = {dtype: str(dtype).removeprefix("torch.") for dtype in LINEAR_DTYPES}  # in the rows of tune.py
_ACTIVATION_CODE = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}  # csrc/launch.h


def linear24(x: Tensor, s: Sparse24 | Fragments24, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """activation(x @ W.T + bias) for a weight W (n, k) stored 2:4, summed in fp32.

    x (..., k), any rank and strides, fp32, fp16 or bf16; s of such a dtype, not necessarily that of x (16-bit storage under fp32
    activations is legal); bias (n,) in x's dtype; activation None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
    A GPU's kernels read Fragments24, and a Sparse24 there is brought into that order at every call: keep ``to_fragments(s)`` of a
    weight that is used again, as SparseLinear does. A CPU's kernels read Sparse24.
    Returns (..., n) in x's dtype. The result is the same bit for bit from run to run. Gradients: exact in x, in the weight at the
    kept places alone, in the order of its values; of any order, and under torch.func: vmap over activations is one product, over
    weights one each; grad and jacrev run the kernels, jvp and jacfwd torch's operators on the weight written out. The torch ops
    beneath have no gradients.
    A pruned place is skipped, so a NaN or Inf of x may reach fewer elements of y than in a dense product, where 0 * Inf is NaN.
    Bias and activation are taken in fp32 and y is rounded once; but where the lookup (tune.py) says that the weight is to be
    written out, the library rounds its product to x's dtype first.
    What the nibbles of s are is not looked at: ops.validate24 does that.
    Raises TypeError for another dtype, ValueError for another shape, device or activation."""
    if not isinstance(s, (Sparse24, Fragments24)):
        raise TypeError(f"linear24: s must be a Sparse24 or a Fragments24, got a {type(s).__name__}; compress24 makes one")
    transformed = in_transform()
    if gradient.in_forward_mode() or (transformed and torch.compiler.is_compiling()):
        _check_product(x, s.values, *s.shape, bias, activation)
        return reference.ACTIVATIONS[activation](gradient.in_plain_torch(x, s, bias))
    tensors = (x, s.values) if bias is None else (x, s.values, bias)
    if transformed or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        _check_activation(activation)
        if torch.jit.is_tracing():  # its own check traces once more, without gradients, and finds another graph
            raise RuntimeError(
                "linear24: torch.jit.trace must run under torch.no_grad(), got gradients on, which a trace would not keep; "
                "use torch.compile or torch.export to train"
            )
        return reference.ACTIVATIONS[activation](gradient.Product.apply(x, s.values, s.meta, *s.shape, bias))
    if not torch.compiler.is_compiling() and isinstance(s, Sparse24) and straight(x, s.values, s.meta, bias):
        gradient.check_rows(s)
        return _linear24_cpu(x, s.values, s.meta, s.shape[1], bias, activation)
    return gradient.call(x, s, bias, activation)


def _check_product(x: Tensor, values: Tensor, n: int, k: int, bias: Tensor | None, activation: str | None) -> None:
    if x.dtype not in LINEAR_DTYPES or values.dtype not in LINEAR_DTYPES:
        raise TypeError(f"linear24: x and values must be one of {listed(LINEAR_DTYPES)}, got {x.dtype} and {values.dtype}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"linear24: the last dimension of x must be k = {k}, got x {tuple(x.shape)}")
    if x.device != values.device:
        raise ValueError(f"linear24: x and values must be on one device, got {x.device} and {values.device}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (n,) or bias.device != x.device):
        raise ValueError(
            f"linear24: bias must be ({n},) in {x.dtype} on {x.device}, got {tuple(bias.shape)} in {bias.dtype} on {bias.device}"
        )
    _check_activation(activation)


def _check_activation(activation: str | None) -> None:
    if activation not in _ACTIVATION_CODE:
        raise ValueError(f"linear24: activation must be {listed(map(repr, _ACTIVATION_CODE))}, got {activation!r}")


def _check_linear24(x: Tensor, values: Tensor, meta: Tensor, k: int, bias: Tensor | None, activation: str | None) -> None:
    check_layout("linear24", values, meta, k)
    _check_product(x, values, values.shape[0], k, bias, activation)


def _check_linear24_fragments(
    x: Tensor, values: Tensor, meta: Tensor, n: int, k: int, bias: Tensor | None, activation: str | None
) -> None:
    check_fragments("linear24", Fragments24(values, meta, (n, k)))
    _check_product(x, values, n, k, bias, activation)


def _rows(x: Tensor, apart: bool = False) -> tuple[Tensor, int, int]:
    """What holds x as (m, k) with unit stride along k, x itself or a view where that can be, else a copy; m; and the elements from
    row to row.

    apart: rows must not overlap, as those of an expanded tensor do."""
    m, k = x.shape[:-1].numel(), x.shape[-1]
    if x.is_contiguous():
        return x, m, k
    rows = x.reshape(m, k)
    across, along = rows.stride()
    if m <= 1:
        across = max(across, k)  # the stride of a single row says nothing
    if (along != 1 and k > 1) or (apart and across < k):
        return rows.clone(memory_format=torch.contiguous_format), m, k
    return rows, m, across


def _aligned(t: Tensor) -> Tensor:
    """The tensor where 16-byte loads can read it: a view into a larger buffer may begin anywhere."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _expanded(x: Tensor, s: Sparse24 | Fragments24, bias: Tensor | None, activation: str | None) -> Tensor:
    """The weight written out dense, and the library's product: in fp32 where the dtypes differ, since neither holds the other."""
    w = gradient.dense(s)
    if w.dtype == x.dtype:
        return reference.ACTIVATIONS[activation](F.linear(x, w, bias))
    y = F.linear(x.float(), w.float(), None if bias is None else bias.float())
    return reference.ACTIVATIONS[activation](y).to(x.dtype)


# ---- on the CPU ----


def _linear24_cpu(x: Tensor, values: Tensor, meta: Tensor, k: int, bias: Tensor | None, activation: str | None) -> Tensor:
    _check_linear24(x, values, meta, k, bias, activation)
    return _chosen_on_cpu(x, Sparse24(values, meta, (values.shape[0], k)), bias, activation)


def _chosen_on_cpu(x: Tensor, s: Sparse24, bias: Tensor | None, activation: str | None) -> Tensor:
    choice = None
    if x.dtype == s.values.dtype:
        choice = tune.choose(cpu_key(threads()), _DTYPE_NAME[x.dtype], x.shape[:-1].numel(), *s.shape)
    return run_on_cpu(choice or Choice(SPARSE_CPU), x, s, bias, activation)


def run_on_cpu(choice: Choice, x: Tensor, s: Sparse24, bias: Tensor | None, activation: str | None) -> Tensor:
    """The product by one kernel."""
    if choice.kernel == tune.EXPAND:
        return _expanded(x, s, bias, activation)
    (rows, m, ldx), (n, k) = _rows(x), s.shape
    values, meta = s.values.contiguous(), s.meta.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    _C.linear24_cpu(
        rows.data_ptr(),
        values.data_ptr(),
        meta.data_ptr(),
        _address(bias),
        y.data_ptr(),
        m,
        n,
        k,
        ldx,
        DTYPE_CODE[x.dtype],
        DTYPE_CODE[values.dtype],
        _ACTIVATION_CODE[activation],
        threads(),
    )
    return y


def _linear24_fragments_cpu(
    x: Tensor, values: Tensor, meta: Tensor, n: int, k: int, bias: Tensor | None, activation: str | None
) -> Tensor:
    _check_linear24_fragments(x, values, meta, n, k, bias, activation)
    return _chosen_on_cpu(x, from_fragments(Fragments24(values, meta, (n, k))), bias, activation)


@cache
def cpu_key(used: int) -> str:
    """What the rows of tune.py are kept under for a CPU with that many threads."""
    return f"cpu {_C.cpu_isa()}; {cpu_name()}; {used} threads; sparsekit {__version__}"


# ---- on a GPU ----


def _linear24_cuda(x: Tensor, values: Tensor, meta: Tensor, k: int, bias: Tensor | None, activation: str | None) -> Tensor:
    _check_linear24(x, values, meta, k, bias, activation)
    s = Sparse24(values, meta, (values.shape[0], k))
    if not _has_kernel(x, values):
        return _expanded(x, s, bias, activation)
    return run_on_gpu(chosen_on_gpu(x, values.dtype, *s.shape), x, s, bias, activation)


def _linear24_fragments_cuda(
    x: Tensor, values: Tensor, meta: Tensor, n: int, k: int, bias: Tensor | None, activation: str | None
) -> Tensor:
    _check_linear24_fragments(x, values, meta, n, k, bias, activation)
    f = Fragments24(values, meta, (n, k))
    if not _has_kernel(x, values):
        return _expanded(x, f, bias, activation)
    return run_on_gpu(chosen_on_gpu(x, values.dtype, n, k), x, f, bias, activation)


def _has_kernel(x: Tensor, values: Tensor) -> bool:
    """Whether the build has a kernel for these dtypes on this device; says so once where it has not."""
    if x.dtype == values.dtype and x.dtype in GPU_DTYPES and _has_mma_sp(x.device.index):
        return True
    say_once(
        f"linear24: no kernel for {x.dtype} x {values.dtype} on {torch.cuda.get_device_name(x.device)} in this build "
        f"(architectures: {', '.join(_C.cuda_archs()) or 'none'}); each call expands the weight"
    )
    return False


def chosen_on_gpu(x: Tensor, dtype: torch.dtype, n: int, k: int) -> Choice:
    """The kernel that runs this product: by measured rows where there are any."""
    index, m = x.device.index, x.shape[:-1].numel()
    choice = tune.choose(gpu_key(index), _DTYPE_NAME[dtype], m, n, k)
    if choice is None or (choice.kernel == HOPPER and not _has_hopper(index)):  # measured with a build that had it
        choice = default_choice(index, m)
    if choice.kernel == DECODE and choice.tile and (tiles := _decode_tiles(m, index)):
        return choice._replace(tile=max(tiles[0], min(choice.tile, tiles[-1])))  # measured for the nearest m, which may have others
    return choice


@cache
def default_choice(index: int, m: int) -> Choice:
    """What runs m tokens on a CUDA device where nothing was measured. Not yet run on hardware."""
    if m <= DECODE_TOKENS:
        return Choice(DECODE)
    return Choice(HOPPER if HOPPER in gpu_kernels(index) else MMA_SP)


def run_on_gpu(choice: Choice, x: Tensor, s: Sparse24 | Fragments24, bias: Tensor | None, activation: str | None) -> Tensor:
    """The product by one kernel. Where TMA cannot take x, which only Hopper's kernel needs, the mma.sp kernel runs."""
    if choice.kernel == tune.EXPAND:
        return _expanded(x, s, bias, activation)
    f = s if isinstance(s, Fragments24) else to_fragments(s)
    (rows, m, ldx), (n, k), index = _rows(x, apart=True), f.shape, x.device.index
    values, meta = _aligned(f.values), _aligned(f.meta)
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    tile, split = choice.tile, choice.split
    operands = rows.data_ptr(), values.data_ptr(), meta.data_ptr(), _address(bias), y.data_ptr()
    sizes = m, n, k, ldx, DTYPE_CODE[x.dtype], _ACTIVATION_CODE[activation]
    where = index, raw_stream(index)
    if choice.kernel == DECODE and m <= DECODE_TOKENS:
        parts = _workspace(_C.linear24_decode_workspace(m, n, k, tile, split, index), x)
        _C.linear24_decode_sm80(*operands, _address(parts), *sizes, tile, split, *where)
        return y
    if choice.kernel == HOPPER:
        parts = _workspace(_C.linear24_sm90a_workspace(m, n, k, tile, split, index), x)
        if _C.linear24_sm90a(*operands, _address(parts), *sizes, tile, split, *where):
            return y
    _C.linear24_sm80(*operands, *sizes, tile if choice.kernel == MMA_SP else 0, *where)
    return y


def _workspace(nbytes: int, like: Tensor) -> Tensor | None:
    return torch.empty(nbytes, dtype=torch.uint8, device=like.device) if nbytes else None


def gpu_kernels(index: int) -> list[str]:
    """The kernels of this build that run on a CUDA device."""
    if not _has_mma_sp(index):
        return []
    return [DECODE, *([HOPPER] if _has_hopper(index) else []), MMA_SP]


@cache
def _has_hopper(index: int) -> bool:
    return hasattr(_C, HOPPER) and torch.cuda.get_device_capability(index) == (9, 0)


def decode_shared(m: int, tile: int) -> int:
    """Bytes of shared memory of a block of the decode kernel: four stages of 16 KiB of values and of x, once for each warp that
    shares a row tile."""
    return 4 * (16384 + 32768 * m // tile)


@cache
def _decode_tiles(m: int, index: int) -> tuple[int, ...]:
    """The decode kernel's tiles for m tokens, neighbours in ascending order, that the device has the shared memory for."""
    properties = torch.cuda.get_device_properties(index)
    held = getattr(properties, "shared_memory_per_block_optin", 99 << 10)  # an older torch does not tell; the least since sm_80
    tiles = next((tiles for most, tiles in DECODE_TILES.items() if m <= most), ())
    return tuple(tile for tile in tiles if decode_shared(m, tile) <= held)


def variants(kernel: str, m: int, index: int) -> list[tuple[int, int]]:
    """The tiles and splits of a kernel that a CUDA device can run for m tokens and that are worth measuring."""
    if kernel == DECODE:
        return [(tile, split) for tile in _decode_tiles(m, index) for split in DECODE_SPLITS]
    if kernel == MMA_SP:
        return [(tile, 0) for tile in MMA_SP_TILES]
    splits = HOPPER_SPLITS if m <= HOPPER_SPLIT_TOKENS else ()
    return [(tile, split) for tile in HOPPER_TILES for split in ((0, *splits) if tile in HOPPER_SPLIT_TILES else (0,))]


@cache
def gpu_key(index: int) -> str:
    """What the rows of tune.py are kept under for a CUDA device."""
    major, minor = torch.cuda.get_device_capability(index)
    driver = _C.cuda_driver() if _C.cuda_archs() else "unknown"
    software = f"driver {driver}; CUDA {torch.version.cuda}; sparsekit {__version__}"
    return f"{torch.cuda.get_device_name(index)}; sm_{major}{minor}; {software}"


@cache
def _has_mma_sp(index: int) -> bool:
    # Code for 80 runs on all that is later, from its PTX if need be; code for 90a on 90 alone.
    major, minor = torch.cuda.get_device_capability(index)
    mine = 10 * major + minor
    return any(int(arch) <= mine if arch.isdigit() else int(arch[:-1]) == mine for arch in _C.cuda_archs())


# ---- for torch ----


def _linear24_fake(x: Tensor, values: Tensor, meta: Tensor, k: int, bias: Tensor | None, activation: str | None) -> Tensor:
    _check_linear24(x, values, meta, k, bias, activation)
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _linear24_fragments_fake(
    x: Tensor, values: Tensor, meta: Tensor, n: int, k: int, bias: Tensor | None, activation: str | None
) -> Tensor:
    _check_linear24_fragments(x, values, meta, n, k, bias, activation)
    return x.new_empty(*x.shape[:-1], n)


def _batched(op):
    """Activations of one weight are one product; weights are one each."""

    def rule(info, in_dims, x, *others):
        if in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
            return op(x.movedim(in_dims[0], 0), *others), 0
        return stacked(info.batch_size, in_dims, (x, *others), op)

    return rule


define(
    "linear24(Tensor x, Tensor values, Tensor meta, SymInt k, Tensor? bias, str? activation) -> Tensor",
    _linear24_cpu,
    _linear24_cuda,
    _linear24_fake,
    vmap=_batched,
)
define(
    "linear24_fragments(Tensor x, Tensor values, Tensor meta, SymInt n, SymInt k, Tensor? bias, str? activation) -> Tensor",
    _linear24_fragments_cpu,
    _linear24_fragments_cuda,
    _linear24_fragments_fake,
    vmap=_batched,
)
