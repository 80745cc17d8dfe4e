from __future__ import annotations

import pytest

from megatron_tf.data.preparation.bpe import train_bpe
from megatron_tf.data.tokenizer import ByteTokenizer, load_tokenizer
from megatron_tf.inference.text import TextStream

TEXT = "naïve – 東京 and 🙂🙂, then plain words, over and over again, and words"


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, tmp_path):
    if request.param == "bytes":
        return ByteTokenizer()
    train_bpe([TEXT, "words over words " * 5], 290, tmp_path / "tokenizer.json")
    return load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("split", [0, 1, 9, 30])
def test_pieces_make_the_text_and_no_character_is_torn(tokenizer, split):
    prompt = TEXT[:split]
    (first,) = tokenizer.encode_batch([prompt])
    rest = tokenizer.encode_batch([TEXT[split:]])[0]
    stream = TextStream(tokenizer, first or [tokenizer.eod_id])
    pieces = [stream.push(token) for token in rest]
    assert "".join(pieces) == TEXT[split:] and stream.rest() == ""
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 5


def test_what_is_no_text_is_shown_after_all():
    stream = TextStream(ByteTokenizer(), [256])
    shown = "".join(stream.push(byte) for byte in [0xFF] * 10 + [0xE6]) + stream.rest()
    assert shown == "\N{REPLACEMENT CHARACTER}" * 11


def test_half_a_character_at_the_end_comes_with_the_rest():
    stream = TextStream(ByteTokenizer(), [256])
    assert [stream.push(byte) for byte in "é".encode()[:1]] == [""] and stream.rest() == "\N{REPLACEMENT CHARACTER}"
