"""Layers of experts: each expert is pruned by the tokens that are routed to it, and by nothing less unless the report says so."""

import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES, BLOCKS, EXPERTS, WIDTH, blocks_of, build, most_nonzeros, token_batches, weight_of
from torch import Tensor, nn

from sparsekit import SparsekitError, checkpoint, criteria
from sparsekit.patterns import Pattern
from sparsekit.pipeline import loop, prune
from sparsekit.pipeline.blocks import find_targets
from sparsekit.pipeline.observe import Observer
from sparsekit.pruners import METHODS, Magnitude, SparseGPT

FUSED = ("qwen3_moe", "mixtral")
IMPLEMENTATIONS = (
    "eager",
    "grouped_mm",
    "batched_mm",
)  # of transformers: three ways to multiply, of which each orders tokens its own
INNER = 20


class Recorder:
    """A pruner that keeps what it is shown."""

    def __init__(self):
        self.rows, self.statistics = [], self

    def observe(self, x: Tensor) -> None:
        self.rows.append(x.clone())


def inputs_by_hand(experts: nn.Module, hidden: Tensor, index: Tensor) -> dict[str, Tensor]:
    """What each matrix of a fused layer (qwen3_moe, mixtral) receives: the tokens that chose the expert, first choices before
    second ones, and what the expert makes of them on its way."""
    made = {}
    for e in range(EXPERTS):
        chosen = torch.cat([(index[:, place] == e).nonzero()[:, 0] for place in range(index.shape[1])])
        gate, up = F.linear(hidden[chosen], experts.gate_up_proj[e]).chunk(2, dim=-1)
        made[f"gate_up_proj[{e}]"], made[f"down_proj[{e}]"] = hidden[chosen], experts.act_fn(gate) * up
    return made


@torch.no_grad()
def by_hand(model: nn.Module, name: str, batches: list, method: str) -> None:
    """Block after block, every batch through the whole model as it is by then, as in test_pipeline.py."""
    for block in blocks_of(model, name):
        pruners = {}
        for path in ARCHITECTURES[name].linears:
            pruners[path] = METHODS[method](weight_of(block, path).shape[1], Pattern.parse("2:4"))
        linears = [path for path in pruners if "[" not in path]
        hooks = [
            block.get_submodule(path).register_forward_pre_hook(lambda _, args, pruner=pruners[path]: pruner.observe(args[0]))
            for path in linears
        ]

        def look(experts, args):
            for matrix, rows in inputs_by_hand(experts, *args[:2]).items():
                pruners[f"mlp.experts.{matrix}"].observe(rows)  # noqa: B023

        hooks.append(block.mlp.experts.register_forward_pre_hook(look))
        for batch in batches:
            model(input_ids=batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        for path, pruner in pruners.items():
            weight_of(block, path).copy_(pruner.prune(weight_of(block, path)).weight)


def in_order(rows: Tensor) -> Tensor:
    """The rows in an order that depends on them alone."""
    return rows[torch.argsort(rows[:, 0])]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_an_expert_is_shown_the_tokens_that_are_routed_to_it(name, implementation):
    model = build(name)
    model.set_experts_implementation(implementation)
    block = blocks_of(model, name)[1]
    targets = find_targets(nn.ModuleList([block]), {module: path for path, module in block.named_modules()}, ())[0]
    pruners, routed, outputs = {target: Recorder() for target in targets}, [], []
    block.mlp.experts.register_forward_pre_hook(lambda _, args: routed.append(args[:2]))
    block.register_forward_hook(lambda _, __, out: outputs.append(out))
    (batch,) = token_batches((2, 24))
    model(input_ids=batch)
    observer = Observer(block, pruners)
    with observer.batch(None):
        model(input_ids=batch)
    assert torch.equal(*outputs), "watching changes no bit"
    wanted = inputs_by_hand(block.mlp.experts, *routed[1])
    for target in targets:
        if target.index is None:
            continue
        (rows,), (_, _, matrix) = pruners[target].rows, target.name.rpartition("experts.")
        assert len(rows) == len(wanted[matrix])
        if implementation == "eager":
            assert torch.equal(rows, wanted[matrix]), target.name
        elif target.parameter == "gate_up_proj":
            assert torch.equal(in_order(rows), in_order(wanted[matrix])), target.name
        else:
            torch.testing.assert_close(in_order(rows), in_order(wanted[matrix]))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", FUSED)
def test_experts_are_calibrated_as_by_hand(name, method):
    batches = token_batches((4, 32), (4, 32), (2, 32))
    ours, theirs = build(name), build(name)
    for model in (ours, theirs):
        model.set_experts_implementation("eager")
    report = prune(ours, batches, method, "2:4")
    assert {linear.statistics for linear in report.linears} == {"own"}
    by_hand(theirs, name, batches, method)
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[key]), key
    routed = [linear.tokens for linear in report.linears if linear.name.endswith(tuple(f"down_proj[{e}]" for e in range(EXPERTS)))]
    assert sum(routed) == BLOCKS * 10 * 32 * 2, "every token goes to two experts of each layer"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_implementations_prune_alike(implementation):
    """They add up in other orders: the same masks, and weights within fp32 rounding."""
    batches = token_batches((4, 32), (4, 32))
    ours, theirs = build("mixtral"), build("mixtral")
    ours.set_experts_implementation(implementation)
    theirs.set_experts_implementation("eager")
    for model in (ours, theirs):
        prune(model, batches)
    for name in ARCHITECTURES["mixtral"].targets():
        torch.testing.assert_close(weight_of(ours, name), weight_of(theirs, name), rtol=1e-3, atol=1e-4)
        assert torch.equal(weight_of(ours, name) == 0, weight_of(theirs, name) == 0), name


