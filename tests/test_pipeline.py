"""Whole models through the pruning pipeline, against sequential calibration written out by hand."""

import copy
import re
import statistics
import time

import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    BLOCKS,
    DENSE,
    VOCABULARY,
    WIDTH,
    blocks_of,
    build,
    matrix,
    most_nonzeros,
    token_batches,
    weight_of,
)
from torch import nn
from torch.utils._pytree import tree_leaves

from sparsekit import SparsekitError, compress
from sparsekit.patterns import NM, Pattern, Unstructured
from sparsekit.pipeline import find_blocks, prune
from sparsekit.pipeline.loop import run
from sparsekit.pipeline.source import Resident
from sparsekit.pipeline.store import InMemory, OnDisk
from sparsekit.pipeline.stream import Stream
from sparsekit.pruners import METHODS, Magnitude, SparseGPT, Wanda
from sparsekit.timing import peak_memory

EVERY = pytest.mark.parametrize("name", ARCHITECTURES)
RAGGED = ((2, 16), (2, 16), (1, 16))  # the last batch holds fewer sequences


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def by_hand(model: nn.Module, name: str, batches: list, method: str, pattern: str) -> None:
    """Block after block: every batch through the whole model as it is by then, one statistic a linear, then prune."""
    for block in blocks_of(model, name):
        linears = [block.get_submodule(path) for path in ARCHITECTURES[name].linears]
        pruners = [METHODS[method](matrix(linear).shape[1], Pattern.parse(pattern)) for linear in linears]
        hooks = [
            linear.register_forward_pre_hook(lambda _, args, pruner=pruner: pruner.observe(args[0]))
            for linear, pruner in zip(linears, pruners)
        ]
        for batch in batches:
            with torch.no_grad():
                model(input_ids=batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        for linear, pruner in zip(linears, pruners):
            matrix(linear).copy_(pruner.prune(matrix(linear)).weight)


# ---- what is pruned ----


@EVERY
@pytest.mark.parametrize(("method", "pattern"), [("magnitude", "50%"), ("wanda", "2:4"), ("sparsegpt", "4:8")])
def test_every_target_holds_the_pattern(name, method, pattern):
    model = build(name)
    before, modules = snapshot(model), dict(model.named_modules())
    report = prune(model, token_batches(*RAGGED), method, pattern)
    targets, after = ARCHITECTURES[name].targets(), snapshot(model)
    assert [linear.name for linear in report.linears] == targets
    assert (report.method, report.pattern) == (method, pattern)
    assert report.tokens == (0 if method == "magnitude" else 5 * 16)
    for linear in report.linears:
        weight = weight_of(model, linear.name)
        zeros = int((weight == 0).sum())
        if pattern == "50%":
            assert zeros == weight.numel() // 2
        else:
            kept, of = map(int, pattern.split(":"))
            rows, columns = weight.shape
            assert most_nonzeros(weight, of) == kept
            assert zeros == rows * sum(max(0, min(of, columns - begin) - kept) for begin in range(0, columns, of))
        assert linear.shape == tuple(weight.shape)
        assert linear.sparsity == zeros / weight.numel()
        assert (linear.output_error is None) == (method != "sparsegpt" or linear.statistics == "magnitude")
    assert dict(model.named_modules()) == modules, "a module was swapped"
    changed = {target.partition("[")[0] for target in targets}
    for key in before:
        assert torch.equal(before[key], after[key]) == (key.removesuffix(".weight") not in changed), key


@EVERY
def test_what_is_left_alone_is_listed_with_the_reason(name):
    model = build(name)
    output = next(path for path, module in model.named_modules() if module is model.get_output_embeddings())
    assert prune(model, method="magnitude").skipped == {**ARCHITECTURES[name].skipped, output: "output layer"}


def test_half_precision_weights_keep_their_dtype():
    model = build("llama", torch.bfloat16)
    prune(model, token_batches((2, 16)))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert most_nonzeros(matrix(model.model.layers[2].mlp.down_proj), 4) == 2


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["model.layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
        (["*.q_proj"], {f"model.layers.{i}.self_attn.q_proj" for i in range(BLOCKS)}),
        (["model.layers.0"], {f"model.layers.0.{linear}" for linear in ARCHITECTURES["llama"].linears}),
        (["model.layers.?.mlp"], {f"model.layers.{i}.mlp.{x}_proj" for i in range(BLOCKS) for x in ("gate", "up", "down")}),
        (["lm_head"], set()),
    ],
    ids=["a linear", "a pattern", "a block", "a part of each block", "left alone anyway"],
)
def test_skip(skip, left):
    model = build("llama")
    before = snapshot(model)
    report = prune(model, token_batches((2, 16)), "wanda", skip=skip)
    assert {linear.name for linear in report.linears} == set(ARCHITECTURES["llama"].targets()) - left
    assert {name for name, reason in report.skipped.items() if reason == "asked for"} == left
    after = snapshot(model)
    assert all(torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) for name in left)


