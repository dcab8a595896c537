"""The engine on a device: what a GPU does in other ways than a CPU (pinned hidden states, times by events, its own kernels) comes
out the same. Without a GPU the same tests run on the CPU. Not yet run on hardware."""

import pytest
import torch
from models import ARCHITECTURES, build, token_batches, weight_of
from safetensors.torch import load_file

from sparsekit import prune, prune_folder
from sparsekit.pipeline import folder
from sparsekit.pipeline.store import OnDisk

BATCHES = token_batches((3, 16), (3, 16), (1, 11))


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_device_prunes_as_the_cpu_does(name, method, pattern, device):
    ours, theirs = build(name).to(device), build(name)
    report, wanted = prune(ours, BATCHES, method, pattern), prune(theirs, BATCHES, method, pattern)
    same = total = 0
    for target in ARCHITECTURES[name].targets():
        mask, other = weight_of(ours, target).cpu() != 0, weight_of(theirs, target) != 0
        same, total = same + int((mask == other).sum()), total + mask.numel()
    assert same >= 0.99 * total, "more than scores alike within rounding can explain"
    assert all(row.seconds.keys() == like.seconds.keys() for row, like in zip(report.linears, wanted.linears, strict=True))
    for row, like in zip(report.linears, wanted.linears):
        assert (row.name, row.sparsity) == (like.name, pytest.approx(like.sparsity, abs=1e-9))
        if ".experts" not in row.name:  # a token between two experts may go to the other one
            assert (row.statistics, row.tokens) == (like.statistics, like.tokens)
        assert row.peak_memory > 0 and min(row.seconds.values()) >= 0
        if like.output_error is not None and ".experts" not in row.name:
            assert row.output_error == pytest.approx(like.output_error, rel=0.05)
    assert all(min(block.seconds.values()) >= -1e-5 for block in report.blocks) and sum(report.phases.values()) <= report.seconds


def test_a_folder_is_pruned_on_a_device_as_the_model_is(device, tmp_path):
    """To the bit, hidden states in the host's memory or in a file."""
    build("llama").save_pretrained(tmp_path / "model")
    model = build("llama").to(device)
    prune(model, BATCHES)
    for out, how in (("memory", {}), ("disk", {"max_memory": "64GiB"})):
        with pytest.MonkeyPatch.context() as patch:
            if out == "disk":
                patch.setattr(folder, "store_within", lambda limit, offload, *_: OnDisk(offload))
            prune_folder(tmp_path / "model", tmp_path / out, BATCHES, format="dense", device=device, **how)
        found = {name: t for path in (tmp_path / out).glob("*.safetensors") for name, t in load_file(path).items()}
        for target in ARCHITECTURES["llama"].targets():
            assert torch.equal(found[f"{target}.weight"], weight_of(model, target).cpu()), target
