"""The `model:` section of a TokenFormer."""

from __future__ import annotations

from typing import Literal

from megatron_tf.config.schema import Activation, Model, ParameterTokens


class TokenFormerModel(Model):
    architecture: Literal["tokenformer"] = "tokenformer"
    """What fills the blocks: Pattention."""
    parameter_tokens: ParameterTokens
    """Parameter tokens of each kind of projection. Growth adds to them."""
    activation: Activation = "l2_norm_gelu"
    """Nonlinearity and normalisation over the parameter tokens."""


def as_tokenformer(model: Model) -> TokenFormerModel:
    """`model`, which is known to be a TokenFormer's."""
    assert isinstance(model, TokenFormerModel), model.architecture
    return model
