"""The name by which scripts outside this package know `runtime.environment.detect`."""

from megatron_tf.runtime.environment import detect

__all__ = ["detect"]
