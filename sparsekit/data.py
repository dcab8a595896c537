"""Text into token windows, for calibration and for evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import SparsekitError

SELF = "self"  # in place of a file: text that the model writes itself
TEXTS = (".txt", ".md")  # what is read of a folder
PICKLES = (".pt", ".pth", ".pkl", ".pickle")


def read_tokens(path: str | Path, tokenizer) -> Tensor:
    """The tokens (count,) of a UTF-8 text file, without special tokens. Raises SparsekitError where it cannot be read."""
    text = _read_text(path)
    if not text.strip():
        raise SparsekitError(f"the text {path} is empty; give one with words in it")
    return _tokens([text], tokenizer)


def read_calibration(path: str | Path, tokenizer, field: str | None = None, vocabulary: int | None = None) -> Tensor:
    """The tokens (count,) of a calibration source, its texts one after the other, without special tokens.

    A folder is all of its .txt and .md files, those of its folders too, hidden ones not, in the order of their paths. A .jsonl file
    is an object a line, whose texts are under ``field`` ("text"). A .npy or .safetensors file is an integer tensor of token ids,
    read row by row (of several tensors, the one called input_ids); a .ids file is ids in decimal, parted by white space. Any other
    file is one UTF-8 text. vocabulary: ids must be below it.
    Raises SparsekitError where it cannot be read, holds no text, or is a pickle, which could run code."""
    path = Path(path)
    if field is not None and path.suffix != ".jsonl":
        raise SparsekitError(f"a field belongs to a .jsonl file, got {field!r} for {path}; leave it out")
    if path.suffix in PICKLES and not path.is_dir():
        raise SparsekitError(
            f"token ids must be a .npy, .safetensors or .ids file, got {path}: a pickle could run code; save it anew"
        )
    if path.suffix in _IDS and not path.is_dir():
        try:
            return _checked(_IDS[path.suffix](path), path, vocabulary)
        except OSError as error:
            raise SparsekitError(f"the token ids {path} cannot be read: {error.strerror or error}") from None
    if not path.is_dir() and path.suffix != ".jsonl":
        return read_tokens(path, tokenizer)
    texts = list(_folder(path) if path.is_dir() else _lines(path, "text" if field is None else field))
    if not any(text.strip() for text in texts):
        raise SparsekitError(f"{path} must hold text, and all of {len(texts)} are empty; give one with words in it")
    return _tokens(texts, tokenizer)


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SparsekitError(f"the text {path} must be UTF-8, and byte {error.start} is not; convert it first") from None
    except OSError as error:
        raise SparsekitError(f"the text {path} cannot be read: {error.strerror}") from None


def _tokens(texts: list[str], tokenizer) -> Tensor:
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # no warning that it exceeds the context
    return torch.tensor([token for each in ids for token in each], dtype=torch.long)


def _folder(folder: Path) -> Iterator[str]:
    found = [path for path in folder.rglob("*") if path.suffix in TEXTS and path.is_file()]
    names = sorted(path.relative_to(folder).parts for path in found)
    shown = [name for name in names if not any(part.startswith(".") for part in name)]
    if not shown:
        raise SparsekitError(f"the folder {folder} must hold {' or '.join(TEXTS)} files, and has none")
    for name in shown:
        yield _read_text(folder.joinpath(*name))


def _lines(path: Path, field: str) -> Iterator[str]:
    lines = _read_text(path).split("\n")  # not splitlines: a JSON text may hold any other end of line
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            raise SparsekitError(f"each line of {path} must be a JSON object, and line {number} is not JSON") from None
        if not isinstance(value, dict) or not isinstance(value.get(field), str):
            fields = [name for name in value if isinstance(value[name], str)] if isinstance(value, dict) else []
            known = f"its texts are {', '.join(map(repr, fields))}" if fields else "it holds no text"
            raise SparsekitError(f"each line of {path} must hold a text {field!r}, and line {number} does not; {known}")
        yield value[field]


def _npy(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise SparsekitError(f"{path} is not a whole .npy file of numbers: {str(error).splitlines()[0]}") from None
    if not isinstance(ids, np.ndarray):
        raise SparsekitError(f"{path} must be one .npy array, and is an archive of several")
    return ids


def _safetensors(path: Path) -> np.ndarray:
    try:
        with safe_open(path, framework="np") as tensors:
            names = list(tensors.keys())
            name = names[0] if len(names) == 1 else "input_ids"
            if name not in names:
                raise SparsekitError(f"{path} must hold one tensor or one called input_ids, got {', '.join(names) or 'none'}")
            return tensors.get_tensor(name)
    except (SafetensorError, TypeError) as error:
        raise SparsekitError(f"{path} is not a whole safetensors file of integers: {str(error).splitlines()[0]}") from None


def _decimals(path: Path) -> np.ndarray:
    words = _read_text(path).split()
    for i, word in enumerate(words):
        if not (word.isascii() and word.isdecimal() and len(word) < 19):
            raise SparsekitError(f"{path} must hold token ids in decimal, and word {i + 1} is {word[:40]!r}")
    return np.array([int(word) for word in words], dtype=np.int64)


_IDS = {".npy": _npy, ".safetensors": _safetensors, ".ids": _decimals}


def _checked(ids: np.ndarray, path: Path, vocabulary: int | None) -> Tensor:
    """The token ids as a tensor (count,)."""
    if ids.dtype.kind not in "iu":
        raise SparsekitError(f"token ids must be integers, got {ids.dtype} in {path}")
    if not ids.size:
        raise SparsekitError(f"{path} must hold token ids, and is empty")
    last = (vocabulary or 1 << 31) - 1
    if ids.min() < 0 or ids.max() > last:
        raise SparsekitError(
            f"token ids must be 0 to {last}, got {ids.min()} to {ids.max()} in {path}; use the model's own tokenizer"
        )
    return torch.from_numpy(ids.reshape(-1).astype(np.int64))


def first_token(tokenizer, config) -> int:
    """The token that a text of the model begins with: BOS, or where it has none EOS. Raises SparsekitError where it has neither."""
    for name in ("bos_token_id", "eos_token_id"):
        for held in (tokenizer, config.get_text_config()):
            token = getattr(held, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                return token
    raise SparsekitError(
        "a model that writes its own text must have a token to begin with, and has neither BOS nor EOS; give a text"
    )


def context_length(config) -> int:
    """Tokens that a model of this transformers config can see at once; 2048 where the config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2048


