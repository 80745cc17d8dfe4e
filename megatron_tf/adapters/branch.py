"""A branch: parameter tokens at a module. It is a child of the module and acts by forward hooks, so the module keeps
its class, its name and its parameters.

A branch in parallel to a module of any decoder adds its output to the module's:

    y = module(x) + Σ over active adapters of Pattention(x; keys [n, d_in], values [n, d_out])

Tokens K', V' appended to a Pattention of a TokenFormer share the norm and τ of its own tokens K, V:

    y = θ(x [K; K']ᵀ) [V; V']

A parallel branch may also choose among candidates at each position (`model.sparse_pattention`). Its balancing loss is
attached to its output, so any training loop trains the balance.

New tokens keep the function. In parallel, values are 0 and keys random. Appended, K' are 0 and V' random, as in growth
by `zero_key`: a score of 0 has no weight and does not change the norm; K' has a gradient at once, and V' from the
second step. Appended tokens are merged by concatenation. Parallel ones cannot be: they have a norm of their own.
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
    """The tokens of all adapters at one module. They are fp32 even if the module has 16-bit weights."""

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
        # A plain dict: PEFT expects an adapter's name just before the last part of a parameter's name, which holds for
        # the banks but not for the modules around them.
        self.choices: dict[str, SparsePattention] = {}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        weight = next(module.parameters())
        self.device = weight.device
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.key_std, self.value_std = INITIAL_STD, 0.0  # of new tokens; one of the two is 0
        module.add_module(BRANCH, self)
        self.handles = self.attach(module)

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        """Registers the hooks that apply the tokens, and returns them."""
        raise NotImplementedError

    def update_layer(self, adapter: str, num_tokens: int, frozen_tokens: int, scale: float | None) -> None:
        """Adds new tokens for `adapter` that keep the module's function. `scale`: τ; None: that of the module."""
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
        """As `update_layer`, with candidates that positions choose among."""
        module = SparsePattention(
            num_tokens // candidates, self.place.d_in, self.place.d_out, group_size=group_size, candidates=candidates,
            scale=scale,
        )  # fmt: skip
        nn.init.zeros_(module.bank.value_tokens)
        self.choices[adapter] = module.to(self.device, self.dtype)
        self.bank[adapter] = module.bank
        self.scales[adapter] = scale

    def remove(self, module: nn.Module) -> None:
        """Restores `module` to its state before there was a branch."""
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

    # The base class takes these from the layer that it wraps. Nothing is wrapped here.
    @property
    def weight(self) -> Tensor:
        raise AttributeError("weight")

    @property
    def bias(self) -> Tensor:
        raise AttributeError("bias")


class PattentionLayer(TokenLayer):
    """Branches in parallel to a module.

    `loss_weight`: of the balancing loss of branches with candidates. A loop that adds up the gradients of several
    forward passes sets it to the share of each, see `weigh_losses`.
    """

    loss_weight = 1.0

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        return [module.register_forward_hook(self._add, with_kwargs=True)]

    def forward(self, x: Tensor) -> Tensor | None:
        """x [..., d_in] -> the sum of the outputs of active adapters [..., d_out]; None when none is active."""
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
        return _WithLoss.apply(out, losses["balance"] * self.loss_weight)

    def _add(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        if self.disable_adapters:
            return output
        added = self(args[0] if args else kwargs[self.place.argument])
        if added is None:
            return output
        if isinstance(output, tuple):  # attention weights or router logits come after the hidden states
            return (output[0] + added.to(output[0].dtype), *output[1:])
        return output + added.to(output.dtype)


def weigh_losses(model: nn.Module, weight: float) -> None:
    """Sets `loss_weight` of all branches of `model`, for the forward passes that follow."""
    for module in model.modules():
        if isinstance(module, PattentionLayer):
            module.loss_weight = weight


class _WithLoss(Function):
    """Identity on the output, which adds the gradient of an auxiliary loss: backward behaves as if the loss had been
    added, with factor 1, to the loss computed from the output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, *ctx.saved_tensors


class AppendedLayer(TokenLayer):
    """Tokens appended to a Pattention of an exported TokenFormer: those of all active adapters, one after another.

    A hook appends their scores to those of the module's `keys`: [..., n + n']. The module turns scores into weights.
    Hooks then split the weights: the module's `values` [n, d] take the first n, the appended values the others.
    """

    def __init__(self, module: nn.Module, place: Place):
        super().__init__(module, place)
        values = module.get_submodule("values").weight
        self.key_std, self.value_std = 0.0, INITIAL_STD
        if isinstance(values, Tensor) and values.dtype.is_floating_point and not values.is_meta:
            self.value_std = values.detach().float().square().mean().sqrt().item() or INITIAL_STD
        self.weights: Tensor | None = None  # [..., n'] of the appended tokens, between the two hooks of `values`

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        keys, values = module.get_submodule("keys"), module.get_submodule("values")
        return [
            keys.register_forward_hook(self._append_scores),
            values.register_forward_pre_hook(self._keep_weights),
            values.register_forward_hook(self._add_values),
        ]

    def _active(self) -> list[tuple[Tensor, Tensor]]:
        """(Keys, values) of each active adapter."""
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
