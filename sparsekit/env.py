"""Every environment variable that sparsekit reads, in one place.

===================== ======= ========= ==============================================================================
name                  type    default   meaning
===================== ======= ========= ==============================================================================
SPARSEKIT_CUDA        0 or 1  1         at build time: 0 builds without CUDA sources even where nvcc is found
SPARSEKIT_CUDA_ARCHS  text    by nvcc   at build time: architectures to compile for, such as "80 90a 120"
SPARSEKIT_THREADS     int     torch's   threads of the CPU kernels; unset, torch.get_num_threads() at each call
SPARSEKIT_CACHE       folder  see right where measured rows are kept; ~/.cache/sparsekit, or sparsekit in XDG_CACHE_HOME
===================== ======= ========= ==============================================================================

The build variables are read by setup.py, which cannot import this package.
"""

import os
from pathlib import Path

from .errors import SparsekitError


def _positive(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise SparsekitError(f"{name} must be a positive integer, got {text!r}")
    return int(text)


def _cache_folder() -> Path:
    if chosen := os.environ.get("SPARSEKIT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsekit"


THREADS: int | None = _positive("SPARSEKIT_THREADS")
CACHE: Path = _cache_folder()
