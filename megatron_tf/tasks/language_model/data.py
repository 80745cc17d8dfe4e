"""Prepared text as the batches of a language model: token ids, and the ids that follow them as labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.data import DataSource
from megatron_tf.data.documents import find_boundaries
from megatron_tf.data.loader import BatchLoader, build_dataset, check_tokenizer, fingerprint
from megatron_tf.data.outlook import data_warnings, describe_passes, passes_over
from megatron_tf.data.summary import bytes_per_token
from megatron_tf.tasks.data import OpenData, TaskData
from megatron_tf.tasks.language_model.perplexity import perplexity
from megatron_tf.tasks.language_model.section import vocab_size_of


class OpenText(OpenData):
    def __init__(self, config: RunConfig):
        self._config = config
        boundaries = find_boundaries(config.data)
        self.document_ends = boundaries.ends
        self._loss_mask = boundaries.loss_mask
        check_tokenizer((*config.data.train, *config.data.validation), config.data.tokenizer)

    def loader(
        self,
        sources: Sequence[DataSource],
        *,
        micro_batch_size: int,
        num_micro_batches: int,
        data_rank: int = 0,
        data_size: int = 1,
        training: bool = False,
    ) -> BatchLoader:
        vocab_size = vocab_size_of(self._config.model)
        return BatchLoader(
            build_dataset(sources, self._config.model.seq_length, self._config.run.seed, vocab_size),
            micro_batch_size=micro_batch_size,
            num_micro_batches=num_micro_batches,
            data_rank=data_rank,
            data_size=data_size,
            vocab_size=vocab_size,
            loss_mask=self._loss_mask,
        )

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(self._config.data.train, self._config.run.seed)

    def outlook(self, samples: int) -> tuple[str, list[str]]:
        passes = passes_over(self._config, samples)
        return describe_passes(passes), data_warnings(self._config, passes)


class TextData(TaskData):
    def checks(self, config: RunConfig) -> list[Callable[[], object]]:
        data, model = config.data, config.model
        return [
            partial(find_boundaries, data),
            partial(check_tokenizer, (*data.train, *data.validation), data.tokenizer),
            *(
                partial(build_dataset, sources, model.seq_length, config.run.seed, vocab_size_of(model))
                for sources in (data.train, data.validation)
                if sources
            ),
        ]

    def open(self, config: RunConfig) -> OpenText:
        return OpenText(config)

    def in_other_numbers(self, sources: Sequence[DataSource]) -> Callable[[float], dict[str, float]]:
        """Perplexity, and bits per byte of text where the data's summary has the mean length of tokens.

        That mean is over all data, so bits per byte are approximate for the samples of one step.
        """
        width = bytes_per_token(sources) if sources else None

        def numbers(loss: float) -> dict[str, float]:
            found = {"perplexity": perplexity(loss)}
            if width is not None:
                found["bits_per_byte"] = loss / math.log(2) / width
            return found

        return numbers


LANGUAGE_MODEL_DATA = TextData()