def test_blocks_can_be_given():
    model = build("llama")
    report = prune(model, token_batches((2, 16)), blocks=model.model.layers[1:])
    assert {linear.name.split(".")[2] for linear in report.linears} == {"1", "2"}


# ---- the capture ----


@EVERY
@pytest.mark.parametrize("padded", [False, True], ids=["tokens", "padded dicts"])
def test_the_stream_is_the_models_own_forward(name, padded):
    """Blocks by hand, with the arguments captured once, give the bits that the model's forward gives."""
    model = build(name)
    blocks = blocks_of(model, name)
    batches = token_batches((3, 16), (1, 11))
    if padded:
        batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]
        batches[0]["attention_mask"][1, :5] = 0
        batches[0]["attention_mask"][2, 9:] = 0
    wanted = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: wanted.append(out if isinstance(out, torch.Tensor) else out[0]))
        for block in blocks
    ]
    with torch.no_grad():
        for batch in batches:
            model(**(batch if padded else {"input_ids": batch}), use_cache=False)
        for hook in hooks:
            hook.remove()
        stream = Stream(model, blocks, batches)
        for i, block in enumerate(blocks):
            stream.advance(block)
            for b in range(len(batches)):
                assert torch.equal(stream.hidden[b], wanted[b * len(blocks) + i]), (i, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_store_gives_back_the_bits(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    bits = [torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 5, 3), (1, 4, 3), (1, 0, 3), (2, 5, 3), (3, 5, 7))]
    bits[0][0, 0] = torch.tensor([float("nan"), -0.0, float("inf")])
    for store in (InMemory(), OnDisk(tmp_path)):
        for b in range(3):
            store.append(bits[b].transpose(0, 1))
        # What is written again: as large, the same, wider than its place.
        store[0], store[2] = bits[3], bits[4]
        assert len(store) == 3
        for b, wanted in enumerate((bits[3], bits[1].transpose(0, 1), bits[4])):
            assert store[b].dtype == dtype and store[b].shape == wanted.shape
            assert store[b].contiguous().view(torch.uint8).equal(wanted.contiguous().view(torch.uint8)), b
        store[0] = bits[0]
        assert store[0].view(torch.uint8).equal(bits[0].view(torch.uint8)), "NaN and -0.0 too"
    assert not any(tmp_path.iterdir()), "the file has no name"


def test_hidden_states_on_disk_change_nothing(tmp_path):
    batches = token_batches(*RAGGED)
    ours, theirs = build("gemma3"), build("gemma3")
    prune(theirs, batches)
    store = OnDisk(tmp_path)
    source = Resident(ours)
    source.store = store
    run(source, batches, "sparsegpt", "2:4")
    assert_same(ours.state_dict(), theirs.state_dict())
    assert len(store) == len(batches)
    store.close()


def test_a_folder_that_cannot_hold_hidden_states(tmp_path):
    with pytest.raises(SparsekitError, match=r"a folder that can be written, got .*missing: No such file"):
        OnDisk(tmp_path / "missing")


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_later_blocks_are_calibrated_on_the_pruned_earlier_ones(name, method):
    batches = token_batches(*RAGGED)
    ours, theirs, at_once = build(name), build(name), build(name)
    prune(ours, batches, method, "2:4")
    by_hand(theirs, name, batches, method, "2:4")
    assert_same(ours.state_dict(), theirs.state_dict())
    # The check sees the difference: a last block calibrated on the dense model comes out otherwise.
    prune(at_once, batches, method, "2:4", blocks=blocks_of(at_once, name)[-1:])
    first, last = ARCHITECTURES[name].targets()[0], ARCHITECTURES[name].targets()[-1]
    assert not torch.equal(matrix(at_once.get_submodule(last)), matrix(ours.get_submodule(last)))
    assert torch.equal(matrix(at_once.get_submodule(first)), matrix(build(name).get_submodule(first)))


