"""Benchmarks: one file an op, each a command (``python -m benchmarks.linear24 --help``) and a set of pytest-benchmark cases
(``pytest benchmarks/linear24.py``)."""

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

# A command run in the source tree, `python -m pytest` too, finds sparsekit there first, without its extension unless the install is
# an editable one of this Python. Then the installed package is meant.
_ROOT = Path(__file__).resolve().parents[1]
if not any((_ROOT / f"sparsekit/_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != _ROOT]
