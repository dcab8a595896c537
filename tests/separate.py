"""A model whose experts are modules of their own, as transformers 4 and models with code of their own have them."""

import torch
import torch.nn.functional as F
from models import ARCHITECTURES, build
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from sparsekit.structured import Architecture

DESCRIPTOR = Architecture(
    ("separate_experts",), mlp_at="mlp", experts="experts", router="gate", gate="w1", up="w3", down="w2",
    experts_field="num_local_experts", expert_size_field="intermediate_size",
)  # fmt: skip


class Expert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2))
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k, self.num_experts = config.num_experts_per_tok, config.num_local_experts
        self.gate = nn.Linear(config.hidden_size, self.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(self.num_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, -2)
        weights, chosen = F.softmax(self.gate(tokens).float(), dim=-1).topk(self.top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(tokens.dtype)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            choice, rows = torch.where(chosen.T == e)  # by choice first: not in the order of the tokens
            out.index_add_(0, rows, expert(tokens[rows]) * weights[rows, choice, None])
        return out.view_as(hidden)


class SeparateConfig(MixtralConfig):
    model_type = "separate_experts"


class SeparateForCausalLM(MixtralForCausalLM):
    config_class = SeparateConfig

    def __init__(self, config):
        super().__init__(config)
        for block in self.model.layers:
            block.mlp = Experts(config)


AutoConfig.register("separate_experts", SeparateConfig, exist_ok=True)
AutoModelForCausalLM.register(SeparateConfig, SeparateForCausalLM, exist_ok=True)


@torch.no_grad()
def build_separate(dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """The same model as ``build("mixtral")``, with its experts apart."""
    fused = build("mixtral", dtype, **changes)
    model = SeparateForCausalLM(SeparateConfig(**{**ARCHITECTURES["mixtral"].sizes, **changes})).to(dtype).eval()
    model.load_state_dict(fused.state_dict(), strict=False)
    for block, whole in zip(model.model.layers, fused.model.layers):
        block.mlp.gate.weight.copy_(whole.mlp.gate.weight)
        for e, expert in enumerate(block.mlp.experts):
            both = whole.mlp.experts.gate_up_proj[e].chunk(2)
            for linear, weight in zip((expert.w1, expert.w3, expert.w2), (*both, whole.mlp.experts.down_proj[e])):
                linear.weight.copy_(weight)
    return model