@pytest.mark.parametrize(
    ("name", "inputs"), [("llama", 4), ("gpt2", 4), ("opt", 4), ("phi", 3), ("gpt_neox", 4), ("falcon", 3), ("falcon, new", 4)]
)
def test_a_shared_input_is_observed_once(name, inputs, monkeypatch):
    seen = []
    observe = SparseGPT.observe
    monkeypatch.setattr(SparseGPT, "observe", lambda self, x: (seen.append(x.shape), observe(self, x)))
    prune(build(name), token_batches(*RAGGED))
    assert len(seen) == BLOCKS * inputs * len(RAGGED)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_calibrated_on(side, name):
    long, short = token_batches((1, 48), (1, 29))
    pad = torch.full((1, 19), 50)
    ids = torch.cat([long, torch.cat([pad, short] if side == "left" else [short, pad], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, slice(None, 19) if side == "left" else slice(29, None)] = 0
    ours, theirs = build(name), build(name)
    report, other = prune(ours, [{"input_ids": ids, "attention_mask": mask}]), prune(theirs, [long, short])
    assert report.tokens == 48 + 29
    assert [linear.tokens for linear in report.linears] == [linear.tokens for linear in other.linears]
    for target in ARCHITECTURES[name].targets():
        torch.testing.assert_close(weight_of(ours, target), weight_of(theirs, target), rtol=1e-3, atol=1e-5)


def test_batches_may_be_any_mapping_and_any_iterable():
    batches = token_batches((2, 16), (1, 16))
    ours, theirs = build("llama"), build("llama")
    prune(ours, (transformers.BatchEncoding({"input_ids": ids}) for ids in batches))
    prune(theirs, batches)
    assert_same(ours.state_dict(), theirs.state_dict())


def test_the_first_of_a_set_of_alike_runs_is_the_second():
    models = build("gemma3"), build("gemma3")
    reports = [prune(model, token_batches(*RAGGED)).to_dict() for model in models]
    assert_same(models[0].state_dict(), models[1].state_dict())
    for report in reports:
        for timed in ("seconds", "phases", "blocks", "peak_memory"):
            report.pop(timed)
        for linear in report["linears"]:
            linear.pop("seconds"), linear.pop("peak_memory")
    assert reports[0] == reports[1]


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_seconds_are_told_of_each_linear_by_phase(method, monkeypatch):
    """The statistics are the work of the linear that gathers them for all that share its input, and its forward is without them; no
    time is counted twice."""
    kind = METHODS[method]
    observe = kind.observe
    monkeypatch.setattr(kind, "observe", lambda *given: (time.sleep(0.03), observe(*given)))  # most of the time there is
    model = build("llama")
    slow = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: time.sleep(0.02))  # of one linear, in both passes
    begin = time.perf_counter()
    report = prune(model, token_batches(*RAGGED), method)
    slow.remove()
    spent = time.perf_counter() - begin
    gather = {row.name.rpartition(".")[2] for row in report.linears if row.seconds.get("gram", 0) > 0}
    assert gather == {"q_proj", "o_proj", "gate_proj", "down_proj"}
    for row in report.linears:
        assert row.seconds and min(row.seconds.values()) >= 0 and all(isinstance(phase, str) for phase in row.seconds)
    for block in report.blocks:
        assert block.seconds.keys() == {"read", "forward"} and block.seconds["forward"] > 0
    forward = {row.name: row.seconds["forward"] for row in report.linears}
    slowest = forward.pop("model.layers.1.mlp.up_proj")
    assert slowest >= 6 * 0.02 and 0 < min(forward.values()) <= statistics.median(forward.values()) < 0.02
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert report.phases["gram"] == pytest.approx(sum(row.seconds.get("gram", 0) for row in report.linears))
    assert sum(report.phases.values()) <= spent


def test_peak_memory_is_told_of_each_linear():
    """The most that was held by then: it does not fall, and is within what the block is said to have held."""
    before = peak_memory(torch.device("cpu"))
    report = prune(build("llama"), token_batches(*RAGGED))
    rows = iter(report.linears)
    told = [before]
    for block in report.blocks:
        told += [next(rows).peak_memory for _ in ARCHITECTURES["llama"].linears] + [block.peak_memory]
    assert told == sorted(told) and report.peak_memory == told[-1]


def test_progress_names_each_block_and_ends_at_the_whole():
    told = []
    prune(build("gpt2"), token_batches((1, 8)), progress=lambda *now: told.append(now))
    blocks = [now for now in told if ", error " not in now[0]]
    assert blocks == [(f"transformer.h.{i}", i, BLOCKS) for i in range(BLOCKS)] + [("", BLOCKS, BLOCKS)]
    linears = [(re.fullmatch(r"(\S+), error 0\.\d{4}", what)[1], done) for what, done, _ in told if ", error " in what]
    assert linears == [(name, int(name.split(".")[2])) for name in ARCHITECTURES["gpt2"].targets()]


# ---- blocks of other people's making ----


class Block(nn.Module):
    """Two linears of WIDTH, put together by ``join(first, second, hidden)``."""

    def __init__(self, join):
        super().__init__()
        self.first, self.second, self.join = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), join

    def forward(self, hidden):
        return hidden + self.join(self.first, self.second, hidden)


