from megatron_tf.checkpoint.load import load_logical

__all__ = ["load_logical"]
