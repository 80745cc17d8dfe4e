"""A model of transformers with parameter tokens in parallel to its modules: y = module(x) + Pattention(x)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel as BaseForCausalLM
from transformers import PreTrainedModel as BaseModel

LEAST = 1e-16  # norms up to this count as 0, as in training
BALANCE_SPEED = 10.0  # the factor of a candidate's balance in the choice


class PattentionBranch(nn.Module):
    """[..., d_in] -> [..., d_out] by attention to parameter tokens: GELU(τ·xKᵀ/‖xKᵀ‖) V."""

    def __init__(self, num_tokens: int, d_in: int, d_out: int, scale: float, argument: str):
        super().__init__()
        self.key_tokens = nn.Parameter(torch.empty(num_tokens, d_in))
        self.value_tokens = nn.Parameter(torch.empty(num_tokens, d_out))
        self.scale, self.argument = scale, argument

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        norm = self.norm(scores)
        # 0 for norms whose squares are lost, and NaN where the sum of squares has overflowed. The division sees no 0,
        # where its derivative would be infinite.
        there = norm > LEAST
        inverse = torch.where(there, self.scale / torch.where(there, norm, 1), 0) + (norm - norm)
        return self.total(F.gelu(scores * inverse.to(scores.dtype)) @ self.value_tokens)

    def scores(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., n]. Those of 0 have no weight, and no part in the norm."""
        return x.to(self.key_tokens.dtype) @ self.key_tokens.mT

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


class ChoosingBranch(PattentionBranch):
    """Tokens by slot, candidate and token: a position uses one of the candidates of each slot."""

    def __init__(self, num_tokens, d_in, d_out, scale, argument, candidates, group_size):
        super().__init__(num_tokens, d_in, d_out, scale, argument)
        groups = num_tokens // group_size
        self.shape = groups // candidates, candidates, group_size
        self.router = nn.Parameter(torch.empty(groups, d_in))
        self.balance = nn.Parameter(torch.empty(groups))

    def scores(self, x: Tensor) -> Tensor:
        slots, candidates, _ = self.shape
        logits = (x.to(self.router.dtype) @ self.router.mT).unflatten(-1, (slots, candidates))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = (logits + BALANCE_SPEED * self.balance.view(slots, candidates)).argmax(-1, keepdim=True)
        unused = torch.ones_like(logits, dtype=torch.bool).scatter(-1, chosen, False)
        return super().scores(x).unflatten(-1, self.shape).masked_fill(unused.unsqueeze(-1), 0).flatten(-3)


def add_branches(model: nn.Module, pattention: dict, over=lambda kind: kind) -> None:
    """`pattention`: num_tokens, scale, candidates and group_size where positions choose, and of each module's name
    d_in, d_out and the name of its input.  `over`: changes the class of the branches."""
    choice = {key: pattention[key] for key in ("candidates", "group_size") if key in pattention}
    make = over(ChoosingBranch if choice else PattentionBranch)
    for name, (d_in, d_out, argument) in pattention["branches"].items():
        module = model.get_submodule(name)
        branch = make(pattention["num_tokens"], d_in, d_out, pattention["scale"], argument, **choice)
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
