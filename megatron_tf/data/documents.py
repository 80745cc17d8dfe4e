"""Document boundaries, and the loss mask that follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_tf.config.sections.data import Data, DataSource
from megatron_tf.data.indexed import IndexedDataset, data_file
from megatron_tf.data.summary import read_summary, summary_file
from megatron_tf.errors import DataError
from megatron_tf.tasks.classes import IGNORED
from megatron_tf.telemetry.text import count_of

DOCUMENTS_LOOKED_AT = 16  # of each source, to check that they end with the expected token


@dataclass(frozen=True)
class LossMask:
    """The labels without a loss: those after an end-of-document token, and padding.

    The label after `eod_id` is masked, because it begins an unrelated document; the end itself is learnt. Labels equal
    to `pad_id`, or following it, are masked too. None disables.
    """

    eod_id: int | None
    pad_id: int | None

    def apply(self, ids: np.ndarray, labels: np.ndarray) -> None:
        """Writes IGNORED into `labels`; both int64 [b, s]."""
        if self.eod_id is not None:
            labels[ids == self.eod_id] = IGNORED
        if self.pad_id is not None:
            labels[(ids == self.pad_id) | (labels == self.pad_id)] = IGNORED


@dataclass(frozen=True)
class Boundaries:
    """Where documents matter to the model. `ends`: the tokens after which attention begins anew."""

    ends: tuple[int, ...] = ()
    loss_mask: LossMask | None = None


def boundaries(data: Data, eod_id: int | None) -> Boundaries:
    """The boundaries that `data` asks for, when documents end with `eod_id` (None if `data` does not need it).

    Each padding token counts as a document of its own, so that no other token attends to it.
    """
    ends = (token for token in (eod_id, data.pad_id) if token is not None) if data.reset_at_eod else ()
    mask = LossMask(eod_id if data.mask_eod_loss else None, data.pad_id) if data.masks_loss else None
    return Boundaries(tuple(ends), mask)


def find_boundaries(data: Data) -> Boundaries:
    """The boundaries that `data` asks for. DataError as in `end_of_document`, which is called only if needed."""
    return boundaries(data, end_of_document(data) if data.reset_at_eod or data.mask_eod_loss else None)


def end_of_document(data: Data) -> int:
    """The token that ends the documents of all sources: data.eod_id, or the one in their summaries.

    DataError with the problems of all sources: when it is given nowhere, when two summaries differ, or when documents
    do not end with it.
    """
    eod_id, origin = data.eod_id, "data.eod_id"
    problems = []
    for source in dict.fromkeys((*data.train, *data.validation)):
        summary = read_summary(source.path)
        if summary is None:
            continue
        if eod_id is None:
            eod_id, origin = summary.eod_id, str(summary_file(source.path))
        elif summary.eod_id != eod_id:
            problems.append(
                f"{summary_file(source.path)}: documents end with token {summary.eod_id}, but {origin} says {eod_id}. "
                f"All data must end documents alike: {'' if data.eod_id is None else 'remove data.eod_id, or '}prepare "
                "the data again."
            )
    if eod_id is None:
        raise DataError(
            f"data.{_reason(data)}: the token that ends a document is not known, because there is no "
            f"{summary_file(data.train[0].path)}. Give it as data.eod_id, or prepare the data with "
            "tools/preprocess_data.py."
        )
    if eod_id == data.pad_id:
        problems.append(
            f"data.pad_id: {eod_id} is the end-of-document token too, as {origin} says. Remove data.pad_id; "
            "data.mask_eod_loss=true leaves out all but the first of such tokens in a row."
        )
    problems += _without_ends((*data.train, *data.validation), eod_id)
    if problems:
        raise DataError("\n".join(problems))
    return eod_id


def _without_ends(sources: tuple[DataSource, ...], eod_id: int) -> Iterator[str]:
    """Data that were prepared without end-of-document tokens, or with another one."""
    for path in dict.fromkeys(source.path for source in sources):
        ends = IndexedDataset(path).ends_of_documents(DOCUMENTS_LOOKED_AT)
        if ends.size and not (ends == eod_id).any():
            yield (
                f"{data_file(path)}: its documents do not end with the end-of-document token {eod_id} "
                f"({count_of(ends.size, 'document')} looked at); the first one ends with {ends[0]}. Correct "
                "data.eod_id, or prepare the data again with end-of-document tokens."
            )


def _reason(data: Data) -> str:
    return "reset_at_eod" if data.reset_at_eod else "mask_eod_loss"
