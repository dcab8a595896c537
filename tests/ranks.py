"""One rank of a small world: ``python ranks.py SCENE FOLDER`` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.

What it prunes is in CASES, for test_world.py to prune in one process. It does without transformers, whose import costs seconds."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsekit import GradualPruner, PruningConfig, SparsekitError
from sparsekit.pipeline import prune
from sparsekit.pipeline.world import World
from sparsekit.pruners import SparseGPT

WIDTH, VOCABULARY = 32, 96
RARE, RAREST = VOCABULARY - 1, VOCABULARY - 2  # tokens of the last batch alone, and of the first, two of them


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(WIDTH, width), nn.Linear(WIDTH, width), nn.Linear(width, WIDTH)

    def forward(self, hidden):
        return hidden + self.down(self.up(hidden) * self.gate(hidden).sigmoid())


class Conv1D(nn.Module):
    """A stand-in for transformers' own, which sparsekit knows by its name: the weight is held transposed."""

    def __init__(self, outputs: int, inputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 6), None

    def forward(self, x):
        return x @ self.weight


Conv1D.__module__ = "transformers.pytorch_utils"


class Transposed(Block):
    def __init__(self, width: int):
        super().__init__(width)
        self.up, self.down = Conv1D(width, WIDTH), Conv1D(WIDTH, width)


class Experts(nn.Module):
    """RARE and RAREST, which a column each tells, have an expert of their own, that no batch but one reaches."""

    def __init__(self, width: int):
        super().__init__()
        self.router = nn.Linear(WIDTH, 3, bias=False)
        self.experts = nn.ModuleList(Block(width) for _ in range(3))
        with torch.no_grad():
            self.router.weight.copy_(torch.eye(3, WIDTH))

    def forward(self, hidden):
        out, logits = hidden.clone(), self.router(hidden)
        choice = (logits[..., 1] > 4) + 2 * (logits[..., 2] > 4)
        for i, expert in enumerate(self.experts):
            if (chosen := choice == i).any():
                out[chosen] = expert(hidden[chosen])
        return out


class Model(nn.Module):
    """Column 0 of the embedding is zero but for the token RARE: an input of the first linears dead to all batches but the last."""

    def __init__(self, kind: type = Block, width: int = 48, blocks: int = 2):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(kind(width) for _ in range(blocks))
        with torch.no_grad():
            self.embedding.weight[:, 0] = 0
            self.embedding.weight[RARE, :3] = torch.tensor([1.0, 6.0, 0.0])
            self.embedding.weight[RAREST, :3] = torch.tensor([0.0, 0.0, 6.0])

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


@dataclass
class Said:
    logits: Tensor


class Speaking(Model):
    """Says which token comes next, as gradients need it."""

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return Said(super().forward(input_ids) @ self.embedding.weight.T / WIDTH)


def batches(count: int = 4, seed: int = 1) -> list[Tensor]:
    """Ragged, so that ranks see unequal numbers of tokens. RARE comes often enough for an expert of its own, RAREST does not."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, RAREST, (2, 80 + 9 * i), generator=generator) for i in range(count)]
    ids[-1][:, ::2] = RARE
    ids[0][:, 3] = RAREST
    return ids


def padded() -> list[dict[str, Tensor]]:
    """The third batch counts for nothing, so that a rank of three has seen no token at all."""
    held = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches(3)]
    held[0]["attention_mask"][:, :7] = 0
    held[1]["attention_mask"][:] = 0
    return held


def padded_less() -> list[dict[str, Tensor]]:
    """Every sequence has tokens to predict, without which there are no gradients."""
    held = padded()
    held[1]["attention_mask"][:, 40:] = 1
    return held


# name: model, batches, method, pattern, group
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list], str, str, str | None]] = {
    "dead inputs": (Model, batches, "sparsegpt", "2:4", None),
    "padded": (Model, padded, "sparsegpt", "4:8", None),
    "experts": (lambda: Model(Experts), batches, "sparsegpt", "50%", None),
    "wanda": (lambda: Model(Experts), batches, "wanda", "2:4", None),
    "magnitude": (Model, lambda: [], "magnitude", "2:4", None),
    "transposed": (lambda: Model(Transposed), batches, "sparsegpt", "2:4", None),
    "over a block": (lambda: Model(Transposed), batches, "activation", "block:4x4@50%", "block"),
    "over the model": (Model, batches, "wanda", "50%", "model"),
    # An expert's tokens are in the last batch alone, and so are its gradients on one rank.
    "gradient": (lambda: Speaking(Experts), batches, "gradient", "2:4", None),
    "gradient, padded": (Speaking, padded_less, "gradient", "50%", "block"),
    "gradient over the model": (lambda: Speaking(Transposed), batches, "gradient", "50%", "model"),
    # One block: the next would see activations that 16 bits round otherwise after the first fp32 rounding.
    "16 bits": (lambda: Model(blocks=1).bfloat16(), batches, "sparsegpt", "2:4", None),
}


class Power:
    """A criterion of one's own."""

    name, statistics, rowwise = "power", None, False

    def __init__(self, p: float):
        self.p = p

    def scores(self, weight: Tensor, statistics: None) -> Tensor:
        return weight.float().abs() ** self.p


