"""The architectures by the name that `model.architecture` gives. `architectures.base` says what each must provide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_tf.registry import Registry

if TYPE_CHECKING:
    from megatron_tf.architectures.base import Architecture
    from megatron_tf.config.sections.model import Model

ARCHITECTURES: Registry[Architecture] = Registry(
    {
        "tokenformer": "megatron_tf.architectures.tokenformer.architecture:TOKENFORMER",
        "transformer": "megatron_tf.architectures.transformer.architecture:TRANSFORMER",
    }
)


def architecture_of(model: Model) -> Architecture:
    """The architecture that `model` names."""
    return ARCHITECTURES[model.architecture]


def with_parameter_tokens() -> list[str]:
    """Names of the architectures that have parameter tokens."""
    return [name for name in ARCHITECTURES.names() if "parameter_tokens" in ARCHITECTURES[name].section.model_fields]
