"""The kernels as functions on tensors, and as torch ops with a schema, CPU, CUDA and fake: ``torch.ops.sparsekit``.

torch.compile and opcheck see them. Kernels are called from here alone. What is wrong with a tensor is one sentence of ours; an
argument of another kind altogether (a list for a tensor, 1.5 for a count) is refused by torch's dispatcher, in its words.
"""

from .format import (
    LARGEST_M,
    compress24,
    expand24,
    mask_nm,
    mask_rows,
    prune24,
    prune_compress24,
    validate24,
)
from .gradient import held
from .gram import gram_
from .linear import LINEAR_DTYPES, linear24
from .obs import obs_block_

__all__ = [
    "LARGEST_M",
    "LINEAR_DTYPES",
    "compress24",
    "expand24",
    "gram_",
    "held",
    "linear24",
    "mask_nm",
    "mask_rows",
    "obs_block_",
    "prune24",
    "prune_compress24",
    "validate24",
]