def check_vocabulary(ids: Tensor, model: nn.Module) -> None:
    """Raises SparsekitError where a token id is none or lies outside the model's embedding: on a GPU that would end the process."""
    count = _vocabulary(model)
    if count is None:
        return
    if ids.dtype not in (torch.int64, torch.int32):
        raise SparsekitError(f"token ids must be int64 or int32, got {ids.dtype}")
    least, most = map(int, ids.aminmax()) if ids.numel() else (0, 0)
    if least < 0:
        raise SparsekitError(
            f"token ids must be 0 or more, got {least}; where it fills up a row, take another and an attention_mask"
        )
    if most >= count:
        raise SparsekitError(
            f"token ids must be below the model's vocabulary of {count}, got {most}; use the model's own tokenizer"
        )


def _vocabulary(model: nn.Module) -> int | None:
    """How many tokens the model's embedding knows; None where it has none."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return getattr(embedding, "num_embeddings", None)


def model_call(
    model: nn.Module, batch: Tensor | Mapping[str, Any], device: torch.device
) -> tuple[tuple, dict[str, Any], Tensor | None]:
    """What to call the model with for a batch, on the device: arguments and keyword arguments; and which of its tokens count, as
    the batch's attention_mask has it, (batch * tokens,) bool, or None for all.

    batch: token ids (batch, tokens), or a dict of the model's keyword arguments. Raises SparsekitError for ids of another shape or
    that the model does not know."""
    args, kwargs = ((), batch) if isinstance(batch, Mapping) else ((batch.to(device),), {})
    kwargs = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in kwargs.items()}
    if (ids := args[0] if args else kwargs.get("input_ids")) is not None:
        if _vocabulary(model) is not None and (ids.dim() < 2 or not ids.numel()):
            raise SparsekitError(f"a batch must be token ids (batch, tokens), one or more, got a tensor {tuple(ids.shape)}")
        check_vocabulary(ids, model)
    return args, kwargs, token_mask(kwargs)


def token_mask(batch: Tensor | Mapping[str, Any]) -> Tensor | None:
    """Which tokens of a batch count, as its attention_mask has it, (batch * tokens,) bool; None for all."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    padded = mask is not None and mask.dim() == 2 and not mask.bool().all()
    return mask.bool().flatten() if padded else None


def next_tokens(labels: Tensor, mask: Tensor | None) -> Tensor:
    """What is to be predicted behind each token but the last of labels (batch, tokens): the next one, and -100, nothing, where the
    attention mask (batch, tokens) leaves out either of the two."""
    if mask is None or mask.dim() != 2:
        return labels[:, 1:]
    real = mask.bool()
    return labels[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), -100)


def count_tokens(batches: Iterable[Tensor | Mapping[str, Any]]) -> int:
    """The tokens (batch, tokens) of the batches that count."""
    total = 0
    for batch in batches:
        mask = token_mask(batch)
        first = batch if isinstance(batch, Tensor) else next(t for t in batch.values() if isinstance(t, Tensor))
        total += first.shape[:2].numel() if mask is None else int(mask.count_nonzero())
    return total


def check_sampling(samples: int, seq_len: int, seed: int) -> None:
    """Raises SparsekitError for numbers that no calibration set can be made with."""
    for name, value in (("samples", samples), ("seq_len", seq_len)):
        if value < 1:
            raise SparsekitError(f"{name} must be at least 1, got {value}")
    if not 0 <= seed < 1 << 63:
        raise SparsekitError(f"seed must be at least 0 and below 2**63, got {seed}")


def calibration_batches(tokens: Tensor, samples: int, seq_len: int, seed: int = 0, batch: int = 4) -> list[Tensor]:
    """``samples`` windows of seq_len consecutive tokens at random places, as batches (<= batch, seq_len).

    The same seed gives the same windows. Raises SparsekitError where the text is shorter than one window."""
    check_sampling(samples, seq_len, seed)
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
