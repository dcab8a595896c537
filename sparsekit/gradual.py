"""Pruning while a model trains: a little more every so many steps, and never a weight back.

``GradualPruner`` serves any training loop; its ``callback`` serves transformers' Trainer. Where a model is pruned already and only
recovers, ``GradualPruner.fixed`` keeps its zeros where they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint.reading import open_weights
from .checkpoint.writing import save_file
from .config import PruningConfig
from .criteria import CRITERIA, SquaredGradients
from .documents import to_json, write_whole
from .errors import SparsekitError
from .patterns import JOINT, Pattern
from .pipeline.blocks import Target, check_together, find_blocks, find_targets

STATE_FILE = "sparsekit_pruner.safetensors"


class GradualPruner:
    """Prunes the linears of the model's decoder blocks by the config while the caller trains, and keeps what is pruned at zero.

    After each step of the optimiser call ``step(optimizer)``. Masks only grow. A pruned weight gets no gradient, so neither
    momentum nor gradient accumulation brings it back, and what an optimiser remembers of it is cleared.
    Of processes that train together, each with the whole model (torch.distributed's default group), every one has a pruner, and
    the gradient criterion goes by the sequences of all.
    Weights that ask for no gradient (requires_grad) are pruned like the others.
    blocks: the decoder blocks; by default the largest ModuleList of the model. masks: by name, (out, in) bool, True where kept.
    Raises SparsekitError where there is nothing to prune or a skipped name is none of the model's."""

    def __init__(self, model: nn.Module, config: PruningConfig, blocks: nn.ModuleList | None = None):
        self.config, self.steps, self.pruned = config, 0, 0
        names = {module: name for name, module in model.named_modules()}
        targets = find_targets(find_blocks(model) if blocks is None else blocks, names, config.skip)
        self._blocks = [[target.name for target in block] for block in targets]
        self._targets = {target.name: target for block in targets for target in block}
        self.masks = {name: torch.ones_like(target.weight, dtype=torch.bool) for name, target in self._targets.items()}
        self._squares: dict[str, SquaredGradients] = {}  # since the last pruning, where the criterion asks for it
        self._batch: torch.Size | None = None  # (sequences, tokens) of the pass under way
        self._parameters: dict[nn.Parameter, list[Target]] = {}  # one may hold the matrices of many experts
        for target in self._targets.values():
            self._parameters.setdefault(getattr(target.module, target.parameter), []).append(target)
        asking = [(parameter, held) for parameter, held in self._parameters.items() if parameter.requires_grad]
        self._hooks = [parameter.register_hook(self._on_gradient(held)) for parameter, held in asking]
        if self._squares_due:
            for target in self._targets.values():
                if target.index is None:
                    self._hooks.append(target.module.register_forward_hook(self._on_output(target), with_kwargs=True))

    @classmethod
    def fixed(
        cls, model: nn.Module, pattern: str | Pattern = "2:4", skip: Iterable[str] = (), blocks: nn.ModuleList | None = None
    ) -> GradualPruner:
        """For a model that holds the pattern already: its zeros stay, nothing else is pruned.

        Raises SparsekitError, naming the linear and the place, where it does not hold the pattern."""
        pruner = cls(model, PruningConfig(pattern, skip=tuple(skip)), blocks)
        pruner.pruned = pruner.config.prunings
        for name, target in pruner._targets.items():
            if broken := pruner.config.pattern.check(target.weight):
                raise SparsekitError(f"the model must hold {pattern}, got {name}, where {broken}; prune it first")
            pruner.masks[name] = target.weight != 0
        return pruner

    @property
    def done(self) -> bool:
        """Whether the last pruning is behind."""
        return self.pruned == self.config.prunings

    @property
    def sparsity(self) -> float:
        """Share of the weights that are pruned now."""
        return 1 - sum(int(m.sum()) for m in self.masks.values()) / max(sum(m.numel() for m in self.masks.values()), 1)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """To be called after each step of the optimiser. Returns whether it pruned."""
        due = not self.done and self.steps == self.config.begin + self.pruned * self.config.every
        self.steps += 1
        if due:
            self.pruned += 1
            if self._gathers:
                self._sum_of_all()
            self._prune(self.config.pattern_after(self.pruned))
            self._squares.clear()
        self.apply(optimizer if due else None)
        return due

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Sets every pruned weight to zero and, where an optimiser is given, what it remembers of them."""
        for parameter, targets in self._parameters.items():
            state = optimizer.state.get(parameter, {}).values() if optimizer else ()
            alike = [t for t in state if isinstance(t, Tensor) and t.shape == parameter.shape]
            for held in (parameter.detach(), *alike):
                self._clear(held, targets)

    def finish(self) -> None:
        """Lets go of the model. Raises SparsekitError where pruning is not done, or a weight does not hold the pattern."""
        for hook in self._hooks:
            hook.remove()
        if not self.done:
            raise SparsekitError(f"pruning must be done, {self.config.prunings} times, got {self.pruned}; train on or end earlier")
        self.apply()
        if self.config.group in JOINT:  # then no layer has its own count
            for names in self._together():
                check_together(self.config.pattern, [self._targets[name] for name in names], self.config.group)
            return
        for name, target in self._targets.items():
            if broken := self.config.pattern.check(target.weight, rowwise=self.config.group == "row"):
                raise SparsekitError(f"every pruned linear must hold {self.config.pattern}, got {name}, where {broken}")

    def callback(self):
        """A transformers TrainerCallback that does all this, and keeps its state beside each of the Trainer's checkpoints."""
        from transformers import TrainerCallback

        pruner = self

        class Callback(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                there = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
                if state.global_step and there.is_file():
                    pruner.load(there)
                elif state.global_step and not pruner.steps and not pruner.done:  # its masks would be lost without a word
                    raise SparsekitError(
                        f"training that goes on from step {state.global_step} needs the pruner's state, and {there} is not there; "
                        f"call load with the one of the checkpoint before"
                    )

            def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
                # accelerate wraps the optimiser, and the wrapped one is keyed alike.
                pruner.step(optimizer)

            def on_save(self, args, state, control, **kwargs):
                pruner.gather()
                if args.should_save:
                    pruner.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE)

        return Callback()

    # ---- what it knows ----

    def gather(self) -> None:
        """Brings what the processes know of gradients to rank 0, whose state is then that of all. Each must call it, before rank 0
        saves; a process alone need not."""
        if self._squares_due:
            self._sum_of_all()
            if _processes() > 1 and dist.get_rank():
                self._squares.clear()

    def state_dict(self) -> dict:
        """Steps, prunings, masks, gathered squares and their samples; the config with them, as text."""
        return {
            "config": self.config.to_dict(),
            "steps": self.steps,
            "pruned": self.pruned,
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "squares": {name: squares.sum.clone() for name, squares in self._squares.items()},
            "samples": {name: squares.tokens for name, squares in self._squares.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on where ``state_dict`` was taken; of several processes each takes the state of rank 0, after ``gather``.

        Raises SparsekitError where that was of other settings or another model."""
        mine = self.config.to_dict()
        for name, value in state["config"].items():
            if mine.get(name) != value:
                raise SparsekitError(f"the state must be of the same settings, got {name} = {value!r} for {mine.get(name)!r}")
        shapes = [{name: tuple(mask.shape) for name, mask in masks.items()} for masks in (self.masks, state["masks"])]
        if shapes[0] != shapes[1]:
            other = next(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
            raise SparsekitError(f"the state must be of the same model, and differs in {other}")
        self.steps, self.pruned = state["steps"], state["pruned"]
        for name, target in self._targets.items():
            self.masks[name] = state["masks"][name].to(target.weight.device)
        self._squares = {}
        others = _processes() > 1 and dist.get_rank() > 0  # rank 0 has what all had
        for name, squares in ({} if others else state["squares"]).items():
            self._squares[name] = SquaredGradients(squares.shape, self.masks[name].device)
            self._squares[name].sum += squares.to(self.masks[name].device)
            self._squares[name].tokens = state["samples"][name]
        self.apply()

    def save(self, path: str | Path) -> None:
        """The state as a safetensors file, which appears whole or not at all."""
        state = self.state_dict()
        tensors = {f"{kind}.{name}": t.contiguous() for kind in ("masks", "squares") for name, t in state.pop(kind).items()}
        write_whole(Path(path), lambda part: save_file(tensors, part, {"sparsekit_pruner": to_json(state)}))

    def load(self, path: str | Path) -> None:
        """Goes on where ``save`` was called. Raises as ``load_state_dict`` does, and SparsekitError for a file that is not one."""
        with open_weights(Path(path)) as tensors:
            state = json.loads((tensors.metadata() or {}).get("sparsekit_pruner", "{}"))
            if not state:
                raise SparsekitError(f"{path} must hold a pruner's state, and its metadata has none")
            state |= {"masks": {}, "squares": {}}
            for key in tensors.keys():
                kind, _, name = key.partition(".")
                state[kind][name] = tensors.get_tensor(key)
        self.load_state_dict(state)

    # ---- the work ----

    def _clear(self, held: Tensor, targets: list[Target]) -> None:
        """Zeros in a tensor in the shape of the targets' parameter, wherever a weight is pruned."""
        for target in targets:
            target.of(held).masked_fill_(~self.masks[target.name], 0)

    @property
    def _gathers(self) -> bool:
        return CRITERIA[self.config.criterion].statistics is SquaredGradients

    @property
    def _squares_due(self) -> bool:
        return self._gathers and not self.done

    def _on_gradient(self, targets: list[Target]):
        def masked(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            for target in targets:
                if target.index is not None and self._squares_due:  # the tokens of an expert do not tell their sequence
                    self._square(target, target.of(gradient))
            self._clear(gradient, targets)
            return gradient

        return masked

    def _on_output(self, target: Target):
        """A hook for the linear's output: of each sequence, the gradient of the weight is that of the output times the input."""

        def watch(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
            if out.requires_grad and self._squares_due:
                x = (args[0] if args else next(iter(kwargs.values()))).detach()
                if x.dim() > 2:
                    self._batch = x.shape[:-1]
                # Some models flatten (sequences, tokens, k) on the way into their MLP; the tokens of an expert are another matter.
                whole = target.expert is None and self._batch is not None and self._batch.numel() == len(x)
                sequences = len(x) if x.dim() > 2 else self._batch[0] if whole else 1
                out.register_hook(lambda gradient: gather(x, gradient, sequences))

        def gather(x: Tensor, gradient: Tensor, sequences: int) -> None:
            inputs, outputs = (t.detach().float().reshape(sequences, -1, t.shape[-1]) for t in (x, gradient))
            for rows, lost in zip(inputs, outputs):
                self._square(target, lost.T @ rows)

        return watch

    def _square(self, target: Target, gradient: Tensor) -> None:
        """Adds one sample's gradient (out_features, in_features)."""
        self._squares.setdefault(target.name, SquaredGradients(gradient.shape, gradient.device)).update(gradient)

    def _sum_of_all(self) -> None:
        """Makes the squares those of the sequences that all processes have seen."""
        if _processes() == 1:
            return
        mine = [self._squares[name].tokens if name in self._squares else 0 for name in self._targets]
        seen = torch.tensor(mine, device=next(iter(self._targets.values())).weight.device)
        dist.all_reduce(seen)  # one for all linears, and one more for each that a process has seen
        for (name, target), samples in zip(self._targets.items(), seen.tolist()):
            if samples:
                if name not in self._squares:
                    self._squares[name] = SquaredGradients(target.weight.shape, target.weight.device)
                dist.all_reduce(self._squares[name].sum)
                self._squares[name].tokens = samples

    def _scores(self, name: str) -> Tensor:
        """Of each weight, -inf where it is pruned already, so that it stays so."""
        criterion, statistics = CRITERIA[self.config.criterion], self._squares.get(name)
        if criterion.statistics and statistics is None:
            raise SparsekitError(f"the criterion gradient needs a backward pass before each pruning, and {name} has had none")
        if statistics is not None and not torch.isfinite(statistics.sum).all():
            raise SparsekitError(f"the criterion gradient needs gradients that are finite, and those of {name} hold NaN or Inf")
        return criterion.scores(self._targets[name].weight, statistics).masked_fill(~self.masks[name], -math.inf)

    def _together(self) -> list[list[str]]:
        """The names of the linears that are counted together, group by group."""
        return self._blocks if self.config.group == "block" else [list(self._targets)]

    def _prune(self, pattern: Pattern) -> None:
        if self.config.group not in JOINT:
            for name in self._targets:
                self.masks[name] = pattern.mask(self._scores(name), rowwise=self.config.group == "row")
            return
        for names in self._together():
            units = [pattern.units(self._scores(name)) for name in names]
            self.masks |= zip(names, pattern.masks(units, [self.masks[name].shape for name in names]))


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of next-token distributions, a mean over tokens, times temperature^2.

    student, teacher: logits (..., vocabulary), summed in fp32. Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    Raises SparsekitError for logits of two shapes and a temperature that is not above 0."""
    if student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise SparsekitError(f"student and teacher must have logits of one shape, got {shapes}")
    if not temperature > 0:
        raise SparsekitError(f"the temperature must be above 0, got {temperature}")
    ours, theirs = (F.log_softmax(logits.flatten(0, -2).float() / temperature, -1) for logits in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
