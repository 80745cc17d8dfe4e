from __future__ import annotations

import pytest

from megatron_tf.data.indexed import IndexedDataset, IndexedWriter
from megatron_tf.data.summary import CorpusSummary
from megatron_tf.data.tokenizer import ByteTokenizer
from megatron_tf.evaluation.text_bytes import FROM_SUMMARY, FROM_TOKENIZER, count_text_bytes

TEXTS = ("plain", "größer", "", "日本")


@pytest.fixture
def data(tmp_path):
    tokenizer = ByteTokenizer()
    with IndexedWriter(tmp_path / "text", vocab_size=257) as writer:
        for ids in tokenizer.encode_batch(list(TEXTS)):
            writer.add_document([*ids, tokenizer.eod_id])
    return IndexedDataset(tmp_path / "text")


def summary(data, size):
    return CorpusSummary(data.num_documents, data.num_tokens, size, 256, "", 257, 256, (), 0, 0)


def test_all_of_the_data(data):
    size = sum(len(text.encode()) for text in TEXTS)
    assert count_text_bytes(data, data.num_tokens, summary(data, 1234), ByteTokenizer()) == (1234, FROM_SUMMARY)
    assert count_text_bytes(data, data.num_tokens, None, ByteTokenizer()) == (size, FROM_TOKENIZER)
    assert count_text_bytes(data, data.num_tokens, None, None)[0] is None


def test_a_part_of_the_data(data):
    """The end of a document is no text."""
    assert count_text_bytes(data, 5, summary(data, 1234), ByteTokenizer())[0] == 5
    assert count_text_bytes(data, 6, summary(data, 1234), ByteTokenizer())[0] == 5
    assert count_text_bytes(data, 6 + 8 + 1, None, ByteTokenizer())[0] == 5 + 8
