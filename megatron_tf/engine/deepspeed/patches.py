"""Every private part of DeepSpeed 0.19.8 that this package replaces or reads, and why.

| what | why |
|---|---|
| `ops.__compatible_ops__` | a CPU compiles `deepspeed_shm_comm` for a minute; a killed build leaves a lock |
| `PipelineEngine._INSTRUCTION_MAP` | the only place that tells forward, backward and communication of a step apart |
| `clip_fp32_gradients` | without ZeRO it discards the norm that it computed, and updates even if it is not finite |
| `clear_hp_grads`, `_update_scale` | they drop the gradients of a skipped step, so the infinite ones are noted first |
| `_hp_mapping` | it gives the places of the fp32 master weight and the moments of a parameter |
| `PipelineModule._partition_layers`, `_synchronize_tied_weights` | `TokenFormerPipeline` overrides them and says why |
| `is_fp16_supported` of a CPU | only for checks: torch emulates fp16 well enough for them |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe import schedule as instructions
from torch import Tensor, nn

from megatron_tf.engine.shards import ShardedParameter
from megatron_tf.engine.step_clock import StepClock

# Phase of each instruction of the pipeline engine. ZeRO communicates in the optimizer's step as well.
PHASE_OF = {
    instructions.LoadMicroBatch: "data",
    instructions.ForwardPass: "forward",
    instructions.BackwardPass: "backward",
    instructions.OptimizerStep: "optimizer",
    **dict.fromkeys(
        (
            instructions.ReduceGrads,
            instructions.ReduceTiedGrads,
            instructions.SendActivation,
            instructions.RecvActivation,
            instructions.SendGrad,
            instructions.RecvGrad,
        ),
        "communication",
    ),
}


def attach() -> None:
    """Initialises DeepSpeed's communication on the ranks that torch.distributed has joined."""
    # Only its communication reads this table, for this op. Building the real table would try to compile every op.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def has_fp16() -> bool:
    """Whether DeepSpeed trains in fp16 on this device."""
    return get_accelerator().is_fp16_supported()


def allow_fp16_on_cpu() -> None:
    """Lets DeepSpeed train in fp16 on a processor without fp16 instructions, slowly. For checks."""
    get_accelerator().is_fp16_supported = lambda: True


def time_phases(engine: Any, clock: StepClock) -> None:
    """Makes `clock` measure the phase of each instruction of a step."""
    engine._INSTRUCTION_MAP = {
        instruction: _timed(work, PHASE_OF[instruction], clock) for instruction, work in engine._INSTRUCTION_MAP.items()
    }


def _timed(work: Callable[..., None], phase: str, clock: StepClock) -> Callable[..., None]:
    def timed(engine: Any, **arguments: Any) -> None:
        with clock.phase(phase):
            work(engine, **arguments)

    return timed


def clip_by_true_norm(engine: Any, clip: Callable[[], None]) -> None:
    """Without ZeRO: replaces DeepSpeed's clipping by `clip`."""
    engine.clip_fp32_gradients = clip


def master_fragment(parameter: nn.Parameter) -> tuple[Any, Any] | None:
    """This data-parallel rank's part of the parameter under ZeRO: (range within the parameter, range within the flat
    fp32 buffer), each with `start` and `numel` in elements. None when it has no part."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    return None if mapping is None else (mapping.lp_fragment_address, mapping.get_hp_fragment_address())


def watch_nonfinite(wrapper: Any, shards: Iterable[ShardedParameter]) -> Callable[[], list[str]]:
    """Returns a function that returns the names of this rank's parameters whose gradients were not finite in the last
    skipped step.

    DeepSpeed drops the gradients of a skipped step before its caller can read them. So this wraps a call between the
    decision to skip and the dropping: with bf16 the clearing itself, otherwise the update of the loss scale.
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
