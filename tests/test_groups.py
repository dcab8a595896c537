"""Shares counted over a decoder block or the whole model: from a folder as in memory, resumed, within a limit, verified."""

import json
import re

import pytest
import torch
from models import build, token_batches
from test_folder import assert_same, weights

from sparsekit import SparsekitError, checkpoint, prune, prune_folder
from sparsekit.patterns import Block, Share, Unstructured
from sparsekit.pipeline import groups, memory
from sparsekit.pipeline.store import OnDisk

BATCHES = token_batches((3, 16), (1, 11))
OF_A_FOLDER = dict(format="dense", device="cpu", dtype=torch.float32)


# obs knows a Gram matrix, magnitude nothing, wanda 4 bytes a column, gradient the whole model; tied, transposed, fused weights.
@pytest.mark.parametrize(
    "name, method, pattern, group",
    [
        ("llama, tied", "wanda", "50%", "model"),
        ("gpt2", "obs", "block:4x4@50%", "model"),
        ("qwen3_moe", "magnitude", "60%", "model"),
        ("llama", "gradient", "50%", "model"),
        ("qwen3_moe", "obd", "50%", "block"),
    ],
)
def test_a_folder_is_pruned_as_the_whole_model_is(name, method, pattern, group, tmp_path):
    build(name, torch.bfloat16).save_pretrained(tmp_path / "model")
    model = checkpoint.load(tmp_path / "model", device="cpu", dtype=torch.float32)
    alone = prune(model, BATCHES, method, pattern, group=group, stored=torch.bfloat16)
    checkpoint.save(model.to(torch.bfloat16), tmp_path / "whole", format="dense")
    report = prune_folder(tmp_path / "model", tmp_path / "out", BATCHES, method, pattern, group=group, **OF_A_FOLDER)
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert report.group == group == json.loads((tmp_path / "out" / "report.json").read_text())["group"]
    rows = [(row.name, row.sparsity, row.statistics, row.tokens) for row in report.linears]
    assert rows == [(row.name, row.sparsity, row.statistics, row.tokens) for row in alone.linears]
    assert report.tokens == alone.tokens == (0 if method == "magnitude" else 3 * 16 + 11)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_a_resumed_run_comes_to_the_same_masks(method, tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    how = dict(group="model", **OF_A_FOLDER)

    def stop(what: str, done: int, total: int) -> None:
        if done == 2 and not what.startswith("scores"):
            raise KeyboardInterrupt

    prune_folder(tmp_path / "model", tmp_path / "whole", BATCHES, method, "50%", **how)
    with pytest.raises(KeyboardInterrupt):
        prune_folder(tmp_path / "model", tmp_path / "out", BATCHES, method, "50%", progress=stop, **how)
    assert len(list((tmp_path / "out.partial" / "model").glob("*.safetensors"))) == 2
    report = prune_folder(tmp_path / "model", tmp_path / "out", BATCHES, method, "50%", resume=True, **how)
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert report.sparsity == pytest.approx(0.5, abs=1e-4)


def test_scores_of_a_folder_wait_on_disk_and_memory_is_told(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(memory, "taken", lambda: 0)
    arguments = tmp_path / "model", tmp_path / "out", BATCHES, "wanda", "50%"
    with pytest.raises(SparsekitError, match=r"at least .*KiB for the scores of a block") as error:
        prune_folder(*arguments, group="model", max_memory=1, **OF_A_FOLDER)
    kept = []
    original = groups.OfModel.finish
    monkeypatch.setattr(groups.OfModel, "finish", lambda self: (kept.append(self._scores), original(self)))
    (tmp_path / "offload").mkdir()
    need = re.search(r"at least (\S+),", str(error.value))[1]
    prune_folder(*arguments, group="model", max_memory=need, offload=tmp_path / "offload", **OF_A_FOLDER)
    assert type(kept[0]) is OnDisk and len(kept[0]) == 21


@pytest.mark.parametrize("group", ["block", "model"])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Block(4, 4, 0.5)], ids=str)
def test_one_unit_too_few_is_found_by_the_verification(group, pattern, monkeypatch):
    monkeypatch.setattr(Share, "masks", one_more(Share.masks))
    with pytest.raises(SparsekitError, match=rf"each {group} must hold {re.escape(str(pattern))}, (\d+) gone, got \d+ in the"):
        prune(build("llama"), BATCHES, "wanda", pattern, group=group)


def one_more(masks):
    """Masks of which the last keeps everything."""

    def keeping(self, units, shapes, *wide):
        for i, mask in enumerate(masks(self, units, shapes, *wide)):
            yield torch.ones_like(mask) if i == len(shapes) - 1 else mask

    return keeping


def test_scores_that_are_no_numbers_name_their_linear():
    class Broken:
        name, statistics, rowwise = "broken", None, False

        def scores(self, weight, statistics):
            return weight.float().abs().masked_fill(torch.ones_like(weight).bool(), torch.nan)

    for group in ("block", "model"):
        with pytest.raises(SparsekitError, match=r"model\.layers\.0\.self_attn\.q_proj cannot be pruned: its scores hold NaN"):
            prune(build("llama"), (), Broken(), "50%", group=group)


def test_what_is_skipped_is_not_counted():
    model = build("llama")
    report = prune(model, BATCHES, "wanda", "50%", group="model", skip=["*.mlp", "*.0.self_attn"])
    assert len(report.linears) == 8
    assert (
        sum(round(row.sparsity * row.shape[0] * row.shape[1]) for row in report.linears)
        == sum(row.shape[0] * row.shape[1] for row in report.linears) // 2
    )


def test_progress_tells_of_both_passes():
    told = []
    prune(build("llama"), BATCHES, "wanda", "50%", group="model", progress=lambda *now: told.append(now))
    assert told[0] == ("scores of model.layers.0", 0, 3) and ("model.layers.0", 0, 3) in told and told[-1] == ("", 3, 3)
