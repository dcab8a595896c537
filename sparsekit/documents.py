"""Files, one at a time: YAML and JSON read as data and nothing else; and a file that appears whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import SparsekitError


def read_document(path: Path, what: str, as_yaml: bool) -> Any:
    """What the file holds. what: the text calls it so. Raises SparsekitError where it cannot be read or is not YAML, or JSON."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SparsekitError(f"the {what} {path} must be a text file that can be read, got {error}") from None
    try:
        if as_yaml:
            import yaml

            return yaml.safe_load(text)
        return json.loads(text)
    except Exception as error:  # YAML's reader raises what a date or a number that cannot be trips over
        said = " ".join(str(error).split())
        raise SparsekitError(f"the {what} {path} must be {'YAML' if as_yaml else 'JSON'}, got {said}") from None


def to_json(value: object, **how: Any) -> str:
    """As any reader of JSON takes it. how: of ``json.dumps``. Raises ValueError for NaN and Inf, which JSON has no word for."""
    return json.dumps(value, allow_nan=False, **how)


def write_json(path: Path, value: object, sort_keys: bool = False) -> None:
    path.write_text(to_json(value, indent=2, sort_keys=sort_keys) + "\n")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """The file appears when it is whole and on the disk, in place of one that is there; where that fails nothing is left of it."""
    part = path.with_name(f"{path.name}.part")
    try:
        write(part)
        sync(part)
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Brings a file to the disk, or a folder's list of names: a rename in it then outlives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
