"""What an attention of fewer heads takes from elsewhere as it runs: their number from the config, their slopes from the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class OwnConfig:
    """The config as one attention reads it: all is the model's, as it is at the time, but for the number of heads."""

    def __init__(self, config: Any, num_attention_heads: int):
        self._config, self.num_attention_heads = config, num_attention_heads

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # asked for by copy and pickle before there is one
            raise AttributeError(name)
        return getattr(self._config, name)


def read_own_heads(attention: nn.Module, heads: int) -> None:
    """Makes the attention read this number of heads, whatever the model's config says."""
    held = attention.config
    attention.config = OwnConfig(held._config if isinstance(held, OwnConfig) else held, heads)


def share_config(attention: nn.Module, config: Any) -> None:
    """Lets an attention of as many heads as the model's config says read that config again."""
    if isinstance(held := attention.config, OwnConfig) and held.num_attention_heads == config.num_attention_heads:
        attention.config = config


class _Slopes:
    """Before an attention of fewer heads runs: of ALiBi's biases, and of a mask that holds them, those of its own heads."""

    def __init__(self, heads: Sequence[int]):
        self.heads = list(heads)

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        chosen = {name: self._of(kwargs[name], len(hidden)) for name in ("alibi", "attention_mask") if name in kwargs}
        return args, {**kwargs, **chosen}

    def _of(self, biases: Tensor | None, rows: int) -> Tensor | None:
        """Of biases (rows * heads, 1, keys) or (rows, heads, ., keys); what is the same for all heads is left as it is."""
        if biases is None or biases.dim() < 3 or (biases.dim() == 4 and biases.shape[1] == 1):
            return biases
        by_head = biases.unflatten(0, (rows, -1)) if biases.dim() == 3 else biases
        chosen = by_head[:, self.heads]
        return chosen.flatten(0, 1) if biases.dim() == 3 else chosen


def alibi_heads(attention: nn.Module) -> list[int] | None:
    """The numbers that the attention's heads had in the whole block; None where all are there."""
    return next((hook.heads for hook in attention._forward_pre_hooks.values() if isinstance(hook, _Slopes)), None)


def set_alibi_heads(attention: nn.Module, heads: Sequence[int]) -> None:
    """Gives the attention the slopes of these heads of the whole block."""
    for hook in attention._forward_pre_hooks.values():
        if isinstance(hook, _Slopes):
            hook.heads = list(heads)
            return
    attention.register_forward_pre_hook(_Slopes(heads), with_kwargs=True)
