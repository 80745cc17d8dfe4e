"""The TokenFormer's implementation of `Architecture`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_tf.activations.forms import Norm
from megatron_tf.architectures.base import Architecture
from megatron_tf.architectures.spec import ParameterSpec, ProjectionSpec
from megatron_tf.architectures.tokenformer.forms import form_problems, norm_forms
from megatron_tf.architectures.tokenformer.parameters import PROJECTIONS, block_parameters, token_tensors
from megatron_tf.architectures.tokenformer.section import (
    Sparse,
    TokenFormerModel,
    as_tokenformer,
    bank_layout_problems,
    bank_of,
    bank_problems,
    bank_spec,
    banks_of,
    slot_counts,
    with_choices,
)
from megatron_tf.architectures.tokenformer.work import block_collectives, block_work, step_collectives
from megatron_tf.architectures.work import BlockWork, Collectives
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model, ParameterTokens


class TokenFormerArchitecture(Architecture):
    section = TokenFormerModel
    block = "megatron_tf.architectures.tokenformer.block:tokenformer_block"
    formats = frozenset({"official", "huggingface"})
    why_not_elsewhere = "a tokenformer has parameter tokens instead"

    def problems(self, model: Model) -> Iterator[str]:
        return bank_problems(as_tokenformer(model))

    def shared_counts(self, model: Model) -> tuple[int, ...]:
        return *super().shared_counts(model), *slot_counts(as_tokenformer(model)).values()

    def layout_problems(self, config: RunConfig) -> Iterator[str]:
        split = config.growth is not None and config.growth.method == "split"
        near = self.tensor_sizes_near(config.model, config.parallel.tensor)
        yield from bank_layout_problems(
            as_tokenformer(config.model), config.parallel.tensor, near, counts_are_given=split
        )
        yield from form_problems(as_tokenformer(config.model), config.training)

    def losses(self, model: Model) -> tuple[str, ...]:
        sparse = as_tokenformer(model).sparse
        if sparse is None:
            return ()
        return ("balance", "z_loss") if sparse.z_loss else ("balance",)

    def metrics(self, model: Model) -> tuple[str, ...]:
        return ("load_max",) if as_tokenformer(model).sparse else ()

    def format_problem(self, model: Model, form: str) -> str | None:
        if form == "huggingface" or as_tokenformer(model).sparse is None:
            return None
        fewer = ",".join(f"{kind}=1" for kind in banks_of(as_tokenformer(model)))
        return (
            f"the {form} format has no place for model.sparse, tokens of which a position uses a part. Export it by "
            f"to-hf, or make it dense by megatron_tf prune --candidates {fewer}, or give the model that it was split "
            "from"
        )

    def block_parameters(self, model: Model, layer: int) -> Iterator[ParameterSpec]:
        return block_parameters(as_tokenformer(model), layer)

    def sharded_rows(self, model: Model) -> dict[str, int]:
        return {f"model.parameter_tokens.{kind}": count for kind, count in self.token_counts(model).items()}

    def describe(self, model: Model) -> str:
        counts = {kind: f"{count}" for kind, count in self.token_counts(model).items()}
        for kind, count in self.token_counts(model).items():
            if (bank := bank_of(as_tokenformer(model), kind)) is not None:
                counts[kind] = f"{count} of {bank.stored(count):,} ({bank_spec(as_tokenformer(model), kind)})"
        return "tokens " + " / ".join(f"{kind} {text}" for kind, text in counts.items())

    def work(self, config: RunConfig) -> BlockWork:
        return block_work(as_tokenformer(config.model), config)

    def collectives(self, config: RunConfig) -> tuple[Collectives, Collectives]:
        return block_collectives(as_tokenformer(config.model), config)

    def step_collectives(self, config: RunConfig) -> tuple[Collectives, Collectives]:
        return step_collectives(as_tokenformer(config.model), config)

    def token_counts(self, model: Model) -> dict[str, int]:
        return as_tokenformer(model).parameter_tokens.model_dump()

    def norm_forms(self, config: RunConfig, device: str) -> dict[str, Norm]:
        return norm_forms(as_tokenformer(config.model), config, device)

    def with_token_counts(self, model: Model, counts: Mapping[str, int]) -> Model:
        return model.model_copy(update={"parameter_tokens": ParameterTokens.model_validate(dict(counts))})

    def with_sparse(self, model: Model, sparse: Mapping[str, Any] | None) -> Model:
        if sparse is None:
            return model.model_copy(update={"sparse": None})
        own = as_tokenformer(model).sparse
        kept = {} if own is None else {"z_loss": own.z_loss}
        return model.model_copy(update={"sparse": with_choices(Sparse.model_validate({**kept, **sparse}))})

    def sparse_sections(self, model: Model) -> dict[str, Any] | None:
        sparse = as_tokenformer(model).sparse
        return None if sparse is None else {kind: bank.model_dump() for kind, bank in sparse.banks().items()}

    def projections(self, model: Model) -> tuple[ProjectionSpec, ...]:
        counts = self.token_counts(model)
        return tuple(
            ProjectionSpec(
                f"blocks.{layer}.{name}",
                names.tokens,
                counts[names.tokens],
                as_tokenformer(model).activation,
                *token_tensors(bank_of(as_tokenformer(model), names.tokens)),
                bank_spec(as_tokenformer(model), names.tokens),
            )
            for layer in range(model.num_layers)
            for name, names in PROJECTIONS.items()
        )


TOKENFORMER = TokenFormerArchitecture()