# ---- other ways to hold experts ----


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Separate(nn.Module):
    """A block whose experts are modules of their own: of the tokens of each, the router sends one part to each expert."""

    def __init__(self, count: int = 3, never: int | None = None):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, count), nn.ModuleList(Expert() for _ in range(count))
        self.never = never

    def choose(self, tokens: Tensor) -> Tensor:
        scores = self.router(tokens)
        if self.never is not None:
            scores[:, self.never] = -torch.inf
        return scores.argmax(-1)

    def forward(self, hidden):
        tokens = hidden.flatten(0, -2)
        chosen, out = self.choose(tokens), torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            out[chosen == e] = expert(tokens[chosen == e])
        return hidden + out.view_as(hidden)


class Fused(Separate):
    """The same weights in parameters (experts, ., .). product(x, weight, e): how expert e of one of them is applied."""

    def __init__(self, separate: Separate, product, transposed: bool = False):
        super().__init__(1, separate.never)
        self.router = separate.router
        stacked = {
            name: torch.stack([getattr(expert, name).weight.detach() for expert in separate.experts])
            for name in ("gate", "up", "down")
        }
        self.experts = Stack(stacked, product, transposed)

    def forward(self, hidden):
        tokens = hidden.flatten(0, -2)
        return hidden + self.experts(tokens, self.choose(tokens)).view_as(hidden)


class Stack(nn.Module):
    def __init__(self, stacked: dict[str, Tensor], product, transposed: bool):
        super().__init__()
        self.num_experts, self.product, self.is_transposed = len(stacked["gate"]), product, transposed
        for name, weight in stacked.items():
            self.register_parameter(name, nn.Parameter(weight.mT.contiguous() if transposed else weight))

    def forward(self, tokens, chosen):
        out = torch.zeros_like(tokens)
        for e in range(self.num_experts):
            x = tokens[chosen == e]
            inner = F.silu(self.product(x, self.gate, e)) * self.product(x, self.up, e)
            out[chosen == e] = self.product(inner, self.down, e)
        return out


class Toy(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden):
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def toy(never: int | None = None) -> Separate:
    torch.manual_seed(0)
    return Separate(never=never)


def hidden_batches(*counts: int, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, count, WIDTH, generator=generator) for count in counts]


def names_of(block: str, e: int) -> list[str]:
    return [f"blocks.{block}.experts.{e}.{role}" for role in ("gate", "up", "down")]


def test_experts_that_are_modules():
    ours, theirs, batches = Toy(toy(), toy()), Toy(toy(), toy()), hidden_batches(90, 70)
    report = prune(ours, batches)
    assert report.skipped == {"blocks.0.router": "router", "blocks.1.router": "router"}
    assert [linear.name for linear in report.linears] == [name for b in "01" for e in range(3) for name in names_of(b, e)]
    for i, block in enumerate(theirs.blocks):
        pruners = {name: SparseGPT(weight.shape[1], Pattern.parse("2:4")) for name, weight in block.experts.named_parameters()}
        for batch in batches:
            with torch.no_grad():
                tokens = Toy(*theirs.blocks[:i])(batch).flatten(0, 1)
                chosen = block.choose(tokens)
                for e, expert in enumerate(block.experts):
                    x = tokens[chosen == e]
                    for role in ("gate", "up"):
                        pruners[f"{e}.{role}.weight"].observe(x)
                    pruners[f"{e}.down.weight"].observe(F.silu(expert.gate(x)) * expert.up(x))
        for name, weight in block.experts.named_parameters():
            weight.data.copy_(pruners[name].prune(weight.data).weight)
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[key]), key


