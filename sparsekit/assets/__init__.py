"""The small model and the texts that ship with the package, for the demo and the tests.

Installed, they lie in this folder; in a source tree, where the tests and the examples keep them."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
_IN_TREE = {"kjv1m": "tests/data/kjv1m", "text": "examples/data"}


def asset(name: str, file: str = "") -> Path:
    """The path of an asset's folder ("kjv1m", "text"), or of a file in it."""
    installed = _HERE / name
    return (installed if installed.is_dir() else _HERE.parents[1] / _IN_TREE[name]) / file