def refusals(rank: int):
    """name: what each rank is to be refused with, in a world of three."""
    yield "too few batches", dict(batches=batches(2))
    yield "pattern", dict(batches=batches(), pattern=("2:4", "4:8", "2:4")[rank])
    yield "criterion", dict(batches=batches(), method=Power(2.0 + (rank == 1)))
    yield "batches", dict(batches=batches(seed=1 + (rank == 2)))
    model = Model()
    model.embedding.weight.data[3, 3] += rank == 1
    yield "weights", dict(model=model, batches=batches())
    model = Model()
    if rank == 1:
        model.blocks[1].up.weight.data[0, 0] = float("nan")
    yield "a broken weight", dict(model=model, batches=batches())


# What a model is trained with while it is pruned; twice by what is known of gradients.
SETTINGS = {
    "a share": dict(pattern="50%", criterion="gradient"),
    "2:4": dict(pattern="2:4", criterion="gradient"),
    "over the model": dict(pattern="60%", criterion="gradient", group="model"),
}


def trained(settings: dict, world: World, saved: Path | None = None) -> dict[str, Tensor]:
    """The masks of a model of experts that is trained on three batches at a time, by three ranks or by one.

    saved: a file to keep the pruner's state in between its two prunings, and to go on from."""
    model, config = Speaking(Experts), PruningConfig(begin=1, end=3, every=2, **settings)
    pruner, optimiser = GradualPruner(model, config), torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    whole = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if world.size > 1 else model
    for step in range(4):
        if saved and step == 3:
            pruner.gather()
            if world.leads:
                pruner.save(saved)
            world.gather(None)  # the others read it when it is there
            pruner = GradualPruner(model, config)
            pruner.load(saved)
        for ids in world.part(batches(3)):
            logits = whole(ids).logits
            (F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) * world.size / 3).backward()
        optimiser.step()
        pruner.step(optimiser)
        optimiser.zero_grad()
    pruner.finish()
    return pruner.masks


def alike(world: World, folder: Path) -> None:
    """Every case, every refusal, every training, in one world."""
    for name, (model, held, method, pattern, group) in CASES.items():
        model, told = model(), []
        progress = lambda *now, told=told: told.append(now)  # noqa: E731
        report = prune(model, held(), method, pattern, group=group, world=world, progress=progress)
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        save_file(state, folder / f"{name}.{world.rank}.safetensors")
        (folder / f"{name}.{world.rank}.json").write_text(json.dumps({**report.to_dict(), "told": len(told)}))
    said = {}
    for name, arguments in refusals(world.rank):
        try:
            prune(**{"model": Model(), **arguments}, world=world)
        except SparsekitError as error:
            said[name] = str(error)
    (folder / f"refusals.{world.rank}.json").write_text(json.dumps(said))
    with world.watched():
        for name, settings in SETTINGS.items():
            for saved in (None, folder / "pruner.safetensors"):
                masks = trained(settings, world, saved)
                save_file(masks, folder / f"{name}, {'saved' if saved else 'at one go'}.{world.rank}.safetensors")


def failing(world: World, folder: Path) -> None:
    """FAILING_RANK does what FAILING says when it first prunes a linear; of eight blocks the third."""
    rank, way = int(os.environ["FAILING_RANK"]), os.environ["FAILING"]
    original, calls = SparseGPT.prune, []

    def fail(self, weight):
        calls.append(time.time())
        if len(calls) > 2:
            (folder / "failed").write_text(str(time.time()))
            if way == "kill":
                os.kill(os.getpid(), 9)
            raise KeyboardInterrupt if way == "interrupt" else RuntimeError("no more of this")
        return original(self, weight)

    if world.rank == rank:
        SparseGPT.prune = fail
    try:
        prune(Model(blocks=8), batches(), world=world)
    finally:
        (folder / f"ended.{world.rank}").write_text(str(time.time()))


def resuming(world: World, folder: Path) -> None:
    """A folder pruned at one go, and others at two: rank 0 is interrupted, rank 1 fails by itself, or finds a user's mistake."""
    from sparsekit.pipeline import folder as pruning
    from sparsekit.pipeline import prune_folder

    model = Path(__file__).parent / "data" / "kjv1m"
    held = [torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def stop(name: str, done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    leave = pruning._Lazy.leave

    def fail(error: Exception):
        def of_rank_1(self, i: int, *told) -> None:
            if world.rank == 1 and i == 2:
                raise error
            leave(self, i, *told)

        return of_rank_1

    prune_folder(model, folder / "whole", held, world=world)
    kept = {}
    ways = {"interrupted": (stop, leave), "failed": (None, fail(MemoryError())), "mistaken": (None, fail(SparsekitError("no")))}
    for way, (progress, pruning._Lazy.leave) in ways.items():
        with suppress(KeyboardInterrupt, SparsekitError, MemoryError):  # of one rank, and what the other hears of it
            prune_folder(model, folder / way, held, world=world, progress=progress)
        kept[way] = len(list((folder / f"{way}.partial" / "model").glob("*.safetensors")))
        pruning._Lazy.leave = leave
        report = prune_folder(model, folder / way, held, world=world, resume=True)
    (folder / f"said.{world.rank}.json").write_text(json.dumps({"kept": kept, "names": [row.name for row in report.linears]}))


if __name__ == "__main__":
    joined = World.from_environment("cpu")
    {"alike": alike, "failing": failing, "resuming": resuming}[sys.argv[1]](joined, Path(sys.argv[2]))
