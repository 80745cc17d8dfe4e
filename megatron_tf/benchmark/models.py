"""The models of measurements: that of a configuration, and those that it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import cast

from torch import Tensor

from megatron_tf.architectures.transformer.section import TransformerModel
from megatron_tf.benchmark.references import Layer, bare_layer, gelu_mlp, plain_formula
from megatron_tf.config.sections.model import Model
from megatron_tf.config.tasks import TASKS
from megatron_tf.costs.estimate import num_parameters
from megatron_tf.errors import ConfigError
from megatron_tf.model.projection import Entered, Pattention
from megatron_tf.model.tokenformer import TokenFormer

FORMULAS: dict[str, Layer] = {"plain": plain_formula, "mlp": gelu_mlp, "products": bare_layer}
_MLP_MULTIPLE = 64  # of tensor-core tiles and of AMX ones


def equal_transformer(model: Model) -> TransformerModel:
    """The Transformer of as many parameters, to 1 %: of the same depth and head size, grown in width.

    The width is the one that comes nearest with an MLP 4 times as wide. The MLP's width is then adjusted. ConfigError
    when no width fits.
    """
    head_dim = model.hidden_size // model.num_attention_heads
    wanted = num_parameters(model)

    section = Model.chosen({"architecture": "transformer", "task": model.task})
    assert section is not None
    shared = {key: getattr(model, key) for key in TASKS[model.task].section.model_fields if key != "architecture"}

    def of_width(heads: int) -> TransformerModel:
        width = heads * head_dim
        sizes = {
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "hidden_size": width,
            "ffn_hidden_size": 4 * width,
        }
        # without validation, as in model_copy: sizes that are too large are refused later, by their memory
        made = section.model_construct(**{**shared, **sizes})
        assert isinstance(made, TransformerModel)
        return made

    heads = 1
    while num_parameters(of_width(heads + 1)) <= wanted:
        heads += 1
    nearest = min(of_width(heads), of_width(heads + 1), key=lambda one: abs(num_parameters(one) - wanted))
    a_column = 2 * nearest.hidden_size * nearest.num_layers
    missing = (wanted - num_parameters(nearest)) / a_column
    mlp = _MLP_MULTIPLE * round((nearest.ffn_hidden_size + missing) / _MLP_MULTIPLE)
    if mlp < _MLP_MULTIPLE:
        raise ConfigError(
            f"no Transformer of {model.num_layers} layers and heads of {head_dim} channels is as small as {wanted:,} "
            "parameters. Give more parameter tokens, or a configuration with smaller heads."
        )
    return nearest.model_copy(update={"ffn_hidden_size": mlp})


class FormulaPattention(Pattention):
    """A Pattention computed by a plain formula, in eager torch, on one process."""

    formula: Layer

    @staticmethod
    def compute(projections: Sequence[Pattention], entered: Entered) -> tuple[Tensor, ...]:
        """A call of the formula for each."""
        made = cast(Sequence[FormulaPattention], projections)
        return tuple(own.formula(entered.x, own.key_tokens, own.value_tokens) for own in made)


def with_formula(model: TokenFormer, name: str) -> TokenFormer:
    """`model`, changed in place: every Pattention is the plain formula, a GELU "mlp" or its "products" alone."""
    for module in model.modules():  # the class is changed, the parameters stay
        if isinstance(module, Pattention):
            module.__class__ = FormulaPattention
            formula = partial(plain_formula, scale=module.scale) if name == "plain" else FORMULAS[name]
            module.formula = formula  # type: ignore[assignment]
    return model


def in_form(model: TokenFormer, name: str) -> TokenFormer:
    """`model`, changed in place: of one of FORMULAS, or in the Gram form: "gram", and "fp8" with products in 8 bits."""
    if name in FORMULAS:
        return with_formula(model, name)
    for module in model.modules():
        if isinstance(module, Pattention):
            module.form = module.form._replace(norm="gram", fp8=name == "fp8")
    return model


def without_candidates(model: Model) -> Model:
    """The model whose positions use as many tokens, all of them the same; `model` itself if it has no candidates."""
    banks = getattr(model, "sparse", None)
    return model if banks is None else model.model_copy(update={"sparse": None})


def of_the_same_weights(model: TokenFormer) -> TokenFormer:
    """Another model whose parameters are those of `model`."""
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
