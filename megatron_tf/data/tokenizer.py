"""Text to token ids behind one protocol: Hugging Face `tokenizers` files, SentencePiece, tiktoken, and plain bytes."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_tf.data.spans import Spans, byte_spans
from megatron_tf.data.special_tokens import EOD_TOKENS, Eod, check_ids, find_eod
from megatron_tf.data.tiktoken_files import TiktokenTokenizer, is_tiktoken, tiktoken_fingerprint
from megatron_tf.data.tokenizer_files import (
    NotATokenizerError,
    is_library_failure,
    read_tokenizer_file,
    without_sampling,
)
from megatron_tf.errors import DataError

BYTES = "bytes"  # the name of the tokenizer that needs no file
_SUFFIXES = (".json", ".model")


class Tokenizer(Protocol):
    """Ids are in [0, vocab_size). No token is added at the beginning or the end of a text.

    The same text always gives the same tokens: sampling, truncation and padding that a file asks for are switched off.
    """

    vocab_size: int  # largest id + 1
    eod_id: int  # token that ends a document
    unknown_id: int | None  # token that stands for what it has no other token for
    is_local: bool  # tokens depend on text nearby alone; not so where rounded sums over the whole text decide
    fingerprint: str  # SHA-256 of the tokenizer's file (and of what else decides its ids), hexadecimal

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        ...

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """The same, each as int32 [tokens]."""
        ...

    def encode_spans(self, text: str) -> Spans | None:
        """The same of one text, with the characters that each token stands for; None where that is not known."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""
        ...


def load_tokenizer(path: str | Path, eod: Eod = None) -> Tokenizer:
    """Open a tokenizer by its suffix or name:

    - `*.json`: a Hugging Face `tokenizers` file
    - `*.model`: a SentencePiece model
    - `*.tiktoken`, or `tiktoken:cl100k_base` and the like when tiktoken's cache has it
    - `bytes`: the bytes of UTF-8 are the ids 0 to 255, 256 ends a document

    `eod`: the token that ends a document, by name or id; None: the one of the usual names that it has.
    Raises `DataError` when it is missing, broken, needs a package that is missing, has no such token, or several of
    the usual names.
    """
    check_kind(path)
    if str(path) == BYTES:
        return ByteTokenizer(eod)
    if is_tiktoken(str(path)):
        return TiktokenTokenizer(str(path), eod)
    path = Path(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eod)
    return SentencePieceTokenizer(path, eod)


def check_kind(path: str | Path) -> None:
    """Raise `DataError` unless the name is of a kind that `load_tokenizer` opens: `NotATokenizerError` where there is
    a file of that name."""
    if str(path) == BYTES or is_tiktoken(str(path)) or Path(path).suffix in _SUFFIXES:
        return
    message = (
        f"{path}: unknown kind of tokenizer. Give a Hugging Face tokenizers .json, a SentencePiece .model, a "
        f".tiktoken file, or {BYTES!r}."
    )
    if os.path.lexists(path):
        raise NotATokenizerError(message)
    raise DataError(f"{message} There is no such file.")


def tokenizer_fingerprint(path: str | Path) -> str:
    """Fingerprint without loading the tokenizer or the package for it. Raises `DataError` when it cannot be read."""
    if str(path) == BYTES:
        return ByteTokenizer.fingerprint
    if is_tiktoken(str(path)):
        return tiktoken_fingerprint(str(path))
    return hashlib.sha256(read_tokenizer_file(Path(path))).hexdigest()


