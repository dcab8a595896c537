"""Texts into windows, and what is measured on them."""

import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import VOCABULARY, build, token_batches
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BloomConfig, PreTrainedTokenizerFast

from sparsekit import SparsekitError, data
from sparsekit.evaluate import generate, own_text, perplexity


@pytest.fixture(scope="module")
def tokenizer():
    """A word a number: "7 8" is tokens 7 and 8; it would put one more before each text if it were let."""
    words = Tokenizer(models.WordLevel({**{str(i): i for i in range(VOCABULARY)}, "<s>": VOCABULARY}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", VOCABULARY)])
    assert PreTrainedTokenizerFast(tokenizer_object=words)("5")["input_ids"] == [VOCABULARY, 5]
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=4)


# ---- reading ----


def test_read_tokens(tokenizer, tmp_path, capfd):
    (tmp_path / "text").write_text("5 6\n7 äöü 8 9", encoding="utf-8")
    tokens = data.read_tokens(tmp_path / "text", tokenizer)
    assert tokens.tolist() == [5, 6, 7, 0, 8, 9]
    assert tokens.dtype == torch.long
    assert capfd.readouterr().err == "", "longer than the tokenizer's context, which is no news"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"5 6 \xff\xfe", "must be UTF-8, and byte 4 is not"),
        ("5 6".encode("utf-16"), "must be UTF-8, and byte 0 is not"),
        (None, "cannot be read: No such file"),
        ("folder", "cannot be read: Is a directory"),
    ],
    ids=["empty", "blank", "latin", "utf-16", "missing", "folder"],
)
def test_a_text_that_cannot_be_read(content, says, tokenizer, tmp_path):
    path = tmp_path / "text"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SparsekitError, match=says) as error:
        data.read_tokens(path, tokenizer)
    assert str(path) in str(error.value)


