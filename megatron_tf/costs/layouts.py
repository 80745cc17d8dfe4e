"""All layouts of a number of GPUs that the model, the batch and the memory allow, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_tf.config.nearest import divisors
from megatron_tf.config.run_plan import topology_for
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.validate import validate
from megatron_tf.costs.estimate import Memory, memory_per_rank
from megatron_tf.costs.hardware import Assumptions, Gpu
from megatron_tf.costs.roofline import StepTime, step_time
from megatron_tf.errors import ConfigError

LARGEST_MICRO_BATCH = 128


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a valid configuration on `world_size` GPUs. `fits`: whether the memory suffices."""

    config: RunConfig
    world_size: int
    memory: Memory
    fits: bool
    time: StepTime

    def overrides(self) -> list[str]:
        """Arguments of launch/train.py that choose this layout."""
        parallel, training = self.config.parallel, self.config.training
        sequence, checkpointing = (str(v).lower() for v in (parallel.sequence, training.activation_checkpointing))
        return [
            f"parallel.tensor={parallel.tensor}",
            f"parallel.pipeline={parallel.pipeline}",
            f"parallel.sequence={sequence}",
            *self._of_torch(),
            f"training.micro_batch_size={training.micro_batch_size}",
            f"training.activation_checkpointing={checkpointing}",
        ]

    def _of_torch(self) -> list[str]:
        parallel = self.config.parallel
        if parallel.engine != "torch":
            return []
        return [f"parallel.{key}={getattr(parallel, key)}" for key in ("context", "virtual_stages", "schedule")]

    def __str__(self) -> str:
        parallel, training = self.config.parallel, self.config.training
        extras = (" +sequence" if parallel.sequence else "", " +checkpointing" * training.activation_checkpointing)
        layout = topology_for(self.config, self.world_size)
        return f"{layout} micro batch {training.micro_batch_size}{''.join(extras)}"


def estimate(config: RunConfig, world_size: int, gpu: Gpu, assumed: Assumptions) -> Estimate:
    """`config` has passed `validate` for `world_size`."""
    memory = memory_per_rank(config, world_size)
    return Estimate(
        config, world_size, memory, assumed.fits(memory.total, gpu), step_time(config, world_size, gpu, assumed)
    )


def ranked(config: RunConfig, world_size: int, gpu: Gpu, assumed: Assumptions) -> list[Estimate]:
    """All layouts that fit, the fastest step first; among equals, the one with smaller context and tensor groups.

    Tensor, pipeline, context and data sizes, sequence, micro batch and checkpointing vary. The global batch and all
    other settings stay. Tensor groups do not leave a node. Empty when no layout fits.
    """
    found = (estimate(candidate, world_size, gpu, assumed) for candidate in _candidates(config, world_size, gpu))
    fitting = [choice for choice in found if choice.fits]
    return sorted(fitting, key=_rank_of)


def _rank_of(choice: Estimate) -> tuple[float, int, int]:
    parallel = choice.config.parallel
    return choice.time.total, parallel.context, parallel.tensor


def _candidates(config: RunConfig, world_size: int, gpu: Gpu) -> Iterator[RunConfig]:
    model, batch = config.model, config.training.global_batch_size
    for tensor in _divisors(min(gpu.per_node, world_size), world_size):
        if model.num_attention_heads % tensor:
            continue
        for pipeline in _divisors(min(model.num_layers, world_size // tensor), world_size // tensor):
            for context in _context_sizes(config, tensor, world_size // (tensor * pipeline)):
                data = world_size // (tensor * pipeline * context)
                if batch % data:
                    continue
                parallel: dict[str, int | str] = {"tensor": tensor, "pipeline": pipeline, "context": context}
                if pipeline == 1:
                    parallel |= {"virtual_stages": 1, "schedule": "1f1b"}
                for micro in _divisors(min(LARGEST_MICRO_BATCH, batch // data), batch // data):
                    for sequence in (False, True)[: 1 + (tensor > 1)]:
                        for checkpointing in (False, True):
                            candidate = _with(config, {**parallel, "sequence": sequence}, micro, checkpointing)
                            if _is_valid(candidate, world_size):
                                yield candidate


def _context_sizes(config: RunConfig, tensor: int, ranks: int) -> list[int]:
    """Context sizes to try: divisors of `ranks`, the ranks that hold the same part of the model."""
    if config.parallel.engine != "torch":
        return [1]
    return _divisors(config.model.num_attention_heads // tensor, ranks)


def _with(config: RunConfig, parallel: Mapping[str, int | str], micro_batch: int, checkpointing: bool) -> RunConfig:
    training = {"micro_batch_size": micro_batch, "activation_checkpointing": checkpointing}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=parallel),
            "training": config.training.model_copy(update=training),
        }
    )


def _is_valid(config: RunConfig, world_size: int) -> bool:
    try:
        validate(config, world_size)
    except ConfigError:
        return False
    return True


def _divisors(largest: int, number: int) -> list[int]:
    """The divisors of `number` up to `largest`."""
    return [size for size in divisors(number) if size <= largest]
