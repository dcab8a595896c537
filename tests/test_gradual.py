"""Gradual pruning: masks that only grow, optimisers that forget, state that survives; and the config as text."""

import math

import pytest
import torch
from models import build, token_batches
from safetensors.torch import save_file
from torch import nn

from sparsekit import PruningConfig, SparsekitError, gradual
from sparsekit.criteria import SquaredGradients
from sparsekit.gradual import STATE_FILE, GradualPruner, distillation_loss
from sparsekit.patterns import Given

IDS = token_batches((2, 12), (2, 12))


@pytest.fixture(autouse=True)
def one_thread():
    # Models this small are slower on two.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(model: nn.Module, optimiser: torch.optim.Optimizer, pruner: GradualPruner, steps: int, accumulate: int = 2) -> None:
    for _ in range(steps):
        for ids in IDS[:accumulate]:
            logits = model(input_ids=ids, use_cache=False).logits
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimiser.step()
        pruner.step(optimiser)
        optimiser.zero_grad()


def optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    ]


def zeros(pruner: GradualPruner) -> dict[str, torch.Tensor]:
    return {name: target.weight == 0 for name, target in pruner._targets.items()}


@pytest.mark.parametrize("which", [0, 1], ids=["AdamW", "SGD with momentum"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(pattern="2:4"),
        dict(pattern="4:8 pairs", criterion="gradient"),
        dict(pattern="60%", schedule="linear"),
        dict(pattern="60%", group="row", criterion="gradient"),
        dict(pattern="50%", group="model", schedule="exponential"),
        dict(pattern="block:4x4@50%", group="model"),
        dict(pattern="block:3x5@50%"),
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_masks_only_grow_and_end_at_the_pattern(name, settings, which):
    model = build(name)
    config = PruningConfig(begin=1, end=7, every=3, **settings)
    pruner, optimiser = GradualPruner(model, config), optimisers(model)[which]
    before, reached = zeros(pruner), [0.0]
    for _ in range(9):
        train(model, optimiser, pruner, 1)
        now = zeros(pruner)
        for linear, mask in pruner.masks.items():
            assert torch.equal(now[linear], ~mask) and not (before[linear] & ~now[linear]).any(), linear
        before = now
        reached.append(pruner.sparsity)
        for parameter in pruner._parameters:
            for held in optimiser.state[parameter].values():
                if isinstance(held, torch.Tensor) and held.shape == parameter.shape:
                    assert not held[parameter == 0].any()  # neither momentum nor variance of what is gone
    assert pruner.done and reached[1] == 0 and reached[2] > 0
    assert reached[2] == reached[3] == reached[4] <= reached[5] == reached[7] < reached[8] == reached[9]
    pruner.finish()
    if config.group == "model":  # exact over all weights, ragged blocks aside
        numel = sum(mask.numel() for mask in pruner.masks.values())
        assert "block" in settings["pattern"] or sum(int((~m).sum()) for m in pruner.masks.values()) == numel // 2
    assert not any(parameter._backward_hooks for parameter in pruner._parameters)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"], ids=["linears", "transposed", "flattened in the MLP"])
def test_the_gradient_criterion_is_fisher_by_the_sequence(name):
    model = build(name)
    pruner = GradualPruner(model, PruningConfig("50%", criterion="gradient", group="row"))
    targets, truth = pruner._targets, {}
    for ids in IDS:
        for row in range(len(ids)):  # its part of the batch's mean loss, by itself
            model.zero_grad()
            pruner._squares.clear()
            next_tokens(model, ids[row : row + 1]).div(len(ids)).backward()
            for key, target in targets.items():
                square = target.of(getattr(target.module, target.parameter).grad).double().square()
                truth[key] = truth.get(key, 0) + square
    pruner._squares.clear()
    for ids in IDS:
        next_tokens(model, ids).backward()
    assert max(len(ids) for ids in IDS) > 1
    for key in targets:
        found = pruner._squares[key]
        assert found.tokens == sum(map(len, IDS))
        assert (found.sum - truth[key]).abs().max() <= 1e-4 * truth[key].max()
    before = {key: target.weight.detach().clone() for key, target in targets.items()}
    pruner.step()
    for key, mask in pruner.masks.items():
        scores = truth[key] * before[key].double().square()
        lost, stays = scores.masked_fill(mask, 0).amax(1), scores.masked_fill(~mask, math.inf).amin(1)
        assert (lost <= stays * (1 + 1e-3)).all() and ((~mask).sum(1) == mask.shape[1] // 2).all()
    assert not pruner._squares


def next_tokens(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("apart", [False, True], ids=["in one batch", "in two passes"])
def test_gradients_that_cancel_do_not_cancel_the_score(apart):
    model = build("llama")
    pruner = GradualPruner(model, PruningConfig("50%", criterion="gradient"))
    linear = model.model.layers[0].mlp.up_proj
    if apart:
        for sign in (1, -1):
            (model(input_ids=IDS[0], use_cache=False).logits.sum() * sign).backward()
    else:
        logits = model(input_ids=torch.cat([IDS[0], IDS[0]]), use_cache=False).logits
        plus, minus = logits.chunk(2)
        (plus.sum() - minus.sum()).backward()
    assert linear.weight.grad.abs().max() < 1e-3 * pruner._squares["model.layers.0.mlp.up_proj"].sum.sqrt().max()
    assert pruner._squares["model.layers.0.mlp.up_proj"].sum.min() > 0


def test_squares_of_all_processes_come_in_one_sum_a_linear_and_one_of_counts(monkeypatch):
    # Two processes: alike in four linears, one more seen by the other alone, the rest by neither.
    pruner = GradualPruner(build("llama"), PruningConfig("50%", criterion="gradient"))
    names, calls = list(pruner.masks), []
    for i, name in enumerate(names[:4]):
        pruner._squares[name] = SquaredGradients(pruner.masks[name].shape)
        pruner._squares[name].sum += i + 1
        pruner._squares[name].tokens = i + 1
    only_there = names[5]

    def all_reduce(held: torch.Tensor) -> None:
        calls.append(held)
        held.mul_(2)
        if len(calls) == 1:
            assert held.dtype == torch.int64 and held.shape == (len(names),)
            held[5] = 3
        elif len(calls) == 6:
            held.add_(7)

    monkeypatch.setattr(gradual, "_processes", lambda: 2)
    monkeypatch.setattr(gradual.dist, "all_reduce", all_reduce)
    pruner._sum_of_all()
    assert len(calls) == 1 + 5 and set(pruner._squares) == {*names[:4], only_there}
    for i, name in enumerate(names[:4]):
        assert pruner._squares[name].tokens == 2 * (i + 1) and (pruner._squares[name].sum == 2 * (i + 1)).all()
    assert pruner._squares[only_there].tokens == 3 and (pruner._squares[only_there].sum == 7).all()


def test_without_a_backward_pass_the_gradient_criterion_says_so():
    pruner = GradualPruner(build("llama"), PruningConfig("50%", criterion="gradient"))
    with pytest.raises(SparsekitError, match=r"needs a backward pass before each pruning, and model\.layers\.0\.self_attn\.q_proj"):
        pruner.step()


@pytest.mark.parametrize("criterion", ["magnitude", "gradient"])
def test_a_run_that_goes_on_from_a_saved_state_is_the_same_run(criterion, tmp_path):
    config = PruningConfig("60%", criterion=criterion, begin=1, end=5, every=2)

    def start() -> tuple:
        model = build("llama")
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), GradualPruner(model, config)

    model, optimiser, pruner = start()
    train(model, optimiser, pruner, 6)
    first, first_optimiser, first_pruner = start()
    train(first, first_optimiser, first_pruner, 3)
    first_pruner.save(tmp_path / "state.safetensors")
    again, again_optimiser, again_pruner = start()
    again.load_state_dict(first.state_dict())
    again_optimiser.load_state_dict(first_optimiser.state_dict())
    again_pruner.load(tmp_path / "state.safetensors")
    found, kept = again_pruner._squares, first_pruner._squares
    assert set(found) == set(kept) == (set(pruner.masks) if criterion == "gradient" else set())
    for name, squares in found.items():  # of several processes, one that knows of no sample takes no part
        assert squares.tokens == kept[name].tokens > 0 and torch.equal(squares.sum, kept[name].sum)
    train(again, again_optimiser, again_pruner, 3)
    for one, other in zip(model.parameters(), again.parameters()):
        assert torch.equal(one, other)
    assert all(torch.equal(pruner.masks[name], again_pruner.masks[name]) for name in pruner.masks)


def test_a_state_of_something_else_is_refused(tmp_path):
    pruner = GradualPruner(build("llama"), PruningConfig("50%"))
    whole = tmp_path / "state.safetensors"
    pruner.save(whole)
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(SparsekitError, match="is not a whole safetensors file"):
        pruner.load(whole)
    save_file({}, whole)
    with pytest.raises(SparsekitError, match="must hold a pruner's state, and its metadata has none"):
        pruner.load(whole)
    with pytest.raises(SparsekitError, match="same settings, got pattern = '60%' for '50%'"):
        pruner.load_state_dict(GradualPruner(build("llama"), PruningConfig("60%")).state_dict())
    with pytest.raises(SparsekitError, match=r"same model, and differs in model\.layers\.0\.mlp\.gate_proj"):
        pruner.load_state_dict(GradualPruner(build("llama", intermediate_size=48), PruningConfig("50%")).state_dict())


def test_a_fixed_mask_stays_through_training():
    model = build("llama")
    for linear in (m for block in model.model.layers for m in block.modules() if isinstance(m, nn.Linear)):
        with torch.no_grad():
            linear.weight.mul_(PruningConfig().pattern.mask(linear.weight.abs()))
    pruner = GradualPruner.fixed(model)
    held, weights = zeros(pruner), [p.detach().clone() for p in model.parameters()]
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), pruner, 3)
    assert all(torch.equal(held[name], now) for name, now in zeros(pruner).items())
    assert all(not torch.equal(old, new) for old, new in zip(weights, model.parameters()))
    pruner.finish()
    with pytest.raises(SparsekitError, match=r"hold 2:4, got model\.layers\.0\.self_attn\.q_proj, where row 0, .*prune it first"):
        GradualPruner.fixed(build("llama"))


@pytest.mark.parametrize("criterion", ["magnitude", "gradient"])
def test_weights_that_do_not_train_are_pruned_too(criterion):
    """The first block's, which a fine-tuning leaves as they are; the gradient reaches its outputs from the embeddings."""
    model = build("llama")
    still = [module.weight for module in model.model.layers[0].modules() if isinstance(module, nn.Linear)]
    for weight in still:
        weight.requires_grad_(False)
    pruner = GradualPruner(model, PruningConfig("2:4", criterion, begin=1, end=3, every=2, schedule="linear"))
    train(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad), pruner, 4)
    pruner.finish()
    assert all(weight.grad is None and (weight == 0).sum() == weight.numel() // 2 for weight in still)
    assert GradualPruner.fixed(model).sparsity == 0.5


@pytest.mark.parametrize("factor", [math.inf, 1e25], ids=["NaN and Inf", "squares beyond fp32"])
def test_gradients_that_are_not_finite_decide_nothing(factor):
    model = build("llama")
    pruner = GradualPruner(model, PruningConfig("50%", "gradient"))
    (next_tokens(model, IDS[0]) * factor).backward()
    with pytest.raises(SparsekitError, match=r"gradients that are finite, and those of model\.layers\.0\..* hold NaN or Inf"):
        pruner.step()


def test_finishing_before_the_end_is_refused():
    pruner = GradualPruner(build("llama"), PruningConfig(begin=0, end=4, every=2))
    pruner.step()
    with pytest.raises(SparsekitError, match="pruning must be done, 3 times, got 1"):
        pruner.finish()


def test_the_callback_prunes_as_the_trainer_steps_and_resumes(tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": ids, "labels": ids} for batch in IDS for ids in batch]

    def trainer(steps: int) -> tuple[Trainer, GradualPruner]:
        model = build("llama")
        pruner = GradualPruner(model, PruningConfig("2:4", "gradient", begin=1, end=5, every=2))  # squares are saved too
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=3,
            learning_rate=0.01, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", lr_scheduler_type="constant",
        )  # fmt: skip
        return Trainer(model, args, train_dataset=data, callbacks=[pruner.callback()]), pruner

    whole, pruner = trainer(6)
    whole.train()
    assert pruner.done and pruner.steps == 6
    for parameter in pruner._parameters:  # the last step pruned: what AdamW remembers of it went with it
        held = [t for t in whole.optimizer.state[parameter].values() if t.shape == parameter.shape]
        assert len(held) == 2 and not any(t[parameter == 0].any() for t in held) and all(t.any() for t in held)
    again, resumed = trainer(6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.steps == 6 and all(torch.equal(pruner.masks[name], resumed.masks[name]) for name in pruner.masks)
    for one, other in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(one, other)
    resumed.finish()
    # A checkpoint of somewhere else: the pruner's state is not beside those of this training.
    elsewhere = (tmp_path / "checkpoint-3").rename(tmp_path.parent / "checkpoint-3 of another")
    moved, fresh = trainer(6)
    with pytest.raises(SparsekitError, match=r"from step 3 needs the pruner's state, and .*checkpoint-3.* is not there"):
        moved.train(resume_from_checkpoint=str(elsewhere))
    moved, fresh = trainer(6)
    fresh.load(elsewhere / STATE_FILE)
    moved.train(resume_from_checkpoint=str(elsewhere))
    assert all(torch.equal(pruner.masks[name], fresh.masks[name]) for name in pruner.masks)


# ---- distillation ----


def test_distillation_against_its_formula():
    student, teacher = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_distillation_refuses(temperature):
    with pytest.raises(SparsekitError, match="temperature must be above 0"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature)
    with pytest.raises(SparsekitError, match=r"one shape, got \(2, 3\) and \(2, 4\)"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4))


# ---- the config ----

CONFIGS = [
    PruningConfig(),
    PruningConfig("33.3%", "gradient", "row", "exponential:5.0", 10, 100, 30, 0.1, skip=("*.down_proj", "lm_head")),
    PruningConfig("block:4x8@50%", group="model", schedule="20%,35%,50%", begin=3, end=5),
]


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.pattern))
def test_a_config_comes_back_from_its_file(config, suffix, tmp_path):
    config.save(tmp_path / f"config.{suffix}")
    assert PruningConfig.load(tmp_path / f"config.{suffix}") == config


