"""Benchmarks: one file an op, each a command (``python -m benchmarks.linear24 --help``) and a set of pytest-benchmark cases
(``pytest benchmarks/linear24.py``)."""

import sys
from pathlib import Path

# A command run in the source tree finds sparsekit there first, without its extension unless the install is an editable one. Then
# the installed package is meant.
_ROOT = Path(__file__).resolve().parents[1]
if not list(_ROOT.glob("sparsekit/_C*")):
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != _ROOT]
