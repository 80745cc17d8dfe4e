"""Rules of the model alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.nearest import divisors_near, either, multiples_near
from megatron_tf.config.sections.model import Model
from megatron_tf.config.tasks import task_of
from megatron_tf.telemetry.text import count_of


def model_problems(model: Model) -> Iterator[str]:
    heads, hidden = model.num_attention_heads, model.hidden_size
    if hidden % heads:
        yield (
            f"model.hidden_size: {hidden} is not a multiple of model.num_attention_heads {heads}. Set it to "
            f"{either(multiples_near(hidden, heads))}, or the heads to {either(divisors_near(hidden, heads))}."
        )
    else:
        yield from _rotary_problems(model)
    yield from architecture_of(model).problems(model)
    yield from task_of(model).problems(model)


def _rotary_problems(model: Model) -> Iterator[str]:
    head_size = model.hidden_size // model.num_attention_heads
    channels = int(model.rotary_fraction * head_size)
    if channels % 2:
        # Rounded up, so that int(fraction * head_size) is the even number and not the odd one below it.
        near = [math.ceil(even / head_size * 1e4) / 1e4 for even in (channels - 1, channels + 1) if even <= head_size]
        yield (
            f"model.rotary_fraction: {model.rotary_fraction:g} of {head_size} channels a head rotates "
            f"{count_of(channels, 'channel')}, but they are rotated in pairs. Set it to "
            f"{either(f'{fraction:g}' for fraction in near)}."
        )
