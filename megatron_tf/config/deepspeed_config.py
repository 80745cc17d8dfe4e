"""The DeepSpeed configuration of a run: the only place that spells DeepSpeed's keys."""

from __future__ import annotations

from typing import Any

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.validate import BatchPlan

# DeepSpeed's key (dotted) -> the section of ours that owns it; giving it under `deepspeed:` is an error
OWNED_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "training.precision",
    "fp16.enabled": "training.precision",
    "zero_optimization.stage": "zero.stage",
    "data_types": "training.precision",
    "communication_data_type": "training.precision",
    "pipeline": "parallel.pipeline",
    "activation_checkpointing": "training.activation_checkpointing",
    "steps_per_print": "logging.interval_steps",
}


def deepspeed_config(config: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`, with the user's `deepspeed:` section merged in.

    Keys that look superfluous prevent silent errors of DeepSpeed's defaults:
    - `pipeline.use_reentrant` false: reentrant checkpointing drops gradients with one pipeline stage;
    - `pipe_partitioned`, `grad_partitioned` false: between stages DeepSpeed would let each tensor rank send a part of
      what it takes for a replicated tensor; under sequence parallelism it is not (gradients were wrong by 100 %);
    - `grad_accum_dtype` and `communication_data_type` fp32: bf16 gradients would be accumulated and reduced in bf16.
    """
    training = config.training
    ours: dict[str, Any] = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.num_micro_batches,
        "gradient_clipping": training.gradient_clipping,
        "zero_optimization": {"stage": config.zero.stage},
        "zero_allow_untested_optimizer": True,  # ours is AdamW over ranges of the flat partition
        "bf16": {"enabled": training.precision == "bf16"},
        "fp16": {"enabled": training.precision == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "pipeline": {
            "use_reentrant": False,
            "activation_checkpoint_interval": 0,
            "pipe_partitioned": False,
            "grad_partitioned": False,
        },
        "steps_per_print": 10**9,  # our own log says it
    }
    return _merged(ours, config.deepspeed)


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out