class Toy(nn.Module):
    """No transformers model: a plain module of an embedding and blocks."""

    def __init__(self, *joins):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(join) for join in joins)

    def forward(self, ids):
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_a_plain_module_is_pruned():
    model = Toy(lambda first, second, x: second(first(x).relu()))
    report = prune(model, token_batches((2, 16)))
    assert [linear.name for linear in report.linears] == ["blocks.0.first", "blocks.0.second"]
    assert report.skipped == {"embedding": "embedding"}
    assert most_nonzeros(model.blocks[0].second.weight, 4) == 2


def test_an_input_changed_in_place_between_two_linears_is_no_shared_input():
    def join(first, second, x):
        x = x.clone()
        y = first(x)
        x.mul_(torch.linspace(0.1, 3, WIDTH))
        return y + second(x)

    def join_on_copies(first, second, x):
        return first(x.clone()) + second(x * torch.linspace(0.1, 3, WIDTH))

    ours, theirs = Toy(join), Toy(join_on_copies)
    for model in (ours, theirs):
        prune(model, token_batches((2, 16)), "wanda")
    assert_same(ours.state_dict(), theirs.state_dict())


def test_linears_that_share_some_calls_alone_are_refused():
    model = Toy(lambda first, second, x: first(x) + second(x) + first(x * 2))
    with pytest.raises(SparsekitError, match="share an input"):
        prune(model, token_batches((2, 16)))


def test_blocks_out_of_order_are_refused():
    model = Toy(*[lambda first, second, x: first(second(x))] * 2)
    model.forward = lambda ids: model.blocks[0](model.blocks[1](model.embedding(ids)))
    with pytest.raises(SparsekitError, match="order"):
        prune(model, token_batches((2, 16)))


@pytest.mark.parametrize("share", ["weight", "block"])
def test_a_weight_used_twice_is_refused(share):
    model = Toy(*[lambda first, second, x: first(second(x))] * 2)
    if share == "weight":
        model.blocks[1].second.weight = model.blocks[0].first.weight
    else:
        model.blocks.append(model.blocks[0])
    before = snapshot(model)
    with pytest.raises(SparsekitError, match=r"blocks\.\d\.\w+ must be used once"):
        prune(model, token_batches((2, 16)))
    assert_same(snapshot(model), before)


