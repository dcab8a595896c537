"""Text into token windows, for calibration and for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import SparsekitError


def read_tokens(path: str | Path, tokenizer) -> Tensor:
    """The tokens (count,) of a UTF-8 text file, without special tokens. Raises SparsekitError where it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SparsekitError(f"the text {path} must be UTF-8, and byte {error.start} is not; convert it first") from None
    except OSError as error:
        raise SparsekitError(f"the text {path} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise SparsekitError(f"the text {path} is empty; give one with words in it")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # no warning that it exceeds the context
    return torch.tensor(ids, dtype=torch.long)


def context_length(config) -> int:
    """Tokens that a model of this transformers config can see at once; 2048 where the config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2048


def check_vocabulary(ids: Tensor, model: nn.Module) -> None:
    """Raises SparsekitError where a token id lies outside the model's embedding: on a GPU that would end the process."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    count = getattr(embedding, "num_embeddings", None)
    if count is not None and ids.numel() and ids.max() >= count:
        raise SparsekitError(
            f"token ids must be below the model's vocabulary of {count}, got {int(ids.max())}; use the model's own tokenizer"
        )


def calibration_batches(tokens: Tensor, samples: int, seq_len: int, seed: int = 0, batch: int = 4) -> list[Tensor]:
    """``samples`` windows of seq_len consecutive tokens at random places, as batches (<= batch, seq_len).

    The same seed gives the same windows. Raises SparsekitError where the text is shorter than one window."""
    for name, value in (("samples", samples), ("seq_len", seq_len)):
        if value < 1:
            raise SparsekitError(f"{name} must be at least 1, got {value}")
    if not 0 <= seed < 1 << 63:
        raise SparsekitError(f"seed must be at least 0 and below 2**63, got {seed}")
    if len(tokens) < seq_len:
        raise SparsekitError(
            f"the calibration text must hold at least one sequence of {seq_len} tokens, got {len(tokens)}; "
            f"give a longer text or a smaller --seq-len"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - seq_len + 1, (samples,), generator=generator).tolist()
    windows = torch.stack([tokens[start : start + seq_len] for start in starts])
    return list(windows.split(batch))


def evaluation_windows(tokens: Tensor, seq_len: int, max_tokens: int | None = None) -> Tensor:
    """Consecutive windows (count, seq_len) that do not overlap; what is left over at the end is dropped."""
    if seq_len < 2:
        raise SparsekitError(f"seq_len must be at least 2, got {seq_len}")
    if max_tokens is not None and max_tokens < 1:
        raise SparsekitError(f"max_tokens must be at least 1, got {max_tokens}")
    read = len(tokens) if max_tokens is None else min(len(tokens), max_tokens)
    count = read // seq_len
    if count == 0:
        raise SparsekitError(
            f"the text must hold at least one sequence of {seq_len} tokens, got {read}; "
            f"give a longer text, a smaller --seq-len or a larger --max-tokens"
        )
    return tokens[: count * seq_len].view(count, seq_len)


def hash_batches(batches: Iterable[Tensor | Mapping]) -> str:
    """What two runs can tell by that they have the same batches, in the same order."""
    seen = hashlib.sha256()
    for batch in batches:
        for name, value in batch.items() if isinstance(batch, Mapping) else [("input_ids", batch)]:
            what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else value
            seen.update(f"{name} {what};".encode())
            if isinstance(value, Tensor):
                seen.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return seen.hexdigest()[:16]
