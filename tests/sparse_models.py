"""Small runs of models with candidates, and the same one without."""

from __future__ import annotations

from tiny import run_config

from megatron_tf.config.schema import RunConfig

TOKENS = {"qkv": 13, "proj": 11, "ffn": 69}


def with_bank(
    ffn: int = 69, bank: dict | None = None, tensor: int = 1, z_loss: float = 0.0, **training: object
) -> RunConfig:
    """Four slots of three candidates, and five tokens that every position uses."""
    bank = {"group_size": 16, "candidates": 3, "dense": 5} if bank is None else bank
    return run_config(
        model={"parameter_tokens": {**TOKENS, "ffn": ffn}, "sparse": {"ffn": bank, "z_loss": z_loss}},
        parallel={"tensor": tensor},
        training=training,
    )


def with_banks(z_loss: float = 0.0, **changes: dict) -> RunConfig:
    """Every projection has four slots, and candidates of its own."""
    banks = {"qkv": {"group_size": 16, "candidates": 2, "dense": 3}, "proj": {"group_size": 16, "candidates": 3}}
    return run_config(
        model={
            "parameter_tokens": {"qkv": 67, "proj": 64, "ffn": 69},
            "sparse": {**banks, "ffn": {"group_size": 16, "candidates": 3, "dense": 5}, "z_loss": z_loss},
        },
        **changes,
    )


def without_banks() -> RunConfig:
    return run_config(model={"parameter_tokens": TOKENS})
