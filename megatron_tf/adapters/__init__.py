"""Parameter tokens in parallel to the modules of any Hugging Face decoder.

`from megatron_tf.adapters import PattentionConfig` makes PEFT know the method; importing this package alone loads
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_tf.adapters.tuner import PattentionConfig as PattentionConfig

__all__ = ["PattentionConfig"]


def __getattr__(name: str) -> Any:
    if name == "PattentionConfig":
        from megatron_tf.adapters.tuner import PattentionConfig

        return PattentionConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
