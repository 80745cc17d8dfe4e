"""Encodes long texts in windows, because libraries need a hundred bytes per character while they encode.

Windows overlap. The tokens of one end, and those of the next begin, at a place in the overlap where

- both have the same tokens, for hundreds of characters on either side, so that these depend neither on where the next
  begins nor on where the first ends; and
- a token begins with another kind of character than stands before it (white space, digits, letters or other signs), so
  that a group of digits counted from the beginning or the end of a number, or a run of spaces, lies within one window.

So no boundary needs to be known beforehand: this works for texts without white space, and for tokenizers that put a
space before every text. When there is no such place, the text is encoded as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_tf.data.spans import Spans
from megatron_tf.data.tokenizer import Tokenizer

WINDOW_CHARACTERS = 1 << 17
OVERLAP_CHARACTERS = 8192


def is_long(text: str) -> bool:
    """Whether `text` is longer than one window."""
    return len(text) > WINDOW_CHARACTERS


def encode_long(tokenizer: Tokenizer, text: str) -> list[np.ndarray] | None:
    """Tokens of `text` in order, int32 [n] each; None when it can only be encoded as a whole."""
    if not tokenizer.is_local:
        return None
    try:
        return list(_parts(tokenizer, text))
    except _NoPlace:
        return None


class _NoPlace(Exception):
    """The overlap has no place to go from one window to the next, or the tokenizer gives no spans."""


def _parts(tokenizer: Tokenizer, text: str) -> Iterator[np.ndarray]:
    begin = first = 0  # first character of the window; its first token that was not yielded yet
    window = _window(tokenizer, text, begin)
    while begin + WINDOW_CHARACTERS < len(text):
        end = begin + WINDOW_CHARACTERS
        begin = end - OVERLAP_CHARACTERS
        following = _window(tokenizer, text, begin)
        last, next_first = _splice(text, window, following, end - OVERLAP_CHARACTERS // 4)
        yield window.ids[first:last]
        window, first = following, next_first
    yield window.ids[first:]


def _window(tokenizer: Tokenizer, text: str, begin: int) -> Spans:
    spans = tokenizer.encode_spans(text[begin : begin + WINDOW_CHARACTERS])
    if spans is None:
        raise _NoPlace
    return spans.moved(begin)


def _splice(text: str, left: Spans, right: Spans, end: int) -> tuple[int, int]:
    """(index in `left`, index in `right`) of the same token, from which on the tokens of `right` are used.

    `end`: from this character on, tokens of `left` may depend on where its window ends. Raises `_NoPlace`.
    """
    stops = [int(np.searchsorted(spans.starts, end)) for spans in (left, right)]
    size = min(stops)
    ours, theirs = (slice(stop - size, stop) for stop in stops)
    same = (left.ids[ours] == right.ids[theirs]) & (left.starts[ours] == right.starts[theirs])
    different = np.flatnonzero(~same)
    agreed = size if not different.size else size - 1 - int(different[-1])
    if not agreed:
        raise _NoPlace
    margin = OVERLAP_CHARACTERS // 8
    first = stops[0] - agreed
    low, high = np.searchsorted(left.starts, (left.starts[first] + margin, end - margin))
    places = [number for number in range(max(int(low), 1), int(high)) if _changes(text, left, number)]
    spaces = [number for number in places if " " in _kinds(text, left, number)]
    if not places:
        raise _NoPlace
    number = (spaces or places)[0]
    return number, number - stops[0] + stops[1]


def _changes(text: str, spans: Spans, number: int) -> bool:
    """Whether a token begins with another kind of character than stands before it, and the one before it ends there."""
    kinds = _kinds(text, spans, number)
    return kinds[0] != kinds[1] and spans.stops[number - 1] <= spans.starts[number] > spans.starts[number - 1]


def _kinds(text: str, spans: Spans, number: int) -> str:
    place = int(spans.starts[number])
    return _kind(text[place - 1]) + _kind(text[place])


def _kind(character: str) -> str:
    if character.isspace():
        return " "
    if character.isnumeric():
        return "1"
    return "a" if character.isalpha() else "."
