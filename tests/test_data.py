"""Texts into windows, and what is measured on them."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import VOCABULARY, build, token_batches
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BloomConfig, PreTrainedTokenizerFast

from sparsekit import SparsekitError, data
from sparsekit.evaluate import generate, perplexity


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
