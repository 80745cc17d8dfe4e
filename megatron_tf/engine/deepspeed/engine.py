"""A model under a layout, run by DeepSpeed."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import clip_grad_norm_
from torch import Tensor

from megatron_tf.config.deepspeed_config import deepspeed_config
from megatron_tf.config.run_plan import BatchPlan
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.config.topology import Topology
from megatron_tf.engine.base import StepResult
from megatron_tf.engine.deepspeed.patches import clip_by_true_norm, master_fragment, time_phases, watch_nonfinite
from megatron_tf.engine.deepspeed.pipeline import TokenFormerPipeline
from megatron_tf.engine.optimizer import SegmentedOptimizer
from megatron_tf.engine.segmented import Fragment, SegmentedEngine
from megatron_tf.engine.shards import ShardedParameter
from megatron_tf.model.layers import TensorParallel
from megatron_tf.model.precision import DTYPES
from megatron_tf.model.projection import choose_forms
from megatron_tf.model.stage import Stage
from megatron_tf.parallel.groups import Group
from megatron_tf.state.sources import StateSource
from megatron_tf.tasks.data import Batch


class DeepSpeedEngine(SegmentedEngine):
    """`base.Engine` on DeepSpeed, whose PipelineModule runs the stages and whose ZeRO shards the optimizer's state."""

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
        `document_ends`: the tokens after which attention begins anew.  `new_layers`: layers added by the run's growth.
        """
        super().__init__(config, model, plan, source, first_new, new_layers)
        clock = self.clock
        # Inside a compiled block collectives cannot be timed separately: their time counts as forward and backward.
        if not config.training.compile:
            tensor = replace(tensor, around=lambda: clock.phase("communication"))
        self._pipeline = TokenFormerPipeline(
            model, source.scales, topology, TensorParallel(tensor, config.parallel.sequence), document_ends
        )
        self._pipeline.loss_weight = 1 / (plan.micro_batch_size * self._task.losses_per_sample(model))
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        for block in self._pipeline.blocks().values():
            block.recompute = config.training.activation_checkpointing
            if config.training.compile:
                block.compile_for(device_type, DTYPES[config.training.compute_type])
        with contextlib.redirect_stdout(io.StringIO()):
            self._deepspeed, self._wrapper, _, _ = deepspeed.initialize(
                model=self._pipeline,
                optimizer=SegmentedOptimizer([shard.parameter for shard in self._pipeline.shards()], config.optimizer),
                config=deepspeed_config(config, plan),
                dist_init_required=False,
            )
        for block in self._pipeline.blocks().values():
            self._of_steps += choose_forms(block, config.training, self._deepspeed.device.type)
        time_phases(self._deepspeed, clock)
        self.optimizer: SegmentedOptimizer = self._deepspeed.basic_optimizer
        self._stage_0_norm: float | None = None
        if config.zero.stage:
            self._nonfinite = watch_nonfinite(self._wrapper, self._pipeline.shards())
        else:
            clip_by_true_norm(self._deepspeed, self._clip_at_stage_0)
        if config.training.precision == "fp16":
            # Otherwise DeepSpeed ends the run with an exception. Our guard shall decide, as for other precisions.
            self._wrapper.loss_scaler.raise_error_at_min_scale = False
        self._load(source, (fragment for shard in self.shards() for fragment in self._fragments(shard)))
        if config.zero.stage:
            # `_load` wrote the fp32 master weights. Now update the model's rounded copy from them.
            self._wrapper.update_lp_params()

    def shards(self) -> list[ShardedParameter]:
        """Every parameter of this rank once, in model order."""
        return self._pipeline.shards()

    def train_step(self, step: int, batches: Iterator[Batch], lr_factor: float = 1.0) -> StepResult:
        """One optimizer step (0-based `step`) on `plan.num_micro_batches` batches of this data-parallel rank.

        `lr_factor` is multiplied with the learning rate of the schedule.
        """
        lr = self._set_learning_rates(step, lr_factor)
        updates = self.optimizer.num_updates
        can_fall = self._loss_scale_can_fall()
        # DeepSpeed scales only the loss of the last stage. Auxiliary losses, at any stage, need the same scale.
        scale = self.loss_scaler().get("cur_scale", 1.0)
        self._pipeline.auxiliary_weight = scale / self.plan.num_micro_batches
        self._begin_step()
        self._pipeline.reports = {}
        self._pipeline.branches = self._branches(step)
        loss = self._deepspeed.train_batch(self._weighed(batches) if self._masks_losses else batches)
        norm = self._deepspeed.get_global_grad_norm() if self.config.zero.stage else self._stage_0_norm
        skipped = self.optimizer.num_updates == updates
        self.steps_skipped += skipped
        return StepResult(
            loss,
            norm,
            lr,
            skipped,
            skipped and can_fall,
            self.loss_scaler().get("cur_scale"),
            self._reports(self._pipeline.reports),
        )

    def _own_nonfinite(self) -> list[str]:
        """Names of this rank's parameters whose gradients were not finite in a skipped step. Empty without ZeRO, where
        gradients are not watched."""
        return self._nonfinite() if self.config.zero.stage else []

    @property
    def reads_data(self) -> bool:
        """Whether this rank takes batches. Ranks of inner pipeline stages do not."""
        return self._deepspeed.is_first_stage() or self._deepspeed.is_last_stage()

    @property
    def _device(self) -> torch.device:
        return self._deepspeed.device

    @property
    def _rows(self) -> Group:
        # The tensor group alone: `validate` refuses a partition that cuts rows.
        return self._pipeline.tensor.group

    @property
    def _data_rank(self) -> int:
        return self._deepspeed.mpu.get_data_parallel_rank()

    @property
    def _tensor_rank(self) -> int:
        return self._pipeline.tensor.group.rank

    def _evaluation_sums(self, batches: Iterable[Batch], num_micro_batches: int) -> list[Tensor]:
        # Otherwise DeepSpeed adds this evaluation's losses to the loss of the last step.
        self._deepspeed.total_loss = None
        sums = self._deepspeed.eval_batch(
            iter(batches), num_micro_batches=num_micro_batches, reduce_output=None, bcast_loss=False
        )
        return sums if self._deepspeed.is_last_stage() else []

    def stage(self) -> Stage:
        """The model's layers on this rank, for forward passes outside of training."""
        return self._pipeline.as_stage()

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
        """Sets the loss weight so that the step's loss is the mean over all unmasked losses of the global batch.
        Yields the same batches.

        DeepSpeed averages over M micro batches and D data-parallel ranks, whatever their numbers of unmasked losses.
        With N of them in the step, over all ranks, the weight of a loss is M·D / N.
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
        """Replaces DeepSpeed's clipping without ZeRO, which discards the norm and updates even if it is not finite."""
        norm = clip_grad_norm_(
            parameters=self._pipeline.parameters(),
            max_norm=self.config.training.gradient_clipping or math.inf,
            mpu=self._deepspeed.mpu,
        )
        self._stage_0_norm = float(norm)
        self.optimizer.skip_next = not math.isfinite(self._stage_0_norm)

    def _fragments(self, shard: ShardedParameter) -> Iterator[Fragment]:
        """The fragment of the shard's fp32 state on this rank, if it has one."""
        first = shard.first_row * shard.spec.width
        if not self.config.zero.stage:
            owned = shard.owned and self._deepspeed.mpu.get_data_parallel_rank() == 0
            yield Fragment(shard.spec, shard.parameter, first, first + shard.parameter.numel(), 0, owned)
            return
        found = master_fragment(shard.parameter)
        # It is None if this data-parallel rank's partition holds no part of the parameter.
        if found is not None:
            (group,) = self.optimizer.param_groups
            (buffer,) = group["params"]
            local, flat = found
            start = first + local.start
            yield Fragment(shard.spec, buffer, start, start + local.numel, flat.start, shard.owned)


_SCALER_STATE = {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"}