PRODUCTS = {
    "linear": (lambda x, weight, e: F.linear(x, weight[e]), False),
    "indexed by a tensor": (lambda x, weight, e: x @ weight[torch.tensor(e)].T, False),
    "transposed": (lambda x, weight, e: x @ weight[e], True),
    "weight on the left": (lambda x, weight, e: (weight[e] @ x.T).T, False),
    "a batch of one": (lambda x, weight, e: torch.bmm(x[None], weight[e : e + 1])[0], True),
    "einsum": (lambda x, weight, e: torch.einsum("tk,nk->tn", x, weight[e]), False),
    "tokens in three dimensions": (lambda x, weight, e: F.linear(x[None], weight[e])[0], False),
    "rows in two parts": (lambda x, weight, e: torch.cat([F.linear(x, part) for part in weight[e].split(7)], dim=1), False),
}


@pytest.mark.parametrize("way", PRODUCTS)
def test_experts_in_one_parameter_are_pruned_as_those_that_are_modules(way, monkeypatch):
    product, transposed = PRODUCTS[way]
    separate, batches = toy(), hidden_batches(90, 70)
    ours, theirs = Toy(Fused(separate, product, transposed)), Toy(separate)
    updates = []
    update = criteria.Gram.update
    monkeypatch.setattr(criteria.Gram, "update", lambda self, x: (updates.append(x.shape), update(self, x)))
    report = prune(ours, batches)
    assert len(updates) == 3 * 2 * len(batches), "gate and up share one Gram matrix"
    assert report.skipped == {"blocks.0.router": "router"}
    reported = {linear.name: linear for linear in prune(theirs, batches).linears}
    for linear in report.linears:
        _, _, role, e = linear.name.replace("[", ".").rstrip("]").split(".")[-4:]
        module = f"blocks.0.experts.{e}.{role}"
        held = getattr(ours.blocks[0].experts, role)[int(e)]
        torch.testing.assert_close(held.T if transposed else held, weight_of(theirs, module), rtol=1e-4, atol=1e-6)
        assert (linear.shape, linear.tokens) == (reported[module].shape, reported[module].tokens)


def test_a_product_that_cannot_be_watched_is_refused():
    ours = Toy(Fused(toy(), lambda x, weight, e: (x[:, None] * weight[e]).sum(-1)))
    with pytest.raises(
        SparsekitError, match=r"blocks\.0\.experts\.gate\[0\] must be multiplied in a way that can be watched"
    ) as error:
        prune(ours, hidden_batches(90))
    assert "\n" not in str(error.value)
    prune(ours, method="magnitude")  # which asks for no inputs


def test_a_shared_gram_is_gathered_and_factored_once(monkeypatch):
    updates, factored = [], []
    update, cholesky = criteria.Gram.update, torch.linalg.cholesky_ex
    monkeypatch.setattr(criteria.Gram, "update", lambda self, x: (updates.append(x.shape), update(self, x)))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda h: (factored.append(h.shape), cholesky(h))[1])
    prune(Toy(toy()), hidden_batches(90, 70))
    assert len(updates) == 3 * 2 * 2
    assert sorted(factored) == [(1, INNER, INNER), (1, WIDTH, WIDTH), (1, WIDTH, WIDTH), (1, WIDTH, WIDTH), (2, INNER, INNER)]


@pytest.mark.parametrize("kind", ["modules", "one parameter"])
def test_factorised_together_and_alone_are_the_same_bits(kind, monkeypatch):
    # Of 32 inputs one takes what there is room for; of 20 two, and the third expert's is left.
    made, factored, cholesky = [], [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda h: (factored.append(h.shape), cholesky(h))[1])
    for together in (loop.TOGETHER, 0):
        monkeypatch.setattr(loop, "TOGETHER", together)
        model = Toy(toy() if kind == "modules" else Fused(toy(), PRODUCTS["linear"][0]))
        report = prune(model, hidden_batches(90, 70))
        made.append((model.state_dict(), [(row.name, row.output_error, row.damping) for row in report.linears]))
    assert len(factored) == 5 + 6 and sum(shape[0] for shape in factored) == 12
    assert made[0][1] == made[1][1]
    for name, tensor in made[0][0].items():
        assert torch.equal(tensor, made[1][0][name]), name


