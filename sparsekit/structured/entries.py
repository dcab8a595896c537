"""What a config says of blocks that differ from each other: one entry a block.

In config.json they are ``"sparsekit": {"per_layer_config": [entry, ...]}``. The bare name is taken: transformers 5 reads it in a
form of its own, which its models do not follow yet. An entry holds, where the block differs from the config's own value,
``num_attention_heads``, ``num_key_value_heads``, ``intermediate_size``, ``num_experts`` and ``moe_intermediate_size`` (neurons of
each expert), whatever the config calls them,
``alibi_heads``, the numbers that its heads had in the whole block where ALiBi tells them apart, and ``attention`` or ``mlp`` as
false where that is gone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ..errors import SparsekitError, listed

COUNTS = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "num_experts", "moe_intermediate_size")
SUBLAYERS = ("attention", "mlp")
ALIBI = "alibi_heads"
Entry = dict[str, Any]
_HOME, _KEY = "sparsekit", "per_layer_config"


def entries_of(config) -> list[Entry] | None:
    """One entry a block, in order, or None where all blocks are as the config says.

    Raises SparsekitError where the config holds entries that cannot be, or of another number of blocks."""
    home = getattr(config, _HOME, None)
    if home is None:
        return None
    entries = home.get(_KEY) if isinstance(home, dict) else home
    count = config.num_hidden_layers
    if not isinstance(entries, list) or len(entries) != count or not all(isinstance(entry, dict) for entry in entries):
        raise SparsekitError(f"{_KEY} must be a list of objects, one for each of the {count} blocks, got {entries!r:.60}")
    for i, entry in enumerate(entries):
        for name, value in entry.items():
            if name not in (known := (*COUNTS, ALIBI, *SUBLAYERS)):
                raise SparsekitError(f"{_KEY} knows {listed(known)}, got {name!r} for block {i}")
            if name in SUBLAYERS:
                fits, what = isinstance(value, bool), "true or false"
            elif name == ALIBI:
                fits, what = _rises(value), "a list of rising numbers of heads"
            else:
                fits, what = type(value) is int and value > 0, "a number above 0"
            if not fits:
                raise SparsekitError(f"{name} in {_KEY} must be {what}, got {value!r} for block {i}")
    return [dict(entry) for entry in entries]


def _rises(value: Any) -> bool:
    numbers = value if isinstance(value, list) and value and all(type(one) is int for one in value) else [-1]
    return numbers[0] >= 0 and all(a < b for a, b in pairwise(numbers))


def set_entries(config, entries: Sequence[Entry] | None) -> None:
    """Makes the config say so; None, or entries that all are empty, makes all blocks as the config says."""
    config.__dict__.pop(_HOME, None)
    if any(entries or ()):
        setattr(config, _HOME, {_KEY: [dict(entry) for entry in entries]})
