"""What classifies images, in plain PyTorch: patches, blocks of a TokenFormer or of a Transformer, a final norm.

Hidden states are [batch, positions, hidden]. `config` has the fields of `TokenFormerImageConfig`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pattention_tokenformer import Pattention


class Patches(nn.Module):
    """Pixels to hidden states, with learned positions; a class token is position 0."""

    def __init__(self, config: Any):
        super().__init__()
        image = config.image
        self.size, self.channels, self.patch = image["size"], image["channels"], image["patch"]
        count, with_token = (self.size // self.patch) ** 2, image["pooling"] == "class_token"
        self.proj = nn.Linear(self.channels * self.patch**2, config.hidden_size)
        self.positions = nn.Parameter(torch.zeros(count + with_token, config.hidden_size))
        self.class_token = nn.Parameter(torch.zeros(config.hidden_size)) if with_token else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        expected = (self.channels, self.size, self.size)
        if pixel_values.dim() != 4 or pixel_values.shape[1:] != expected:
            raise ValueError(f"pixel_values are {list(pixel_values.shape)}, expected [batch, {str(expected)[1:-1]}]")
        cut = pixel_values.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))
        # the pixels of a patch as (channel, row, column)
        hidden_states = self.proj(cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        if self.class_token is not None:
            token = self.class_token.expand(len(hidden_states), 1, -1)
            hidden_states = torch.cat((token, hidden_states), 1)
        return hidden_states + self.positions


class TokenAttention(nn.Module):
    """Every position attends to all; the four projections are Pattentions."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = Pattention(config, layer_idx, "q_proj")
        self.k_proj = Pattention(config, layer_idx, "k_proj")
        self.v_proj = Pattention(config, layer_idx, "v_proj")
        self.o_proj = Pattention(config, layer_idx, "o_proj")

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        return self.o_proj(attend(*(project(x).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))))


class MatrixAttention(nn.Module):
    """Every position attends to all; the projections are matrices.

    The rows of `qkv_proj` are by head of keys and values: its queries, its key, its value; then the next.
    """

    def __init__(self, config: Any):
        super().__init__()
        width, heads, shared = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.queries_per_key = width // heads, heads // shared
        self.qkv_proj = nn.Linear(width, (heads + 2 * shared) * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        groups = self.qkv_proj(x).unflatten(-1, (-1, self.queries_per_key + 2, self.head_dim))
        query, key, value = groups.split((self.queries_per_key, 1, 1), -2)
        key, value = (shared.repeat_interleave(self.queries_per_key, -2).flatten(-3, -2) for shared in (key, value))
        return self.o_proj(attend(query.flatten(-3, -2), key, value))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[batch, positions, heads, head channels] each -> [batch, positions, hidden]."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)


class Mlp(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class ImageLayer(nn.Module):
    """x += attention(LN(x)); x += mlp(LN(x)). The norms have no weight."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        has_tokens = config.block_type == "tokenformer"
        self.self_attn = TokenAttention(config, layer_idx) if has_tokens else MatrixAttention(config)
        self.mlp = Pattention(config, layer_idx, "mlp") if has_tokens else Mlp(config)
        self.eps = config.layer_norm_eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.norm(hidden_states))
        return hidden_states + self.mlp(self.norm(hidden_states))

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)


class ImageNetwork(nn.Module):
    """Normalised pixels [batch, channels, size, size] to hidden states after the final norm."""

    def __init__(self, config: Any):
        super().__init__()
        self.pooling = config.image["pooling"]
        self.patches = Patches(config)
        self.layers = nn.ModuleList(ImageLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden_states = self.patches(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.norm(hidden_states)

    def pool(self, hidden_states: Tensor) -> Tensor:
        """What the head reads, [batch, hidden]."""
        return hidden_states.mean(1) if self.pooling == "mean" else hidden_states[:, 0]
