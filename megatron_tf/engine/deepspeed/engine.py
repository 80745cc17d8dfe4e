"""A model under a layout, run by DeepSpeed."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import xxhash
from deepspeed.runtime.utils import clip_grad_norm_
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.checkpoint.writer import Piece
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.deepspeed_config import deepspeed_config
from megatron_tf.config.schema import Model, RunConfig
from megatron_tf.config.tasks import task_of
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import BatchPlan
from megatron_tf.engine.base import Age, Evaluated, StepResult
from megatron_tf.engine.deepspeed.patches import clip_by_true_norm, master_fragment, time_phases, watch_nonfinite
from megatron_tf.engine.deepspeed.pipeline import ShardedParameter, TokenFormerPipeline
from megatron_tf.engine.optimizer import Segment, SegmentedOptimizer
from megatron_tf.engine.schedule import learning_rate
from megatron_tf.engine.step_clock import StepClock
from megatron_tf.errors import CheckpointError
from megatron_tf.model.layers import TensorParallel
from megatron_tf.model.stage import Stage
from megatron_tf.parallel.groups import Group
from megatron_tf.state.parameters import ParameterSpec, layer_of, parameter_table
from megatron_tf.state.sources import StateSource
from megatron_tf.tasks.data import Batch


class DeepSpeedEngine:
    """`base.Engine` on DeepSpeed: pipeline stages by its PipelineModule, the optimizer's state sharded by its ZeRO."""

    def __init__(
        self,
        config: RunConfig,
        model: Model,
        plan: BatchPlan,
        topology: Topology,
        tensor: Group,
        source: StateSource,
        first_new: Mapping[str, int] | None = None,
        document_ends: Sequence[int] = (),
        new_layers: Collection[int] = (),
    ):
        """`model` and the weights, moments and τ of `source` must belong together.

        `first_new`: for each tensor that the run's growth made bigger, the element where its new tokens begin.
        `document_ends`: the tokens after which attention begins anew.  `new_layers`: those that the run's growth added.
        """
        self.config = config
        self.model = model
        self.plan = plan
        self.clock = clock = StepClock()
        # Inside a compiled block collectives cannot be timed separately: their time counts as forward and backward.
        if not config.training.compile:
            tensor = replace(tensor, around=lambda: clock.phase("communication"))
        self._pipeline = TokenFormerPipeline(
            model, source.scales, topology, TensorParallel(tensor, config.parallel.sequence), document_ends
        )
        self._task = task_of(model)
        self._masks_losses = task_of(model).masks_losses(config)
        self._pipeline.loss_weight = 1 / (plan.micro_batch_size * self._task.losses_per_sample(model))
        for block in self._pipeline.blocks().values():
            block.recompute = config.training.activation_checkpointing
            if config.training.compile:
                block.compile()
        with contextlib.redirect_stdout(io.StringIO()):
            self._deepspeed, self._wrapper, _, _ = deepspeed.initialize(
                model=self._pipeline,
                optimizer=SegmentedOptimizer([shard.parameter for shard in self._pipeline.shards()], config.optimizer),
                config=deepspeed_config(config, plan),
                dist_init_required=False,
            )
        time_phases(self._deepspeed, clock)
        self.optimizer: SegmentedOptimizer = self._deepspeed.basic_optimizer
        self._stage_0_norm: float | None = None
        if config.zero.stage:
            self._nonfinite = watch_nonfinite(self._wrapper, self._pipeline.shards())
        else:
            clip_by_true_norm(self._deepspeed, self._clip_at_stage_0)
        if config.training.precision == "fp16":
            # Otherwise DeepSpeed ends the run by an exception of its own. The guard decides, as for other precisions.
            self._wrapper.loss_scaler.raise_error_at_min_scale = False
        self._first_new = first_new or {}
        self._new_layers = frozenset(new_layers)
        self.steps_skipped = 0  # steps without an update so far, because a gradient was not finite
        self._scales = dict(source.scales)
        self._loaded_steps = {
            name: source.adam_steps(name, 0, spec.numel) for name, spec in parameter_table(model).items()
        }
        self._load(source)

    @property
    def scales(self) -> dict[str, float]:
        """τ of every projection of the whole model."""
        return dict(self._scales)

    def train_step(self, step: int, batches: Iterator[Batch], lr_factor: float = 1.0) -> StepResult:
        """One optimizer step (0-based `step`) on `plan.num_micro_batches` batches of this data-parallel rank.

        `lr_factor`: times the learning rate that the schedule gives.
        """
        position, length = self.plan.schedule_position(step), self.plan.schedule_steps
        lr = lr_factor * learning_rate(position, self.config.optimizer, length)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        updates = self.optimizer.num_updates
        can_fall = self._loss_scale_can_fall()
        # DeepSpeed scales the loss of the last stage so; an auxiliary loss has its gradient from here, at any stage
        scale = self.loss_scaler().get("cur_scale", 1.0)
        self._pipeline.auxiliary_weight = scale / self.plan.num_micro_batches
        self._pipeline.reports = {}
        loss = self._deepspeed.train_batch(self._weighed(batches) if self._masks_losses else batches)
        norm = self._deepspeed.get_global_grad_norm() if self.config.zero.stage else self._stage_0_norm
        skipped = self.optimizer.num_updates == updates
        self.steps_skipped += skipped
        return StepResult(
            loss, norm, lr, skipped, skipped and can_fall, self.loss_scaler().get("cur_scale"), self._reports()
        )

    def _reports(self) -> dict[str, Tensor]:
        """The step's auxiliary losses and metrics, the same on all ranks."""
        architecture, model = architecture_of(self.model), self.model
        losses, metrics = architecture.losses(model), architecture.metrics(model)
        names = (*losses, *metrics)
        if not names:
            return {}
        found = self._pipeline.reports
        device = self._deepspeed.device
        sums = torch.stack([torch.as_tensor(found.get(name, 0.0), device=device).float() for name in names])
        dist.all_reduce(sums)
        sums /= self.plan.num_micro_batches * self.plan.data_parallel
        sums[len(losses) :] /= model.num_layers
        return dict(zip(names, sums))

    def nonfinite_gradients(self) -> list[str]:
        """The parameters, over all ranks, whose gradient was inf or nan in the step that was just skipped.

        All ranks must call it. Empty without ZeRO, where nobody looks.
        """
        own = self._nonfinite() if self.config.zero.stage else []
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, own)
        named = {name for names in everyone for name in names}
        return [name for name in self._loaded_steps if name in named]  # in the model's order

    @property
    def reads_data(self) -> bool:
        """Whether this rank takes batches: those of the inner pipeline stages do not."""
        return self._deepspeed.is_first_stage() or self._deepspeed.is_last_stage()

    @torch.no_grad()
    def evaluate_groups(self, batches: Iterable[Batch], groups: Sequence[int], num_groups: int) -> Evaluated:
        """Of every data-parallel rank together; the same on all ranks, which must all call it.

        `groups`: the group, below `num_groups`, of each of this rank's samples in the order of `batches`.
        """
        metrics = self._task.metrics
        num_micro_batches = len(groups) // self.plan.micro_batch_size
        sums = self._forward(batches, num_micro_batches)
        totals = torch.zeros(2 + len(metrics), num_groups, dtype=torch.float64, device=self._deepspeed.device)
        if self._deepspeed.is_last_stage() and self._pipeline.tensor.group.rank == 0:
            members = F.one_hot(torch.tensor(groups, device=totals.device), num_groups)
            totals += torch.cat(sums, 1).double() @ members.double()
        dist.all_reduce(totals)
        losses, counts, *measured = totals.tolist()
        by_group = [loss / count if count else None for loss, count in zip(losses, counts)]
        mean, *means = (sum(sums) / max(1.0, sum(counts)) for sums in (losses, *measured))
        return Evaluated(mean, by_group, dict(zip(metrics, means)))

    def _forward(self, batches: Iterable[Batch], num_micro_batches: int) -> Any:
        """On the last stage the pipeline's `loss` of each micro batch; None elsewhere."""
        # of the last step, which DeepSpeed would go on adding to
        self._deepspeed.total_loss = None
        return self._deepspeed.eval_batch(
            iter(batches), num_micro_batches=num_micro_batches, reduce_output=None, bcast_loss=False
        )

    def stage(self) -> Stage:
        """The model's layers on this rank, for a look into its forward pass."""
        return self._pipeline.as_stage()

    def pieces(self) -> list[Piece]:
        """Live views of the state this rank saves; over all ranks each logical element is there exactly once."""
        return [
            Piece(segment.name, state, segment.start, segment.stop, tensor)
            for segment in self.optimizer.segments
            if segment.owned
            for state, tensor in self.optimizer.states(segment).items()
        ]

    def ages(self) -> list[Age]:
        """Updates of the elements that this rank saves."""
        return [
            Age(segment.name, segment.start, segment.stop, int(segment.age))
            for segment in self.optimizer.segments
            if segment.owned
        ]

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

    def adam_steps(self) -> dict[str, tuple[tuple[int, int, int], ...]]:
        """Update counts of the whole model: name -> ((start, stop, updates), ...)."""
        done = self.optimizer.num_updates
        return {
            name: tuple((start, stop, steps + done) for start, stop, steps in ranges)
            for name, ranges in self._loaded_steps.items()
        }

    def check_replicas(self) -> None:
        """CheckpointError, on every rank, when copies of one tensor have drifted apart, naming it and the ranks.

        Compared are tensors that several ranks hold whole: such as the final norm over the tensor ranks, and what
        the first and the last stage share. All ranks must call it.
        """
        own = {
            f"{shard.spec.name} from row {shard.first_row}": _digest(shard.parameter)
            for shard in self._pipeline.shards()
            if not shard.spec.sharded or shard.spec.tied
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
                "copies of one parameter have drifted apart: "
                + "; ".join(problems)
                + ". Nothing was saved. Resume from "
                "the last checkpoint; if it happens again, look for a failing device among these ranks."
            )

    def _loss_scale_can_fall(self) -> bool:
        if self.config.training.precision != "fp16":
            return False
        scaler = self._wrapper.loss_scaler
        return scaler.cur_scale > scaler.min_scale

    def loss_scaler(self) -> dict[str, Any]:
        """State of the fp16 loss scaler; empty for other precisions."""
        if self.config.training.precision != "fp16":
            return {}
        scaler = self._wrapper.loss_scaler
        return {key: getattr(scaler, key) for key in _SCALER_STATE}

    def load_loss_scaler(self, state: dict[str, Any]) -> None:
        if self.config.training.precision == "fp16":
            for key in _SCALER_STATE & state.keys():
                setattr(self._wrapper.loss_scaler, key, state[key])

    def close(self) -> None:
        """Frees the parameters and buffers."""
        self._deepspeed.destroy()

    def _weighed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Sets the loss weight so that the step's loss is the mean over all losses of the global batch that count.
        Yields the same batches.

        DeepSpeed averages over M micro batches and D data-parallel ranks, however many such losses they have. With N of
        them in the step, over all ranks, the weight of a loss is M·D / N.
        """
        if not self._deepspeed.is_last_stage():
            return batches
        taken = list(itertools.islice(batches, self.plan.num_micro_batches))
        counts = (self._pipeline.task_layers.counts(targets).sum() for _, targets in taken)
        count = torch.stack(list(counts)).sum().to(self._deepspeed.device)
        dist.all_reduce(count, group=self._deepspeed.mpu.get_data_parallel_group())
        self._pipeline.loss_weight = self.plan.num_micro_batches * self.plan.data_parallel / count.clamp_min(1)
        return iter(taken)

    def _clip_at_stage_0(self) -> None:
        """DeepSpeed's own clipping without ZeRO, which forgets the norm it computed and updates whatever it was."""
        norm = clip_grad_norm_(
            parameters=self._pipeline.parameters(),
            max_norm=self.config.training.gradient_clipping or math.inf,
            mpu=self._deepspeed.mpu,
        )
        self._stage_0_norm = float(norm)
        self.optimizer.skip_next = not math.isfinite(self._stage_0_norm)

    @torch.no_grad()
    def _load(self, source: StateSource) -> None:
        fragments = [f for shard in self._pipeline.shards() for f in self._fragments(shard)]
        segments = []
        for shard, buffer, start, stop, offset, owned in fragments:
            for low, high, updates in source.adam_steps(shard.spec.name, start, stop):
                for first, last, multiplier in self._learning_rates(shard.spec, low, high):
                    age = torch.tensor(float(updates), device=buffer.device)
                    segments.append(
                        Segment(shard.spec.name, first, last, buffer, offset + first - start, owned,
                                shard.spec.decayed, age, multiplier)
                    )  # fmt: skip
        self.optimizer.bind(segments)
        for segment in segments:
            for state, tensor in self.optimizer.states(segment).items():
                source.read_into(segment.name, state, segment.start, tensor)
        if self.config.zero.stage:
            # fp32 master weights were written, not made from rounded ones; now the model's copy follows them
            self._wrapper.update_lp_params()

    def _learning_rates(self, spec: ParameterSpec, start: int, stop: int) -> Iterator[tuple[int, int, float]]:
        """[start, stop) cut where new tokens begin, each part with its learning rate multiplier."""
        if self.config.growth is None:
            yield start, stop, 1.0
            return
        rates = self.config.growth.lr_multipliers
        if layer_of(spec.name) in self._new_layers or not spec.growable:
            yield start, stop, rates.new_layers if layer_of(spec.name) in self._new_layers else rates.other
            return
        boundary = min(max(self._first_new.get(spec.name, stop), start), stop)
        if rates.old_tokens == rates.new_tokens:
            boundary = stop
        for first, last, rate in ((start, boundary, rates.old_tokens), (boundary, stop, rates.new_tokens)):
            if first < last:
                yield first, last, rate

    def _fragments(self, shard: ShardedParameter) -> Iterator[tuple[ShardedParameter, Tensor, int, int, int, bool]]:
        """(shard, buffer, start, stop, offset, owned): where this rank keeps the shard's fp32 state, if it does."""
        first = shard.first_row * shard.spec.width
        if not self.config.zero.stage:
            owned = shard.owned and self._deepspeed.mpu.get_data_parallel_rank() == 0
            yield shard, shard.parameter, first, first + shard.parameter.numel(), 0, owned
            return
        found = master_fragment(shard.parameter)
        # None where the partition of this data-parallel rank holds nothing of it
        if found is not None:
            (group,) = self.optimizer.param_groups
            (buffer,) = group["params"]
            local, flat = found
            start = first + local.start
            yield shard, buffer, start, start + local.numel, flat.start, shard.owned


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().view(torch.uint8).cpu().numpy().data
    return xxhash.xxh3_128(data).hexdigest()


_SCALER_STATE = {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"}
