"""Turns generated tokens into text while they arrive."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tf.data.tokenizer import Tokenizer

_CONTEXT_TOKENS = 8  # the text of a token may depend on a few before it: parts of a character, spaces between words
_LONGEST_CHARACTER = 4  # bytes, and so at most as many tokens: bytes that are still incomplete then are invalid
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of tokens that follow a prompt. An incomplete character is held back until all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._forget(list(prompt))

    def push(self, token: int) -> str:
        """Adds `token`; returns the text that has become complete, which may be empty."""
        self._ids.append(token)
        self._held += 1
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_UNFINISHED) and self._held < _LONGEST_CHARACTER:
            return ""
        added = text[len(self._shown) :]
        self._forget(self._ids)
        return added

    def rest(self) -> str:
        """The text that was held back. Call it after the last token."""
        return self._tokenizer.decode(self._ids)[len(self._shown) :]

    def _forget(self, ids: list[int]) -> None:
        """All of `ids` have been shown: keep the last few, as context for decoding the next tokens."""
        self._ids = ids[-_CONTEXT_TOKENS:]
        self._held = 0
        self._shown = self._tokenizer.decode(self._ids)
