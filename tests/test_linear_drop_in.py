"""SparseLinear where an nn.Linear stood: code that reads ``weight``, subclasses, casts, scripts, processes that share it."""

import copy
from pathlib import Path

import pytest
import torch
from test_world import launch
from torch import nn

from sparsekit import SparsekitError, SparseLinear, compress, load, ops
from sparsekit.linear import dense_weight, is_linear

HERE = Path(__file__).parent


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def pruned(model: nn.Module) -> nn.Module:
    for linear in filter(is_linear, model.modules()):
        with torch.no_grad():
            dense_weight(linear).copy_(ops.prune24(dense_weight(linear)))
    return model


# ---- the weight, read ----


@pytest.mark.parametrize("how", ["linear", "conv1d", "in fragments"])
def test_the_weight_reads_as_the_dense_one(how, dense24, request):
    if how == "in fragments":
        request.getfixturevalue("in_fragments")
    dtype = torch.bfloat16 if how == "in fragments" else torch.float32
    layer = dense24(13, 5, dtype=dtype, conv1d=how == "conv1d", integers=True)
    sparse, dense = SparseLinear.from_linear(layer), layer.weight
    weight = sparse.weight
    for found, wanted in ((weight, dense), (weight.data, dense.data), (weight.T, dense.T)):
        assert torch.equal(found, wanted) and (found.shape, found.dtype, found.device) == (wanted.shape, dtype, wanted.device)
    assert torch.equal(weight[1:3, 2], dense[1:3, 2]) and torch.equal(copy.deepcopy(weight.detach()), dense)
    assert "weight" not in sparse.state_dict() and [name for name, _ in sparse.named_parameters()] == ["values", "bias"]


def test_gradients_reach_the_values_through_the_weight(dense24):
    sparse = SparseLinear.from_linear(dense24(16, 6, integers=True))
    (sparse.weight.square().sum() / 2).backward()
    assert torch.equal(sparse.values.grad, sparse.values)
    assert not sparse.weight.data.requires_grad and not sparse.requires_grad_(False).weight.square().requires_grad


def test_what_is_asked_of_a_weight_each_call_does_not_write_it_out(dense24, monkeypatch):
    sparse = SparseLinear.from_linear(dense24(16, 6, dtype=torch.float16))
    monkeypatch.setattr(SparseLinear, "_write_out", None)
    weight = sparse.weight
    assert isinstance(weight, torch.Tensor) and weight.dtype == torch.float16 and weight.device == torch.device("cpu")
    assert weight.shape == weight.size() == (6, 16) and weight.size(1) == 16 and weight.ndim == weight.dim() == 2
    assert (weight.numel(), len(weight), weight.is_cuda, weight.is_meta, weight.is_floating_point()) == (96, 6, False, False, True)


WRITES = {
    "in place": lambda w: w.mul_(2),
    "an operator": lambda w: w.__iadd__(1),
    "an element": lambda w: w.__setitem__(0, 1.0),
    "its data": lambda w: w.data.copy_(w),
    "its data set": lambda w: setattr(w, "data", torch.zeros(6, 16)),
    "detached": lambda w: w.detach().zero_(),
    "init": lambda w: nn.init.normal_(w),
    "out": lambda w: torch.add(w, 1, out=w),
    "as a parameter": lambda w: nn.Parameter(w),
}


@pytest.mark.parametrize("how", WRITES)
def test_what_would_be_lost_is_refused(how, dense24):
    sparse = SparseLinear.from_linear(dense24(16, 6))
    says = r"^SparseLinear\.weight: it must be read alone, got \w+, which would be lost; write to the values$"
    with torch.no_grad(), pytest.raises(RuntimeError, match=says):
        WRITES[how](sparse.weight)
    for other in (nn.Parameter(torch.zeros(6, 16)), torch.zeros(6, 16)):
        with pytest.raises((KeyError, AttributeError), match="weight"):
            sparse.weight = other


def test_it_may_be_written_elsewhere(dense24):
    """Only its being written to is refused: it can be what is copied, and a result's neighbour."""
    layer = dense24(16, 6).requires_grad_(False)
    sparse, other = SparseLinear.from_linear(layer), torch.zeros(6, 16)
    assert torch.equal(other.copy_(sparse.weight), layer.weight) and torch.equal(other.add_(sparse.weight), 2 * layer.weight)
    assert torch.equal(torch.mul(sparse.weight, 3, out=other), 3 * layer.weight)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("gradients", [False, True], ids=["no grad", "grad"])
