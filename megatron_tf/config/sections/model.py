"""The `model` section: the keys of every model."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

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
    """[tokens] Parameter tokens of each of the query, key and value projections."""
    proj: Count
    """[tokens] Parameter tokens of the attention output projection."""
    ffn: Count
    """[tokens] Parameter tokens of the feed-forward Pattention."""


class Model(OpenSection):
    """The keys of every model. Its architecture and its task add keys; `Model(...)` makes the section of both."""

    # Keys whose values follow from others. A message about a user's configuration names those others.
    derived: ClassVar[frozenset[str]] = frozenset()
    registered = {"architecture": ARCHITECTURES, "task": TASKS}

    architecture: Annotated[str, name_in(ARCHITECTURES)] = "tokenformer"
    """The kind of blocks: a registered architecture."""
    task: Annotated[str, name_in(TASKS)] = "language_model"
    """The purpose of the model: a registered task. Since 0.2."""
    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    """Number of blocks."""
    hidden_size: Count
    """[channels] Width of the hidden states."""
    num_attention_heads: Count
    """Heads of the attention. They must divide hidden_size."""
    seq_length: Count
    """[tokens] Length of a training sample. For images it follows from model.image."""
    rotary_fraction: Fraction = 0.25
    """Share of each head's channels that is rotated."""
    rotary_base: Annotated[float, Field(gt=1, le=1e30)] = 10000.0
    """Wavelengths of the rotation range from 2π to 2π times this."""
    norm_eps: Positive = 1e-5
    """Added to the variance in the block norms, which have no weights, and in the final norm."""

    @classmethod
    def usual(cls) -> type[Section]:
        return TASKS[cls.model_fields["task"].get_default()].section
