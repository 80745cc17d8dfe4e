from __future__ import annotations

import pytest

from megatron_tf.evaluation.windows import Windows


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("num_tokens", [2, 3, 8, 9, 10, 16, 17, 18, 40])
def test_every_token_but_the_first_is_scored_once(num_tokens, stride):
    windows = Windows(num_tokens, length=8, stride=stride)
    scored = []
    for window in windows:
        assert 0 <= window.start < window.stop <= num_tokens - 1 and 1 <= window.stop - window.start <= 8
        scored += range(window.stop + 1 - window.scored, window.stop + 1)
    assert scored == list(range(1, num_tokens))


def test_context_of_a_sliding_window():
    for window in list(Windows(40, length=8, stride=3))[1:]:
        first_scored = window.stop + 1 - window.scored
        assert first_scored - window.start >= 8 - 3 + 1  # tokens before it that the model reads


def test_windows_side_by_side_and_the_rest():
    assert [(w.start, w.stop, w.scored) for w in Windows(20, 8, 8)] == [(0, 8, 8), (8, 16, 8), (16, 19, 3)]
    assert len(Windows(17, 8, 8)) == 2
