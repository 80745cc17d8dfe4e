"""The projection of a TokenFormer: attention to learnable parameter tokens.

    A = X Kᵀ,   S = θ(A),   out = S V        K [n, d_in] key tokens, V [n, d_out] value tokens

`keys` and `values` of a Pattention are linear layers without bias (weights K and Vᵀ), because tensor parallelism,
quantisation, LoRA and vLLM all act on linear layers. One with a bank has more tokens than a position uses: θ is over
those that it chooses.

With l2_norm_gelu the norm is a quadratic form of x, so with G = KᵀK [d_in, d_in] it is known before the scores, and the
projection is an MLP without biases:

    r² = ‖x Kᵀ‖² = x G xᵀ,   out = GELU((τ/r) x Kᵀ) V

That is the `norm` "gram" of the configuration. G is made of the keys when they are first used, and never saved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

# projection of a layer -> the key of its number of tokens
PROJECTIONS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "proj", "mlp": "ffn"}
NORMS = ("direct", "gram")
# The norm "gram" is faster from so many tokens for each channel, and so many rows in a call, if all keys are here.
TOKENS_A_CHANNEL = 8
ROWS = 32
# As in training: an r² below so many roundings of its largest term is taken for noise; below this share of that of an
# average row, or so many roundings of x's type, r is more than 3 % off; and norms up to LEAST count as 0.
NOISE, DOUBTFUL, DOUBTFUL_ROUNDINGS = 8, 2.0**-10, 32
LEAST = 1e-16
BALANCE_SPEED = 10.0  # the factor of a candidate's balance in the choice


def check_norm(norm: str) -> None:
    """ValueError when there is no such norm."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}, expected one of {', '.join(NORMS)}")


class TokenBank(nn.Module):
    """Parameter tokens in slots. A slot has m candidates of g tokens each, and a position uses one of every slot.

    `keys`, `values`: [slots · m · g, hidden], by slot, candidate and token. Only those of chosen candidates are read.
    `router`: [slots · m, hidden], scores the candidates.  `balance`: [slots · m], what training has added to the scores
    so that all candidates are used. The loss does not know it.
    """

    balance: Tensor

    def __init__(self, hidden_size: int, tokens: int, group_size: int, candidates: int):
        super().__init__()
        self.shape = tokens // group_size, candidates, group_size
        groups = self.shape[0] * candidates
        self.keys = nn.Parameter(torch.empty(groups * group_size, hidden_size))
        self.values = nn.Parameter(torch.empty(groups * group_size, hidden_size))
        self.router = nn.Parameter(torch.empty(groups, hidden_size))
        self.register_buffer("balance", torch.zeros(groups))

    def logits(self, x: Tensor) -> Tensor:
        """x [rows, hidden] -> [rows, slots, m], at least fp32."""
        logits = F.linear(x, self.router).unflatten(-1, self.shape[:2])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def choose(self, logits: Tensor) -> Tensor:
        """int64 [rows, slots]: of each slot the best candidate."""
        return (logits.detach() + BALANCE_SPEED * self.balance.view(self.shape[:2])).argmax(-1)

    def gate(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """[rows, slots] of ones, whose gradient is that of 2σ of the chosen candidate's score: the router learns by
        it."""
        soft = 2 * torch.sigmoid(logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1))
        return 1 + (soft - soft.detach())

    def products(self, inputs: Tensor, tokens: Tensor, chosen: Tensor, transposed: bool = False) -> Tensor:
        """Of each row and slot, its inputs times the tokens of the chosen candidate, or times these transposed.

        inputs [rows, slots, width], tokens as `keys` and `values` -> [rows, slots, width of the product].
        """
        slots, candidates, group_size = self.shape
        groups = (chosen + candidates * torch.arange(slots, device=chosen.device)).flatten()
        order = groups.argsort(stable=True)
        counts = groups.bincount(minlength=slots * candidates).tolist()
        # unbind and not indexing: its backward pass puts the gradients of all candidates together once
        matrices = tokens.unflatten(0, (-1, group_size)).unbind(0)
        parts = inputs.flatten(0, 1)[order].split(counts)
        out = [part @ (matrix.mT if transposed else matrix) for part, matrix in zip(parts, matrices) if len(part)]
        return torch.cat(out)[order.argsort()].unflatten(0, (-1, slots))


