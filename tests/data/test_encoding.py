"""What a worker does with a group of records: long documents in pieces, and texts that a library gives up on."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_tf.data import encoding
from megatron_tf.data.bpe import train_bpe
from megatron_tf.data.encoding import EncodeSettings, encode_group, pieces
from megatron_tf.data.record_types import BadRecord, RawRecord
from megatron_tf.data.tokenizer import load_tokenizer

WORDS = [
    "The",
    "fox",
    "number",
    "17",
    "jumps",
    "over\n\n",
    "",
    "the",
    "dogs'",
    "unbelievable",
    "tokenization,",
    "e.g.",
    "",
    "x=f(y);\tZürich",
    "東京",
    "🦊",
    "",
]
LONG = " ".join(WORDS[(number * 7 + number // 5) % len(WORDS)] for number in range(2000))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, str]:
    """Kind -> path."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train_bpe([LONG], 400, folder / "bpe.json")
    paths = {"bpe": str(folder / "bpe.json"), "bytes": "bytes"}
    sentencepiece = pytest.importorskip("sentencepiece")
    for name, extra in {"unigram": False, "keeps spaces": True}.items():  # the second as Llama's
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LONG.split("\n")), model_prefix=str(folder / name), vocab_size=320,
            model_type="bpe" if extra else "unigram", byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
            remove_extra_whitespaces=not extra, normalization_rule_name="identity" if extra else "nmt_nfkc",
        )  # fmt: skip
        paths[name] = str(folder / f"{name}.model")
    return paths


def settings(tokenizer: str, fraction: float = 0.0) -> EncodeSettings:
    return EncodeSettings(tokenizer, "text", fraction)


def text_record(text: str, line: int = 1) -> RawRecord:
    return RawRecord("f", line, text.encode())


@pytest.mark.parametrize("kind", ["bpe", "bytes", "unigram", "keeps spaces"])
@pytest.mark.parametrize("size", [300, 1001])
def test_pieces_of_a_long_document_give_the_tokens_of_the_whole(tokenizers, kind, size, monkeypatch):
    whole = load_tokenizer(tokenizers[kind]).encode_batch([LONG])[0]
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", size)
    tokenizer = load_tokenizer(tokenizers[kind])
    assert max(map(len, pieces(tokenizer, LONG))) <= size and len(list(pieces(tokenizer, LONG))) > len(LONG) // size
    batch = encode_group(settings(tokenizers[kind]), [text_record("short"), text_record(LONG), text_record("end")])
    lengths = batch.lengths.tolist()
    assert batch.token_ids[lengths[0] : lengths[0] + lengths[1]].tolist() == [*whole, tokenizer.eod_id]
    assert batch.text_bytes.tolist() == [5, len(LONG.encode()), 3]


def test_without_white_space_it_is_cut_between_tokens(tokenizers, monkeypatch):
    text = "17x=f(y);" * 500
    whole = load_tokenizer(tokenizers["bpe"]).encode_batch([text])[0]
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 300)
    assert encode_group(settings(tokenizers["bpe"]), [text_record(text)]).token_ids.tolist() == [*whole, 0]


class NowhereToCut:
    """Encodes a text as its length, so that no two pieces give the tokens of the whole."""

    eod_id, vocab_size, fingerprint = 0, 10**6, ""

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([len(text)], dtype=np.int32) for text in texts]


def test_a_document_that_cannot_be_cut_is_a_bad_record(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 300)
    monkeypatch.setattr(encoding, "_loaded_tokenizer", lambda name: NowhereToCut())
    batch = encode_group(settings("x"), [text_record("a"), text_record("b" * 1000, line=7), text_record("cc")])
    assert batch.token_ids.tolist() == [1, 0, 2, 0]
    (sample,) = batch.bad_records
    assert (sample.kind, sample.line) == ("not_encodable", 7)
    assert sample.reason == "no place to cut its 1000 characters near character 300"


class PanicException(BaseException):
    """As the one of libraries written in Rust."""


class Delicate(NowhereToCut):
    def __init__(self, error: BaseException):
        self.error = error

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        if any("poison" in text for text in texts):
            raise self.error
        return super().encode_arrays(texts)


@pytest.mark.parametrize("error", [PanicException("stack overflow"), ValueError("stack overflow")])
def test_a_text_on_which_the_library_fails_is_a_bad_record(monkeypatch, error):
    monkeypatch.setattr(encoding, "_loaded_tokenizer", lambda name: Delicate(error))
    batch = encode_group(settings("x"), [text_record("a"), text_record("poison", line=2), text_record("cc")])
    assert batch.token_ids.tolist() == [1, 0, 2, 0]
    (sample,) = batch.bad_records
    assert (sample.kind, sample.file, sample.line, sample.excerpt) == ("not_encodable", "f", 2, "poison")
    assert sample.reason == f"the tokenizer fails on it ({type(error).__name__}: stack overflow)"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_other_ends_are_not_taken_for_bad_records(monkeypatch, error):
    monkeypatch.setattr(encoding, "_loaded_tokenizer", lambda name: Delicate(error))
    with pytest.raises(type(error)):
        encode_group(settings("x"), [text_record("poison")])


def test_bad_records_come_in_reading_order_with_the_beginning_of_what_stands_there():
    group = [
        RawRecord("f", 1, b'{"text": "ab"}', is_json=True),
        RawRecord("f", 2, b'{"text": 5, "long": "' + b"y" * 500 + b'"}', is_json=True),
        RawRecord("f", 3, b"", problem=("truncated", "it breaks off")),
        RawRecord("g", 1, b"\xff\xfe"),
        RawRecord("g", 2, json.dumps({"text": ""}).encode(), is_json=True),
    ]
    batch = encode_group(settings("bytes"), group)
    assert batch.token_ids.tolist() == [97, 98, 256]
    assert [(sample.kind, sample.file, sample.line) for sample in batch.bad_records] == [
        ("not_text", "f", 2), ("truncated", "f", 3), ("not_utf8", "g", 1), ("empty", "g", 2),
    ]  # fmt: skip
    assert batch.bad_records[0].excerpt.startswith('{"text": 5, "long": "yyy')
    assert len(batch.bad_records[0].excerpt) == encoding.EXCERPT_BYTES and batch.bad_records[2].excerpt == "\\xff\\xfe"


def test_a_group_without_documents():
    batch = encode_group(settings("bytes"), [RawRecord("f", 1, b"")])
    assert (batch.token_ids.size, batch.lengths.size, len(batch.bad_records)) == (0, 0, 1)


def test_cut_gives_up_only_when_there_is_no_place():
    with pytest.raises(BadRecord):
        encoding._cut(NowhereToCut(), "x" * 500, 300)
