"""The interface of an engine to the rest of the package.

An engine holds the weights and the optimizer's state of one rank. State goes in and out as ranges of logical tensors,
so its callers do not depend on how an engine lays it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from megatron_tf.checkpoint.writer import Piece
from megatron_tf.config.run_plan import BatchPlan
from megatron_tf.engine.optimizer import Segment
from megatron_tf.engine.step_clock import StepClock
from megatron_tf.model.stage import Stage
from megatron_tf.tasks.data import Batch


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over the global batch, on the device. `grad_norm`: before clipping.

    `skipped`: the gradient was not finite on some rank, so nothing was updated. `seeks_scale`: a step was skipped in
    fp16 while the loss scale could still fall, which is how the scale is found. `loss_scale`: for the next step; None
    unless in fp16.
    `reports`: auxiliary losses and metrics of the model's architecture.
    """

    loss: Tensor
    grad_norm: Tensor | float | None
    lr: float
    skipped: bool
    seeks_scale: bool = False
    loss_scale: float | None = None
    reports: Mapping[str, Tensor] = field(default_factory=dict)


class Age(NamedTuple):
    """Elements [start, stop) of a logical tensor have had `updates` updates by the optimizer."""

    name: str
    start: int
    stop: int
    updates: int


class Evaluated(NamedTuple):
    """`loss`: mean over all unmasked losses.  `by_group`: the mean of each group; None for a group without any.

    `metrics`: the means of `Task.metrics` by name.
    """

    loss: float
    by_group: list[float | None]
    metrics: Mapping[str, float]


class Engine(Protocol):
    """One rank's part of a model in training. All ranks call each method together.

    `clock`: measures the phases of a step.
    `steps_skipped`: steps without an update so far, because a gradient was not finite.
    `before_update`: called before the state changes; between two of its calls no state changes at all.
    `on_gradients`: called with every segment of this rank and its final gradient, averaged and clipped, before the
    update.
    """

    plan: BatchPlan
    clock: StepClock
    steps_skipped: int
    before_update: Callable[[], None] | None
    on_gradients: Callable[[Segment, Tensor], None] | None

    @property
    def scales(self) -> dict[str, float]:
        """τ of every projection of the whole model."""
        ...

    @property
    def reads_data(self) -> bool:
        """Whether this rank takes batches. Ranks of inner pipeline stages may not."""
        ...

    def train_step(self, step: int, batches: Iterator[Batch], lr_factor: float = 1.0) -> StepResult:
        """One optimizer step (0-based `step`) on `plan.num_micro_batches` batches of this data-parallel rank.

        `lr_factor`: times the learning rate that the schedule gives.
        """
        ...

    def nonfinite_gradients(self) -> list[str]:
        """The parameters, over all ranks, whose gradient was inf or nan in the step that was just skipped."""
        ...

    def evaluate_groups(self, batches: Iterable[Batch], groups: Sequence[int], num_groups: int) -> Evaluated:
        """Evaluates the batches of all data-parallel ranks. The result is identical on all ranks.

        `groups`: the group, below `num_groups`, of each of this rank's samples in the order of `batches`.
        """
        ...

    def stage(self) -> Stage:
        """The model's layers on this rank, for forward passes outside of training."""
        ...

    def pieces(self) -> list[Piece]:
        """Live views of the state this rank saves; over all ranks each logical element is there exactly once."""
        ...

    def ages(self) -> list[Age]:
        """The number of updates of the elements that this rank saves."""
        ...

    def adam_steps(self) -> dict[str, tuple[tuple[int, int, int], ...]]:
        """The number of updates for the whole model: name -> ((start, stop, updates), ...)."""
        ...

    def check_replicas(self) -> None:
        """CheckpointError, on every rank, with the tensor and the ranks, when copies of one tensor differ."""
        ...

    def loss_scaler(self) -> dict[str, Any]:
        """State of the fp16 loss scaler, ready for JSON; empty for other precisions."""
        ...

    def load_loss_scaler(self, state: dict[str, Any]) -> None:
        """Restores a state that `loss_scaler` returned."""
        ...

    def close(self) -> None:
        """Frees the parameters and buffers."""
        ...
