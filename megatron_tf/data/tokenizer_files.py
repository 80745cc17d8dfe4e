"""Safe reading of tokenizer files, which come from strangers: kind, size, and errors of the libraries."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

from megatron_tf.durable import read_plain
from megatron_tf.errors import DataError, file_errors

# Ten times the largest in use.
LARGEST_FILE = 1 << 28
# Fields of the model in a `tokenizers` file: of BPE, and of Unigram.
SAMPLING = ("dropout", "alpha", "nbest_size")


class NotATokenizerError(DataError):
    """The name is not that of a known kind of tokenizer, whatever packages are installed."""


def read_tokenizer_file(path: Path) -> bytes:
    """Its content. Raises `DataError` when it is missing, no plain file, or larger than any tokenizer."""
    with file_errors(DataError, path, "The tokenizer cannot be read: correct the path or make the file readable."):
        return read_plain(path, LARGEST_FILE)


def without_sampling(content: bytes) -> bytes:
    """A `tokenizers` file without random sampling; the same bytes if it has none.

    Raises ValueError, TypeError, KeyError or RecursionError when it is not such a file.
    """
    content = content.removeprefix(codecs.BOM_UTF8)  # which some editors begin every file with
    described = json.loads(content)
    sampling = [name for name in SAMPLING if described["model"].get(name) is not None]
    if not sampling:
        return content
    described["model"].update(dict.fromkeys(sampling))
    return json.dumps(described, ensure_ascii=False).encode("utf-8")


def as_in_preparation(content: bytes) -> bytes:
    """A `tokenizers` file that gives every reader the tokens that data are prepared with: only those of the text.

    Tokens that a post-processor puts around each text are not in the data, so a model has never seen them.
    """
    content = without_sampling(content)
    described = json.loads(content)
    added = [name for name in ("post_processor", "truncation", "padding") if described.get(name) is not None]
    if not added:
        return content
    return json.dumps({**described, **dict.fromkeys(added)}, ensure_ascii=False, indent=2).encode("utf-8")


def is_library_failure(error: BaseException) -> bool:
    """Whether the error is a failure of a library. A panic of one in Rust is not an `Exception`, but must not end the
    work."""
    return (isinstance(error, Exception) and not isinstance(error, MemoryError)) or (
        type(error).__name__ == "PanicException"
    )