def test_the_patterns_on_the_way():
    config = PruningConfig("2:8", schedule="linear", end=5)
    assert [str(config.pattern_after(i)) for i in range(1, 7)] == ["7:8", "6:8", "5:8", "4:8", "3:8", "2:8"]
    assert PruningConfig("0%", end=3).pattern_after(2).sparsity == 0
    for m in range(2, 33):  # a step for each weight: 2/3 of the way is not the float a hair below it
        for n in range(m):
            config = PruningConfig(f"{n}:{m}", schedule="linear", end=m - n - 1)
            assert [config.pattern_after(i).n for i in range(1, m - n + 1)] == list(range(m - 1, n - 1, -1))


@pytest.mark.parametrize("pattern, sparsity", [("7:10", 0.3), ("1:3", 2 / 3), ("8:10 pairs", 0.2), ("70%", 0.7), ("4:4", 0)])
def test_a_sparsity_that_is_the_patterns_but_for_rounding(pattern, sparsity):
    assert PruningConfig(pattern, sparsity=sparsity) == PruningConfig(pattern)


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(pattern="half"), "a pattern must be"),
        (dict(pattern=Given(torch.ones(2, 4, dtype=torch.bool))), "is of the whole model, got the mask of one matrix"),
        (dict(pattern="7:10", sparsity=0.3001), "the sparsity of 7:10 is 0.3, got 0.3001"),
        (dict(schedule="square"), "a schedule must be"),
        (dict(criterion="wanda"), "the criterion must be magnitude or gradient, got 'wanda'"),
        (dict(pattern="50%", group="column"), "the group must be row, layer, block or model, got 'column'"),
        (dict(pattern="2:4", sparsity=0.7), "the sparsity of 2:4 is 0.5, got 0.7"),
        (dict(pattern="2:4", group="row"), "2:4 compares weights within its own groups, got group = 'row'"),
        (dict(start="0.1"), "start must be a number from 0 to 1, got '0.1'"),
        (dict(sparsity="0.5"), "sparsity must be a number from 0 to 1, got '0.5'"),
        (dict(skip=5), "skip must be names of linears, got 5"),
        (dict(begin=-1), "begin must be a whole number of at least 0, got -1"),
        (dict(every=0), "every must be a whole number of at least 1, got 0"),
        (dict(end=2.5), "end must be a whole number of at least 0, got 2.5"),
        (dict(begin=5, end=3), "a whole number of times every = 1 steps after begin = 5, got 3"),
        (dict(end=10, every=3), "a whole number of times every = 3 steps after begin = 0, got 10"),
        (dict(pattern="50%", start=0.6), "must go up, from at least 0 to at most 1, got 0.6 to 0.5"),
        (dict(pattern="50%", schedule="20%,40%", end=1), "the last of the listed sparsities must be the pattern's 0.5, got 0.4"),
        (dict(pattern="50%", schedule="20%,50%", end=2), "a list of 2 sparsities takes as many steps, got 3"),
    ],
)
def test_a_config_that_contradicts_itself(settings, says):
    with pytest.raises(SparsekitError) as caught:
        PruningConfig(**settings)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.json", "{", "must be JSON, got"),
        ("a.yaml", "{", "must be YAML, got"),
        ("a.json", "[]", "must be an object of settings, got a list"),
        (
            "a.json",
            '{"speed": 1}',
            "has the settings pattern, criterion, group, schedule, begin,",
        ),
        ("a.txt", "{}", "a .json, .yaml or .yml file, got"),
        ("none.json", None, "must be a text file that can be read"),
    ],
)
def test_a_file_that_is_no_config(name, text, says, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SparsekitError) as caught:
        PruningConfig.load(tmp_path / name)
    assert says in str(caught.value)
