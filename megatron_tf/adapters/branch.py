"""A branch: parameter tokens at a module. It acts by forward hooks, as a child of the module, which keeps its class,
its name and its parameters.

In parallel to a module of any decoder, its output is added to the module's:

    y = module(x) + Σ over active adapters of Pattention(x; keys [n, d_in], values [n, d_out])

Appended to a Pattention of a TokenFormer, tokens K', V' share the norm and τ of those that are there, K, V:

    y = θ(x [K; K']ᵀ) [V; V']

Where positions choose, a branch in parallel is `model.sparse_pattention` over the candidates that they choose, and the
balance learns from the imbalance that the branch itself sees, in any loop of training.

New K' are 0 and new V' random, as in growth by `zero_key`. A score of 0 has no weight and leaves the norm as it is, so
the function is kept; K' has a gradient at once, and V' from the second step. Such an adapter is a part of a bigger
TokenFormer, and merging is concatenation. In parallel it could not be: its norm would be over its own scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.hooks import RemovableHandle

from megatron_tf.adapters.folder import BANK, FROZEN, KEYS, VALUES
from megatron_tf.adapters.modules import BRANCH, Place
from megatron_tf.config.activations import DEFAULT_ACTIVATION
from megatron_tf.model.context import Reports
from megatron_tf.model.pattention import partial_pattention
from megatron_tf.model.sparse_pattention import SparsePattention
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.state.parameters import INITIAL_STD


class TokenLayer(nn.Module, BaseTunerLayer):
    """The tokens of all adapters at one module. They are fp32, also where the module has 16-bit weights."""

    adapter_layer_names = (KEYS, VALUES, FROZEN + KEYS, FROZEN + VALUES, BANK)
    other_param_names = ("scales", "choices")
    active_adapters: list[str]
    key_tokens: nn.ParameterDict
    value_tokens: nn.ParameterDict
    frozen_key_tokens: nn.ParameterDict
    frozen_value_tokens: nn.ParameterDict
    bank: nn.ModuleDict

    def __init__(self, module: nn.Module, place: Place):
        super().__init__()
        self.place = place
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict() if name == BANK else nn.ParameterDict())
        self.scales: dict[str, float | None] = {}
        # PEFT finds an adapter's name next to the last part of a parameter's: in the banks, and not above them
        self.choices: dict[str, SparsePattention] = {}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        weight = next(module.parameters())
        self.device = weight.device
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.key_std, self.value_std = INITIAL_STD, 0.0  # of new tokens; one of the two is 0
        module.add_module(BRANCH, self)
        self.handles = self.attach(module)

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        """Hooks by which the tokens act."""
        raise NotImplementedError

    def update_layer(self, adapter: str, num_tokens: int, frozen_tokens: int, scale: float | None) -> None:
        """New tokens for `adapter`, with which the module computes what it did. `scale`: τ; None where it is the
        module's."""
        counts = {"": num_tokens - frozen_tokens, FROZEN: frozen_tokens}
        for prefix, count in counts.items():
            if count:
                for leaf, width, std in (
                    (KEYS, self.place.d_in, self.key_std),
                    (VALUES, self.place.d_out, self.value_std),
                ):
                    tokens = nn.Parameter(torch.empty(count, width, device=self.device, dtype=self.dtype))
                    nn.init.normal_(tokens, std=std)
                    getattr(self, prefix + leaf)[adapter] = tokens
        self.scales[adapter] = scale
        if frozen_tokens:
            self.frozen_peft_weight_names[adapter] = (FROZEN + KEYS, FROZEN + VALUES)

    def update_choice(self, adapter: str, num_tokens: int, candidates: int, group_size: int, scale: float) -> None:
        """As `update_layer`, of tokens among which positions choose."""
        module = SparsePattention(
            num_tokens // candidates, self.place.d_in, self.place.d_out, group_size=group_size, candidates=candidates,
            scale=scale,
        )  # fmt: skip
        nn.init.zeros_(module.bank.value_tokens)
        self.choices[adapter] = module.to(self.device, self.dtype)
        self.bank[adapter] = module.bank
        self.scales[adapter] = scale

    def remove(self, module: nn.Module) -> None:
        """Leave `module` as it was before there was a branch."""
        for handle in self.handles:
            handle.remove()
        delattr(module, BRANCH)

    def tokens(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Keys [n, d_in] and values [n, d_out] of an adapter, frozen ones first."""
        keys, values = self.key_tokens[adapter], self.value_tokens[adapter]
        if adapter in self.frozen_key_tokens:
            keys = torch.cat([self.frozen_key_tokens[adapter], keys])
            values = torch.cat([self.frozen_value_tokens[adapter], values])
        return keys, values

    # The base class finds these in a layer that wraps another; here nothing is wrapped.
    @property
    def weight(self) -> Tensor:
        raise AttributeError("weight")

    @property
    def bias(self) -> Tensor:
        raise AttributeError("bias")


class PattentionLayer(TokenLayer):
    """Branches in parallel to a module."""

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        return [module.register_forward_hook(self._add, with_kwargs=True)]

    def forward(self, x: Tensor) -> Tensor | None:
        """x [..., d_in] -> what the active adapters add, [..., d_out]; None when none is active."""
        total: Tensor | None = None
        for adapter in self.active_adapters:
            if adapter in self.scales:
                out = self._chosen(x, adapter) if adapter in self.choices else self._all(x, adapter)
                total = out if total is None else total + out
        return total

    def _all(self, x: Tensor, adapter: str) -> Tensor:
        keys, values = self.tokens(adapter)
        scale = self.scales[adapter]
        assert scale is not None
        return partial_pattention(x, [keys], [values], [scale], DEFAULT_ACTIVATION, SINGLE)[0]

    def _chosen(self, x: Tensor, adapter: str) -> Tensor:
        losses: Reports = {}
        out = self.choices[adapter].partial(x, losses, {})
        return _WithLoss.apply(out, losses["balance"])

    def _add(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        if self.disable_adapters:
            return output
        added = self(args[0] if args else kwargs[self.place.argument])
        if added is None:
            return output
        if isinstance(output, tuple):  # attention weights, or what a router decided, come after the hidden states
            return (output[0] + added.to(output[0].dtype), *output[1:])
        return output + added.to(output.dtype)


class _WithLoss(Function):
    """An output that brings an auxiliary loss along: what is made of the output has that loss's gradient, too."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, *ctx.saved_tensors


class AppendedLayer(TokenLayer):
    """Tokens appended to a Pattention of an exported TokenFormer, those of all active adapters one after the other.

    The module's own `keys` give scores [..., n] and get those of the appended tokens behind them, [..., n + n']; what
    the module makes of them, its `values` [n, d] and the appended ones share out again.
    """

    def __init__(self, module: nn.Module, place: Place):
        super().__init__(module, place)
        values = module.get_submodule("values").weight
        self.key_std, self.value_std = 0.0, INITIAL_STD
        if isinstance(values, Tensor) and values.dtype.is_floating_point and not values.is_meta:
            self.value_std = values.detach().float().square().mean().sqrt().item() or INITIAL_STD
        self.weights: Tensor | None = None  # [..., n'] of the appended tokens, on the way to their values

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        keys, values = module.get_submodule("keys"), module.get_submodule("values")
        return [
            keys.register_forward_hook(self._append_scores),
            values.register_forward_pre_hook(self._keep_weights),
            values.register_forward_hook(self._add_values),
        ]

    def _active(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the adapters that are switched on."""
        if self.disable_adapters:
            return []
        return [self.tokens(adapter) for adapter in self.active_adapters if adapter in self.scales]

    def _append_scores(self, module: nn.Module, args: Sequence[Any], scores: Tensor) -> Tensor:
        own = [(args[0].to(keys.dtype) @ keys.mT).to(scores.dtype) for keys, _ in self._active()]
        return torch.cat([scores, *own], -1) if own else scores

    def _keep_weights(self, module: nn.Module, args: Sequence[Any]) -> tuple[Tensor] | None:
        count = sum(len(keys) for keys, _ in self._active())
        if not count:
            return None
        weights, self.weights = args[0].split([args[0].shape[-1] - count, count], -1)
        return (weights,)

    def _add_values(self, module: nn.Module, args: Sequence[Any], output: Tensor) -> Tensor:
        if self.weights is None:
            return output
        values = torch.cat([values for _, values in self._active()])
        weights, self.weights = self.weights, None
        return output + (weights.to(values.dtype) @ values).to(output.dtype)
