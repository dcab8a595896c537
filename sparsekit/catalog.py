"""What a pattern costs and who runs it: bytes a weight, the kernel on a compute capability, what to expect and when not.

No speed stands here that was not measured: what is expected is a bound that follows from the bytes, or a row of ``tune``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from . import bench, tune
from .errors import SparsekitError, listed
from .ops import LINEAR_DTYPES
from .patterns import NM, Block, PairNM, Pattern

Capability = tuple[int, int]

# Words of the names that drivers and vendors give to GPUs, the more particular ones first, and their compute capability.
# Source: NVIDIA, CUDA GPU compute capability.
_NAMES: tuple[tuple[str, Capability], ...] = (
    (r"QUADRO RTX \d+", (7, 5)),  # its 3000, 4000 and 5000 are no GeForce of those series
    (r"RTX PRO \d+|RTX 50[5-9]0|PRO 6000", (12, 0)),
    (r"GB10|DGX SPARK", (12, 1)),
    (r"THOR", (11, 0)),
    (r"B300|GB300|BLACKWELL ULTRA", (10, 3)),
    (r"B100|B200|GB200|BLACKWELL", (10, 0)),
    (r"H100|H200|H800|H20|GH200|HOPPER", (9, 0)),
    (r"L2|L4|L40S?|L20|RTX 40[5-9]0|ADA|LOVELACE", (8, 9)),
    (r"ORIN", (8, 7)),
    (r"A2|A10G?|A16|A40|RTX 30[5-9]0|RTX 2050|MX570|(RTX )?A[1-6][05]00|RTX A[45]00", (8, 6)),
    (r"A30X?|A100X?|A800|AMPERE", (8, 0)),
    (r"T4|T[46]00|T[12]\d00|RTX 20[6-8]0|GTX 16\d0|MX[45]50|TITAN RTX|TURING", (7, 5)),
    (r"XAVIER", (7, 2)),
    (r"V100S?|GV100|VOLTA|TITAN V", (7, 0)),
    (r"P4|P40|P[1-6]\d00|GTX 10\d0|GT 10[1-3]0|(?<!GTX )TITAN XP?", (6, 1)),
    (r"P100|GP100|PASCAL", (6, 0)),
)
_EXAMPLES = ("A100", "A10", "L4", "L40S", "RTX 4090", "RTX 6000 Ada", "H100", "H200", "B200", "RTX 5090")
_SPARSE_UNITS = (8, 0)  # the first capability with mma.sp: PTX ISA, "mma.sp", target ISA notes


def capability_of(gpu: str | Capability | torch.device | None = None) -> Capability | None:
    """The compute capability (major, minor) of a GPU: its name, its capability as "9.0" or a pair, a CUDA device, or, for None, the
    GPU of this machine. None for the CPU. Raises SparsekitError for a name that is not known."""
    if gpu is None:
        gpu = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(gpu, tuple):
        if len(gpu) != 2 or not all(isinstance(part, int) and part >= 0 for part in gpu):
            raise SparsekitError(f"a compute capability must be two numbers, such as (9, 0), got {gpu}")
        return gpu
    if isinstance(gpu, torch.device):
        return torch.cuda.get_device_capability(gpu) if gpu.type == "cuda" else None
    if not isinstance(gpu, str):
        raise SparsekitError(f'the GPU must be a name, a capability, such as "9.0" or (9, 0), or a torch.device, got {gpu!r}')
    text = re.sub(r"[\s_-]+", " ", gpu.upper()).strip()
    text = re.sub(r"\b([RG]TX)(?=\d)", r"\1 ", text)
    if text == "CPU":
        return None
    if match := re.fullmatch(r"(?:SM ?)?(\d{1,2})\.?(\d)[A-Z]?", text):
        return int(match[1]), int(match[2])
    for words, capability in _NAMES:
        if re.search(rf"(?<![A-Z0-9])(?:{words})(?![A-Z0-9])", text):
            return capability
    raise SparsekitError(f'the GPU must be a capability, such as "9.0", or a name, such as {listed(_EXAMPLES, "or")}, got {gpu!r}')


@dataclass(frozen=True)
class Entry:
    """What is known of a pattern on a compute capability.

    density: share of weights kept. index_bits: bits that say where they are, a weight of the dense matrix. stored: the format that
    holds it in density * itemsize + index_bits / 8 bytes a weight. kernel: what multiplies with it there, None where nothing does
    and the product is the dense one. expect and unless: what to expect, and when not."""

    pattern: Pattern
    capability: Capability | None
    density: float
    index_bits: float
    stored: str
    kernel: str | None
    expect: str
    unless: str

    def bytes_per_weight(self, dtype: torch.dtype) -> float:
        """In the format that ``stored`` names; a dense weight takes dtype.itemsize."""
        return self.density * dtype.itemsize + self.index_bits / 8


def entry(pattern: str | Pattern, gpu: str | Capability | torch.device | None = None) -> Entry:
    """The catalog's entry of a pattern on a GPU, as ``capability_of`` reads it; by default on this machine."""
    pattern, capability = Pattern.parse(pattern), capability_of(gpu)
    density = 1 - pattern.sparsity
    if pattern == NM(2, 4):
        return Entry(pattern, capability, density, 1.0, "sparsekit's 2:4 format", *_two_of_four(capability))
    kernel, unless = None, "no kernel here runs it: the product is the dense one, over zeros"
    if isinstance(pattern, PairNM):
        index_bits, stored = 1.0, "sparse-bitmask"
        if pattern == PairNM(4, 8) and capability and capability >= (10, 0):
            unless = "the tensor cores take it for 4-bit floats alone, and no kernel here does"
    elif isinstance(pattern, Block):
        index_bits, stored = 1 / (pattern.rows * pattern.cols), "one bit a block"
    else:
        index_bits, stored = 1.0, "sparse-bitmask"
    fewer = f"{density:.4g} of the values and {index_bits:.4g} bits a weight on disk" if density < 1 else "nothing removed"
    return Entry(pattern, capability, density, index_bits, stored, kernel, f"{fewer}; no faster", unless)


