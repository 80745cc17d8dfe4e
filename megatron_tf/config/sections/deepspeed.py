"""The `deepspeed:` section of a configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_tf.config.fields import Count, EvenCount, Section, TotalCount


class DeepSpeedFp16(Section):
    """Dynamic loss scaling, with training.precision fp16 and either engine."""

    initial_scale_power: Annotated[int, Field(ge=0, le=40)] = 16
    """The first scale is 2 to this power."""
    loss_scale_window: Count = 1000
    """[steps] Steps without an overflow after which the scale doubles."""
    hysteresis: Count = 2
    """[overflows] Overflows after which the scale halves."""
    consecutive_hysteresis: bool = False
    """Count only overflows one after another."""
    min_loss_scale: Count = 1
    """The scale never falls below it."""


class DeepSpeedZero(Section):
    """How ZeRO communicates."""

    reduce_bucket_size: TotalCount = 500_000_000
    """[elements] Size of one gradient reduction."""
    allgather_bucket_size: EvenCount = 500_000_000
    """[elements] Size of one all-gather of updated weights."""
    overlap_comm: bool = False
    """Reduce gradients while the backward pass goes on."""
    contiguous_gradients: bool = True
    """Copy gradients into one buffer as they are made."""
    reduce_scatter: bool = True
    """Reduce-scatter gradients instead of all-reducing them."""
    use_multi_rank_bucket_allreduce: bool = True
    """All-reduce the buckets of several ranks at once."""
    allgather_partitions: bool = True
    """Gather updated weights instead of broadcasting them."""


class DeepSpeed(Section):
    """Settings under DeepSpeed's own names. They change speed and memory, not results, except for the loss scale."""

    fp16: DeepSpeedFp16 = DeepSpeedFp16()
    """Dynamic loss scaling."""
    zero_optimization: DeepSpeedZero = DeepSpeedZero()
    """How ZeRO communicates."""
