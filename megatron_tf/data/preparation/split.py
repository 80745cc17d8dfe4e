"""Which documents, or which blocks of a document, are held out for validation."""

from __future__ import annotations

import hashlib
from itertools import groupby

MOST_BLOCK_CHARACTERS = 1 << 14  # so that many blocks of a long text are held out, from all its parts


def is_held_out(name: bytes, fraction: float) -> bool:
    """Whether a document belongs to the held-out share: a function of `name` alone, true for `fraction` of all names.

    With the text as the name, copies of a document are never on both sides.
    """
    return _hash(name) < fraction * 2**64


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def split_blocks(text: str, fraction: float) -> list[tuple[str, bool]]:
    """(segment, whether it is held out) of the consecutive segments of `text`; there are some of both kinds.

    Blocks, chosen by hash, are held out until they make up `fraction` of the text, but at least one. Neighbouring
    blocks on the same side form one segment. A text of a single character goes to one side whole.
    """
    blocks = _blocks(text, max(1, min(MOST_BLOCK_CHARACTERS, int(min(fraction, 1 - fraction) * len(text)))))
    if len(blocks) < 2:
        return [(text, is_held_out(text.encode(), fraction))]
    chosen: set[int] = set()
    missing = fraction * len(text)
    for number in sorted(range(len(blocks)), key=lambda number: (_hash(blocks[number].encode()), number))[:-1]:
        if chosen and missing < len(blocks[number]) / 2:
            break
        chosen.add(number)
        missing -= len(blocks[number])
    runs = groupby(range(len(blocks)), key=lambda number: number in chosen)
    return [("".join(blocks[number] for number in numbers), held) for held, numbers in runs]


def _blocks(text: str, characters: int) -> list[str]:
    """`text` in blocks of about `characters` that end with a paragraph, a line or a word where possible."""
    blocks, start = [], 0
    while len(text) - start > characters + characters // 2:
        earliest, latest = start + (characters + 1) // 2, start + characters
        ends = (text.rfind(separator, earliest, latest) + len(separator) for separator in ("\n\n", "\n", " "))
        end = next((end for end in ends if end > earliest), latest)
        blocks.append(text[start:end])
        start = end
    return [*blocks, text[start:]]