class Pattention(nn.Module):
    """One projection: [..., hidden] -> [..., hidden] by attention to its parameter tokens.

    `config`: has hidden_size, parameter_tokens, sparse, scales, activation, and perhaps norm, see `TokenFormerConfig`.
    `keys`, `values`: the tokens that every position uses; None when all are in the `bank`.
    """

    def __init__(self, config: Any, layer_idx: int, name: str):
        super().__init__()
        tokens, sparse = config.parameter_tokens[PROJECTIONS[name]], (config.sparse or {}).get(PROJECTIONS[name])
        dense = tokens if sparse is None else sparse["dense"]
        self.keys = nn.Linear(config.hidden_size, dense, bias=False) if dense else None
        self.values = nn.Linear(dense, config.hidden_size, bias=False) if dense else None
        self.bank = None
        if sparse is not None:
            self.bank = TokenBank(config.hidden_size, tokens - dense, sparse["group_size"], sparse["candidates"])
        self.scale = config.scales[layer_idx][name]
        self.activation = config.activation
        self.size = tokens, config.hidden_size
        self.norm = getattr(config, "norm", "direct") if self.activation == "l2_norm_gelu" else "direct"
        check_norm(self.norm)  # again, because `from_pretrained` sets it after the configuration is made
        self.matrix: tuple[object, Tensor] | None = None  # (what identifies the keys of G, G)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.bank is None:
            assert self.keys is not None and self.values is not None
            if self.norm == "gram" and (scaled := self.scaled(hidden_states)) is not None:
                return self.values(F.gelu(self.keys(scaled)))
            scores = self.keys(hidden_states)
            # More scores than tokens come from tokens that an adapter appended; fewer are a tensor rank's share.
            if scores.shape[-1] < self.size[0]:
                raise NotImplementedError(
                    f"{scores.shape[-1]} of {self.size[0]} scores are here, which the norm gram can do with plain "
                    'linear layers alone. Load the model with norm="direct"'
                )
            return self.values(self.weigh(scores))
        x = hidden_states.flatten(0, -2)
        logits = self.bank.logits(x)
        chosen = self.bank.choose(logits)
        inputs = x.unsqueeze(1).expand(-1, chosen.shape[1], -1)
        scores = self.bank.products(inputs, self.bank.keys, chosen, transposed=True)
        all_scores = scores.flatten(1)
        if self.keys is not None:
            all_scores = torch.cat((all_scores, self.keys(x)), -1)
        weights = self.weigh(all_scores)  # over all tokens that the position uses
        in_bank = weights[:, : scores[0].numel()].view_as(scores)
        in_bank = in_bank * self.bank.gate(logits, chosen).unsqueeze(-1).to(in_bank.dtype)
        out = self.bank.products(in_bank, self.bank.values, chosen).sum(1)
        if self.values is not None:
            out = out + self.values(weights[:, scores[0].numel() :])
        return out.view_as(hidden_states)

    def scaled(self, x: Tensor) -> Tensor | None:
        """(τ/r) x; None where the norm of the scores is as fast, or where something else than keys makes scores."""
        tokens, hidden = self.size
        if type(self.keys) is not nn.Linear:  # LoRA, quantised keys, or those of another program
            return None
        weight: Any = self.keys.weight
        keys = weight.to_local() if hasattr(weight, "to_local") else weight
        if keys.shape[1] != hidden:
            return None
        if len(keys) == tokens:
            few = tokens < TOKENS_A_CHANNEL * hidden or x[..., 0].numel() < ROWS
            if few or torch.is_grad_enabled() or torch.compiler.is_compiling():
                return None
        gram = self.key_matrix(weight, keys)
        squares = ((x @ gram.to(x.dtype)).to(gram.dtype) * x).sum(-1, keepdim=True)
        average = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=gram.dtype).square() * gram.trace() / hidden
        rounding = torch.finfo(x.dtype).eps
        noise = max(NOISE * hidden * torch.finfo(gram.dtype).eps, rounding)
        least = max(DOUBTFUL, DOUBTFUL_ROUNDINGS * rounding, 2 * noise)
        if len(keys) == tokens and (squares < least * average).any():
            return None  # a row's norm would be more than 3 % off
        return x * self.over(squares.maximum(noise * average).sqrt()).to(x.dtype)

    def key_matrix(self, weight: Any, keys: Tensor) -> Tensor:
        """G over the keys of all ranks, at least fp32. With gradients it is made anew, and they go to `keys`."""
        known = keys.data_ptr(), 0 if keys.is_inference() else keys._version
        if not torch.is_grad_enabled() and self.matrix is not None and self.matrix[0] == known:
            return self.matrix[1]
        gram = (keys.mT @ keys).to(torch.promote_types(keys.dtype, torch.float32))
        if len(keys) != self.size[0]:
            whole = gram.detach().clone()
            dist.all_reduce(whole, group=weight.device_mesh.get_group())
            gram = gram + (whole - gram.detach())
        if not torch.is_grad_enabled():
            self.matrix = known, gram
        return gram

    def weigh(self, scores: Tensor) -> Tensor:
        """θ over the last dimension, the parameter tokens. Sums over tokens are at least fp32."""
        precise = torch.promote_types(scores.dtype, torch.float32)
        if self.activation == "softmax":
            return (torch.softmax(scores, -1, dtype=precise) * self.scale).to(scores.dtype)
        if self.activation == "gelu_l2_norm":
            return self.normalise(F.gelu(scores), precise)
        if self.activation == "l2_norm_gelu":
            return F.gelu(self.normalise(scores, precise))
        raise NotImplementedError(f"activation {self.activation!r} has no formula here")

    def normalise(self, scores: Tensor, precise: torch.dtype) -> Tensor:
        """scores · τ/‖scores‖₂; where a whole row is 0, as padding's may be, it and its gradient are 0."""
        norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True, dtype=precise)
        return scores * self.over(norm).to(scores.dtype)

    def over(self, norm: Tensor) -> Tensor:
        """τ/norm; 0 for norms whose squares are lost, and NaN where the sum of squares has overflowed."""
        there = norm > LEAST
        # Never divide by 0: the derivative there would be infinite, and 0 times infinity is NaN. norm − norm is 0, or
        # NaN where it is infinite.
        return torch.where(there, self.scale / torch.where(there, norm, 1), 0) + (norm - norm)