# ---- refusals ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_broken_weight_is_named_before_anything_is_pruned(method, value):
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    before = snapshot(model)
    with pytest.raises(SparsekitError, match=r"NaN or Inf in model\.layers\.1\.mlp\.up_proj$"):
        prune(model, token_batches((2, 16)), method)
    assert all(torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_broken_activations_name_the_linear(method, value):
    model = build("llama")
    model.model.layers[1].post_attention_layernorm.weight.data[7] = value
    with pytest.raises(SparsekitError, match=r"model\.layers\.1\.mlp\.gate_proj .*NaN or Inf"):
        prune(model, token_batches((2, 16)), method)


def refusals():
    def compressed():
        model = build("llama")
        prune(model, method="magnitude")
        compress(model)
        return model

    batches = token_batches((1, 8))
    yield "no linear", nn.Sequential(nn.Embedding(4, 4)), {"batches": batches}, "decoder blocks with a linear"
    yield "norms alone", nn.ModuleList([nn.LayerNorm(4)]), {"batches": batches}, "decoder blocks with a linear"
    yield "unknown skip", build("llama"), {"batches": batches, "skip": ["*.w1"]}, r"'\*\.w1'"
    yield "all skipped", build("llama"), {"batches": batches, "skip": ["*_proj"]}, "every one is skipped"
    yield "compressed already", compressed(), {"batches": batches}, "compressed already"
    yield "no batches", build("llama"), {}, "calibration batches, got none"
    yield "another vocabulary", build("llama"), {"batches": [batches[0] + VOCABULARY]}, f"vocabulary of {VOCABULARY}, got"
    yield "filled up with -100", build("llama"), {"batches": [batches[0] * 0 - 100]}, "0 or more, got -100; where it fills"
    yield "embeddings in place of ids", build("llama"), {"batches": [torch.zeros(1, 8)]}, r"int64 or int32, got torch\.float32"
    yield "a sequence by itself", build("llama"), {"batches": [batches[0][0]]}, r"\(batch, tokens\), one or more, got .* \(8,\)"
    yield "no tokens", build("llama"), {"batches": [batches[0][:, :0]]}, r"\(batch, tokens\), one or more, got .* \(1, 0\)"
    yield (
        "unknown method",
        build("llama"),
        {"method": "gptq"},
        "activation, gradient, magnitude, obd, obs, sparsegpt or wanda, got 'gptq'",
    )
    yield "unknown pattern", build("llama"), {"pattern": "2of4"}, r'"2:4".*"50%".*2of4'
    yield "more than all", build("llama"), {"pattern": "101%"}, "0% to 100%, got 101%"
    yield "less than nothing", build("llama"), {"pattern": "-1%"}, "0% to 100%, got -1%"
    yield "more kept than there are", build("llama"), {"pattern": "5:4"}, "5:4"


@pytest.mark.parametrize(("model", "arguments", "text"), [pytest.param(*row[1:], id=row[0]) for row in refusals()])
def test_refused_with_one_sentence_and_nothing_changed(model, arguments, text):
    before = snapshot(model)
    with pytest.raises(SparsekitError, match=text) as error:
        prune(model, **arguments)
    assert "\n" not in str(error.value)
    assert_same(model.state_dict(), before)


def test_a_linear_that_never_runs_is_named():
    model = Toy(lambda first, second, x: first(x))
    with pytest.raises(SparsekitError, match=r"blocks\.0\.second cannot be pruned: .*observed none"):
        prune(model, token_batches((2, 16)))


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@pytest.mark.parametrize("pruner", [Magnitude, Wanda, SparseGPT])
def test_a_pruner_that_misses_the_pattern_fails_the_run(pruner, pattern, monkeypatch):
    """One weight of one linear put back is enough, and it is that linear that is named."""
    honest = pruner.prune

    def forgetful(self, weight):
        result = honest(self, weight)
        if tuple(weight.shape) == (WIDTH, 44):  # mlp.down_proj
            row, column = (result.weight == 0).nonzero()[5].tolist()
            result.weight[row, column] = 1.0
        return result

    monkeypatch.setattr(pruner, "prune", forgetful)
    name = next(name for name, kind in METHODS.items() if kind is pruner)
    with pytest.raises(SparsekitError, match=rf"must hold {pattern}, got model\.layers\.0\.mlp\.down_proj, where"):
        prune(build("llama"), token_batches((2, 16)), name, pattern)


def test_wanda_is_held_to_its_count_in_each_row(monkeypatch):
    """A zero too few in one row is not made up for by one too many in another."""
    honest = Wanda.prune

    def uneven(self, weight):
        result = honest(self, weight)
        result.weight[0, (result.weight[0] == 0).nonzero()[0]] = 1.0
        result.weight[1, (result.weight[1] != 0).nonzero()[0]] = 0.0
        return result

    monkeypatch.setattr(Wanda, "prune", uneven)
    with pytest.raises(SparsekitError, match=r"must hold 50%, got model\.layers\.0\.self_attn\.q_proj, where row 0 "):
        prune(build("llama"), token_batches((2, 16)), "wanda", "50%")


# ---- the model afterwards ----


def test_the_model_is_left_in_the_state_it_was_in():
    for fails in (False, True):
        model = build("gpt2").train()
        model.transformer.h[1].eval()
        patched = model.transformer.h[2].forward  # as accelerate does, on the instance
        model.transformer.h[2].forward = patched
        if fails:
            model.transformer.h[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        modes = {name: module.training for name, module in model.named_modules()}
        hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
        if fails:
            with pytest.raises(ZeroDivisionError):
                prune(model, token_batches((2, 16)))
        else:
            prune(model, token_batches((2, 16)))
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert {name: len(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks
        assert "forward" not in vars(model.transformer.h[0]) and "forward" not in vars(model.transformer.h[1])
        assert vars(model.transformer.h[2])["forward"] is patched


def test_dropout_is_off_while_calibrating():
    ours, theirs = build("gpt2").train(), build("gpt2")
    for model in (ours, theirs):
        prune(model, token_batches((2, 16)))
    assert_same(ours.state_dict(), theirs.state_dict())


def test_an_exception_in_the_capture_restores_the_forwards():
    model = build("llama")
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(model, token_batches((1, 8)))
    assert not any("forward" in vars(block) for block in model.model.layers)


def test_parameters_stay_the_same_objects():
    """An optimiser, or a tied twin, must not hold a weight that is no longer the model's."""
    model = build("llama")
    before = dict(model.named_parameters())
    prune(model, token_batches((1, 8)))
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_find_blocks_takes_the_list_with_most_weights():
    model = nn.Module()
    model.small = nn.ModuleList([nn.Linear(4, 4) for _ in range(9)])
    model.large = nn.ModuleList([nn.Sequential(nn.Linear(16, 16))])
    assert find_blocks(model) is model.large


def test_patterns_can_be_objects():
    for pattern, text in ((NM(1, 4), "1:4"), (Unstructured(0.25), "25%")):
        model = copy.deepcopy(build("llama"))
        report = prune(model, method="magnitude", pattern=pattern)
        assert report.pattern == text
        assert report.sparsity == pytest.approx(pattern.sparsity, abs=1e-12)


class InPlace(nn.Module):
    """Adds to what it is given, or to a copy of it."""

    def __init__(self, copies: bool):
        super().__init__()
        self.up, self.copies = nn.Linear(WIDTH, WIDTH), copies

    def forward(self, hidden):
        hidden = hidden.clone() if self.copies else hidden
        hidden += self.up(hidden)
        return hidden


def test_blocks_that_change_their_input_in_place(tmp_path):
    def made(copies: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *[InPlace(copies) for _ in range(3)])

    wanted, *others = made(True), made(False), made(False)
    prune(wanted, token_batches((2, 40)), blocks=nn.ModuleList(wanted[1:]))
    for model, store in zip(others, (InMemory(), OnDisk(tmp_path))):
        source = Resident(model, nn.ModuleList(model[1:]))
        source.store = store
        run(source, token_batches((2, 40)), "sparsegpt", "2:4")
        assert_same(model.state_dict(), wanted.state_dict())


@pytest.mark.parametrize("name", ["mistral", "gemma3", "bloom", "falcon, alibi"])
def test_batches_alike_hold_their_masks_once(name):
    # 1 and 9 batches of one shape hold as many tensors; one of another shape has its own.
    def held(*shapes: tuple[int, int]) -> int:
        model = build(name)
        leaves = tree_leaves(Stream(model, blocks_of(model, name), token_batches(*shapes)).calls)
        return len({id(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)})

    assert 0 < held((2, 16)) == held(*[(2, 16)] * 9) < held((2, 16), (2, 11))
