"""The identity of the base model of an adapter: its shape, and a digest of its weights.

A few values of every tensor, spread over it, are rounded to bf16. So the same weights in fp32, in bf16, sharded or
saved again have the same digest. Names are left out, because they differ between versions of transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_tf.adapters.modules import BRANCH, hidden_size, num_layers
from megatron_tf.errors import ArgumentError

_SAMPLES = 64  # values taken of each tensor
DIGESTS = ("vectors", "matrices")


def base_facts(model: nn.Module) -> dict[str, Any]:
    """The facts about a base that an adapter's folder keeps.

    They are `model_type`, `hidden_size`, `num_layers`, and digests: `vectors` of its biases and norms, `matrices` of
    its matrices. A digest is None if there are no such tensors, or if they are quantised or not in memory.
    """
    config: Any = model.config
    facts = {"model_type": config.model_type, "hidden_size": hidden_size(model), "num_layers": num_layers(model)}
    own = [parameter for name, parameter in model.named_parameters() if f".{BRANCH}." not in f".{name}"]
    is_quantised = any(not parameter.dtype.is_floating_point for parameter in own)
    matrices = [] if is_quantised else [parameter for parameter in own if parameter.dim() >= 2]
    vectors = [parameter for parameter in own if parameter.dim() < 2 and parameter.dtype.is_floating_point]
    return {**facts, "vectors": _digest(vectors), "matrices": _digest(matrices)}


def check_base(model: nn.Module, expected: Mapping[str, Any], otherwise: str = "") -> None:
    """ArgumentError unless the `base_facts` of `model` are those `expected`. A digest of None is not compared.

    `otherwise`: the end of the error's last sentence, a remedy for users who mean other weights.
    """
    found = base_facts(model)
    for key in ("model_type", "hidden_size", "num_layers"):
        if found[key] != expected[key]:
            raise ArgumentError(
                f"base: the adapter was trained on a {expected['model_type']} of {expected['num_layers']} layers × "
                f"{expected['hidden_size']}, and this is a {found['model_type']} of {found['num_layers']} layers × "
                f"{found['hidden_size']}. Give the model that it was trained on."
            )
    for key in DIGESTS:
        if None not in (found[key], expected[key]) and found[key] != expected[key]:
            raise ArgumentError(
                f"base: the {key} of this model are not those that the adapter was trained on (digest {found[key]}, "
                f"expected {expected[key]}). Give the same weights{otherwise}."
            )


@torch.no_grad()
def _digest(tensors: list[nn.Parameter]) -> str | None:
    if not tensors or any(tensor.is_meta or not tensor.numel() for tensor in tensors):
        return None
    parts = sorted(_sampled(tensor) for tensor in tensors)
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


def _sampled(tensor: Tensor) -> bytes:
    """The digest of one tensor's shape and values. A sharded tensor is gathered: all ranks call it together."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    flat = whole.detach().reshape(-1)
    count = min(flat.numel(), _SAMPLES)
    places = (torch.arange(count) * flat.numel()) // count
    values = flat[places.to(flat.device)].to(device="cpu", dtype=torch.bfloat16).view(torch.int16)
    return hashlib.sha256(f"{tuple(whole.shape)}".encode() + values.numpy().tobytes()).digest()
