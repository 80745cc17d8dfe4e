"""Prepared data, small and made in no time."""

from __future__ import annotations

from pathlib import Path

from megatron_tf.data.indexed import IndexedWriter


def write_tokens(prefix: Path, vocab_size: int = 99, documents: int = 40) -> int:
    """Documents of 100 tokens each, with ids all over the vocabulary; returns the largest id."""
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        for document in range(documents):
            writer.add_document([(document * 7 + position * position) % vocab_size for position in range(100)])
    return writer.max_token_id
