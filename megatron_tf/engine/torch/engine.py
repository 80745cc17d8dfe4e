"""A model under a layout, run by torch alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.config.run_plan import BatchPlan
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.config.topology import Topology
from megatron_tf.engine.base import StepResult
from megatron_tf.engine.optimizer import SegmentedOptimizer
from megatron_tf.engine.segmented import Fragment, SegmentedEngine
from megatron_tf.engine.shards import ShardedParameter, shards_of
from megatron_tf.engine.torch import sharding
from megatron_tf.engine.torch.loss_scale import LossScale
from megatron_tf.model.context import BlockContext, add_report, of_all_positions
from megatron_tf.model.filling import allocate
from megatron_tf.model.layers import Block, TensorParallel
from megatron_tf.model.precision import DTYPES
from megatron_tf.model.projection import choose_forms
from megatron_tf.model.stage import Stage, build_stage
from megatron_tf.parallel.groups import Group, make_group
from megatron_tf.state.sources import StateSource
from megatron_tf.tasks.data import Batch
from megatron_tf.tasks.layers import evaluation_sums

if TYPE_CHECKING:
    from megatron_tf.engine.torch.pipeline import Pipeline


class TorchEngine(SegmentedEngine):
    """`base.Engine` on torch: parameters, gradients and optimizer state sharded by `fully_shard`, pipelines by
    torch.distributed.pipelining."""

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
        super().__init__(config, model, plan, source, first_new, new_layers)
        clock, rank, timeout = self.clock, dist.get_rank(), config.parallel.timeout_seconds
        context = make_group(topology, "context", timeout)
        # Inside a compiled block collectives cannot be timed separately: their time counts as forward and backward.
        if not config.training.compile:
            tensor = replace(tensor, around=lambda: clock.phase("communication"))
            context = replace(context, around=lambda: clock.phase("communication"))
        self._topology = topology
        self._tensor = tensor
        self._replicas = make_group(topology, "replicas", timeout)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._on = device
        dtype = DTYPES[config.training.compute_type]
        with torch.device("meta"):
            self._stage = build_stage(
                model,
                source.scales,
                topology,
                rank,
                TensorParallel(tensor, config.parallel.sequence, context),
                document_ends,
            )
        allocate(self._stage, device)
        for block in self._stage.blocks.values():
            assert isinstance(block, Block)
            block.recompute = config.training.activation_checkpointing
            self._of_steps += choose_forms(block, config.training, device.type)
            if config.training.compile:
                block.compile_for(device.type, dtype)
        self._keep_gradients = config.parallel.shard == "optimizer"
        self._stage.hidden_dtype = dtype
        self._is_sharded = sharding.shard(
            self._stage,
            self._replicas,
            timeout,
            dtype,
            device,
            keep=config.parallel.shard != "parameters",
            keep_gradients=self._keep_gradients,
        )
        self._context = BlockContext()
        self._of_step: list[Tensor | None] = []
        self._found: dict[str, Tensor] = {}
        # gradients are means over the replicas, of which the context ranks have each a part of the same losses
        self._loss_weight: Tensor | float = topology.context / (
            plan.num_micro_batches * plan.micro_batch_size * self._task.losses_per_sample(model)
        )
        # of fp16 alone: the loss is multiplied by it, and gradients are divided by it again
        self._loss_scale = LossScale(config.deepspeed.fp16) if config.training.precision == "fp16" else None
        self._pipeline: Pipeline | None = None
        pipeline = make_group(topology, "pipeline", timeout)
        if pipeline.handle is not None:
            # imported where it is needed, because it takes as long as torch itself
            from megatron_tf.engine.torch.pipeline import Pipeline

            self._pipeline = Pipeline(
                self._stage,
                topology,
                rank,
                pipeline.handle,
                schedule=config.parallel.schedule,
                num_micro_batches=plan.num_micro_batches,
                device=device,
                clock=clock,
                context=self._next_context,
            )
        self._tied = sharding.tied_group(topology, timeout) if self._task.tied and topology.pipeline > 1 else None
        self._sharing = sharding.row_group(topology, tensor, self._replicas, timeout)
        self._shards = shards_of(self._stage, topology)
        found = ((shard, sharding.fragment(shard, self._replicas)) for shard in self._shards)
        self._fragments = [(shard, fragment) for shard, fragment in found if fragment is not None]
        self._skipped: list[str] = []
        self.optimizer = SegmentedOptimizer([fragment.buffer for _, fragment in self._fragments], config.optimizer)
        self._load(source, (fragment for _, fragment in self._fragments))

    @property
    def _device(self) -> torch.device:
        return self._on

    @property
    def _rows(self) -> Group:
        return self._sharing

    @property
    def _data_rank(self) -> int:
        return self._topology.coordinate("data", dist.get_rank())

    @property
    def _tensor_rank(self) -> int:
        return self._tensor.rank

    @property
    def reads_data(self) -> bool:
        """Always True: stages find the starts of documents, and the shape of hidden states, in the inputs."""
        return True

    def shards(self) -> list[ShardedParameter]:
        """Every parameter of this rank once, in model order."""
        return self._shards

    def stage(self) -> Stage:
        """The model's layers on this rank, for forward passes outside of training."""
        return self._stage

    def train_step(self, step: int, batches: Iterator[Batch], lr_factor: float = 1.0) -> StepResult:
        """One optimizer step (0-based `step`) on `plan.num_micro_batches` batches of this data-parallel rank.

        `lr_factor`: times the learning rate that the schedule gives.
        """
        lr = self._set_learning_rates(step, lr_factor)
        with self.clock.phase("data"):
            taken = [
                (inputs.to(self._on), self._own(targets))
                for inputs, targets in itertools.islice(batches, self.plan.num_micro_batches)
            ]
        if self._masks_losses:
            self._weigh(taken)
        self._begin_step()
        self._found = {}
        self._of_step = list(self._branches(step))
        self._stage.train()
        losses = self._one_stage(taken) if self._pipeline is None else self._through(self._pipeline, taken)
        self._collect_reports()
        with self.clock.phase("communication"):
            self._add_tied_gradients()
            loss, norm = self._loss_and_norm(losses)
        with self.clock.phase("optimizer"):
            skipped = not self._update(norm)
        self.steps_skipped += skipped
        seeks_scale = False
        if self._loss_scale is not None:
            seeks_scale = skipped and self._loss_scale.can_fall
            self._loss_scale.update(skipped)
        context = self._stage.tensor.context
        reports = self._reports({name: of_all_positions(value, context) for name, value in self._found.items()})
        return StepResult(loss, norm, lr, skipped, seeks_scale, self.loss_scaler().get("cur_scale"), reports)

    @property
    def _scale(self) -> float:
        return 1.0 if self._loss_scale is None else self._loss_scale.value

    def _own(self, targets: Tensor) -> Tensor:
        """The targets of this context-parallel rank's positions, on the device."""
        return self._stage.tensor.own_positions(targets).to(self._on)

    def _one_stage(self, batches: Sequence[Batch]) -> list[Tensor]:
        losses = []
        for number, (inputs, targets) in enumerate(batches):
            with self.clock.phase("forward"):
                logits = self._stage(inputs, self._stage.starts(inputs), self._next_context(number))
                loss = self._loss(logits, targets)
            with self.clock.phase("backward"):
                last = number == len(batches) - 1
                if self._is_sharded:
                    sharding.set_last_backward(self._stage, last, self._keep_gradients)
                loss.backward()
            losses.append(loss.detach())
        return losses

    def _through(self, pipeline: Pipeline, batches: Sequence[Batch]) -> list[Tensor]:
        inputs, targets = zip(*batches)
        return [loss.detach() for loss in pipeline.step(inputs, targets, self._loss)]

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits [..., b, C/T], targets [b, ...] -> what the micro batch adds to the step's loss, scaled, at least
        fp32."""
        layers = self._stage.task_layers
        return layers.losses(self.model, logits, targets, self._tensor).sum() * (self._loss_weight * self._scale)

    def _next_context(self, number: int) -> BlockContext:
        """The context for a pass of micro batch `number`."""
        self._collect_reports()
        weight = self._scale / self.plan.num_micro_batches
        self._context = BlockContext(loss_weight=weight, branches=self._of_step[number])
        return self._context

    def _collect_reports(self) -> None:
        for name, value in (self._context.losses | self._context.metrics).items():
            add_report(self._found, name, value)
        self._context = BlockContext()

    def _weigh(self, batches: Sequence[Batch]) -> None:
        """Sets the loss weight so that the step's loss is the mean over all unmasked losses of the global batch.

        Gradients are means over the D replicas. With N unmasked losses over all of them, each has the weight D / N.
        """
        layers = self._stage.task_layers
        count = torch.stack([layers.counts(targets).sum() for _, targets in batches]).sum().to(self._on)
        if self._replicas.handle is not None:
            dist.all_reduce(count, group=self._replicas.handle)
        self._loss_weight = self._topology.replicas / count.clamp_min(1)

    def _add_tied_gradients(self) -> None:
        """The first and the last stage hold the same weight, and each has the gradient of its own use."""
        for shard, gradient in sharding.gradients(self._shards) if self._tied is not None else ():
            if shard.spec.tied:
                dist.all_reduce(gradient, group=self._tied)

    @torch.no_grad()
    def _loss_and_norm(self, losses: list[Tensor]) -> tuple[Tensor, float]:
        """The loss of the global batch, and the norm of its gradient; the same on all ranks."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._on)
        if losses and self._tensor.rank == 0:
            sums[0] = torch.stack(losses).sum().double() / (self._topology.replicas * self._scale)
        squares = [
            gradient.float().square().sum(dtype=torch.float64)
            for shard, gradient in sharding.gradients(self._shards)
            if shard.owned
        ]
        if squares:
            sums[1] = torch.stack(squares).sum()
        dist.all_reduce(sums)
        return sums[0].float(), math.sqrt(float(sums[1])) / self._scale

    @torch.no_grad()
    def _update(self, norm: float) -> bool:
        """Updates the weights, unless the gradient is not finite. `norm`: of the gradient without its scale."""
        limit = self.config.training.gradient_clipping
        finite = math.isfinite(norm)
        self._skipped = [] if finite else _nonfinite(self._shards)
        factor = min(1.0, limit / (norm + 1e-6)) if finite and limit else 1.0
        factor /= self._scale
        for shard, fragment in self._fragments:
            gradient = sharding.gradient(shard.parameter)
            if gradient is not None and factor != 1:
                gradient.mul_(factor)
            fragment.buffer.grad = gradient
        self.optimizer.skip_next = not finite
        self.optimizer.step()
        for _, fragment in self._fragments:
            fragment.buffer.grad = None
        for shard in self._shards:
            shard.parameter.grad = None
        return finite

    def _own_nonfinite(self) -> list[str]:
        return self._skipped

    def _evaluation_sums(self, batches: Iterable[Batch], num_micro_batches: int) -> list[Tensor]:
        self._stage.eval()
        sums = []
        for inputs, targets in itertools.islice(batches, num_micro_batches):
            logits = self._stage.infer(inputs.to(self._on))
            if logits is not None:
                layers = self._stage.task_layers
                sums.append(evaluation_sums(layers, self.model, logits, self._own(targets), self._tensor))
        return sums

    def _replicated(self) -> list[Fragment]:
        """Data-parallel ranks gather weights from each other's parts, so no two of them hold copies of their own."""
        return [fragment for shard, fragment in self._fragments if not shard.spec.sharded or shard.spec.tied]

    def loss_scaler(self) -> dict[str, Any]:
        """State of the fp16 loss scale; empty for other precisions."""
        return {} if self._loss_scale is None else self._loss_scale.state()

    def load_loss_scaler(self, state: dict[str, Any]) -> None:
        """Restores the state. Other precisions ignore it, because they have no loss scale."""
        if self._loss_scale is not None:
            self._loss_scale.load(state)

    def close(self) -> None:
        """Frees the parameters and buffers."""
        self._stage.to_empty(device="meta")
        self.optimizer.state.clear()
        self._shards, self._fragments = [], []


def _nonfinite(shards: Sequence[ShardedParameter]) -> list[str]:
    return [shard.spec.name for shard, gradient in sharding.gradients(shards) if not torch.isfinite(gradient).all()]
