"""Reading text files that users wrote with any editor on any system."""

from __future__ import annotations

import codecs
import os

from megatron_tf.durable import read_plain
from megatron_tf.errors import UserError, file_errors

MOST_BYTES = 1 << 30
# Little-endian UTF-32 is reported as UTF-16, because its mark begins with the mark of UTF-16.
_OTHERS = ((codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"), (codecs.BOM_UTF32_BE, "UTF-32"))


def read_text_file(
    kind: type[UserError], path: str | os.PathLike[str], remedy: str, most_bytes: int = MOST_BYTES
) -> str:
    """The text of a UTF-8 file, see `decode_text`.

    Raises a `kind` when `path` is not a file, is not readable, or has more than `most_bytes`.
    """
    with file_errors(kind, path, remedy):
        content = read_plain(path, most_bytes)
    return decode_text(kind, path, content)


def decode_text(kind: type[UserError], path: str | os.PathLike[str], content: bytes) -> str:
    """Decodes the UTF-8 `content` of the file `path`, without a byte order mark. Every line end becomes \\n.

    Raises a `kind` for other encodings.
    """
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        other = next((name for mark, name in _OTHERS if content.startswith(mark)), None)
        found = f"is {other} text" if other else f"byte {error.start} is not UTF-8 text"
        raise kind(f"{os.fspath(path)}: {found}. Save the file as UTF-8.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
