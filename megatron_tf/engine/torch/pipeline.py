"""Micro batches through the stages of a pipeline, in the order of one of torch's schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.pipelining.schedules import REDUCE_GRAD, RESHARD, UNSHARD

from megatron_tf.config.topology import Topology
from megatron_tf.engine.step_clock import StepClock
from megatron_tf.engine.torch import sharding
from megatron_tf.model.context import BlockContext
from megatron_tf.model.later import Later
from megatron_tf.model.projection import leave_weights
from megatron_tf.model.stage import Stage

# parallel.schedule -> class for one part of the depth a rank, and for any number of them
SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
OF_PARTS = {"1f1b": ScheduleInterleaved1F1B, "zero_bubble": ScheduleInterleavedZeroBubble}


class _TimedStage(PipelineStage):
    """A part of a stage, which gives its blocks a context and reports the time of its passes to the clock.

    `later`: the gradients of weights that backward passes leave for later passes; None: they leave none.
    """

    def __init__(
        self,
        stage: Stage,
        part: int,
        clock: StepClock,
        context: Callable[[int], BlockContext],
        later: Later | None,
        **arguments: Any,
    ):
        super().__init__(stage, dw_builder=None if later is None else later.take, **arguments)
        self._part = part
        self._clock = clock
        self._context = context
        self._micro_batch = 0

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._micro_batch = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.phase("forward"):
            return self.submod(*args, context=self._context(self._micro_batch), part=self._part, **kwargs)

    def backward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.phase("backward"):
            return super().backward_maybe_with_nosync(*args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        with self._clock.phase("backward"):
            super().backward_weight_one_chunk(*args, **kwargs)
            sharding.add_up(self.submod)


class Pipeline:
    """One rank's place in a pipeline of two stages or more."""

    def __init__(
        self,
        stage: Stage,
        topology: Topology,
        rank: int,
        group: dist.ProcessGroup,
        *,
        schedule: str,
        num_micro_batches: int,
        device: torch.device,
        clock: StepClock,
        context: Callable[[int], BlockContext],
    ):
        """`context`: a new one for a pass of a micro batch."""
        self._stage = stage
        self._clock = clock
        self._context = context
        self._topology = topology
        self._rank = rank
        self._group = group
        self._name = schedule
        self._num_micro_batches = num_micro_batches
        self._device = device
        self._schedule: Any = None

    def step(
        self, inputs: Sequence[Tensor], targets: Sequence[Tensor], loss: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Tensor]:
        """Forward and backward passes of all micro batches -> at the last stage the loss of each."""
        if self._schedule is None:
            self._schedule = self._build(inputs[0], targets[0], loss)
        losses: list[Tensor] = []
        whole = torch.cat(list(inputs))
        starts = self._stage.starts(whole)
        arguments = {} if starts is None else {"starts": starts}
        # all time outside of forward and backward is sending, and waiting for other ranks
        with self._clock.phase("communication"):
            if self._stage.previous is None:
                self._schedule.step(whole, return_outputs=False, **arguments)
            elif self._stage.following is None:
                self._schedule.step(target=torch.cat(list(targets)), losses=losses, return_outputs=False, **arguments)
            else:
                self._schedule.step(return_outputs=False, **arguments)
        return losses

    def _build(self, inputs: Tensor, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
        dtype = self._stage.hidden_dtype
        hidden = torch.empty(self._stage.hidden_shape(inputs), dtype=dtype, device="meta", requires_grad=True)
        ranks, number = self._topology.pipeline, self._topology.coordinate("pipeline", self._rank)
        stages = [
            _TimedStage(
                self._stage,
                part,
                self._clock,
                self._context,
                self._later(part),
                stage_index=part * ranks + number,
                num_stages=ranks * len(self._stage.parts),
                device=self._device,
                input_args=torch.empty_like(inputs, device="meta") if self._stage.source(part) is None else hidden,
                output_args=torch.empty((), device="meta") if self._stage.target(part) is None else hidden,
                group=self._group,
            )
            for part in range(len(self._stage.parts))
        ]
        if len(stages) > 1 or self._name not in SCHEDULES:
            return _of_parts(OF_PARTS[self._name], stages, self._num_micro_batches, loss)
        return SCHEDULES[self._name](stages[0], self._num_micro_batches, loss_fn=loss, scale_grads=False)

    def _later(self, part: int) -> Later | None:
        """The store for gradients of weights that the part computes later; None if the schedule has no such passes."""
        if self._name != "zero_bubble":
            return None
        later = Later()
        for module in self._stage.modules_of(part):
            leave_weights(module, later)
        return later


def _of_parts(
    schedule_class: Callable[..., Any],
    stages: list[_TimedStage],
    num_micro_batches: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """Parts share one sharded module, which gathers what it needs by itself and reduces once all parts are done."""
    schedule = schedule_class(stages, num_micro_batches, loss_fn=loss, scale_grads=False)
    done: set[int] = set()

    def begin(action: Any, ctx: Any) -> None:
        ctx.schedule_ref.unsharded_stages.add(action.stage_index)

    def end(action: Any, ctx: Any) -> None:
        ctx.schedule_ref.unsharded_stages.discard(action.stage_index)

    def reduce(action: Any, ctx: Any) -> None:
        done.add(action.stage_index)
        if len(done) == len(stages):
            stages[0].perform_reduce_grad(1)
            done.clear()

    for kind, call in ((UNSHARD, begin), (RESHARD, end), (REDUCE_GRAD, reduce)):
        schedule.register_custom_function(kind, call)
    return schedule
