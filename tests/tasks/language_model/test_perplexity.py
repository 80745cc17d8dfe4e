from __future__ import annotations

import pytest

from megatron_tf.tasks.language_model.perplexity import format_perplexity, perplexity


@pytest.mark.parametrize(
    ("loss", "text"),
    [(2.0, "7.39"), (10.0, "22,026.47"), (14.0, "1.20e+06"), (1e6, "1.01e+304"), (float("nan"), "nan")],
)
def test_a_perplexity_is_short_whatever_it_is(loss, text):
    assert format_perplexity(perplexity(loss)) == text


def test_an_infinite_perplexity():
    assert format_perplexity(float("inf")) == "inf"
