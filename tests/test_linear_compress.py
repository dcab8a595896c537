"""A model's linears that hold 2:4, swapped for SparseLinear."""

import pytest
import torch
from torch import nn

from sparsekit import SparsekitError, SparseLinear, compress
from sparsekit.format import nbytes24
from sparsekit.linear import is_conv1d, is_linear


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    def __init__(self, dense24):
        super().__init__()
        self.embed = nn.Embedding(6, 16)
        self.body = nn.ModuleList([nn.ModuleDict({"up": dense24(16, 8), "down": dense24(8, 16)}) for _ in range(2)])
        self.head = nn.Linear(16, 6, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.body:
            x = x + block["down"](block["up"](x).relu())
        return self.head(x)


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules() if is_linear(m) or isinstance(m, SparseLinear)}


def test_compress_swaps_what_holds_24(dense24):
    model, ids = Model(dense24).requires_grad_(False), torch.arange(6)
    with torch.no_grad():
        model.body[1]["down"].weight[3, 4:8] = 1  # not 2:4 any more
        before = model(ids)
    others = dict(model.named_modules())
    swapped = compress(model)
    assert swapped == ["body.0.up", "body.0.down", "body.1.up"]
    assert kinds(model) == dict.fromkeys(swapped, SparseLinear) | {"body.1.down": nn.Linear, "head": nn.Linear}
    assert all(m is others[name] for name, m in model.named_modules() if name not in swapped)
    assert torch.allclose(model(ids), before, rtol=1e-5, atol=1e-5)
    assert compress(model) == []  # nothing is left to swap


def test_compress_swaps_conv1d(dense24):
    model = nn.Sequential(dense24(16, 8, conv1d=True), nn.GELU(), dense24(8, 16, conv1d=True))
    x = normal(3, 16)
    with torch.no_grad():
        before = model(x)
        assert compress(model) == ["0", "2"] and torch.allclose(model(x), before, rtol=1e-5, atol=1e-5)
    assert all(model[i].conv1d for i in (0, 2)) and is_conv1d(model[0].to_linear())


def test_compress_leaves_a_tied_weight(dense24, weight24):
    model = Model(dense24)
    model.embed.weight = nn.Parameter(weight24(6, 16))
    model.head.weight = model.embed.weight
    assert "head" not in compress(model) and model.head.weight is model.embed.weight


def test_compress_leaves_a_layer_that_stands_in_two_places(dense24):
    shared = dense24(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": dense24(16, 16)})
    assert compress(model) == ["c"]
    assert model["a"] is shared and model["b"][0] is shared


def test_compress_leaves_two_layers_with_one_weight(dense24):
    model = nn.Sequential(dense24(16, 16), dense24(16, 16), dense24(16, 16))
    model[2].weight = model[0].weight
    assert compress(model) == ["1"]


@pytest.mark.parametrize(
    "k, dtype, saves", [(4, torch.float32, False), (5, torch.float32, True), (4, torch.float16, False), (5, torch.float16, True)]
)
def test_compress_leaves_what_would_grow(k, dtype, saves, dense24):
    # Eight columns are the least that is stored: 4 values and a byte of metadata, 17 bytes in fp32, 9 in 16 bits.
    with torch.no_grad():
        layer = dense24(k, 6, dtype=dtype)
        layer.weight[:, 2:] = 0
    assert (nbytes24(6, k, dtype) < layer.weight.nbytes) == saves
    assert compress(nn.Sequential(layer)) == (["0"] if saves else [])


def test_compress_leaves_subclasses(dense24):
    class Quantised(nn.Linear):
        pass

    layer = Quantised(16, 8)
    layer.weight = dense24(16, 8).weight
    assert compress(nn.Sequential(layer)) == [] and not is_linear(layer)


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_compress_cannot_replace_the_model_itself(conv1d, dense24):
    layer = dense24(16, 8, conv1d=conv1d)
    with pytest.raises(
        SparsekitError, match=f"a model that holds linears, got a {type(layer).__name__}; use SparseLinear.from_linear"
    ):
        compress(layer)
    assert list(layer.named_children()) == []
