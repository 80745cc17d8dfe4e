"""The form in which each kind of projection is computed, and checks of the settings that choose it."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tf.activations.forms import Norm, norm_form
from megatron_tf.architectures.tokenformer.section import TokenFormerModel, bank_of
from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.config.nearest import either
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.training import Training


def kinds_with_own_rows(config: RunConfig) -> frozenset[str]:
    """Kinds of projections whose input is split over the sequence before it is gathered. proj's is split by heads."""
    return frozenset({"qkv", "ffn"}) if config.parallel.sequence and config.parallel.tensor > 1 else frozenset()


def norm_forms(model: TokenFormerModel, config: RunConfig, device: str) -> dict[str, Norm]:
    """The form of each kind of projection. One with candidates has only the direct form."""
    return {
        kind: "direct"
        if bank_of(model, kind) is not None
        else norm_form(
            config.training.wanted_norm,
            ACTIVATIONS[model.activation],
            tokens,
            model.hidden_size,
            config.parallel.tensor,
            device,
            own_rows=kind in kinds_with_own_rows(config),
            compiled=config.training.compile,
        )
        for kind, tokens in model.parameter_tokens.model_dump().items()
    }


def form_problems(model: TokenFormerModel, training: Training) -> Iterator[str]:
    """Sentences on settings that need a form which the activation or the projections do not have."""
    with_gram = [name for name in ACTIVATIONS.names() if ACTIVATIONS[name].gram_saves is not None]
    if training.norm == "gram" and model.activation not in with_gram:
        yield (
            f"training.norm: gram finds the norm of scores before their activation, which model.activation "
            f"{model.activation} does not have. Set it to auto, or the activation to {either(with_gram)}."
        )
    if training.precision == "fp8" and model.activation not in with_gram:
        yield (
            f"training.precision: fp8 is for activations whose norm is known before the scores, and model.activation "
            f"{model.activation} is none of them. Set it to bf16, or the activation to {either(with_gram)}."
        )
    if training.precision == "fp8" and training.norm == "direct":
        yield (
            "training.precision: fp8 needs norms that are known before the scores, and training.norm is direct. Set it "
            "to bf16, or training.norm to auto."
        )
    wanted = {
        "norm": (training.norm, "gram", "auto"),
        "scores": (training.scores, "recompute", "keep"),
        "precision": (training.precision, "fp8", "bf16"),
    }
    for key, (value, refused, remedy) in wanted.items():
        if value == refused and model.sparse is not None:
            yield (
                f"training.{key}: {value} is for projections whose positions use all their tokens, but model.sparse is "
                f"given. Set it to {remedy}, or model.sparse to null."
            )
