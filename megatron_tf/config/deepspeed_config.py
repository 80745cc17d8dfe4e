"""The DeepSpeed configuration of a run: the only place that spells DeepSpeed's keys."""

from __future__ import annotations

import math
from typing import Any

from megatron_tf.config.run_plan import BatchPlan
from megatron_tf.config.schema import RunConfig

# DeepSpeed's key (dotted) -> the section of ours that decides it
OWNED_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "managed_gradient_accumulation": "training.global_batch_size",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "training.precision",
    "bfloat16": "training.precision",  # DeepSpeed's old name of bf16
    "fp16.enabled": "training.precision",
    "torch_autocast": "training.precision",
    "data_types": "training.precision",
    "communication_data_type": "training.precision",
    "seq_parallel_communication_data_type": "training.precision",
    "zero_optimization.stage": "zero.stage",
    "pipeline": "parallel.pipeline",
    "tensor_parallel": "parallel.tensor",
    "sequence_parallel_size": "parallel.sequence",
    "activation_checkpointing": "training.activation_checkpointing",
    "compile": "training.compile",
    "checkpoint": "checkpoint",
    "data_efficiency": "data",
    "steps_per_print": "logging.interval_steps",
    "tensorboard": "logging.trackers",
    "wandb": "logging.trackers",
}

_FP32_STATE = "master weights and moments are fp32 here, for checkpoints and growth"
_ON_DEVICE = "weights and optimizer state stay on the device here, for checkpoints read and write them there"
_NO_LOG = "DeepSpeed's log is off; metrics.jsonl has perf/step_seconds and perf/tokens_per_second"
# DeepSpeed's key (dotted) -> why it is refused
REFUSED_KEYS = {
    # Seen with two data-parallel ranks in fp32: the error of the gradient was larger than the gradient.
    "zero_optimization.round_robin_gradients": "gradients would silently be wrong",
    "gradient_allreduce_op": "gradients are averages over the global batch here",
    "zero_optimization.compute_grad_norm": "clipping and the log need the norm of the gradient",
    "zero_optimization.offload_optimizer": _ON_DEVICE,
    "zero_optimization.offload_param": _ON_DEVICE,
    "zero_optimization.cpu_offload": _ON_DEVICE,
    "zero_optimization.cpu_offload_param": _ON_DEVICE,
    "zero_force_ds_cpu_optimizer": "the optimizer is this project's own",
    "zero_allow_untested_optimizer": "the optimizer is this project's own",
    "fp16.loss_scale": "loss scaling is dynamic here, and checkpoints keep its state; see initial_scale_power",
    "fp16.fp16_master_weights_and_grads": _FP32_STATE,
    "fp16.auto_cast": "inputs are token numbers, which must stay whole",
    "wall_clock_breakdown": _NO_LOG,
    "memory_breakdown": _NO_LOG,
    "flops_profiler": _NO_LOG,
    "comms_logger": _NO_LOG,
    "dump_state": _NO_LOG,
}


def deepspeed_config(config: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`, with the user's `deepspeed:` section in it.

    Keys that look superfluous prevent silent errors of DeepSpeed's defaults:
    - `pipeline.use_reentrant` false: reentrant checkpointing drops gradients with one pipeline stage;
    - `pipe_partitioned`, `grad_partitioned` false: between stages DeepSpeed would let each tensor rank send a part of
      what it takes for a replicated tensor; under sequence parallelism it is not (gradients were wrong by 100 %);
    - `grad_accum_dtype` and `communication_data_type` fp32: bf16 gradients would be accumulated and reduced in bf16.
    """
    training, user = config.training, config.deepspeed
    return {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.num_micro_batches,
        # without ZeRO, DeepSpeed computes no norm unless it clips, and a gradient that is not finite would go unseen
        "gradient_clipping": training.gradient_clipping or (0.0 if config.zero.stage else math.inf),
        "zero_optimization": {"stage": config.zero.stage, **user.zero_optimization.model_dump()},
        "zero_allow_untested_optimizer": True,  # ours works on ranges of the flat partition
        "bf16": {"enabled": training.compute_type == "bf16"},
        "fp16": {"enabled": training.precision == "fp16", **user.fp16.model_dump()},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "pipeline": {
            "use_reentrant": False,
            "activation_checkpoint_interval": 0,
            "pipe_partitioned": False,
            "grad_partitioned": False,
        },
        "steps_per_print": 10**9,  # never: our own log reports progress
    }
