"""The `model:` section of a TokenFormer."""

from __future__ import annotations

from typing import Literal

from megatron_tf.config.schema import Activation, Model, ParameterTokens


class TokenFormerModel(Model):
    architecture: Literal["tokenformer"] = "tokenformer"
    parameter_tokens: ParameterTokens
    activation: Activation = "l2_norm_gelu"  # normalisation over the parameter tokens


def as_tokenformer(model: Model) -> TokenFormerModel:
    """`model`, which is known to be a TokenFormer's."""
    assert isinstance(model, TokenFormerModel), model.architecture
    return model
