"""The shared part of engines with a `SegmentedOptimizer`: loading, reading and comparing logical state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.checkpoint.writer import Piece
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.run_plan import BatchPlan
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.config.tasks import task_of
from megatron_tf.engine.base import Age, Evaluated
from megatron_tf.engine.optimizer import Segment, SegmentedOptimizer
from megatron_tf.engine.schedule import learning_rate, new_tokens_factor
from megatron_tf.engine.shards import ShardedParameter
from megatron_tf.engine.step_clock import StepClock
from megatron_tf.errors import CheckpointError
from megatron_tf.model.drop_path import DropPath
from megatron_tf.model.gram import StepMatrices
from megatron_tf.optimizers.base import MatrixRule
from megatron_tf.parallel.groups import Group
from megatron_tf.state.lr_rule import PLAIN, factors
from megatron_tf.state.parameters import ParameterSpec, layer_of, matrix_rows, parameter_table
from megatron_tf.state.sources import StateSource
from megatron_tf.tasks.data import Batch


class Fragment(NamedTuple):
    """Elements [start, stop) of a logical tensor, whose fp32 state lies in `buffer` from `offset` on.

    `owned`: false if another rank saves the same elements.
    """

    spec: ParameterSpec
    buffer: Tensor
    start: int
    stop: int
    offset: int
    owned: bool


class SegmentedEngine(ABC):
    """See `base.Engine`. A subclass sets `optimizer` and then calls `_load`."""

    optimizer: SegmentedOptimizer

    def __init__(
        self,
        config: RunConfig,
        model: Model,
        plan: BatchPlan,
        source: StateSource,
        first_new: Mapping[str, int] | None,
        new_layers: Collection[int],
    ):
        self.config = config
        self.model = model
        self.plan = plan
        self.clock = StepClock()
        self.steps_skipped = 0
        self._task = task_of(model)
        self._masks_losses = self._task.masks_losses(config)
        self._drop_path: DropPath | None = None
        if config.training.drop_path:
            self._drop_path = DropPath(config.training.drop_path, model.num_layers, config.run.seed)
        self._of_steps: list[StepMatrices] = []
        self._first_new = first_new or {}
        self._new_layers = frozenset(new_layers)
        self._scales = dict(source.scales)
        self._loaded_steps = {
            name: source.adam_steps(name, 0, spec.numel) for name, spec in parameter_table(model).items()
        }

    def _set_learning_rates(self, step: int, factor: float) -> float:
        """Sets the learning rates of the 0-based `step`, and returns the schedule's rate times `factor`."""
        position = self.plan.schedule_position(step)
        lr = factor * learning_rate(position, self.config.optimizer, self.plan.schedule_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.new_tokens_factor = new_tokens_factor(position, self.config.growth)
        return lr

    def _begin_step(self) -> None:
        """Is called before the first micro batch of a step."""
        for matrices in self._of_steps:
            matrices.begin(self.plan.num_micro_batches)

    def _branches(self, step: int) -> Iterator[Tensor | None]:
        """`BlockContext.branches` of each micro batch of this rank in the 0-based `step`."""
        plan, chosen = self.plan, self._drop_path
        for micro in range(plan.num_micro_batches):
            first = (micro * plan.data_parallel + self._data_rank) * plan.micro_batch_size
            places = range(first, first + plan.micro_batch_size)
            yield None if chosen is None else chosen.scales(step, places).to(self._device)

    @property
    @abstractmethod
    def _data_rank(self) -> int: ...

    @abstractmethod
    def shards(self) -> list[ShardedParameter]:
        """Every parameter of this rank once, in model order."""

    @abstractmethod
    def _own_nonfinite(self) -> list[str]:
        """The parameters of this rank whose gradient was inf or nan in the step that was just skipped."""

    @abstractmethod
    def _evaluation_sums(self, batches: Iterable[Batch], num_micro_batches: int) -> list[Tensor]:
        """On the last stage `tasks.layers.evaluation_sums` of each micro batch; empty elsewhere."""

    @property
    @abstractmethod
    def _rows(self) -> Group:
        """The ranks that share the rows of this rank's matrices and of their optimizer state."""

    @property
    @abstractmethod
    def _device(self) -> torch.device: ...

    @property
    def scales(self) -> dict[str, float]:
        """τ of every projection of the whole model."""
        return dict(self._scales)

    def nonfinite_gradients(self) -> list[str]:
        """The parameters, over all ranks, whose gradient was inf or nan in the step that was just skipped.

        All ranks must call it.
        """
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, self._own_nonfinite())
        named = {name for names in everyone for name in names}
        # in the model's order
        return [name for name in self._loaded_steps if name in named]

    @torch.no_grad()
    def evaluate_groups(self, batches: Iterable[Batch], groups: Sequence[int], num_groups: int) -> Evaluated:
        """Evaluates the batches of all data-parallel ranks. Identical on all ranks, which must all call it.

        `groups`: the group, below `num_groups`, of each of this rank's samples in the order of `batches`.
        """
        metrics = self._task.metrics
        sums = self._evaluation_sums(batches, len(groups) // self.plan.micro_batch_size)
        totals = torch.zeros(2 + len(metrics), num_groups, dtype=torch.float64, device=self._device)
        if sums and self._tensor_rank == 0:
            members = F.one_hot(torch.tensor(groups, device=totals.device), num_groups)
            totals += torch.cat(sums, 1).double() @ members.double()
        dist.all_reduce(totals)
        losses, counts, *measured = totals.tolist()
        by_group = [loss / count if count else None for loss, count in zip(losses, counts)]
        mean, *means = (sum(sums) / max(1.0, sum(counts)) for sums in (losses, *measured))
        return Evaluated(mean, by_group, dict(zip(metrics, means)))

    @property
    @abstractmethod
    def _tensor_rank(self) -> int: ...

    def pieces(self) -> list[Piece]:
        """Live views of the state this rank saves; over all ranks each logical element is there exactly once."""
        return [
            Piece(segment.name, state, segment.start, segment.stop, tensor)
            for segment in self.optimizer.segments
            if segment.owned
            for state, tensor in self.optimizer.states(segment).items()
        ]

    def ages(self) -> list[Age]:
        """The number of updates of the elements that this rank saves."""
        return [
            Age(segment.name, segment.start, segment.stop, int(segment.age))
            for segment in self.optimizer.segments
            if segment.owned
        ]

    def adam_steps(self) -> dict[str, tuple[tuple[int, int, int], ...]]:
        """Update counts of the whole model: name -> ((start, stop, updates), ...)."""
        done = self.optimizer.num_updates
        return {
            name: tuple((start, stop, steps + done) for start, stop, steps in ranges)
            for name, ranges in self._loaded_steps.items()
        }

    @property
    def before_update(self) -> Callable[[], None] | None:
        return self.optimizer.before_update

    @before_update.setter
    def before_update(self, call: Callable[[], None] | None) -> None:
        self.optimizer.before_update = call

    @property
    def on_gradients(self) -> Callable[[Segment, Tensor], None] | None:
        return self.optimizer.observe

    @on_gradients.setter
    def on_gradients(self, call: Callable[[Segment, Tensor], None] | None) -> None:
        self.optimizer.observe = call

    def check_replicas(self) -> None:
        """CheckpointError, on every rank, with the tensor and the ranks, when copies of one tensor differ.

        It compares tensors that several ranks hold: the final norm over the tensor ranks, the tied weight of the first
        and the last stage, and all weights over data-parallel ranks where an engine keeps them whole. Reads these
        tensors into main memory, one at a time. All ranks must call it.
        """
        own = {
            f"{fragment.spec.name} from row {fragment.start // fragment.spec.width}": _digest(_elements(fragment))
            for fragment in self._replicated()
        }
        everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, own)
        problems = []
        for name in sorted({name for copies in everyone for name in copies}):
            holders: dict[str, list[int]] = {}
            for rank, copies in enumerate(everyone):
                if name in copies:
                    holders.setdefault(copies[name], []).append(rank)
            if len(holders) > 1:
                problems.append(f"{name}: " + " differ from ".join(f"ranks {ranks}" for ranks in holders.values()))
        if problems:
            raise CheckpointError(
                f"copies of one parameter have drifted apart: {'; '.join(problems)}. Nothing was saved. Resume from "
                "the last checkpoint; if it happens again, look for a failing device among these ranks."
            )

    def _replicated(self) -> list[Fragment]:
        """This rank's fragments of tensors of which several ranks hold the same elements."""
        return [
            Fragment(shard.spec, shard.parameter, first, first + shard.parameter.numel(), 0, shard.owned)
            for shard in self.shards()
            if self.plan.data_parallel > 1 or not shard.spec.sharded or shard.spec.tied
            for first in (shard.first_row * shard.spec.width,)
        ]

    @torch.no_grad()
    def _load(self, source: StateSource, fragments: Iterable[Fragment]) -> None:
        """Binds the optimizer to `fragments` and writes their state."""
        segments = []
        rule = factors(self.model, self.config.optimizer)
        for spec, buffer, start, stop, offset, owned in fragments:
            by_rule = rule.get(spec.name, PLAIN)
            for low, high, updates in source.adam_steps(spec.name, start, stop):
                for first, last, multiplier, new in self._learning_rates(spec, low, high):
                    segments.append(
                        Segment(
                            spec.name,
                            first,
                            last,
                            buffer,
                            offset + first - start,
                            owned,
                            spec.decayed,
                            torch.tensor(float(updates), device=buffer.device),
                            multiplier * by_rule.lr,
                            by_rule.weight_decay,
                            new,
                        )
                    )
        matrices = [shard.spec for shard in self.shards() if matrix_rows(shard.spec)]
        self.optimizer.bind(segments, matrices if isinstance(self.optimizer.rule, MatrixRule) else (), self._rows)
        for segment in segments:
            for state, tensor in self.optimizer.states(segment).items():
                source.read_into(segment.name, state, segment.start, tensor)

    def _learning_rates(self, spec: ParameterSpec, start: int, stop: int) -> Iterator[tuple[int, int, float, bool]]:
        """[start, stop) cut where new tokens begin: each part's multiplier by growth, and whether it is of new tokens.

        The multiplier of new tokens is the optimizer's `new_tokens_factor`, because it may change from step to step.
        """
        if self.config.growth is None:
            yield start, stop, 1.0, False
            return
        rates = self.config.growth.lr_multipliers
        if layer_of(spec.name) in self._new_layers or not spec.growable:
            yield start, stop, rates.new_layers if layer_of(spec.name) in self._new_layers else rates.other, False
            return
        boundary = min(max(self._first_new.get(spec.name, stop), start), stop)
        if rates.new_tokens_decay_steps is None and rates.old_tokens == rates.new_tokens:
            boundary = stop
        if start < boundary:
            yield start, boundary, rates.old_tokens, False
        if boundary < stop:
            yield boundary, stop, 1.0, True

    def _reports(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A step's auxiliary losses and metrics, the same on all ranks, from their sums over this rank's blocks."""
        architecture, model = architecture_of(self.model), self.model
        losses, metrics = architecture.losses(model), architecture.metrics(model)
        names = (*losses, *metrics)
        if not names:
            return {}
        sums = torch.stack([torch.as_tensor(found.get(name, 0.0), device=self._device).float() for name in names])
        dist.all_reduce(sums)
        sums /= self.plan.num_micro_batches * self.plan.data_parallel * self.config.parallel.context
        sums[len(losses) :] /= model.num_layers
        return dict(zip(names, sums))


def _elements(fragment: Fragment) -> Tensor:
    length = fragment.stop - fragment.start
    return fragment.buffer.detach().reshape(-1)[fragment.offset : fragment.offset + length]


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().view(torch.uint8).cpu().numpy().data
    return xxhash.xxh3_128(data).hexdigest()
