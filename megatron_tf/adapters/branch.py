"""A branch: parameter tokens in parallel to a module, whose output is added to the module's.

    y = module(x) + Σ over active adapters of Pattention(x; keys [n, d_in], values [n, d_out])

The branch is a child of the module and adds by a forward hook: the module keeps its class, its name and its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from megatron_tf.adapters.folder import FROZEN, KEYS, VALUES
from megatron_tf.adapters.modules import BRANCH, Place
from megatron_tf.config.activations import DEFAULT_ACTIVATION
from megatron_tf.model.pattention import partial_pattention
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.state.parameters import INITIAL_STD


class PattentionLayer(nn.Module, BaseTunerLayer):
    """The branches of all adapters at one module. Tokens are fp32, also where the module has 16-bit weights."""

    adapter_layer_names = (KEYS, VALUES, FROZEN + KEYS, FROZEN + VALUES)
    other_param_names = ("scales",)
    active_adapters: list[str]
    key_tokens: nn.ParameterDict
    value_tokens: nn.ParameterDict
    frozen_key_tokens: nn.ParameterDict
    frozen_value_tokens: nn.ParameterDict

    def __init__(self, module: nn.Module, place: Place):
        super().__init__()
        self.place = place
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.scales: dict[str, float] = {}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        weight = next(module.parameters())
        self.device = weight.device
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        module.add_module(BRANCH, self)
        self.handle = module.register_forward_hook(self._add, with_kwargs=True)

    def update_layer(self, adapter: str, num_tokens: int, frozen_tokens: int, scale: float) -> None:
        """New tokens for `adapter`: keys drawn, values 0, so that the module computes what it did."""
        counts = {"": num_tokens - frozen_tokens, FROZEN: frozen_tokens}
        for prefix, count in counts.items():
            if count:
                for leaf, width, std in ((KEYS, self.place.d_in, INITIAL_STD), (VALUES, self.place.d_out, 0.0)):
                    tokens = nn.Parameter(torch.empty(count, width, device=self.device, dtype=self.dtype))
                    nn.init.normal_(tokens, std=std)
                    getattr(self, prefix + leaf)[adapter] = tokens
        self.scales[adapter] = scale
        if frozen_tokens:
            self.frozen_peft_weight_names[adapter] = (FROZEN + KEYS, FROZEN + VALUES)

    def remove(self, module: nn.Module) -> None:
        """Leave `module` as it was before there was a branch."""
        self.handle.remove()
        delattr(module, BRANCH)

    def tokens(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Keys [n, d_in] and values [n, d_out] of an adapter, frozen ones first."""
        keys, values = self.key_tokens[adapter], self.value_tokens[adapter]
        if adapter in self.frozen_key_tokens:
            keys = torch.cat([self.frozen_key_tokens[adapter], keys])
            values = torch.cat([self.frozen_value_tokens[adapter], values])
        return keys, values

    def forward(self, x: Tensor) -> Tensor | None:
        """x [..., d_in] -> what the active adapters add, [..., d_out]; None when none is active."""
        total: Tensor | None = None
        for adapter in self.active_adapters:
            if adapter in self.scales:
                keys, values = self.tokens(adapter)
                (out,) = partial_pattention(x, [keys], [values], [self.scales[adapter]], DEFAULT_ACTIVATION, SINGLE)
                total = out if total is None else total + out
        return total

    def _add(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        if self.disable_adapters:
            return output
        added = self(args[0] if args else kwargs[self.place.argument])
        if added is None:
            return output
        if isinstance(output, tuple):  # attention weights, or what a router decided, come after the hidden states
            return (output[0] + added.to(output[0].dtype), *output[1:])
        return output + added.to(output.dtype)

    # The base class finds these in a layer that wraps another; here nothing is wrapped.
    @property
    def weight(self) -> Tensor:
        raise AttributeError("weight")

    @property
    def bias(self) -> Tensor:
        raise AttributeError("bias")
