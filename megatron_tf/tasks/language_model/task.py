"""The language model's implementation of `Task`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_tf.architectures.spec import INITIAL_STD, ParameterSpec
from megatron_tf.architectures.work import Collective, Collectives, Product, hidden_bytes, positions_of
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.tasks.base import EndsWork, Task
from megatron_tf.tasks.language_model.perplexity import format_perplexity, perplexity
from megatron_tf.tasks.language_model.section import LanguageModel, vocab_size_of

EMBEDDING = "embedding.weight"


class LanguageModelling(Task):
    section = LanguageModel
    layers = "megatron_tf.tasks.language_model.layers:LANGUAGE_MODEL_LAYERS"
    data = "megatron_tf.tasks.language_model.data:LANGUAGE_MODEL_DATA"
    evaluation = "megatron_tf.evaluation.text:TEXT_EVALUATION"
    causal = True
    splits_samples = True
    input_name = head_name = "embedding"
    own_keys = (
        "data.tokenizer",
        "data.eod_id",
        "data.pad_id",
        "data.reset_at_eod",
        "data.mask_eod_loss",
        "evaluation.sample_prompts",
        "evaluation.sample_tokens",
    )
    formats = frozenset({"official", "huggingface"})

    def input_parameters(self, model: Model) -> Iterator[ParameterSpec]:
        yield ParameterSpec(
            EMBEDDING,
            (vocab_size_of(model), model.hidden_size),
            sharded=True,
            growable=False,
            decayed=True,
            std=INITIAL_STD,
            mean=0.0,
            ends=("first", "last"),
            official_name="sequential.0.word_embeddings.weight",
            huggingface_name="model.embed_tokens.weight",
        )

    def sharded_rows(self, model: Model) -> dict[str, int]:
        return {"model.vocab_size": vocab_size_of(model)}

    def describe(self, model: Model) -> str:
        return f"vocabulary {vocab_size_of(model):,}"

    def losses_per_sample(self, model: Model) -> int:
        return model.seq_length

    def multiply_adds(self, model: Model) -> int:
        """Multiply-adds of the head; rows of the embedding are only looked up."""
        return model.seq_length * vocab_size_of(model) * model.hidden_size

    def work(self, config: RunConfig) -> EndsWork:
        rows = -(-vocab_size_of(config.model) // config.parallel.tensor)
        positions = positions_of(config)
        return EndsWork((), (Product(positions, config.model.hidden_size, rows),), positions * rows)

    def collectives(self, config: RunConfig) -> tuple[tuple[Collectives, Collectives], tuple[Collectives, Collectives]]:
        positions, whole = positions_of(config), hidden_bytes(config)
        # largest logit; then the sum of exponentials and the label's logit together
        loss = (Collective("all_reduce", 4 * positions), Collective("all_reduce", 8 * positions))
        if not config.parallel.sequence:
            reduced = (Collective("all_reduce", whole),)
            return (reduced, ()), (loss, reduced)
        gather, scatter = (Collective("all_gather", whole),), (Collective("reduce_scatter", whole),)
        return (scatter, gather), (gather + loss, scatter)

    def masks_losses(self, config: RunConfig) -> bool:
        return config.data.masks_loss

    def run_problems(self, config: RunConfig) -> Iterator[str]:
        data, vocabulary = config.data, vocab_size_of(config.model)
        for key, token in {"eod_id": data.eod_id, "pad_id": data.pad_id}.items():
            if token is not None and token >= vocabulary:
                yield (
                    f"data.{key}: {token} is beyond the vocabulary, model.vocab_size is {vocabulary}. Set it to a "
                    f"token below {vocabulary}, or raise model.vocab_size."
                )
        if data.pad_id is not None and data.pad_id == data.eod_id:
            yield (
                f"data.pad_id: {data.pad_id} is data.eod_id too, so the model would never learn where a document ends. "
                "Remove data.pad_id; data.mask_eod_loss=true leaves out all but the first of such tokens in a row."
            )
        if config.evaluation.sample_prompts:
            yield from self._prompt_problems(config)

    def _prompt_problems(self, config: RunConfig) -> Iterator[str]:
        if config.data.tokenizer is None:
            yield "evaluation.sample_prompts: need data.tokenizer to become tokens. Give it, or remove the prompts."
        if not config.data.validation:
            yield (
                "evaluation.sample_prompts: are written on after each evaluation, but data.validation is empty. Give "
                "data.validation, or remove the prompts."
            )

    def in_words(self, loss: float, metrics: Mapping[str, float]) -> str:
        return f"loss {loss:.4f}  perplexity {format_perplexity(perplexity(loss))}"


LANGUAGE_MODEL = LanguageModelling()
