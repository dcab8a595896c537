"""One rank of two that train a model of SparseLinear under fully_shard: ``python shards.py FOLDER``. What a rank finds
wrong it raises."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as saving
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparsekit.linear
from sparsekit import SparseLinear, ops

INPUTS, WIDTH, OUTPUTS = 68, 40, 21  # a byte of metadata half used; rows that two ranks share unevenly, in rows and in tiles of 16
WHOLE = StateDictOptions(full_state_dict=True)


def model(dtype: torch.dtype, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    dense = [nn.Linear(INPUTS, WIDTH, dtype=dtype), nn.Linear(WIDTH, OUTPUTS, bias=False, dtype=dtype)]
    for linear in dense:
        linear.weight = nn.Parameter(ops.prune24(linear.weight.detach()))
    first, last = map(SparseLinear.from_linear, dense)
    return nn.Sequential(first, nn.ReLU(), last)


def spread(whole: nn.Sequential) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (2,))
    for module in (whole[0], whole[2], whole):
        fully_shard(module, mesh=mesh)
    return whole


def same(found: dict, wanted: dict) -> bool:
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in found.items()}
    return whole.keys() == wanted.keys() and all(torch.equal(t, wanted[name]) for name, t in whole.items())


def trains_and_is_kept(dtype: torch.dtype, folder: Path) -> None:
    alone = model(dtype, seed=0)
    both, other = spread(copy.deepcopy(alone)), spread(model(dtype, seed=1))
    x = torch.randint(-2, 3, (4, INPUTS), generator=torch.Generator().manual_seed(2)).to(dtype)
    for one in (alone, both):
        optimiser = torch.optim.SGD(one.parameters(), 0.5)
        one(x).square().sum().backward()  # the same on both ranks, so that the mean is exact
        optimiser.step()
    wanted = alone.state_dict()
    assert same(both.state_dict(), wanted), "state_dict"
    assert same(get_model_state_dict(both, options=WHOLE), wanted), "the whole of it"
    for assign in (False, True):
        target = copy.deepcopy(other.state_dict())
        other.load_state_dict(both.state_dict(), assign=assign)
        assert same(other.state_dict(), wanted) and torch.equal(other(x), alone(x)), f"loaded, assign={assign}"
        other.load_state_dict(target)
    set_model_state_dict(other, dict(wanted), options=WHOLE)
    assert same(other.state_dict(), wanted), "loaded whole"
    saving.save(get_model_state_dict(both), checkpoint_id=folder)
    held = get_model_state_dict(spread(model(dtype, seed=3)))
    saving.load(held, checkpoint_id=folder)
    assert same(held, wanted), "saved in parts"
    broken = {name: t.clone() for name, t in both.state_dict().items()}
    broken["2.meta"][20, 3] = 0x40  # in the last rank's last row
    try:
        other.load_state_dict(broken)
    except RuntimeError as error:
        assert "got 0 in row 20, group 6" in str(error), error
    else:
        raise AssertionError("a bad nibble was taken")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    trains_and_is_kept(torch.float32, Path(sys.argv[1]) / "canonical")
    sparsekit.linear._reads_fragments = lambda values: values.dtype == torch.bfloat16  # as on a GPU
    trains_and_is_kept(torch.bfloat16, Path(sys.argv[1]) / "fragments")
    dist.destroy_process_group()