@pytest.mark.parametrize("kind", ["modules", "one parameter"])
@torch.no_grad()
def test_tokens_that_do_not_count_are_not_shown(kind):
    block, (hidden,) = toy() if kind == "modules" else Fused(toy(), PRODUCTS["linear"][0]), hidden_batches(60)
    mask = torch.arange(60) % 3 != 1
    targets = find_targets(nn.ModuleList([block]), {module: path for path, module in block.named_modules()}, ())[0]
    shown = []
    for states, counts in ((hidden, mask), (hidden[:, mask], None)):
        observer = Observer(block, {target: Recorder() for target in targets})
        with observer.batch(counts):
            block(states)
        shown.append([pruner.rows for pruner in observer.pruners.values()])
    for ours, theirs in zip(*shown):
        assert len(ours) == len(theirs)
        for rows, wanted in zip(ours, theirs):
            torch.testing.assert_close(rows, wanted)


def test_an_expert_without_tokens_shares_as_the_others_do(monkeypatch):
    factored, cholesky = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda h: (factored.extend([h.shape[1]] * h.shape[0]), cholesky(h))[1])
    prune(Toy(toy(never=1)), hidden_batches(60))
    assert sorted(factored) == [INNER] * 2 + [WIDTH] * 3, "gate and up of the layer's statistics have one factor too"


@pytest.mark.parametrize("transposed", [False, True])
def test_the_way_out_tells_how_a_way_in_lies(transposed):
    """Two parameters of a module that does not say, as Llama 4 has them: gate and up in one, and down."""
    shapes = {"gate_up": (2 * INNER, WIDTH), "down": (WIDTH, INNER)}
    module = nn.Module()
    module.num_experts = 3
    for name, (rows, columns) in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(3, *((columns, rows) if transposed else (rows, columns)))))
    block = nn.ModuleDict({"experts": module})
    names = {child: path for path, child in block.named_modules()}
    (targets,) = find_targets(nn.ModuleList([block]), names, ())
    assert {target.name: tuple(target.weight.shape) for target in targets} == {
        f"experts.{name}[{e}]": shape for name, shape in shapes.items() for e in range(3)
    }


# ---- too few tokens ----


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("kind", ["modules", "one parameter"])
def test_an_expert_without_tokens_is_named_and_gets_the_layers_statistics(kind, method):
    pattern, batches, dense = "50%", hidden_batches(60, 40), toy(never=1)
    separate = kind == "modules"
    model = Toy(toy(never=1) if separate else Fused(toy(never=1), PRODUCTS["linear"][0]))
    name = (lambda e, role: f"blocks.0.experts.{e}.{role}") if separate else (lambda e, role: f"blocks.0.experts.{role}[{e}]")
    report = {linear.name: linear for linear in prune(model, batches, method, pattern).linears}
    tokens = torch.cat([batch.flatten(0, 1) for batch in batches])
    chosen = dense.choose(tokens)
    for e in range(3):
        for role in ("gate", "up", "down"):
            row = report[name(e, role)]
            assert row.tokens == int((chosen == e).sum())
            assert row.statistics == ("own" if e != 1 else "magnitude" if role == "down" else "layer"), row
    whole = METHODS[method](WIDTH, Pattern.parse(pattern))
    for e in (0, 2):  # the order in which the sum comes together
        whole.observe(tokens[chosen == e])
    for role in ("gate", "up"):
        wanted = whole.prune(getattr(dense.experts[1], role).weight.detach())
        torch.testing.assert_close(weight_of(model, name(1, role)), wanted.weight, rtol=1e-3, atol=1e-5)
        assert torch.equal(weight_of(model, name(1, role)) != 0, wanted.mask)
    magnitude = Magnitude(INNER, Pattern.parse(pattern))
    magnitude.rowwise = METHODS[method].rowwise
    assert torch.equal(weight_of(model, name(1, "down")), magnitude.prune(dense.experts[1].down.weight.detach()).weight)


