"""`runtime.environment.detect` under its former name, for scripts outside this package."""

from megatron_tf.runtime.environment import detect

__all__ = ["detect"]
