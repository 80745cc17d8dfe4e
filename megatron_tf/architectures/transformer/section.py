"""The `model:` section of a Transformer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_tf.config.fields import Count
from megatron_tf.config.sections.model import Model


class TransformerModel(Model):
    architecture: Literal["transformer"] = "transformer"
    """What fills the blocks: matrices and a GELU MLP."""
    ffn_hidden_size: Count = Field(default_factory=lambda earlier: 4 * earlier.get("hidden_size", 1))
    """[channels] Width of the MLP. By default 4 × hidden_size."""
    num_key_value_heads: Count = Field(default_factory=lambda earlier: earlier.get("num_attention_heads", 1))
    """Heads of keys and values, each for several query heads (grouped-query attention). By default one for each."""


def as_transformer(model: Model) -> TransformerModel:
    """`model`, which is known to be a Transformer's."""
    assert isinstance(model, TransformerModel), model.architecture
    return model
