"""The Transformer's implementation of `Architecture`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tf.architectures.base import Architecture
from megatron_tf.architectures.spec import ParameterSpec
from megatron_tf.architectures.transformer.parameters import block_parameters
from megatron_tf.architectures.transformer.section import TransformerModel, as_transformer
from megatron_tf.architectures.transformer.work import block_collectives, block_work
from megatron_tf.architectures.work import BlockWork, Collectives
from megatron_tf.config.nearest import divisors_near, either
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.config.tasks import task_of


class TransformerArchitecture(Architecture):
    section = TransformerModel
    block = "megatron_tf.architectures.transformer.block:transformer_block"
    formats = frozenset({"huggingface"})
    why_not_elsewhere = "a transformer has no parameter tokens"

    def block_parameters(self, model: Model, layer: int) -> Iterator[ParameterSpec]:
        return block_parameters(as_transformer(model), layer)

    def sharded_rows(self, model: Model) -> dict[str, int]:
        return {"model.ffn_hidden_size": as_transformer(model).ffn_hidden_size}

    def format_problem(self, model: Model, form: str) -> str | None:
        if not task_of(model).causal:
            return None
        return (
            f"the code for the {form} format computes a transformer that classifies images only. Give one whose "
            "model.task is image_classification, or a model whose model.architecture is tokenformer"
        )

    def problems(self, model: Model) -> Iterator[str]:
        heads, shared = model.num_attention_heads, as_transformer(model).num_key_value_heads
        if heads % shared:
            yield (
                f"model.num_key_value_heads: {shared} does not divide model.num_attention_heads {heads}, and each of "
                f"its heads serves as many query heads as any other. Set it to {either(divisors_near(heads, shared))}."
            )

    def layout_problems(self, config: RunConfig) -> Iterator[str]:
        shared, tensor = as_transformer(config.model).num_key_value_heads, config.parallel.tensor
        if shared % tensor:
            yield (
                f"parallel.tensor: {tensor} does not divide model.num_key_value_heads {shared}. "
                f"Set it to {either(self.tensor_sizes_near(config.model, tensor))}."
            )

    def key_value_heads(self, model: Model) -> int:
        return as_transformer(model).num_key_value_heads

    def describe(self, model: Model) -> str:
        shared = as_transformer(model).num_key_value_heads
        heads = f", {shared} of keys and values" if shared != model.num_attention_heads else ""
        return f"a transformer with MLP {as_transformer(model).ffn_hidden_size}{heads}"

    def work(self, config: RunConfig) -> BlockWork:
        return block_work(as_transformer(config.model), config)

    def collectives(self, config: RunConfig) -> tuple[Collectives, Collectives]:
        return block_collectives(config)


TRANSFORMER = TransformerArchitecture()