def write(folder: Path, name: str, content) -> Path:
    """A file of the folder: text, bytes, an array of numpy, or tensors by name."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        save_file(content, path)
    elif isinstance(content, np.ndarray):
        with path.open("wb") as file:
            np.save(file, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8", newline="")
    return path


IDS = np.array([[5, 6], [7, 95]])
SOURCES = {
    "text": ("text", "5 6\n7 95"),
    "text of any suffix": ("text.csv", "5 6 7 95"),
    "jsonl": ("a.jsonl", '{"text": "5 6", "id": 9}\n\n{"id": 8, "text": "7"}\r\n{"text": " "}\n{"text": "95"}'),
    "a line that only splitlines ends": ("a.jsonl", '{"text": "5\u2028 6 7 95"}\n'),
    "npy": ("a.npy", IDS),
    "npy, 16 bits": ("a.npy", IDS.astype(np.uint16)),
    "npy, big endian, by columns": ("a.npy", np.asfortranarray(IDS.astype(">i4"))),
    "safetensors, one tensor": ("a.safetensors", {"tokens": torch.from_numpy(IDS)}),
    "safetensors, several": ("a.safetensors", {"input_ids": torch.from_numpy(IDS), "mask": torch.ones(2)}),
    "ids": ("a.ids", "5\t6\n\n7  95\n"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_read_calibration(source, tokenizer, tmp_path):
    tokens = data.read_calibration(write(tmp_path, *SOURCES[source]), tokenizer, vocabulary=VOCABULARY)
    assert tokens.tolist() == [5, 6, 7, 95]
    assert tokens.dtype == torch.long


def test_a_folder_is_its_texts_in_the_order_of_their_paths(tokenizer, tmp_path):
    for name, text in (("b/2.txt", "5"), ("a.txt", "1"), ("b/10.md", "4"), ("b.txt", "6"), ("a/z/x.txt", "2"), ("c.txt", "")):
        write(tmp_path, name, text)
    for name in ("d.jsonl", "e.py", ".hidden.txt", ".git/f.txt", "b/.g/h.txt"):
        write(tmp_path, name, "90")
    (tmp_path / "folder.txt").mkdir()
    # "a" stands before "a.txt", "b" before "b.txt": by the parts of the path, and not by its letters.
    assert data.read_calibration(tmp_path, tokenizer).tolist() == [2, 1, 4, 5, 6]


def test_the_field_of_a_jsonl(tokenizer, tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "1", "body": "5"}\n{"text": "2", "body": "6"}')
    assert data.read_calibration(path, tokenizer, field="body").tolist() == [5, 6]


REFUSED = {
    "a line is not JSON": ("a.jsonl", '{"text": "5"}\n\n{"text": ', {}, "line 3 is not JSON"),
    "a line is no object": ("a.jsonl", '["5"]', {}, "line 1 does not; it holds no text"),
    "another field": ("a.jsonl", '{"body": "5", "title": "6", "id": 3}', {}, "line 1 .* are 'body', 'title'"),
    "a field of numbers": ("a.jsonl", '{"text": "5"}\n{"text": 5}', {}, "line 2 does not"),
    "all lines are empty": ("a.jsonl", '{"text": ""}\n{"text": " "}', {}, "must hold text, and all of 2 are empty"),
    "jsonl, empty": ("a.jsonl", "", {}, "must hold text"),
    "jsonl, not UTF-8": ("a.jsonl", b'{"text": "\xff"}', {}, "byte 10 is not"),
    "a field of a text": ("a.txt", "5", {"field": "body"}, r"a field belongs to a \.jsonl file, got 'body'"),
    "a folder without texts": ("b/a.jsonl", '{"text": "5"}', {"of": ""}, r"must hold \.txt or \.md files, and has none"),
    "a folder of empty texts": ("b/a.txt", " ", {"of": ""}, "all of 1 are empty"),
    "a broken text in a folder": ("b/a.txt", b"5 \xff", {"of": ""}, r"b/a\.txt must be UTF-8, and byte 2"),
    "pickle": ("a.pt", b"\x80", {}, "a pickle could run code; save it anew"),
    "pickle in npy": ("a.npy", np.array([{}], dtype=object), {}, r"is not a whole \.npy file of numbers"),
    "npy cut": ("a.npy", b"\x93NUMPY\x01\x00v\x00{'desc", {}, r"is not a whole \.npy file"),
    "npy empty": ("a.npy", np.zeros(0, dtype=int), {}, "must hold token ids, and is empty"),
    "npy of floats": ("a.npy", np.ones(3), {}, "must be integers, got float64"),
    "npy missing": (None, "a.npy", {}, "cannot be read: No such file"),
    "an id below zero": ("a.npy", np.array([3, -1]), {}, "must be 0 to 95, got -1 to 3"),
    "an id of another vocabulary": ("a.npy", np.array([3, 96], dtype=np.uint64), {}, "0 to 95, got 3 to 96 .*own tokenizer"),
    "safetensors cut": ("a.safetensors", b"\x08", {}, "is not a whole safetensors file"),
    "safetensors missing": (None, "a.safetensors", {}, "cannot be read: No such file"),
    "safetensors of several": ("a.safetensors", {"a": torch.ones(1), "b": torch.ones(1)}, {}, "called input_ids, got a, b"),
    "ids that are words": ("a.ids", "5 6 seven", {}, "word 3 is 'seven'"),
    "ids with a sign": ("a.ids", "5 -6", {}, "word 2 is '-6'"),
    "ids, empty": ("a.ids", " ", {}, "must hold token ids, and is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_calibration_source_that_cannot_be_read(case, tokenizer, tmp_path):
    name, content, options, says = REFUSED[case]
    path = write(tmp_path, name, content) if name else tmp_path / content
    path = tmp_path if "of" in options else path
    with pytest.raises(SparsekitError, match=says) as error:
        data.read_calibration(path, tokenizer, options.get("field"), vocabulary=VOCABULARY)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# ---- what a model writes itself ----


@torch.no_grad()
def test_own_text_is_drawn_from_the_models_probabilities():
    model = build("llama")
    model.generation_config.eos_token_id = None
    told = []
    batches = own_text(model, 7, samples=5, seq_len=9, seed=3, batch=2, progress=lambda *now: told.append(now))
    assert [batch.shape for batch in batches] == [(2, 9), (2, 9), (1, 9)]
    assert told[-1] == (45, 45) and told == sorted(told)
    generator = torch.Generator().manual_seed(3)
    for batch in batches:  # again, without a cache
        assert (batch[:, 0] == 7).all()
        for i in range(1, 9):
            probabilities = F.softmax(model(input_ids=batch[:, :i], use_cache=False).logits[:, -1], dim=-1)
            assert torch.equal(batch[:, i], torch.multinomial(probabilities, 1, generator=generator)[:, 0])
    again, other = (torch.cat(own_text(model, 7, 5, 9, seed, batch=2)) for seed in (3, 4))
    assert torch.equal(again, torch.cat(batches)) and not torch.equal(other, again)


@pytest.mark.parametrize("ends", [11, [11, 12]])
def test_after_the_end_of_a_text_comes_the_beginning_of_one(ends):
    model = build("llama")
    model.lm_head.weight.data.zero_()  # every token is as likely
    model.generation_config.eos_token_id = ends
    ids = torch.cat(own_text(model, 7, samples=24, seq_len=60, batch=24))
    ended = torch.isin(ids[:, :-1], torch.tensor(ends))
    assert ended.sum() > 5
    assert (ids[:, 1:][ended] == 7).all() and not (ids[:, 1:][~ended] == 7).all()
    model.generation_config.eos_token_id = 7  # one token for both, as GPT-2 has it
    assert (torch.cat(own_text(model, 7, samples=2, seq_len=30)) != 7).any()


def test_own_text_without_dropout_and_with_the_mode_kept():
    model = build("gpt2")
    wanted = torch.cat(own_text(model, 7, 2, 9))
    model.train()
    assert torch.equal(torch.cat(own_text(model, 7, 2, 9)), wanted)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (lambda model: model.lm_head.weight.data.fill_(float("nan")), (7, 1, 4), "logits must be finite .*weights are broken"),
        (lambda model: None, (VOCABULARY, 1, 4), f"vocabulary of {VOCABULARY}"),
        (lambda model: None, (7, 0, 4), "samples must be at least 1, got 0"),
        (lambda model: None, (7, 1, 4, -1), "seed must be at least 0"),
    ],
    ids=["broken", "vocabulary", "no samples", "seed"],
)
def test_own_text_that_cannot_be_written(change, arguments, says):
    model = build("llama")
    change(model)
    with pytest.raises(SparsekitError, match=says):
        own_text(model, *arguments)


def test_the_first_token():
    def tokenizer(bos, eos):
        return types.SimpleNamespace(bos_token_id=bos, eos_token_id=eos)

    config = build("llama").config
    config.bos_token_id, config.eos_token_id = 0, [8, 9]
    assert data.first_token(tokenizer(5, 6), config) == 5
    assert data.first_token(tokenizer(None, 6), config) == 0
    config.bos_token_id = None
    assert data.first_token(tokenizer(None, 6), config) == 6
    assert data.first_token(tokenizer(None, None), config) == 8
    config.eos_token_id = None
    with pytest.raises(SparsekitError, match="neither BOS nor EOS; give a text"):
        data.first_token(tokenizer(None, None), config)


# ---- windows ----


def test_calibration_batches():
    tokens = torch.arange(1000)
    batches = data.calibration_batches(tokens, samples=10, seq_len=7, seed=3)
    assert [batch.shape for batch in batches] == [(4, 7), (4, 7), (2, 7)]
    windows = torch.cat(batches)
    assert torch.equal(windows, windows[:, :1] + torch.arange(7)), "tokens must be consecutive"
    assert len(set(windows[:, 0].tolist())) == 10
    same, other = (torch.cat(data.calibration_batches(tokens, 10, 7, seed)) for seed in (3, 4))
    assert torch.equal(windows, same) and not torch.equal(windows, other)


def test_calibration_windows_reach_both_ends():
    starts = torch.cat(data.calibration_batches(torch.arange(10), samples=200, seq_len=8))[:, 0]
    assert set(starts.tolist()) == {0, 1, 2}
    assert data.calibration_batches(torch.arange(8), samples=1, seq_len=8)[0].tolist() == [list(range(8))]


def test_evaluation_windows():
    tokens = torch.arange(10)
    assert data.evaluation_windows(tokens, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert data.evaluation_windows(tokens, 4, max_tokens=7).tolist() == [[0, 1, 2, 3]]
    assert data.evaluation_windows(tokens, 5, max_tokens=99).shape == (2, 5)
    assert data.evaluation_windows(tokens, 10).shape == (1, 10)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: data.calibration_batches(torch.arange(7), 1, 8), "sequence of 8 tokens, got 7"),
        (lambda: data.calibration_batches(torch.arange(7), 0, 4), "samples must be at least 1, got 0"),
        (lambda: data.calibration_batches(torch.arange(7), -1, 4), "samples must be at least 1, got -1"),
        (lambda: data.calibration_batches(torch.arange(7), 1, 0), "seq_len must be at least 1, got 0"),
        (lambda: data.evaluation_windows(torch.arange(7), 8), "sequence of 8 tokens, got 7"),
        (lambda: data.evaluation_windows(torch.arange(70), 8, 7), "sequence of 8 tokens, got 7"),
        (lambda: data.evaluation_windows(torch.arange(70), 8, 0), "max_tokens must be at least 1, got 0"),
        (lambda: data.evaluation_windows(torch.arange(70), 8, -8), "max_tokens must be at least 1, got -8"),
        (lambda: data.evaluation_windows(torch.arange(70), 1), "seq_len must be at least 2, got 1"),
    ],
)
def test_windows_that_cannot_be_cut(call, says):
    with pytest.raises(SparsekitError, match=says):
        call()


def test_context_length():
    assert data.context_length(build("llama").config) == 64
    assert data.context_length(build("gpt2").config) == 64  # which calls it n_positions
    assert data.context_length(BloomConfig()) == 2048  # which does not say


# ---- perplexity ----


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_perplexity_is_that_of_the_probabilities(name):
    model, tokens = build(name), token_batches((1, 50))[0][0]
    logs = []
    for window in (tokens[:16], tokens[16:32], tokens[32:48]):  # two tokens are left over
        for i in range(1, 16):
            probabilities = F.softmax(model(input_ids=window[None, :i]).logits[0, -1].double(), dim=-1)
            logs.append(math.log(probabilities[window[i]]))
    told = []
    result = perplexity(model, tokens, 16, batch=2, progress=lambda *now: told.append(now))
    assert result["tokens"] == len(logs) == 45
    assert result["perplexity"] == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-5)
    assert told == [(2, 3), (3, 3)]
    assert result["seconds"] > 0


def test_perplexity_without_dropout_and_with_the_mode_kept():
    model, tokens = build("gpt2"), token_batches((1, 64))[0][0]
    wanted = perplexity(model, tokens, 16)["perplexity"]
    model.train()
    assert perplexity(model, tokens, 16)["perplexity"] == wanted
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_perplexity_of_a_broken_model_is_refused(value):
    model = build("llama")
    model.lm_head.weight.data[:5] = value
    with pytest.raises(SparsekitError, match="weights are broken"):
        perplexity(model, token_batches((1, 64))[0][0], 16)


def test_perplexity_of_another_vocabulary_is_refused():
    with pytest.raises(SparsekitError, match=f"vocabulary of {VOCABULARY}, got {VOCABULARY}; use the model's own tokenizer"):
        perplexity(build("llama"), torch.full((64,), VOCABULARY), 16)


# ---- generation ----


@torch.no_grad()
def test_generate_is_greedy_and_stops_where_the_model_ends(tokenizer):
    model = build("llama")
    ids = [5, 6, 7]
    for _ in range(8):  # without a cache, a token at a time
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    model.generation_config.eos_token_id = None
    result = generate(model, tokenizer, "5 6 7", 8)
    assert result["text"].split() == [str(token) for token in ids[3:]]
    assert result["tokens"] == 8
    assert result["tokens_per_second"] == pytest.approx(7 / result["seconds"])
    end = next(i for i in range(4, 11) if ids[i] not in ids[3:i])
    for ends in (ids[end], [ids[end], -1]):
        model.generation_config.eos_token_id = ends
        assert generate(model, tokenizer, "5 6 7", 8)["text"].split() == [str(token) for token in ids[3:end]]


def test_generate_takes_the_chat_template(tokenizer):
    model = build("llama")
    plain = generate(model, tokenizer, "9 8 5 9", 4)
    tokenizer.chat_template = "9 8 {{ messages[0]['content'] }}{% if add_generation_prompt %} 9{% endif %}"
    try:
        assert generate(model, tokenizer, "5", 4)["text"] == plain["text"]
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("prompt", "new", "says"),
    [
        ("", 4, "at least one token"),
        ("5 6 7", 62, "context of 64, got 3 and 62"),
        (f"5 {VOCABULARY - 1}", 4, "vocabulary of 90"),
    ],
)
def test_a_prompt_that_cannot_be_used(prompt, new, says, tokenizer):
    with pytest.raises(SparsekitError, match=says):
        generate(build("gpt2", vocab_size=90), tokenizer, prompt, new)


def test_the_shipped_texts_do_not_overlap():
    """A model calibrated on what it is judged by would be judged too well."""
    folder = Path(__file__).parent.parent / "examples" / "data"
    calib, test = ((folder / name).read_text(encoding="utf-8").splitlines() for name in ("kjv.calib.txt", "kjv.test.txt"))
    long = {line for line in calib if len(line) > 80}
    assert long and not long & set(test)
