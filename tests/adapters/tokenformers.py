"""Tiny random TokenFormers as transformers loads them."""

from __future__ import annotations

import torch
from decoders import VOCABULARY
from torch import nn

WIDTH, LAYERS = 32, 2
TOKENS = {"qkv": 24, "proj": 16, "ffn": 32}
BANK = {"ffn": {"group_size": 16, "candidates": 2, "dense": 16}}


def tokenformer(activation: str = "l2_norm_gelu", sparse: dict | None = None, seed: int = 0) -> nn.Module:
    from megatron_tf.convert.huggingface.remote_code.configuration_tokenformer import TokenFormerConfig
    from megatron_tf.convert.huggingface.remote_code.modeling_tokenformer import TokenFormerForCausalLM

    scales = [{"q_proj": 4.0, "k_proj": 4.5, "v_proj": 5.0, "o_proj": 4.0, "mlp": 5.5}] * LAYERS
    config = TokenFormerConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=64, parameter_tokens=TOKENS, scales=scales, sparse=sparse, activation=activation,
        initializer_range=0.3, bos_token_id=2, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return TokenFormerForCausalLM(config).eval()
