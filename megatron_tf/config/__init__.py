from megatron_tf.config.load import load_config

__all__ = ["load_config"]
