"""Text to token ids behind one protocol: Hugging Face `tokenizers` files, SentencePiece, tiktoken, and plain bytes."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_tf.data.tiktoken_files import TiktokenTokenizer, is_tiktoken, tiktoken_fingerprint
from megatron_tf.errors import DataError, file_errors

BYTES = "bytes"  # the name of the tokenizer that needs no file
EOD_TOKENS = ("<|endoftext|>", "</s>", "<eos>")  # end of document, in the order they are looked for


class Tokenizer(Protocol):
    """Ids are in [0, vocab_size). No token is added at the beginning or the end of a text."""

    vocab_size: int  # largest id + 1
    eod_id: int  # token that ends a document
    fingerprint: str  # SHA-256 of the tokenizer's file (and of what else decides its ids), hexadecimal

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        ...

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """The same, each as int32 [tokens]."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer by its suffix or name:

    - `*.json`: a Hugging Face `tokenizers` file
    - `*.model`: a SentencePiece model
    - `*.tiktoken`, or `tiktoken:cl100k_base` and the like when tiktoken's cache has it
    - `bytes`: the bytes of UTF-8 are the ids 0 to 255, 256 ends a document

    Raises `DataError` when it is missing, broken, needs a package that is missing, or has no end-of-document token.
    """
    if str(path) == BYTES:
        return ByteTokenizer()
    if is_tiktoken(str(path)):
        return TiktokenTokenizer(str(path))
    path = Path(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    raise DataError(
        f"{path}: unknown kind of tokenizer. Give a Hugging Face tokenizers .json, a SentencePiece .model, a .tiktoken "
        f"file, or {BYTES!r}."
    )


def tokenizer_fingerprint(path: str | Path) -> str:
    """Fingerprint without loading the tokenizer or the package for it. Raises `DataError` when it cannot be read."""
    if str(path) == BYTES:
        return ByteTokenizer.fingerprint
    if is_tiktoken(str(path)):
        return tiktoken_fingerprint(str(path))
    with file_errors(DataError, path, "The tokenizer cannot be read: correct the path or make the file readable."):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class ByteTokenizer:
    """Every byte of UTF-8 is a token."""

    vocab_size = 257
    eod_id = 256
    fingerprint = hashlib.sha256(b"bytes of UTF-8, 256 ends a document").hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are no UTF-8, such as half a character, come out as replacement characters."""
        end = EOD_TOKENS[0].encode("utf-8")
        content = b"".join(end if number == self.eod_id else bytes([number]) for number in ids)
        return content.decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizers` file. Truncation and padding that the file asks for are switched off: they would lose text.

    A special token that is written out in a text becomes that token, as in GPT-NeoX and Megatron-LM.
    """

    def __init__(self, path: Path):
        self.fingerprint = tokenizer_fingerprint(path)
        try:
            import tokenizers
        except ImportError:
            raise DataError(f"{path}: needs the package tokenizers: pip install 'megatron_tf'") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the library raises plain Exception for a file it cannot read
            raise DataError(f"{path}: not a Hugging Face tokenizers file ({error}). Give its tokenizer.json.") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eod_id = _first_eod(path, vocabulary)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # The fast one leaves out the tokens' places in the text, which nobody asks for here.
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return _arrays(self.encode_batch(texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class SentencePieceTokenizer:
    """A SentencePiece model; one thread a process."""

    def __init__(self, path: Path):
        self.fingerprint = tokenizer_fingerprint(path)
        try:
            import sentencepiece
        except ImportError:
            raise DataError(
                f"{path}: needs the package sentencepiece: pip install 'megatron_tf[sentencepiece]'"
            ) from None
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(f"{path}: not a SentencePiece model ({error}). Give the .model file.") from None
        # Newer versions fill arrays themselves, which is faster than to turn their lists into arrays.
        self._makes_arrays = "return_type" in inspect.signature(self._processor.encode).parameters
        self.vocab_size = self._processor.get_piece_size()
        found = {token: self._processor.piece_to_id(token) for token in EOD_TOKENS}
        # An unknown piece has the id of <unk>, so the way back tells whether it is there.
        vocabulary = {token: number for token, number in found.items() if self._processor.id_to_piece(number) == token}
        self.eod_id = _first_eod(path, vocabulary)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, out_type=int, add_bos=False, add_eos=False, num_threads=1)

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        if not self._makes_arrays:
            return _arrays(self.encode_batch(texts))
        return self._processor.encode(texts, return_type="numpy", add_bos=False, add_eos=False, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(number) for number in ids])


def _arrays(batch: list[list[int]]) -> list[np.ndarray]:
    return [np.fromiter(ids, np.int32, len(ids)) for ids in batch]


def _first_eod(path: Path, vocabulary: dict[str, int]) -> int:
    for token in EOD_TOKENS:
        if token in vocabulary:
            return vocabulary[token]
    raise DataError(
        f"{path}: has no end-of-document token; looked for {', '.join(EOD_TOKENS)}. "
        f"Add one of them to the tokenizer as a special token."
    )
