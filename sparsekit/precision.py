"""Arithmetic in full fp32, whatever a caller has chosen for the model's own: TF32 or bf16 products, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, or in a function that it decorates, products of fp32 are of fp32 and nothing is cast; after it all is as it was.

    torch has an older and a newer way to choose, and multiplies nothing where they are at odds: the caller's is the one used."""
    try:
        chosen = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was chosen by the newer one
        chosen = [held.fp32_precision for held in _backends()]
    try:
        _choose("highest" if isinstance(chosen, str) else ["ieee"] * len(chosen))
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        _choose(chosen)


def _backends() -> list:
    """What the newer way chooses for: products on a GPU and on a CPU."""
    return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]


def _choose(precision: str | list[str]) -> None:
    if isinstance(precision, str):
        torch.set_float32_matmul_precision(precision)
        return
    for held, wanted in zip(_backends(), precision):
        held.fp32_precision = wanted
