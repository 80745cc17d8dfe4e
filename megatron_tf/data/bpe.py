"""Train a byte-level BPE tokenizer, as a Hugging Face `tokenizers` file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_tf.data.atomic import atomic_path, make_parent
from megatron_tf.data.tokenizer import EOD_TOKENS
from megatron_tf.errors import DataError

SMALLEST_VOCABULARY = 257  # every byte and the end-of-document token


def train_bpe(texts: Iterable[str], vocab_size: int, output: Path) -> int:
    """Train on the texts and write `output`; returns the vocabulary size, smaller than asked for on too little text.

    Id 0 is <|endoftext|>, then the 256 bytes, then the merges: any text is encoded without an unknown token. The same
    texts give the same file. Raises `DataError` for a vocabulary that is too small or a package that is missing.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"vocabulary size is {vocab_size}, bytes alone need {SMALLEST_VOCABULARY}. Choose a larger one."
        )
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise DataError("training needs the package tokenizers: pip install 'megatron_tf'") from None
    make_parent(output)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKENS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    with atomic_path(output) as path:
        path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    return tokenizer.get_vocab_size()
