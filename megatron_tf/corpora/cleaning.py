"""Cleaning of text: one form of characters and line ends, a test for English, and removal of repeated paragraphs."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass, field

LEAST_CHARACTERS = 200  # shorter documents are left out: there is too little to learn from them
LEAST_COMMON_WORDS = 0.04  # share of the words; English has 0.3 and more, programs 0.05 to 0.15, tables and Latin none
# Letters and digits. A shorter paragraph is kept however often it comes: a heading, an import, a refrain.
LEAST_PARAGRAPH_CHARACTERS = 60
MOST_REPEATED = 0.5  # share of a document's characters in repeated paragraphs, above which it is left out whole
_COMMON = """
a an and are as at be but by for from had he her his i if in is it my no not of on or she so that the their they this
thou thy to was we which will with you your return self def none
"""
COMMON_WORDS = frozenset(_COMMON.split())
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2060\ufeff\ufffd]")
_LINE_END = re.compile(r"[ \t]+$", re.MULTILINE)
_MANY_LINES = re.compile(r"\n{3,}")
_PARAGRAPHS = re.compile(r"\n{2,}")
_WORD = re.compile(r"[^\W\d_]+")


def clean(text: str) -> str:
    """The text in NFC with plain spaces and newlines, without control characters or several empty lines in a row.

    It does not begin with a newline, and ends with exactly one.
    """
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ")
    text = _LINE_END.sub("", _CONTROL.sub("", text).expandtabs())
    return _MANY_LINES.sub("\n\n", text).strip("\n") + "\n"


def is_english(text: str) -> bool:
    """Whether LEAST_COMMON_WORDS of the words at the beginning are among the commonest of English or of programs."""
    words = _WORD.findall(text[:200_000].lower())
    return bool(words) and sum(word in COMMON_WORDS for word in words) >= LEAST_COMMON_WORDS * len(words)


@dataclass
class Deduplicator:
    """Takes documents one after another and leaves out paragraphs that came before, in the same document or another.

    Two paragraphs are the same when their letters and digits are: case, spaces, line breaks and punctuation do not
    count. Paragraphs are told apart by 64 bits of a hash.
    """

    seen: set[bytes] = field(default_factory=set)
    dropped_characters: int = 0

    def take(self, text: str) -> str:
        """The document without repeated paragraphs; "" when more than MOST_REPEATED of it is repeated."""
        kept, repeated, fresh = [], 0, set()
        for paragraph in _PARAGRAPHS.split(text):
            letters = "".join(filter(str.isalnum, paragraph.casefold()))
            if len(letters) < LEAST_PARAGRAPH_CHARACTERS:
                kept.append(paragraph)
                continue
            key = hashlib.blake2b(letters.encode("utf-8"), digest_size=8).digest()
            if key in self.seen or key in fresh:
                repeated += len(paragraph)
            else:
                fresh.add(key)
                kept.append(paragraph)
        if repeated > MOST_REPEATED * len(text):
            self.dropped_characters += len(text)
            return ""
        self.seen |= fresh
        self.dropped_characters += repeated
        return text if not repeated else "\n\n".join(kept)
