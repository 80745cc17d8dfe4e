"""The TokenFormer model. It runs on one device without DeepSpeed."""

# The CPU kernels under their public name, by which other code checks whether they are available.
from megatron_tf.model.kernels import native_passes as native_stages
from megatron_tf.model.pattention import pattention
from megatron_tf.model.projection import Pattention
from megatron_tf.model.tokenformer import TokenFormer, build_model

__all__ = ["Pattention", "TokenFormer", "build_model", "native_stages", "pattention"]
