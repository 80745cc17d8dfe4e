"""The TokenFormer as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_tf.architectures.base import Architecture
from megatron_tf.architectures.spec import ParameterSpec, ProjectionSpec
from megatron_tf.architectures.tokenformer.parameters import PROJECTIONS, block_parameters
from megatron_tf.architectures.tokenformer.section import TokenFormerModel, as_tokenformer
from megatron_tf.architectures.tokenformer.work import block_collectives, block_work
from megatron_tf.architectures.work import BlockWork, Collectives
from megatron_tf.config.schema import Model, ParameterTokens, RunConfig


class TokenFormerArchitecture(Architecture):
    section = TokenFormerModel
    block = "megatron_tf.architectures.tokenformer.block:tokenformer_block"
    formats = frozenset({"official", "huggingface"})
    why_not_elsewhere = "a tokenformer has parameter tokens instead"

    def block_parameters(self, model: Model, layer: int) -> Iterator[ParameterSpec]:
        return block_parameters(as_tokenformer(model), layer)

    def sharded_rows(self, model: Model) -> dict[str, int]:
        return {f"model.parameter_tokens.{kind}": count for kind, count in self.token_counts(model).items()}

    def describe(self, model: Model) -> str:
        return "tokens " + " / ".join(f"{kind} {count}" for kind, count in self.token_counts(model).items())

    def work(self, config: RunConfig) -> BlockWork:
        return block_work(as_tokenformer(config.model), config)

    def collectives(self, config: RunConfig) -> tuple[Collectives, Collectives]:
        return block_collectives(as_tokenformer(config.model), config)

    def token_counts(self, model: Model) -> dict[str, int]:
        return as_tokenformer(model).parameter_tokens.model_dump()

    def with_token_counts(self, model: Model, counts: Mapping[str, int]) -> Model:
        return model.model_copy(update={"parameter_tokens": ParameterTokens.model_validate(dict(counts))})

    def projections(self, model: Model) -> tuple[ProjectionSpec, ...]:
        counts = self.token_counts(model)
        return tuple(
            ProjectionSpec(
                f"blocks.{layer}.{name}", names.tokens, counts[names.tokens], as_tokenformer(model).activation
            )
            for layer in range(model.num_layers)
            for name, names in PROJECTIONS.items()
        )


TOKENFORMER = TokenFormerArchitecture()
