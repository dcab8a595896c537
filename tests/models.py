"""Small random transformers models, one of each way to build a decoder block, and what is known of them beforehand."""

from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 96
WIDTH = 32
BLOCKS = 3
EXPERTS = 4


@dataclass(frozen=True)
class Architecture:
    """blocks: where the decoder blocks are. linears: those of one block, in its order. skipped: every other weight matrix but the
    output layer's."""

    config: type
    sizes: dict
    blocks: str
    linears: tuple[str, ...]
    skipped: dict[str, str]

    def targets(self) -> list[str]:
        return [f"{self.blocks}.{i}.{name}" for i in range(BLOCKS) for name in self.linears]


def experts(module: str, count: int = EXPERTS) -> tuple[str, ...]:
    """The matrices of all experts that the module holds in two parameters."""
    return tuple(f"{module}.{parameter}[{i}]" for parameter in ("gate_up_proj", "down_proj") for i in range(count))


_LLAMA_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=44,  # not a multiple of 8: the last columns are padded
    num_hidden_layers=BLOCKS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_GATED = _ATTENTION + ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LLAMA = ("model.layers", _GATED, {"model.embed_tokens": "embedding"})
_FALCON_SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=4, bos_token_id=1, eos_token_id=2
)
_FALCON = (
    "transformer.h",
    ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    {"transformer.word_embeddings": "embedding"},
)
_SMALL_TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)

ARCHITECTURES = {
    "llama": Architecture(transformers.LlamaConfig, _LLAMA_SIZES, *_LLAMA),
    "llama, tied": Architecture(transformers.LlamaConfig, {**_LLAMA_SIZES, "tie_word_embeddings": True}, *_LLAMA),
    "mistral": Architecture(transformers.MistralConfig, {**_LLAMA_SIZES, "sliding_window": 6}, *_LLAMA),
    # q, k and v have a bias; the last two blocks see a window, the first everything.
    "qwen2": Architecture(
        transformers.Qwen2Config,
        {**_LLAMA_SIZES, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        *_LLAMA,
    ),
    # Blocks differ in mask and in rotary frequencies; the embedding is scaled by a buffer; tied.
    "gemma3": Architecture(
        transformers.Gemma3TextConfig,
        {
            **_LLAMA_SIZES,
            **_SMALL_TOKENS,
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        *_LLAMA,
    ),
    # Conv1D holds its weight transposed; q, k and v are one; tied.
    "gpt2": Architecture(
        transformers.GPT2Config,
        dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=BLOCKS, n_head=4, n_positions=64, **_SMALL_TOKENS),
        "transformer.h",
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        {"transformer.wte": "embedding", "transformer.wpe": "embedding"},
    ),
    # Linears before and after the blocks; learned positions counted from the mask; tied.
    "opt": Architecture(
        transformers.OPTConfig,
        dict(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            ffn_dim=44,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=24,
            **_SMALL_TOKENS,
        ),
        "model.decoder.layers",
        ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"),
        {
            "model.decoder.embed_tokens": "embedding",
            "model.decoder.embed_positions": "embedding",
            "model.decoder.project_in": "outside the blocks",
            "model.decoder.project_out": "outside the blocks",
        },
    ),
    # Attention and MLP side by side behind one norm: four linears share an input.
    "phi": Architecture(
        transformers.PhiConfig,
        _LLAMA_SIZES,
        "model.layers",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"),
        {"model.embed_tokens": "embedding"},
    ),
    # q, k and v stacked in one linear, gate and up in another; the attention reads the config as it runs.
    "phi3": Architecture(
        transformers.Phi3Config,
        {**_LLAMA_SIZES, **_SMALL_TOKENS},
        "model.layers",
        ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        {"model.embed_tokens": "embedding"},
    ),
    "gpt_neox": Architecture(
        transformers.GPTNeoXConfig,
        {name: size for name, size in _LLAMA_SIZES.items() if name != "num_key_value_heads"},
        "gpt_neox.layers",
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        {"gpt_neox.embed_in": "embedding"},
    ),
    # Scaled embedding, norms of 1 + weight, heads wider than their share; tied.
    "gemma": Architecture(transformers.GemmaConfig, {**_LLAMA_SIZES, **_SMALL_TOKENS, "head_dim": 12}, *_LLAMA),
    # One key and value head, attention and MLP side by side behind one norm, rotary.
    "falcon": Architecture(transformers.FalconConfig, {**_FALCON_SIZES, "multi_query": True, "parallel_attn": True}, *_FALCON),
    # One after the other, ALiBi in the mask, biases.
    "falcon, alibi": Architecture(
        transformers.FalconConfig,
        {**_FALCON_SIZES, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        *_FALCON,
    ),
    # Grouped heads, side by side behind two norms.
    "falcon, new": Architecture(
        transformers.FalconConfig, {**_FALCON_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}, *_FALCON
    ),
    # ALiBi as an argument of the blocks; the residual is an argument of the modules; tied.
    "bloom": Architecture(
        transformers.BloomConfig,
        dict(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=BLOCKS, n_head=4, **_SMALL_TOKENS),
        *_FALCON,
    ),
    # The experts of a layer are two parameters of three dimensions.
    "qwen3_moe": Architecture(
        transformers.Qwen3MoeConfig,
        {**_LLAMA_SIZES, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 8},
        "model.layers",
        _ATTENTION + experts("mlp.experts"),
        {"model.embed_tokens": "embedding", **{f"model.layers.{i}.mlp.gate": "router" for i in range(BLOCKS)}},
    ),
    "mixtral": Architecture(
        transformers.MixtralConfig,
        {**_LLAMA_SIZES, "num_local_experts": EXPERTS},
        "model.layers",
        _ATTENTION + experts("mlp.experts"),
        {"model.embed_tokens": "embedding", **{f"model.layers.{i}.mlp.gate": "router" for i in range(BLOCKS)}},
    ),
}
DENSE = [name for name, architecture in ARCHITECTURES.items() if not any("[" in linear for linear in architecture.linears)]


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> nn.Module:
    """A model of that architecture in eval mode, every parameter random: no bias is zero, no norm is one."""
    torch.manual_seed(seed)
    config = ARCHITECTURES[name].config(**{**ARCHITECTURES[name].sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def unregistered() -> nn.Module:
    """A model of a family that structured pruning has no descriptor for. Its parts lie as Llama's do."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.StableLmConfig(**_LLAMA_SIZES)).eval()


def blocks_of(model: nn.Module, name: str) -> nn.ModuleList:
    return model.get_submodule(ARCHITECTURES[name].blocks)


def token_batches(*shapes: tuple[int, int], seed: int = 1) -> list[Tensor]:
    """A batch (sequences, tokens) of random token ids for each shape; no padding token among them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, shape, generator=generator) for shape in shapes]


def matrix(linear: nn.Module) -> Tensor:
    """The weight as (out_features, in_features), whichever way the module holds it."""
    return linear.weight.detach().T if type(linear).__name__ == "Conv1D" else linear.weight.detach()


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The matrix (out_features, in_features) that a report calls by this name."""
    path, _, index = name.partition("[")
    if not index:
        return matrix(model.get_submodule(path))
    return model.get_parameter(path).detach()[int(index.removesuffix("]"))]


def most_nonzeros(weight: Tensor, of: int) -> int:
    """The most non-zeros that any ``of`` neighbours in a row hold, neighbours counted from the row's start."""
    return max(sum(value != 0 for value in row[i : i + of]) for row in weight.tolist() for i in range(0, len(row), of))
