"""Which parameters had a gradient that is not finite, in a step that DeepSpeed skipped for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_tf.training.pipeline import ShardedParameter


def watch_nonfinite(wrapper: Any, shards: Iterable[ShardedParameter]) -> Callable[[], list[str]]:
    """Makes DeepSpeed's optimizer wrapper remember; returns a function that gives the names of this rank's part.

    DeepSpeed drops the gradients of a skipped step before anyone can look. So this looks in the one thing that it calls
    between its verdict and that: with bf16 the clearing itself, else the update of the loss scale.
    """
    names = {id(shard.parameter): shard.spec.name for shard in shards}
    found: list[str] = []

    def remember(groups: Iterable[tuple[Iterable[Tensor], Iterable[Tensor]]]) -> None:
        found[:] = dict.fromkeys(
            names[id(parameter)]
            for parameters, gradients in groups
            for parameter, gradient in zip(parameters, gradients)
            if not torch.isfinite(gradient).all()
        )

    if hasattr(wrapper, "bf16_groups"):
        clear = wrapper.clear_hp_grads

        def look_and_clear() -> None:
            if wrapper.overflow:
                remember(zip(wrapper.bf16_groups, wrapper.fp32_groups_gradients))
            clear()

        wrapper.clear_hp_grads = look_and_clear
    else:
        update_scale = wrapper._update_scale

        def look_and_update(has_overflow: bool = False) -> None:
            if has_overflow:
                remember(
                    (parameters, wrapper.averaged_gradients.get(group) or ())
                    for group, parameters in enumerate(wrapper.params_in_partition)
                )
            update_scale(has_overflow)

        wrapper._update_scale = look_and_update
    return lambda: list(found)
