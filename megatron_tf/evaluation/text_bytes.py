"""Counts the bytes of text behind the evaluated tokens. A loss per byte is comparable between models with different
tokenizers."""

from __future__ import annotations

from megatron_tf.data.indexed import IndexedDataset
from megatron_tf.data.summary import CorpusSummary
from megatron_tf.data.tokenizer import Tokenizer

FROM_SUMMARY = "counted when the data were prepared"
FROM_TOKENIZER = "counted by decoding the tokens"


def count_text_bytes(
    dataset: IndexedDataset, num_tokens: int, summary: CorpusSummary | None, tokenizer: Tokenizer | None
) -> tuple[int | None, str]:
    """(bytes of UTF-8, how they were counted) for the first `num_tokens` tokens of `dataset`.

    For the whole data the summary holds the number. Otherwise each document is decoded, without its end token. That is
    exact for byte-level tokenizers (`bytes`, byte-level BPE, tiktoken), except for a character that is cut at the end.
    It is close for others, which may lose some spaces. None, with a reason, when neither a fitting summary nor a
    tokenizer is there.
    """
    if summary is not None and num_tokens == dataset.num_tokens:
        return summary.bytes, FROM_SUMMARY
    if tokenizer is None:
        return None, "not known: the data have no summary of ours, and no data.tokenizer is given"
    total, offsets = 0, dataset.document_offsets
    for start, stop in zip(offsets, offsets[1:]):
        if start >= num_tokens:
            break
        total += _decoded_bytes(dataset, int(start), min(int(stop), num_tokens), tokenizer)
    return total, FROM_TOKENIZER


def _decoded_bytes(dataset: IndexedDataset, start: int, stop: int, tokenizer: Tokenizer) -> int:
    ids = [number for number in dataset.tokens(start, stop).tolist() if number != tokenizer.eod_id]
    return len(tokenizer.decode(ids).encode("utf-8"))
