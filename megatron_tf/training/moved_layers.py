"""What pipeline stages know of the smaller model's layers, when a growth in depth moves layers to other stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_tf.parallel.groups import make_group
from megatron_tf.training.running import Run
from megatron_tf.training.start import Start

T = TypeVar("T")


def of_all_stages(run: Run, start: Start, own: Mapping[str, T]) -> Mapping[str, T]:
    """`own`, by the name of a projection or parameter in this rank's part of the smaller model. If the growth adds
    layers, that of the other pipeline stages is added, because this rank may hold their layers now.

    All ranks call it together. Tensors are in main memory.
    """
    if not start.new_layers(run.config.model):
        return own
    stages = make_group(run.plan.topology, "pipeline", run.config.parallel.timeout_seconds, "gloo")
    if stages.handle is None:
        return own
    everyone: list[Any] = [None] * stages.size
    dist.all_gather_object(everyone, dict(own), group=stages.handle)
    return {name: value for part in everyone for name, value in part.items()}
