"""The `model` section: what every model has."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.config.architectures import ARCHITECTURES
from megatron_tf.config.fields import Count, Fraction, OpenSection, Positive, Section, name_in
from megatron_tf.config.tasks import TASKS


def _list_activations(node: dict[str, Any]) -> None:
    """Adds the choices to the JSON schema of a key."""
    node["enum"] = list(ACTIVATIONS.names())


ActivationName = Annotated[str, name_in(ACTIVATIONS), Field(json_schema_extra=_list_activations)]


class ParameterTokens(Section):
    qkv: Count
    """[tokens] Of each of the query, key and value projections."""
    proj: Count
    """[tokens] Of the attention output projection."""
    ffn: Count
    """[tokens] Of the feed-forward Pattention."""


class Model(OpenSection):
    """What every model has. Its architecture and its task add keys; `Model(...)` makes the section of both."""

    registered = {"architecture": ARCHITECTURES, "task": TASKS}

    architecture: Annotated[str, name_in(ARCHITECTURES)] = "tokenformer"
    """What fills the blocks: a registered architecture."""
    task: Annotated[str, name_in(TASKS)] = "language_model"
    """What the model is trained for: a registered task. Since 0.2."""
    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    """Number of blocks."""
    hidden_size: Count
    """[channels] Width of the hidden states."""
    num_attention_heads: Count
    """Heads of the attention. They must divide hidden_size."""
    seq_length: Count
    """[tokens] Length of a training sample. Of images it follows from model.image."""
    rotary_fraction: Fraction = 0.25
    """Share of each head's channels that is rotated."""
    rotary_base: Annotated[float, Field(gt=1, le=1e30)] = 10000.0
    """Wavelengths of the rotation run from 2π to 2π times this."""
    norm_eps: Positive = 1e-5
    """Of the weightless block norms and of the final norm."""

    @classmethod
    def usual(cls) -> type[Section]:
        return TASKS[cls.model_fields["task"].get_default()].section
