"""megatron_tf: `from megatron_tf import train` trains in this process; everything else is in the packages below.

Importing this package alone loads nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_tf.training.one_process import train as train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from megatron_tf.training.one_process import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