def test_torchs_own_encoder_runs(gradients):
    """In eval mode it reads the weights of its linears, to hand them to a kernel of its own."""
    torch.manual_seed(0)
    dense = pruned(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)).eval()
    sparse = copy.deepcopy(dense)
    assert compress(sparse) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    x = torch.randn(2, 3, 16)
    with torch.set_grad_enabled(gradients):
        assert torch.allclose(sparse(x), dense(x), rtol=1e-5, atol=1e-5)


def test_t5_asks_for_the_dtype_of_a_weight():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    dense = pruned(T5ForConditionalGeneration(config)).eval()
    sparse, ids = copy.deepcopy(dense), torch.arange(6)[None]
    assert any(name.endswith("DenseReluDense.wo") for name in compress(sparse))
    with torch.no_grad():
        found, wanted = (model(input_ids=ids, decoder_input_ids=ids).logits for model in (sparse, dense))
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_compiled_function_reads_the_weight(dense24):
    layer = dense24(16, 6, integers=True)
    sparse = SparseLinear.from_linear(layer)
    torch.compiler.reset()
    whole = torch.compile(lambda x: x.to(sparse.weight.dtype) @ sparse.weight.T, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(integers(3, 16)), integers(3, 16) @ layer.weight.T)
    torch.compiler.reset()


# ---- other linears ----


class Doubled(nn.Linear):
    """As a quantised linear does, or one with an adapter: more than its weight and bias say."""

    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    pass


def test_a_linear_that_computes_something_else_is_refused(weight24):
    for kind in (Named, Doubled):
        layer = kind(16, 6)
        layer.weight = nn.Parameter(weight24(6, 16, integers=True))
        if kind is Named:
            assert torch.equal(SparseLinear.from_linear(layer)(integers(2, 16)), layer(integers(2, 16)))
            continue
        with pytest.raises(TypeError, match=r"an nn\.Linear, forward included, or a .*, got a test_linear_drop_in\.Doubled$"):
            SparseLinear.from_linear(layer)


def test_a_parametrized_weight_comes_as_it_is_now(dense24):
    layer = nn.utils.parametrizations.weight_norm(dense24(16, 6))
    sparse = SparseLinear.from_linear(layer)
    assert torch.equal(sparse.weight, layer.weight) and sparse.values.requires_grad
    assert compress(nn.Sequential(layer)) == []


def test_a_model_that_is_not_in_memory_is_left_as_it_is(dense24):
    """As one that is offloaded, part of it."""
    model = nn.Sequential(dense24(16, 8), nn.Linear(8, 8, device="meta"))
    with pytest.raises(SparsekitError, match="needs weights that are in memory, got 1 on the meta device; load without offloading"):
        compress(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("shard", ["1GB", "6KB"], ids=["a file", "files"])
def test_what_transformers_saves_itself_is_loaded(shard, tmp_path):
    """As a Trainer saves a model that it trains: nothing in the folder but the tensors says what they are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=False
    )
    model, ids = pruned(LlamaForCausalLM(config)).eval(), torch.arange(9)[None]
    swapped = compress(model)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard == "1GB"
    found = load(tmp_path, device="cpu")
    assert swapped == [name for name, module in found.named_modules() if isinstance(module, SparseLinear)] and len(swapped) == 15
    assert torch.equal(found(ids).logits, model(ids).logits)


# ---- as a module ----


@pytest.mark.parametrize("fragments", [False, True], ids=["canonical", "in fragments"])
def test_type_leaves_the_metadata(fragments, dense24, request):
    """Unlike ``to`` it casts buffers of integers too."""
    if fragments:
        request.getfixturevalue("in_fragments")
    sparse = SparseLinear.from_linear(dense24(70, 20, integers=True))
    wanted, meta = copy.deepcopy(sparse).half(), sparse.meta.clone()
    assert sparse.type(torch.float16).values.dtype == torch.float16 and sparse.meta.dtype == wanted.meta.dtype
    assert torch.equal(sparse.meta, wanted.meta) and torch.equal(sparse(integers(2, 70).half()), wanted(integers(2, 70).half()))
    assert torch.equal(sparse.type(torch.float32).meta, meta)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_is_refused_in_a_sentence(dense24):
    sparse = SparseLinear.from_linear(dense24(16, 6))
    for model in (sparse, nn.Sequential(nn.ReLU(), sparse)):
        with pytest.raises(TypeError, match=r"^SparseLinear: torch\.jit\.script cannot compile it; use torch\.export"):
            torch.jit.script(model)


def test_two_processes_share_a_model(tmp_path):
    """fully_shard: values and gradients in parts, in either order; the files are those of one process."""
    done = launch(2, HERE / "shards.py", tmp_path)
    assert [rank.returncode for rank in done] == [0] * 2, [rank.stderr[-2000:] for rank in done]
