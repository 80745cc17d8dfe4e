"""Tokens with the places in the text that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Spans(NamedTuple):
    """Tokens in order. Of a character in several tokens, and of an added space, places may be empty or repeated."""

    ids: np.ndarray  # int32 [n]
    starts: np.ndarray  # int64 [n], of characters of the text
    stops: np.ndarray  # int64 [n]

    @classmethod
    def of(cls, ids: Sequence[int], places: Sequence[tuple[int, int]]) -> Spans:
        pairs = np.array(places, dtype=np.int64).reshape(-1, 2)
        return cls(np.fromiter(ids, np.int32, len(ids)), pairs[:, 0], pairs[:, 1])

    def moved(self, characters: int) -> Spans:
        """The same, of a text with so many characters before it."""
        return Spans(self.ids, self.starts + characters, self.stops + characters)


def byte_spans(text: str, ids: np.ndarray, lengths: np.ndarray) -> Spans | None:
    """Spans of tokens that are `lengths` bytes of UTF-8 each; None when they are not all bytes of the text."""
    content = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    stops = np.cumsum(lengths, dtype=np.int64)
    if (int(stops[-1]) if stops.size else 0) != content.size:
        return None
    # Characters that have begun at each byte: a byte 10xxxxxx goes on with one.
    begun = np.append(0, np.cumsum((content & 0xC0) != 0x80))
    starts = begun[stops - lengths + 1] - 1
    return Spans(ids, starts, begun[stops])