@pytest.mark.parametrize(
    ("tokens", "gate", "down"), [(4, "layer", "magnitude"), (5, "layer", "own"), (7, "layer", "own"), (8, "own", "own")]
)
def test_a_quarter_of_a_token_a_column_is_enough(tokens, gate, down):
    """Of 32 columns on the way in, 8; of 20 on the way out, 5."""
    model = Toy(toy())
    model.blocks[0].choose = lambda rows: (torch.arange(len(rows)) >= tokens).long()
    report = {row.name: row for row in prune(model, hidden_batches(80)).linears}
    for role, statistics in (("gate", gate), ("up", gate), ("down", down)):
        row = report[f"blocks.0.experts.0.{role}"]
        assert (row.tokens, row.statistics) == (tokens, statistics)


def test_the_layers_statistics_leave_the_others_their_own():
    """An expert without tokens changes no bit of the experts that have some."""
    batches = hidden_batches(60, 40)
    ours, theirs = Toy(toy(never=1)), Toy(toy(never=1))
    prune(ours, batches)
    prune(theirs, batches, skip=["blocks.0.experts.1"])
    for e in (0, 2):
        for name in names_of("0", e):
            assert torch.equal(weight_of(ours, name), weight_of(theirs, name)), name


# ---- skipping, patterns, folders ----


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["model.layers.1.mlp.experts"], {f"model.layers.1.mlp.experts.{p}_proj" for p in ("gate_up", "down")}),
        (["*.down_proj"], {f"model.layers.{i}.mlp.experts.down_proj" for i in range(BLOCKS)}),
        (["model.layers.0.mlp.experts.down_proj[3]"], {"model.layers.0.mlp.experts.down_proj[3]"}),
    ],
    ids=["a layer", "a parameter of each block", "an expert"],
)
def test_skip(skip, left):
    model, before = build("mixtral"), build("mixtral")
    report = prune(model, token_batches((4, 32)), skip=skip)
    assert {name for name, reason in report.skipped.items() if reason == "asked for"} == left
    assert {linear.name for linear in report.linears} == {
        target for target in ARCHITECTURES["mixtral"].targets() if target not in left and target.partition("[")[0] not in left
    }
    for name in ARCHITECTURES["mixtral"].targets():
        same = torch.equal(weight_of(model, name), weight_of(before, name))
        assert same == (name in left or name.partition("[")[0] in left), name


def test_an_expert_that_misses_the_pattern_fails_the_run(monkeypatch):
    honest = SparseGPT.prune

    def forgetful(self, weight):
        result = honest(self, weight)
        if weight.shape == (WIDTH, 44) and (weight == target).all():
            result.weight[3, (result.weight[3] == 0).nonzero()[0]] = 1.0
        return result

    model = build("mixtral")
    target = weight_of(model, "model.layers.1.mlp.experts.down_proj[2]").clone()
    monkeypatch.setattr(SparseGPT, "prune", forgetful)
    with pytest.raises(SparsekitError, match=r"must hold 2:4, got model\.layers\.1\.mlp\.experts\.down_proj\[2\], where row 3"):
        prune(model, token_batches((4, 32)))


def test_a_broken_expert_is_named():
    model = build("qwen3_moe")
    model.model.layers[1].mlp.experts.gate_up_proj.data[2, 3, 5] = float("nan")
    with pytest.raises(SparsekitError, match=r"NaN or Inf in model\.layers\.1\.mlp\.experts\.gate_up_proj\[2\]$"):
        prune(model, token_batches((2, 16)))


@pytest.mark.parametrize("format", checkpoint.FORMATS)
def test_a_folder_of_experts(format, tmp_path):
    """Experts are stored with their zeros written out; what stands beside them is compressed."""
    import transformers

    from sparsekit import compress

    model = build("qwen3_moe")
    prune(model, token_batches((4, 32)))
    with torch.no_grad():
        wanted = model(input_ids=token_batches((2, 16))[0]).logits
    if format == "compressed":
        assert not any("experts" in name for name in compress(model))
    checkpoint.save(model, tmp_path / "out", format=format)
    loaded = [checkpoint.load(tmp_path / "out")]
    if format == "dense":
        loaded.append(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    for again in loaded:
        held = again.model.layers[2].mlp.experts.down_proj
        assert torch.equal(held, model.model.layers[2].mlp.experts.down_proj)
        assert all(most_nonzeros(matrix, 4) == 2 for matrix in held)
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=token_batches((2, 16))[0]).logits, wanted, rtol=1e-4, atol=1e-4)