def _two_of_four(capability: Capability | None) -> tuple[str | None, str, str]:
    """kernel, expect, unless of 2:4."""
    bound = "reads 9/16 of a 16-bit weight's bytes, at most 1.78x where those bound the product (a few tokens)"
    if capability is None:
        return "linear24_cpu", bound, "with many tokens, where the dense product can be faster"
    if capability < _SPARSE_UNITS:
        return (
            None,
            "smaller files; no faster",
            f"compute capability {capability[0]}.{capability[1]} has no sparse tensor cores, 8.0 and later do",
        )
    many = "linear24_sm90a" if capability == (9, 0) else "linear24_sm80"
    kernels = f"linear24_decode_sm80 up to 64 tokens, {many} above"
    return kernels, f"{bound}; at most 2x where the tensor cores do (many tokens)", "for weights so small that launches bound them"


@dataclass(frozen=True)
class Advice:
    """pattern: what to prune to for speed, None where nothing within a matrix gains any. measured: how many times as fast as the
    dense product this machine ran it, by weight (n, k); empty where nothing was measured. why: the reasons, a sentence each."""

    pattern: Pattern | None
    kernel: str | None
    measured: dict[tuple[int, int], float]
    why: tuple[str, ...]


def recommend(gpu: str | Capability | torch.device | None = None, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> Advice:
    """What to prune to for speed on that GPU with ``batch`` tokens a product, by its capability and, for this machine (None), by
    the rows that ``sparsekit bench --tune`` measured.

    Raises SparsekitError for a name that is not known, a batch below 1 and a dtype that no product takes."""
    if batch < 1:
        raise SparsekitError(f"the batch must be at least one token, got {batch}")
    if dtype not in LINEAR_DTYPES:
        raise SparsekitError(f"the dtype must be one that a product takes, {listed(LINEAR_DTYPES, 'or')}, got {dtype}")
    found = entry("2:4", gpu)
    if found.kernel is None:
        return Advice(None, None, {}, (f"2:4: {found.expect}; {found.unless}", "whole heads, neurons or layers removed are faster"))
    reasons = f"2:4 {found.expect}", f"not so {found.unless}"
    if gpu is not None:
        return Advice(found.pattern, found.kernel, {}, (*reasons, "not measured for a GPU by its name"))
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    key = bench.key(place)
    measured = tune.speedups(key, str(dtype).removeprefix("torch."), batch)
    if not measured:
        return Advice(found.pattern, found.kernel, {}, (*reasons, "not measured on this machine; `sparsekit bench --tune` does"))
    low, high = min(measured.values()), max(measured.values())
    said = f"near {batch} tokens 2:4 ran at {low:.2f} to {high:.2f} of the dense product's speed {tune.measured_on(key)}"
    if high <= 1:
        return Advice(None, None, measured, (f"{said}: not faster",))
    return Advice(found.pattern, found.kernel, measured, (said, *reasons))
