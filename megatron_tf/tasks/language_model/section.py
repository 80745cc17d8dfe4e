"""The `model:` section of a language model."""

from __future__ import annotations

from typing import Literal

from megatron_tf.config.fields import Count
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import UserError


class LanguageModel(Model):
    task: Literal["language_model"] = "language_model"
    vocab_size: Count
    """[tokens] Rows of the embedding, which is also the output head."""


def vocab_size_of(model: Model) -> int:
    """The size of the vocabulary of `model`, which is known to be a language model."""
    assert isinstance(model, LanguageModel), model.task
    return model.vocab_size


def check_reads_text(model: Model, action: str) -> None:
    """UserError unless `model` is a language model. `action`: what needs one, such as "generation"."""
    if not isinstance(model, LanguageModel):
        raise UserError(
            f"model.task: {model.task}, but {action} needs a model of text. Give one whose model.task is "
            "language_model."
        )
