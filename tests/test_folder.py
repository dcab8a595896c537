"""Folders pruned block by block, against the model pruned as a whole; runs that were killed, against one that was not."""

import json
import statistics
import time
from pathlib import Path

import pytest
import torch
import transformers
from models import ARCHITECTURES, build, token_batches
from safetensors.torch import load_file

from sparsekit import checkpoint, compress, prune, prune_folder
from sparsekit.checkpoint import writing
from sparsekit.linear import SparseLinear
from sparsekit.pipeline import loop

KJV = Path(__file__).parent / "data" / "kjv1m"
EVERY = pytest.mark.parametrize("name", ARCHITECTURES)


def dense_folder(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes) -> Path:
    build(name, dtype, **changes).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert [file.name for file in files] == [writing.shard_name(i, len(files)) for i in range(len(files))]
    return tensors


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bytes."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)), name


def as_a_whole(folder: Path, out: Path, batches, method: str, pattern: str, format: str) -> dict[str, torch.Tensor]:
    """The folder's model loaded, pruned in memory and saved."""
    model = checkpoint.load(folder, device="cpu", dtype=torch.float32)
    stored = checkpoint.stored_dtype(folder)
    prune(model, batches, method, pattern, stored=stored)
    model.to(stored)
    if format == "compressed":
        compress(model)
    checkpoint.save(model, out, format=format)
    return weights(out)


def check_as_a_whole(folder: Path, tmp_path: Path, method: str, format: str, pattern: str = "2:4") -> None:
    batches = token_batches((3, 16), (1, 11))
    theirs = as_a_whole(folder, tmp_path / "whole", batches, method, pattern, format)
    report = prune_folder(folder, tmp_path / "out", batches, method, pattern, format=format, device="cpu", dtype=torch.float32)
    assert_same(weights(tmp_path / "out"), theirs)
    for file in ("config.json", "generation_config.json"):
        if (folder / file).exists():
            assert (tmp_path / "out" / file).read_text() == (tmp_path / "whole" / file).read_text()
    assert report.tokens == (0 if method == "magnitude" else 3 * 16 + 11)
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert kept == json.loads(json.dumps(report.to_dict()))
    assert {path.name for path in tmp_path.iterdir()} - {folder.name} == {"out", "whole"}


@EVERY
def test_a_folder_is_pruned_as_the_whole_model_is(name, tmp_path):
    check_as_a_whole(dense_folder(tmp_path / "model", name), tmp_path, "wanda", "compressed")
    checkpoint.load(tmp_path / "out", device="cpu")


# Narrower in the file than in memory: later blocks see what was rounded.
@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_stored_as_narrow_as_they_were(name, dtype, tmp_path):
    check_as_a_whole(dense_folder(tmp_path / "model", name, dtype), tmp_path, "sparsegpt", "dense")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.dtype == dtype and not any(info.values())


@pytest.mark.parametrize(("method", "pattern"), [("magnitude", "2:4"), ("sparsegpt", "50%"), ("wanda", "1:4")])
def test_other_methods_and_patterns(method, pattern, tmp_path):
    check_as_a_whole(dense_folder(tmp_path / "model", "llama"), tmp_path, method, pattern=pattern, format="compressed")


def test_a_report_of_huge_weights_is_json(tmp_path):
    # Their squares are more than fp32 holds, and Infinity is no word of JSON.
    model = build("llama")
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(1e20)
    model.save_pretrained(tmp_path / "model")
    prune_folder(tmp_path / "model", tmp_path / "out", token_batches((3, 16)), "sparsegpt", "2:4", device="cpu")
    report = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    row = report["linears"][-1]
    assert row["name"].endswith("mlp.down_proj")
    assert 1e30 < row["loss"] < 1e50 and 0 < row["output_error"] < row["output_error_masked"] < 1


def test_a_checkpoint_of_the_bare_model_in_shards(tmp_path):
    """GPT-2 as it is published: no prefix, and here a block's tensors lie in several files."""
    build("gpt2").transformer.save_pretrained(tmp_path / "model", max_shard_size="12KB")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 5
    assert "h.0.attn.c_attn.weight" in weights(tmp_path / "model")
    check_as_a_whole(tmp_path / "model", tmp_path, "wanda", "compressed")


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_experts_that_are_stored_one_by_one(family, tmp_path):
    """transformers stacks them as it reads them; so does a block that is read on its own."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=96, hidden_size=32, intermediate_size=44, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    assert any(".experts.3." in name for name in weights(tmp_path / "model"))
    check_as_a_whole(tmp_path / "model", tmp_path, "wanda", "compressed")


def test_what_is_written_is_told_of_each_linear(tmp_path, monkeypatch):
    """Of each linear its own tensors, rounded, compressed and handed to the file; of the block the rest, no time twice."""
    folder = dense_folder(tmp_path / "model", "llama", torch.bfloat16)
    from_linear = SparseLinear.from_linear.__func__
    compressed = []

    def slowly(cls, linear):
        compressed.append(linear)
        time.sleep(0.05 if len(compressed) == 13 else 0)
        return from_linear(cls, linear)

    monkeypatch.setattr(SparseLinear, "from_linear", classmethod(slowly))
    begin = time.perf_counter()
    report = prune_folder(folder, tmp_path / "out", token_batches((3, 16)), device="cpu", dtype=torch.float32)
    took = time.perf_counter() - begin
    names = ARCHITECTURES["llama"].targets()
    spent = {row.name: row.seconds["write"] for row in report.linears}
    assert list(spent) == names and min(spent.values()) > 0
    assert 0.05 < spent.pop(names[12]) and statistics.median(spent.values()) < 0.05
    assert all(block.seconds["write"] > 0 for block in report.blocks) and sum(report.phases.values()) <= took
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["seconds"] for row in kept["linears"]] == [row.seconds for row in report.linears]


def test_one_block_is_in_memory_at_a_time(tmp_path, monkeypatch):
    folder = dense_folder(tmp_path / "model", "llama")
    seen = []
    prune_one = loop._prune

    def look(*arguments):
        source = arguments[-1]
        seen.append({n.split(".")[2] for n, p in source.model.named_parameters() if not p.is_meta and ".layers." in n})
        assert all(p.is_meta for n, p in source.model.named_parameters() if ".layers." not in n), "embeddings are let go"
        return prune_one(*arguments)

    monkeypatch.setattr(loop, "_prune", look)
    prune_folder(folder, tmp_path / "out", token_batches((2, 16)), device="cpu")
    assert seen == [{str(i)} for i in range(3) for _ in range(7)]
