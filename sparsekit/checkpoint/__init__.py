"""Model folders: in and out, dense or compressed.

A compressed folder is a Hugging Face folder whose safetensors hold, for a 2:4 linear P, ``P.values`` and ``P.meta`` (the canonical
format of sparsekit/format.py) in place of ``P.weight``. Its ``__metadata__`` carries, under "sparsekit", the JSON object
``{"version": 1, "linears": {P: [out_features, in_features], ...}}``, and config.json names the quantisation method "sparsekit".
To transformers an unknown method is worth a warning, and a missing weight a random one. So ``P.weight`` is there too, of shape
(0,): a loader that does not know the format stops at it.

A model that parts were taken out of is an ordinary folder where its blocks are alike. Where they differ, config.json says how
(sparsekit/structured/entries.py), and a sub-layer that is gone leaves an empty weight of the same kind behind.
"""

from .reading import (
    check_model_folder,
    check_stored,
    compressed_linears,
    linear_shapes,
    load,
    load_tokenizer,
    read_config,
    resolve_device,
    skeleton,
    stored_dtype,
    weight_files,
)
from .writing import FORMATS, check_format, check_new_file, check_new_folder, new_folder, save

__all__ = [
    "FORMATS", "check_format", "check_model_folder", "check_new_file", "check_new_folder", "check_stored", "compressed_linears",
    "linear_shapes", "load", "load_tokenizer", "new_folder", "read_config", "resolve_device", "save", "skeleton", "stored_dtype",
    "weight_files",
]  # fmt: skip
