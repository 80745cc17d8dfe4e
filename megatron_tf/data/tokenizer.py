"""Text to token ids: Hugging Face `tokenizers` files (.json) and SentencePiece models (.model), behind one protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_tf.errors import DataError

EOD_TOKENS = ("<|endoftext|>", "</s>", "<eos>")  # end of document, in the order they are looked for


class Tokenizer(Protocol):
    """Ids are in [0, vocab_size). No token is added at the beginning or the end of a text."""

    vocab_size: int  # largest id + 1
    eod_id: int  # token that ends a document
    fingerprint: str  # SHA-256 of the tokenizer's file, hexadecimal

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer by its suffix. Raises `DataError` when it is missing, broken or has no end-of-document token."""
    path = Path(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    raise DataError(
        f"{path}: unknown kind of tokenizer. Give a Hugging Face tokenizers .json or a SentencePiece .model."
    )


def tokenizer_fingerprint(path: str | Path) -> str:
    """SHA-256 of the file, without loading the tokenizer. Raises `DataError` when it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: the tokenizer cannot be read ({error.strerror}). Correct the path.") from None


class HuggingFaceTokenizer:
    """A `tokenizers` file. Truncation and padding that the file asks for are switched off: they would lose text."""

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
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

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
        self.vocab_size = self._processor.get_piece_size()
        found = {token: self._processor.piece_to_id(token) for token in EOD_TOKENS}
        # An unknown piece has the id of <unk>, so the way back tells whether it is there.
        vocabulary = {token: number for token, number in found.items() if self._processor.id_to_piece(number) == token}
        self.eod_id = _first_eod(path, vocabulary)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, out_type=int, add_bos=False, add_eos=False, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(number) for number in ids])


def _first_eod(path: Path, vocabulary: dict[str, int]) -> int:
    for token in EOD_TOKENS:
        if token in vocabulary:
            return vocabulary[token]
    raise DataError(
        f"{path}: has no end-of-document token; looked for {', '.join(EOD_TOKENS)}. "
        f"Add one of them to the tokenizer as a special token."
    )
