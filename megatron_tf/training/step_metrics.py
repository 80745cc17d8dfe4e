"""The metrics of training steps, under their names in metrics.jsonl and trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from megatron_tf.config.run_plan import BatchPlan
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import LearningRates
from megatron_tf.config.tasks import task_of
from megatron_tf.costs.estimate import flops_per_token
from megatron_tf.engine.base import StepResult
from megatron_tf.engine.schedule import new_tokens_factor
from megatron_tf.tasks.data import task_data
from megatron_tf.telemetry.memory import memory_metric
from megatron_tf.telemetry.meters import Rates, mfu, peak_bf16_flops
from megatron_tf.telemetry.trackers import Value


class StepMetrics:
    """All ranks call `training` together, because memory is the largest of theirs."""

    def __init__(self, config: RunConfig, plan: BatchPlan, device: torch.device, meeting: dist.ProcessGroup | None):
        self._config = config
        self._plan = plan
        self._device = device
        self._meeting = meeting
        self._num_devices = plan.data_parallel * config.parallel.ranks_per_sample
        self._peak = peak_bf16_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        data = task_data(config.model)
        self._train_numbers = data.in_other_numbers(config.data.train)
        self._validation_numbers = data.in_other_numbers(config.data.validation)

    def training(
        self,
        result: StepResult,
        mean_loss: float,
        skipped_steps: int,
        rates: Rates,
        shares: Mapping[str, float],
        steps_left: int,
    ) -> dict[str, Value]:
        """`result`, `shares`: of the last step; `shares` are of its time.  `mean_loss`, `rates`: since the last logged
        step."""
        norm = None if result.grad_norm is None else float(result.grad_norm)
        tokens_per_second, task = rates.tokens_per_second, task_of(self._config.model)
        per_second = task.in_units(self._config.model, tokens_per_second)
        in_units = {} if task.unit == "tokens" else {f"perf/{task.unit}_per_second": per_second}
        memory, size = memory_metric(self._device)
        largest = torch.tensor([size])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._meeting)
        return {
            **_loss_metrics("train", mean_loss, self._train_numbers),
            "train/loss_step": float(result.loss),
            **{f"train/{name}": float(value) for name, value in result.reports.items()},
            "optim/lr": result.lr,
            **self._group_rates(result.lr, self._plan.train_steps - steps_left - 1),
            "optim/grad_norm": norm,
            "optim/skipped_steps": skipped_steps,
            **({} if result.loss_scale is None else {"optim/loss_scale": result.loss_scale}),
            "perf/tokens_per_second": tokens_per_second,
            "perf/tokens_per_second_per_device": tokens_per_second / self._num_devices,
            "perf/samples_per_second": tokens_per_second / self._plan.seq_length,
            **in_units,
            "perf/step_seconds": rates.step_seconds,
            **{f"perf/share_{phase}": share for phase, share in shares.items()},
            "perf/data_wait_share": rates.data_wait_share,
            "perf/eta_seconds": rates.step_seconds * steps_left,
            "perf/mfu": mfu(tokens_per_second, flops_per_token(self._config.model), self._peak, self._num_devices),
            memory: int(largest),
        }

    def validation(self, loss: float, measured: Mapping[str, float]) -> dict[str, Value]:
        """`measured`: the means of the task's metrics."""
        of_task = {f"eval/{name}": value for name, value in measured.items()}
        return {**_loss_metrics("eval", loss, self._validation_numbers), **of_task}

    def _group_rates(self, lr: float, step: int) -> dict[str, Value]:
        """The learning rate of each group of parameters in the 0-based `step`, where a growth gives them different
        ones."""
        growth = self._config.growth
        if growth is None:
            return {}
        rates = growth.lr_multipliers
        if rates == LearningRates():
            return {}
        new_layers = {"optim/lr_new_layers": lr * rates.new_layers} if rates.new_layers != 1 else {}
        return {
            **new_layers,
            "optim/lr_old_tokens": lr * rates.old_tokens,
            "optim/lr_new_tokens": lr * new_tokens_factor(self._plan.schedule_position(step), growth),
            "optim/lr_other": lr * rates.other,
        }


def _loss_metrics(prefix: str, loss: float, numbers: Callable[[float], dict[str, float]]) -> dict[str, Value]:
    return {f"{prefix}/{name}": value for name, value in {"loss": loss, **numbers(loss)}.items()}