class ByteTokenizer:
    """Every byte of UTF-8 is a token."""

    vocab_size = 257
    eod_id = 256
    unknown_id: int | None = None
    is_local = True
    fingerprint = hashlib.sha256(b"bytes of UTF-8, 256 ends a document").hexdigest()

    def __init__(self, eod: Eod = None):
        find_eod(BYTES, {EOD_TOKENS[0]: self.eod_id}, eod)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32) for text in texts]

    def encode_spans(self, text: str) -> Spans | None:
        ids = self.encode_arrays([text])[0]
        return byte_spans(text, ids, np.ones(ids.size, dtype=np.int64))

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are no UTF-8, such as half a character, come out as replacement characters."""
        end = EOD_TOKENS[0].encode("utf-8")
        content = b"".join(end if number == self.eod_id else bytes([number]) for number in ids)
        return content.decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizers` file. What it says of truncation, padding and dropout is switched off: they would lose text, or
    give other tokens each time.

    A special token that is written out in a text becomes that token, as in GPT-NeoX and Megatron-LM.
    """

    def __init__(self, path: Path, eod: Eod = None):
        content = read_tokenizer_file(path)
        self._path = path
        self.fingerprint = hashlib.sha256(content).hexdigest()
        try:
            import tokenizers
        except ImportError:
            raise DataError(f"{path}: needs the package tokenizers: pip install 'megatron_tf'") from None
        try:
            content = without_sampling(content)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except BaseException as error:
            if not is_library_failure(error):
                raise
            raise NotATokenizerError(
                f"{path}: not a Hugging Face tokenizers file ({error}). Give its tokenizer.json."
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder().items()
        special = {token.content: number for number, token in added if token.special}
        self.vocab_size = check_ids(path, vocabulary)
        self.eod_id = find_eod(path, vocabulary, eod, special)
        described = json.loads(content)["model"]
        self.unknown_id = _unknown_id(described, vocabulary)
        self.is_local = described.get("type") != "Unigram"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # The fast one leaves out the tokens' places in the text, which nobody asks for here.
        return [encoding.ids for encoding in self._encoded(self._tokenizer.encode_batch_fast, texts)]

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return _arrays(self.encode_batch(texts))

    def encode_spans(self, text: str) -> Spans | None:
        encoding = self._encoded(self._tokenizer.encode_batch, [text])[0]
        return Spans.of(encoding.ids, encoding.offsets)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _encoded(self, encode: Callable[..., list[Any]], texts: list[str]) -> list[Any]:
        try:
            return encode(texts, add_special_tokens=False)
        except BaseException as error:
            if not is_library_failure(error):
                raise
            raise DataError(
                f"{self._path}: fails on a text ({error}). Is it a whole tokenizer, and the right one?"
            ) from None


class SentencePieceTokenizer:
    """A SentencePiece model; one thread a process."""

    def __init__(self, path: Path, eod: Eod = None):
        content = read_tokenizer_file(path)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        try:
            import sentencepiece
        except ImportError:
            raise DataError(
                f"{path}: needs the package sentencepiece: pip install 'megatron_tf[sentencepiece]'"
            ) from None
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
            ids = range(self._processor.get_piece_size())
            vocabulary = {self._processor.id_to_piece(number): number for number in ids}
        except (RuntimeError, OSError, ValueError) as error:
            raise NotATokenizerError(f"{path}: not a SentencePiece model ({error}). Give the .model file.") from None
        # Newer versions fill arrays themselves, which is faster than to turn their lists into arrays.
        self._makes_arrays = "return_type" in inspect.signature(self._processor.encode).parameters
        special = {piece: number for piece, number in vocabulary.items() if self._processor.is_control(number)}
        self.vocab_size = check_ids(path, vocabulary)
        self.eod_id = find_eod(path, vocabulary, eod, special)
        self.unknown_id: int | None = self._processor.unk_id()
        self.is_local = not self._is_unigram()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, out_type=int, num_threads=1, **_AS_IT_STANDS)

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        if not self._makes_arrays:
            return _arrays(self.encode_batch(texts))
        return self._processor.encode(texts, return_type="numpy", num_threads=1, **_AS_IT_STANDS)

    def encode_spans(self, text: str) -> Spans | None:
        if self._makes_arrays:
            found = self._processor.encode(text, return_type="offset_mapping", **_AS_IT_STANDS)
            return Spans.of(found["ids"], found["offsets"])
        pieces = self._processor.encode(text, out_type="immutable_proto", **_AS_IT_STANDS).pieces
        return Spans.of([piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces])

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(number) for number in ids])

    def _is_unigram(self) -> bool:
        try:  # only these models know a second best; the others say so, or give nothing
            return bool(self._processor.nbest_encode("a", nbest_size=2, out_type=int))
        except RuntimeError:
            return False


_AS_IT_STANDS: Mapping[str, Any] = {"add_bos": False, "add_eos": False, "reverse": False, "enable_sampling": False}


def _arrays(batch: list[list[int]]) -> list[np.ndarray]:
    return [np.fromiter(ids, np.int32, len(ids)) for ids in batch]


def _unknown_id(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> int | None:
    """The unknown token of the model of a `tokenizers` file: Unigram says its id, the others its name."""
    number = model.get("unk_id")
    return vocabulary.get(model.get("unk_token") or "") if number is None else number
