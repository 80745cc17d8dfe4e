"""The official TokenFormer's weights. Names are read through the parameter table."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_tf.errors import CheckpointError
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.params import parameter_table


@torch.no_grad()
def load_official_state_dict(state_dict: Mapping[str, Tensor], model: TokenFormer) -> None:
    """Copies weights under the official names into `model`, after every name and shape was checked.

    CheckpointError lists all tensors that are missing, unknown, or of another shape; nothing is copied then.
    """
    table = parameter_table(model.config)
    official = {spec.official_name: spec for spec in table.values()}
    problems = [f"missing tensor {name}" for name in official if name not in state_dict]
    problems += [f"unknown tensor {name}" for name in state_dict if name not in official]
    problems += [
        f"{name} has shape {list(state_dict[name].shape)}, the model wants {list(spec.shape)}"
        for name, spec in official.items()
        if name in state_dict and tuple(state_dict[name].shape) != spec.shape
    ]
    if problems:
        raise CheckpointError(
            "these are not the official weights of this model: "
            + "; ".join(problems)
            + ". Give the configuration that the weights were trained with."
        )
    parameters = dict(model.named_parameters())
    for name, spec in official.items():
        parameters[spec.name].copy_(state_dict[name])
