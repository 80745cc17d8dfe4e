"""Characters of a text that a tokenizer loses: they become no token, or the unknown one."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.errors import DataError
from megatron_tf.telemetry.text import count_of

PIECE_CHARACTERS = 20  # of a longer unknown word only the beginning is named
NAMED = 8  # pieces in a message
MOST_PIECES = 500  # that are counted one by one
PART_CHARACTERS = 1 << 18  # of a text, looked at at once for unknown pieces
BASES = "aetnoi01."
# Text that normalisation would change: case, an accent, white space, a ligature, a number in a circle.
SAMPLE = "\u00c9a  b\n\tc \ufb01 \u2460"


@dataclass
class Loss:
    """The lost characters of one text or of many. `visible`: at least one is not a control or format character."""

    characters: int = 0
    pieces: Counter[str] = field(default_factory=Counter)  # as they stand in the text -> how often
    visible: bool = False

    def __bool__(self) -> bool:
        return self.characters > 0

    def __str__(self) -> str:
        named = ", ".join(f"{piece!r} {count:,}" for piece, count in self.pieces.most_common(NAMED))
        return f"{count_of(self.characters, 'character')} ({named}{', ...' if len(self.pieces) > NAMED else ''})"

    def add(self, other: Loss) -> None:
        """Count what is lost elsewhere. Of very many different pieces the rarer ones are forgotten."""
        self.characters += other.characters
        self.visible |= other.visible
        self.pieces.update(other.pieces)
        if len(self.pieces) > 2 * MOST_PIECES:
            self.pieces = Counter(dict(self.pieces.most_common(MOST_PIECES)))


class LossFinder:
    """Knows which characters a tokenizer drops, once it has met them. White space is not looked at, see
    `comes_back`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._kept: set[str] = set()
        self._dropped: set[str] = set()
        self._base = self._find_base()
        self._unknown = "" if tokenizer.unknown_id is None else tokenizer.decode([tokenizer.unknown_id]).strip()

    def find(self, text: str, tokens: Sequence[np.ndarray]) -> Loss:
        """What is lost of `text`, whose tokens are `tokens`, one array after another."""
        loss = Loss()
        characters = set(text)
        if new := characters - self._kept - self._dropped:
            self._meet(sorted(new))
        for character in sorted(characters & self._dropped, key=text.index):
            self._add(loss, character, text.count(character))
        unknown = self._tokenizer.unknown_id
        if unknown is not None and any((ids == unknown).any() for ids in tokens):
            for piece, count in self._unknown_pieces(text).items():
                self._add(loss, piece, count)
        return loss

    def _meet(self, characters: Sequence[str]) -> None:
        """Sort new characters into those that are kept and those that are dropped, wherever they stand."""
        visible = [character for character in characters if _is_visible(character)]
        hidden = [character for character in characters if not _is_visible(character) and not character.isspace()]
        dropped = set(filter(self._is_dropped, visible))
        if self._base:
            without = self._tokens(self._base * 2)
            dropped |= {c for c in hidden if self._tokens(self._base + c + self._base) == without}
        self._dropped |= dropped
        self._kept |= set(characters) - dropped

    def _is_dropped(self, character: str) -> bool:
        alone = self._tokens(character)
        if alone is None or self._tokenizer.unknown_id in alone:
            return False
        # A tokenizer that puts a space before every text has a token for that.
        return not alone or self._tokens(self._base + character) == self._tokens(self._base)

    def _tokens(self, text: str) -> list[int] | None:
        """None when the tokenizer fails, as it then does on texts with these characters."""
        try:
            return self._tokenizer.encode_batch([text])[0]
        except DataError:
            return None

    def _unknown_pieces(self, text: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for begin in range(0, len(text), PART_CHARACTERS):
            part = text[begin : begin + PART_CHARACTERS]
            spans = self._tokenizer.encode_spans(part)
            assert spans is not None, "only tokenizers that know the places of tokens have an unknown one"
            places = np.flatnonzero(spans.ids == self._tokenizer.unknown_id)
            found.update(part[spans.starts[place] : spans.stops[place]] for place in places)
        del found[self._unknown]  # it is written out in the text
        return found

    def _add(self, loss: Loss, piece: str, count: int) -> None:
        loss.characters += len(piece) * count
        loss.pieces[piece[:PIECE_CHARACTERS]] += count
        loss.visible |= any(map(_is_visible, piece))

    def _find_base(self) -> str:
        """A known character to put next to unknown ones; empty when there is none."""
        for base in BASES:
            ids = self._tokens(base)
            if ids and self._tokenizer.unknown_id not in ids:
                return base
        return ""


def comes_back(tokenizer: Tokenizer) -> str | None:
    """The text that the tokens of SAMPLE decode to, when it differs from SAMPLE; None when it does not.

    A space before it, which some tokenizers put there, does not count.
    """
    returned = tokenizer.decode(tokenizer.encode_batch([SAMPLE])[0])
    return None if returned.removeprefix(" ") == SAMPLE else returned


def _is_visible(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Zs", "Zl", "Zp")
