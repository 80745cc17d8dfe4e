"""Train a byte-level BPE tokenizer, as a Hugging Face `tokenizers` file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_tf.data.special_tokens import EOD_TOKENS
from megatron_tf.durable import prepare_output, write_atomically
from megatron_tf.errors import DataError, write_errors

SMALLEST_VOCABULARY = 257  # every byte and the end-of-document token
LARGEST_VOCABULARY = 1 << 20  # four times the largest in use; the trainer reserves memory for the size asked for


def train_bpe(texts: Iterable[str], vocab_size: int, output: Path, eod_token: str = EOD_TOKENS[0]) -> int:
    """Train on the texts and write `output`; returns the vocabulary size, smaller than asked for on too little text.

    Id 0 is `eod_token`, then come the 256 bytes, then the merges, so that any text is encoded without an unknown token.
    The same texts give the same file. Raises `DataError` for a vocabulary size out of range, an end-of-document token
    of fewer than two characters, an output that is not named .json or cannot be written, and a missing package.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"vocabulary size is {vocab_size}, bytes alone need {SMALLEST_VOCABULARY}. Choose a larger one."
        )
    if vocab_size > LARGEST_VOCABULARY:
        raise DataError(
            f"vocabulary size is {vocab_size}, at most {LARGEST_VOCABULARY} is possible. Choose a smaller one."
        )
    if len(eod_token) < 2:
        raise DataError(f"end-of-document token is {eod_token!r}. Choose a name that no text is likely to hold.")
    if output.suffix != ".json":
        raise DataError(f"{output}: a tokenizer is recognised by the ending .json. Choose such a name for the output.")
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise DataError("training needs the package tokenizers: pip install 'megatron_tf'") from None
    prepare_output(output)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eod_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    with write_errors(DataError, output, "Choose another output."):
        write_atomically(output, tokenizer.to_str(pretty=True).encode("utf-8"))
    return tokenizer.get_vocab_size()
