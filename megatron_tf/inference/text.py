"""Tokens to text as they come."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tf.data.tokenizer import Tokenizer

_CONTEXT_TOKENS = 8  # what a token means in text may depend on a few before it: half characters, spaces between words
_LONGEST_CHARACTER = 4  # bytes, and so tokens: what is still no character after them is none
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Text of tokens that follow a prompt; a character whose bytes are not all there yet is held back."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._forget(list(prompt))

    def push(self, token: int) -> str:
        """What `token` adds to the text that is certain."""
        self._ids.append(token)
        self._held += 1
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_UNFINISHED) and self._held < _LONGEST_CHARACTER:
            return ""
        added = text[len(self._shown) :]
        self._forget(self._ids)
        return added

    def rest(self) -> str:
        """What was held back, when no token follows."""
        return self._tokenizer.decode(self._ids)[len(self._shown) :]

    def _forget(self, ids: list[int]) -> None:
        """All of `ids` is shown: keep the few that the next tokens are decoded after."""
        self._ids = ids[-_CONTEXT_TOKENS:]
        self._held = 0
        self._shown = self._tokenizer.decode(self._ids)
