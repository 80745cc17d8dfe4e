"""The small run that most tests of training use."""

from __future__ import annotations

from megatron_tf.config.schema import RunConfig


def run_config(**changes) -> RunConfig:
    """A small run whose token counts and vocabulary divide by nothing."""
    values = {
        "run": {"dir": "unused", "seed": 7},
        "model": {
            "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "vocab_size": 99,
            "parameter_tokens": {"qkv": 13, "proj": 11, "ffn": 37},
        },
        "training": {"train_steps": 20, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "optimizer": {"lr": 1e-3, "schedule": {"type": "cosine", "warmup_steps": 2}},
        "data": {"train": ({"path": "unused"},)},
    }  # fmt: skip
    for section, update in changes.items():
        values[section] = {**values.get(section, {}), **update}
    return RunConfig.model_validate(values)
