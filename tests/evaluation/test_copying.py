from __future__ import annotations

import math

import pytest

from megatron_tf.evaluation.copying import MOST_TOKENS, SAMPLES, measure_copying, random_sequences


def asked_of(model_says):
    """An `Ask` whose answer to each continuation is the sum of what `model_says` of its tokens."""

    def ask(requests):
        answers = []
        for context, continuation in requests:
            row = context + continuation
            own = range(len(context), len(row))
            answers.append((sum(math.log(model_says(row[:at], row[at])) for at in own), False))
        return answers

    return ask


def test_a_model_that_copies_is_told_from_one_that_does_not():
    """One says all ids are alike; the other is sure of what followed a token the last time."""

    def copies(before, token):
        seen = [after for first, after in zip(before, before[1:]) if first == before[-1]]
        return (0.9 if token == seen[-1] else 0.1 / 999) if seen else 1 / 1000

    found = measure_copying(asked_of(lambda before, token: 1 / 1000), 1000, 64)
    assert (found.samples, found.tokens) == (SAMPLES, 32)
    assert found.first == pytest.approx(math.log(1000)) and found.again == pytest.approx(math.log(1000))
    found = measure_copying(asked_of(copies), 1000, 64)
    assert found.first > 6.5 and found.again < 1.0


@pytest.mark.parametrize(("seq_length", "tokens"), [(4, 2), (16, 8), (255, 127), (4096, MOST_TOKENS)])
def test_both_times_fit_into_what_the_model_reads(seq_length, tokens):
    asked = []
    measure_copying(lambda requests: asked.extend(requests) or [(0.0, False)] * len(requests), 99, seq_length)
    assert len(asked) == 2 * SAMPLES
    assert {len(continuation) for _, continuation in asked} == {tokens - 1}
    assert max(len(context) + len(continuation) for context, continuation in asked) == 2 * tokens <= seq_length


def test_ids_are_the_same_each_time_and_of_the_whole_vocabulary():
    sequences = random_sequences(7, 50)
    assert sequences == random_sequences(7, 50)
    assert {token for ids in sequences for token in ids} == set(range(7))
