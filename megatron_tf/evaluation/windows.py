"""Cuts a stream of tokens into windows so that each token is scored exactly once. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """The model reads tokens [start, stop) and predicts [start + 1, stop + 1), of which the last `scored` count."""

    start: int
    stop: int
    scored: int


@dataclass(frozen=True)
class Windows:
    """Windows over a stream of `num_tokens` (2 or more). All tokens but the first are predicted, each once.

    `length`: most tokens that the model reads at once.  `stride` (1 to `length`): tokens from the start of one window
    to the start of the next. With stride = length, windows do not overlap, and the first tokens of each have little
    context. With a smaller stride, each window but the first scores only its last `stride` predictions. Then every
    token has at least length − stride tokens of context (unless the stream begins there), at length/stride times the
    work. The last window may be shorter.
    """

    num_tokens: int
    length: int
    stride: int

    def __post_init__(self) -> None:
        assert self.num_tokens >= 2 and 1 <= self.stride <= self.length

    def __len__(self) -> int:
        beyond_first = max(0, self.num_tokens - 1 - self.length)
        return 1 + -(-beyond_first // self.stride)

    def __getitem__(self, number: int) -> Window:
        if not 0 <= number < len(self):
            raise IndexError(number)
        start, stop = number * self.stride, self._stop(number)
        return Window(start, stop, stop - (self._stop(number - 1) if number else 0))

    def _stop(self, number: int) -> int:
        return min(number * self.stride + self.length, self.num_tokens - 1)
