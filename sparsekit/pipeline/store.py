"""Where the hidden states of the calibration batches wait between two blocks: in memory, or on disk where memory is short.

A store is a list of tensors that only grows: ``append``, ``store[b]``, ``store[b] = hidden`` and ``len``. What is read is bit for
bit what was written, on the device it was written from."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..errors import SparsekitError


class InMemory:
    """In the host's memory; pinned where they come from a GPU, so that a copy does not hold the host up."""

    def __init__(self):
        self._held: list[tuple[Tensor, torch.device]] = []

    def __len__(self) -> int:
        return len(self._held)

    def append(self, hidden: Tensor) -> None:
        self._held.append((_to_host(hidden), hidden.device))

    def __setitem__(self, b: int, hidden: Tensor) -> None:
        self._held[b] = (_to_host(hidden, self._held[b][0]), hidden.device)

    def __getitem__(self, b: int) -> Tensor:
        held, device = self._held[b]
        return held.to(device, non_blocking=True, copy=True)  # a block may add to it in place, and runs twice


class OnDisk:
    """In one file of a folder, which has no name there: the system removes it when the process ends, however it ends.

    One batch at a time is in memory. Raises SparsekitError where the folder cannot be written, OSError where the disk is full."""

    def __init__(self, folder: str | Path):
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        except OSError as error:
            raise SparsekitError(f"hidden states must go to a folder that can be written, got {folder}: {error.strerror}") from None
        self._places: list[tuple[int, Tensor, torch.device]] = []  # offset; shape and dtype, as a tensor on meta; device
        self._end = 0

    def __len__(self) -> int:
        return len(self._places)

    def append(self, hidden: Tensor) -> None:
        self._places.append((self._end, hidden.new_empty(0, device="meta"), hidden.device))
        self[len(self._places) - 1] = hidden

    def __setitem__(self, b: int, hidden: Tensor) -> None:
        offset, like, _ = self._places[b]
        if hidden.nbytes > like.nbytes:  # a block may widen them; what it leaves behind is a hole
            offset, self._end = self._end, self._end + hidden.nbytes
        view = memoryview(hidden.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        while view:  # one call writes 2 GiB at most
            written = os.pwrite(self._file.fileno(), view, offset + hidden.nbytes - len(view))
            view = view[written:]
        self._places[b] = (offset, torch.empty_like(hidden, device="meta"), hidden.device)

    def __getitem__(self, b: int) -> Tensor:
        offset, like, device = self._places[b]
        hidden = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        view = memoryview(hidden.flatten().view(torch.uint8).numpy())
        while view:
            read = os.preadv(self._file.fileno(), [view], offset + hidden.nbytes - len(view))
            if not read:
                raise OSError(f"the hidden states of batch {b} cannot be read back to their end")
            view = view[read:]
        return hidden.to(device)

    def close(self) -> None:
        """Gives the disk space back; the store is empty then."""
        self._file.close()
        self._places.clear()


Store = InMemory | OnDisk


def _to_host(hidden: Tensor, into: Tensor | None = None) -> Tensor:
    """The tensor itself, or of a GPU's its copy in pinned memory: ``into`` where that fits."""
    if not hidden.is_cuda:
        return hidden
    if into is None or not into.is_pinned() or (into.shape, into.dtype) != (hidden.shape, hidden.dtype):
        into = torch.empty(hidden.shape, dtype=hidden.dtype, device="cpu", pin_memory=True)
    return into.copy_(hidden, non_blocking=True)
