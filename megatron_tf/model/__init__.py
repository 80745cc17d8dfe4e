"""The TokenFormer model; runs on one device without DeepSpeed."""

from megatron_tf.model.layers import Pattention
from megatron_tf.model.pattention import pattention
from megatron_tf.model.tokenformer import TokenFormer, build_model

__all__ = ["Pattention", "TokenFormer", "build_model", "pattention"]
