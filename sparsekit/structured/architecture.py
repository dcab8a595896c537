"""Where the parts of a decoder model lie, and which fields of its config give their sizes: a descriptor for each family."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import nn

from ..errors import SparsekitError, listed
from ..linear import dense_weight, is_linear
from .removed import Removed

_ORDERS = ("stacked", "grouped")


@dataclass(frozen=True)
class BlockShape:
    """The sizes of a block as its modules have them; None where the block has no such part. moe_intermediate_size: the neurons of
    each of its experts."""

    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    num_experts: int | None = None
    moe_intermediate_size: int | None = None

    @property
    def head_units(self) -> int | None:
        """What heads go by: key-value heads, each with the query heads that share it; query heads where all share one."""
        return self.num_attention_heads if self.num_key_value_heads == 1 else self.num_key_value_heads

    @property
    def heads_a_unit(self) -> int:
        """Query heads of each of those."""
        return self.num_attention_heads // self.head_units


@dataclass(frozen=True)
class Architecture:
    """A family of decoder models. The defaults are Llama's; a new family is one descriptor with what differs.

    model_types: values of ``config.model_type``. Paths of modules: blocks_at from the base model (``LlamaForCausalLM.model``),
    attention_at and mlp_at from a block ("" where the MLP's linears are the block's own), q, k, v, qkv and o from the attention,
    gate, up, down, experts and router from the MLP.
    qkv: the one linear that makes queries, keys and values, None where q, k and v do. qkv_order: how its output features lie,
    "stacked" (all queries, all keys, all values) or "grouped" (for each key-value head its queries, its key and its value).
    gate: None for an MLP without one. gate_up: the one linear that makes both, gate's features first, None where gate and up do.
    experts, router: None outside mixtures of experts; a block whose MLP lacks them is dense. Experts are one module, as in
    transformers 5, or a ModuleList; then gate, up, gate_up and down are also the linears of each.
    Attributes of the attention module: head_width holds the width of a head, index its place in the cache.
    adds_residual: whether attention and MLP are given, after their input, the hidden states that they add their output to.
    alibi: whether the attention is called with ALiBi's biases by head, which Falcon's is where its config's ``alibi`` says so.
    reads_config: whether the attention, as it runs, reads the number of its heads from its ``config``.
    Fields of the config (transformers' own names serve where the config maps them): kv_heads_field, head_dim_field and
    intermediate_field are None where it has none; what the fields cannot say is then kept in ``per_layer_config``. lists: fields
    that hold a value a block. block_lists: fields that hold numbers of blocks."""

    model_types: tuple[str, ...]
    blocks_at: str = "layers"
    attention_at: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    qkv: str | None = None
    qkv_order: str = "stacked"
    o: str = "o_proj"
    mlp_at: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    gate_up: str | None = None
    down: str = "down_proj"
    experts: str | None = None
    router: str | None = None
    head_width: str = "head_dim"
    index: str = "layer_idx"
    adds_residual: bool = False
    alibi: bool = False
    reads_config: bool = False
    heads_field: str = "num_attention_heads"
    kv_heads_field: str | None = "num_key_value_heads"
    head_dim_field: str | None = "head_dim"
    intermediate_field: str | None = "intermediate_size"
    experts_field: str | None = None
    expert_size_field: str | None = None
    top_k_field: str = "num_experts_per_tok"
    layers_field: str = "num_hidden_layers"
    lists: tuple[str, ...] = ("layer_types",)
    block_lists: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.model_types or isinstance(self.model_types, str):
            raise SparsekitError(f"model_types must be a tuple of at least one config.model_type, got {self.model_types!r}")
        if self.qkv_order not in _ORDERS:
            raise SparsekitError(f"qkv_order must be {listed(_ORDERS, 'or')}, got {self.qkv_order!r}")

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The decoder blocks of the model, which may lack its output layer. Raises SparsekitError where they lie elsewhere."""
        base = getattr(model, "base_model", model)
        found = submodule(base, self.blocks_at)
        if not isinstance(found, nn.ModuleList) or not len(found):
            raise SparsekitError(
                f"the blocks of a {self.model_types[0]} model must be a ModuleList at {self.blocks_at} of its base model, and "
                f"{type(base).__name__} has none there; correct blocks_at of its descriptor"
            )
        return found

    def attention(self, block: nn.Module) -> nn.Module | None:
        """The attention of the block; None where it has been removed."""
        found = submodule(block, self.attention_at)
        return None if found is None or isinstance(found, Removed) or submodule(found, self.o) is None else found

    def mlp(self, block: nn.Module) -> nn.Module | None:
        """What holds the linears of the block's MLP, or its experts: the block itself where mlp_at is ""; None where it has been
        removed."""
        found = submodule(block, self.mlp_at)
        if found is None or isinstance(found, Removed):
            return None
        down = submodule(found, self.down)
        return None if (down is None or isinstance(down, Removed)) and not self._has_experts(found) else found

    def projections(self, block: nn.Module) -> dict[str, nn.Module]:
        """The dense linears of the block's attention by their part, "q", "k", "v" (or "qkv") and "o"; empty where it is removed."""
        attention = self.attention(block)
        if attention is None:
            return {}
        parts = {"qkv": self.qkv} if self.qkv else {"q": self.q, "k": self.k, "v": self.v}
        return self._linears(attention, self.attention_at, {**parts, "o": self.o})

    def neurons(self, block: nn.Module) -> dict[str, nn.Module]:
        """The dense linears of the block's MLP by their part, "gate" where it has one and "up" (or "gate_up"), and "down".

        Empty where it is removed or holds experts."""
        mlp = self.mlp(block)
        return {} if mlp is None or self._has_experts(mlp) else self._linears(mlp, self.mlp_at, self._of_neurons())

    def expert_linears(self, expert: nn.Module) -> dict[str, nn.Module]:
        """The same of one expert that is a module of its own."""
        return self._linears(expert, f"an expert of {_join(self.mlp_at, self.experts)}", self._of_neurons())

    def _of_neurons(self) -> dict[str, str]:
        if self.gate_up:
            return {"gate_up": self.gate_up, "down": self.down}
        return {"gate": self.gate, "up": self.up, "down": self.down} if self.gate else {"up": self.up, "down": self.down}

    def uses_alibi(self, attention: nn.Module) -> bool:
        """Whether what the attention makes depends on a head's number, by ALiBi's slopes."""
        return self.alibi and bool(getattr(getattr(attention, "config", None), "alibi", True))

    def expert_parts(self, block: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        """What holds the block's experts, and their router; None where the block has none."""
        mlp = self.mlp(block)
        if mlp is None or not self._has_experts(mlp):
            return None
        return submodule(mlp, self.experts), self._needed(mlp, self.mlp_at, self.router)

    def shape(self, block: nn.Module) -> BlockShape:
        """The sizes of the block, measured on its modules, of whatever device."""
        heads = kv_heads = head_dim = intermediate = experts = neurons = None
        if linears := self.projections(block):
            head_dim = getattr(self.attention(block), self.head_width)
            inner = dense_weight(linears["o"]).shape[1]
            keys = dense_weight(linears["k"]).shape[0] if "k" in linears else (dense_weight(linears["qkv"]).shape[0] - inner) // 2
            heads, kv_heads = inner // head_dim, keys // head_dim
        if linears := self.neurons(block):
            intermediate = dense_weight(linears["down"]).shape[1]
        if parts := self.expert_parts(block):
            experts = len(parts[0]) if isinstance(parts[0], nn.ModuleList) else parts[0].num_experts
            neurons = self._neurons_an_expert(parts[0])
        return BlockShape(heads, kv_heads, head_dim, intermediate, experts, neurons)

    def _neurons_an_expert(self, experts: nn.Module) -> int | None:
        """None where they lie in a way that is not known."""
        if isinstance(experts, nn.ModuleList):
            known = all(submodule(experts[0], path) is not None for path in self._of_neurons().values())
            return dense_weight(self.expert_linears(experts[0])["down"]).shape[1] if known else None
        gate_up, down = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
        usual = {"is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": True}
        if gate_up is None or down is None or any(getattr(experts, name, value) != value for name, value in usual.items()):
            return None
        return down.shape[2] if gate_up.shape[1] == 2 * down.shape[2] else None

    def _has_experts(self, mlp: nn.Module) -> bool:
        return self.experts is not None and submodule(mlp, self.experts) is not None

    def _linears(self, module: nn.Module, place: str, paths: dict[str, str]) -> dict[str, nn.Module]:
        found = {}
        for part, path in paths.items():
            found[part] = self._needed(module, place, path)
            if not is_linear(found[part]):
                raise SparsekitError(
                    f"structured pruning needs dense linears, got {type(found[part]).__name__} as {_join(place, path)}; "
                    f"take structures out first, then prune 2:4 and compress"
                )
        return found

    def _needed(self, module: nn.Module, place: str, path: str) -> nn.Module:
        if (found := submodule(module, path)) is None:
            raise SparsekitError(
                f"a block of a {self.model_types[0]} model must have {_join(place, path)}, and has none; correct its descriptor"
            )
        return found


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The module at the path, the module itself for ""; None where there is none."""
    for name in filter(None, path.split(".")):
        module = getattr(module, name, None)
        if not isinstance(module, nn.Module):
            return None
    return module


def _join(*paths: str) -> str:
    return ".".join(filter(None, paths))


ARCHITECTURES: dict[str, Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Makes ``architecture_of`` find the descriptor for its model types, in the place of those that had them."""
    ARCHITECTURES.update(dict.fromkeys(architecture.model_types, architecture))
    return architecture


def architecture_of(model: nn.Module) -> Architecture:
    """The descriptor of the model by its ``config.model_type``.

    Raises SparsekitError for a type that nothing is registered for, and where a module is not where the descriptor says."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in ARCHITECTURES:
        needed = listed([field.name for field in fields(Architecture) if field.name != "model_types"][:5])
        raise SparsekitError(
            f"structured pruning knows {listed(sorted(ARCHITECTURES))}, got {kind or type(model).__name__}; register a "
            f"sparsekit.structured.Architecture that names its model_types, where its modules lie ({needed} and so on) and the "
            f"fields of its config"
        )
    architecture = ARCHITECTURES[kind]
    for block in architecture.blocks(model):
        architecture.shape(block)
    return architecture


register(Architecture(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")))
register(
    Architecture(
        ("mixtral",), experts="experts", router="gate", experts_field="num_local_experts", expert_size_field="intermediate_size"
    )
)
register(
    Architecture(
        ("qwen3_moe",), experts="experts", router="gate", experts_field="num_experts", expert_size_field="moe_intermediate_size",
        block_lists=("mlp_only_layers",),
    )
)  # fmt: skip
register(Architecture(("phi",), o="dense", gate=None, up="fc1", down="fc2"))
register(
    Architecture(
        ("gpt2",), blocks_at="h", attention_at="attn", qkv="c_attn", o="c_proj", gate=None, up="c_fc", down="c_proj",
        kv_heads_field=None, head_dim_field=None, intermediate_field="n_inner",
    )
)  # fmt: skip
register(
    Architecture(
        ("opt",), blocks_at="decoder.layers", o="out_proj", mlp_at="", gate=None, up="fc1", down="fc2",
        kv_heads_field=None, head_dim_field=None, intermediate_field="ffn_dim",
    )
)  # fmt: skip
register(Architecture(("phi3",), qkv="qkv_proj", gate_up="gate_up_proj", reads_config=True))
register(
    Architecture(
        ("falcon",), blocks_at="h", attention_at="self_attention", qkv="query_key_value", qkv_order="grouped", o="dense", gate=None,
        up="dense_h_to_4h", down="dense_4h_to_h", alibi=True, kv_heads_field="num_kv_heads", head_dim_field=None,
        intermediate_field="ffn_hidden_size",
    )
)  # fmt: skip
register(
    Architecture(
        ("bloom",), blocks_at="h", attention_at="self_attention", qkv="query_key_value", qkv_order="grouped", o="dense", gate=None,
        up="dense_h_to_4h", down="dense_4h_to_h", adds_residual=True, alibi=True, kv_heads_field=None, head_dim_field=None,
        intermediate_field=None,
    )
)  # fmt: skip
register(
    Architecture(
        ("gpt_neox",), attention_at="attention", qkv="query_key_value", qkv_order="grouped", o="dense", gate=None,
        up="dense_h_to_4h", down="dense_4h_to_h", head_width="head_size", kv_heads_field=None, head_dim_field=None,
    )
)  # fmt: skip
