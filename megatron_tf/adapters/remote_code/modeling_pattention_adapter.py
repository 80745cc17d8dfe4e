"""A model of transformers with parameter tokens in parallel to its modules: y = module(x) + Pattention(x)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel as BaseForCausalLM
from transformers import PreTrainedModel as BaseModel


class PattentionBranch(nn.Module):
    """[..., d_in] -> [..., d_out] by attention to parameter tokens: GELU(τ·xKᵀ/‖xKᵀ‖) V."""

    def __init__(self, num_tokens: int, d_in: int, d_out: int, scale: float, argument: str):
        super().__init__()
        self.key_tokens = nn.Parameter(torch.empty(num_tokens, d_in))
        self.value_tokens = nn.Parameter(torch.empty(num_tokens, d_out))
        self.scale, self.argument = scale, argument

    def forward(self, x: Tensor) -> Tensor:
        scores = x.to(self.key_tokens.dtype) @ self.key_tokens.mT
        norm = self.norm(scores)
        # The division sees no 0: its derivative there would be infinite.
        inverse = torch.where(norm > 0, self.scale / torch.where(norm > 0, norm, 1), 0)
        return self.total(F.gelu(scores * inverse.to(scores.dtype)) @ self.value_tokens)

    def norm(self, scores: Tensor) -> Tensor:
        """Of scores [..., n] over all tokens, [..., 1], at least fp32."""
        precise = torch.promote_types(scores.dtype, torch.float32)
        return torch.linalg.vector_norm(scores, dim=-1, keepdim=True, dtype=precise)

    def total(self, output: Tensor) -> Tensor:
        """The output of all tokens, of that of those that are here."""
        return output

    def add(self, module, args, kwargs, output):
        added = self(args[0] if args else kwargs[self.argument])
        if isinstance(output, tuple):  # attention weights, or what a router decided, come after the hidden states
            return (output[0] + added.to(output[0].dtype), *output[1:])
        return output + added.to(output.dtype)


def add_branches(model: nn.Module, pattention: dict, make=PattentionBranch) -> None:
    """`pattention`: num_tokens, scale, and of each module's name d_in, d_out and the name of its input."""
    for name, (d_in, d_out, argument) in pattention["branches"].items():
        module = model.get_submodule(name)
        branch = make(pattention["num_tokens"], d_in, d_out, pattention["scale"], argument)
        module.add_module("pattention_branch", branch)
        module.register_forward_hook(branch.add, with_kwargs=True)


class PattentionAdapterForCausalLM(BaseForCausalLM):
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        add_branches(self, config.pattention)


class PattentionAdapterModel(BaseModel):
    """Without the head, as vLLM builds it."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        prefix = f"{self.base_model_prefix}."
        branches = {name.removeprefix(prefix): branch for name, branch in config.pattention["branches"].items()}
        add_branches(self, {**config.pattention, "branches": branches})
