"""Small files that a person may write: YAML or JSON, read as data and nothing else."""

from __future__ import annotations

import json
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
