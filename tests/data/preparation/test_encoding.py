"""What a worker does with a group of records: long documents in pieces, and texts that a library gives up on."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_tf.data.losses import LossFinder
from megatron_tf.data.preparation import encoding, long_texts
from megatron_tf.data.preparation.bpe import train_bpe
from megatron_tf.data.preparation.encoding import EncodeSettings, encode_group
from megatron_tf.data.preparation.record_types import RawRecord
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


def in_windows(monkeypatch, size: int, overlap: int) -> None:
    monkeypatch.setattr(long_texts, "WINDOW_CHARACTERS", size)
    monkeypatch.setattr(long_texts, "OVERLAP_CHARACTERS", overlap)


@pytest.mark.parametrize("kind", ["bpe", "bytes", "unigram", "keeps spaces"])
@pytest.mark.parametrize("size", [300, 1001])
def test_pieces_of_a_long_document_give_the_tokens_of_the_whole(tokenizers, kind, size, monkeypatch):
    in_windows(monkeypatch, size, 100)
    tokenizer = load_tokenizer(tokenizers[kind])
    whole = tokenizer.encode_batch([LONG])[0]
    batch = encode_group(settings(tokenizers[kind]), [text_record("short"), text_record(LONG), text_record("end")])
    lengths = batch.lengths.tolist()
    assert batch.token_ids[lengths[0] : lengths[0] + lengths[1]].tolist() == [*whole, tokenizer.eod_id]
    assert batch.text_bytes.tolist() == [5, len(LONG.encode()), 3]
    kept = [(remark.kind, remark.file, remark.line, remark.reason) for remark in batch.kept]
    at_once = [("encoded_whole", "f", 1, f"{len(LONG):,} characters at once")]
    assert kept == (at_once if kind == "unigram" else [])


class TakesLengths:
    """Encodes a text as its length, so that no two pieces give the tokens of the whole."""

    eod_id, unknown_id, vocab_size, fingerprint, is_local = 0, None, 10**6, "", True

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([len(text)], dtype=np.int32) for text in texts]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_spans(self, text: str):
        return None


def use(monkeypatch, tokenizer: TakesLengths) -> None:
    monkeypatch.setattr(encoding, "_loaded_tokenizer", lambda *name: (tokenizer, LossFinder(tokenizer)))


def test_a_document_that_cannot_be_taken_apart_is_encoded_at_once_and_named(monkeypatch):
    in_windows(monkeypatch, 300, 100)
    use(monkeypatch, TakesLengths())
    batch = encode_group(settings("x"), [text_record("a"), text_record("b" * 1000, line=7), text_record("cc")])
    assert batch.token_ids.tolist() == [1, 0, 1000, 0, 2, 0] and batch.bad_records == ()
    (remark,) = batch.kept
    assert (remark.kind, remark.line, remark.reason) == ("encoded_whole", 7, "1,000 characters at once")


def lossy(folder) -> str:
    """A tokenizer that knows the letters of a few words, and neither bytes nor an unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        ["the quick brown fox"], trainers.BpeTrainer(special_tokens=["<|endoftext|>"], show_progress=False)
    )
    tokenizer.save(str(folder / "lossy.json"))
    return str(folder / "lossy.json")


def test_a_document_that_loses_characters_is_bad_or_kept_and_counted(tmp_path):
    pytest.importorskip("tokenizers")
    group = [text_record("the fox"), text_record("the 日本 ζ日", line=2), text_record("quick", line=3)]
    reason = "the tokenizer loses 4 characters ('日' 2, '本' 1, 'ζ' 1) of it"
    strict = encode_group(settings(lossy(tmp_path)), group)
    (bad,) = strict.bad_records
    assert (bad.kind, bad.file, bad.line, bad.reason) == ("lost_text", "f", 2, reason)
    assert strict.lengths.size == 2 and strict.kept == () and not strict.loss
    kept = encode_group(EncodeSettings(lossy(tmp_path), "text", 0.0, keep_lossy=True), group)
    assert kept.bad_records == () and kept.lengths.size == 3
    assert [(remark.kind, remark.line, remark.reason) for remark in kept.kept] == [("lost_text", 2, reason)]
    assert (kept.loss.characters, kept.loss.pieces["日"]) == (4, 2)


class PanicException(BaseException):
    """As the one of libraries written in Rust."""


class Delicate(TakesLengths):
    def __init__(self, error: BaseException):
        self.error = error

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        if any("poison" in text for text in texts):
            raise self.error
        return super().encode_arrays(texts)


@pytest.mark.parametrize("error", [PanicException("stack overflow"), ValueError("stack overflow")])
def test_a_text_on_which_the_library_fails_is_a_bad_record(monkeypatch, error):
    use(monkeypatch, Delicate(error))
    batch = encode_group(settings("x"), [text_record("a"), text_record("poison", line=2), text_record("cc")])
    assert batch.token_ids.tolist() == [1, 0, 2, 0]
    (sample,) = batch.bad_records
    assert (sample.kind, sample.file, sample.line, sample.excerpt) == ("not_encodable", "f", 2, "poison")
    assert sample.reason == f"the tokenizer fails on it ({type(error).__name__}: stack overflow)"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_other_ends_are_not_taken_for_bad_records(monkeypatch, error):
    use(monkeypatch, Delicate(error))
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
