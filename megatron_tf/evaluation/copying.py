"""Measures whether a model copies: the loss of random tokens, and of the same tokens when they are repeated.

A model that attends to what followed a token the last time predicts the second occurrence. Transformers learn it late
and suddenly (induction heads: Olsson et al., 2022, arXiv 2209.11895), and the loss on text that repeats itself falls
with it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from megatron_tf.evaluation.scoring import Ask, Request

SAMPLES = 64
MOST_TOKENS = 128


@dataclass(frozen=True)
class Copying:
    """Loss in nats a token over `samples` sequences of `tokens` random ids: the `first` time, and `again` directly
    after it."""

    samples: int
    tokens: int
    first: float
    again: float


def measure_copying(ask: Ask, vocab_size: int, seq_length: int) -> Copying:
    """Measures a model that reads `seq_length` tokens, 4 or more. Every model of that vocabulary and length gets the
    same ids."""
    sequences = random_sequences(vocab_size, min(MOST_TOKENS, seq_length // 2))
    tokens = len(sequences[0])
    # The first token of a sequence is only read and not scored, both times.
    firsts: list[Request] = [(ids[:1], ids[1:]) for ids in sequences]
    agains: list[Request] = [(ids + ids[:1], ids[1:]) for ids in sequences]
    likelihoods = [likelihood for likelihood, _ in ask(firsts + agains)]
    scored = SAMPLES * (tokens - 1)
    return Copying(SAMPLES, tokens, -sum(likelihoods[:SAMPLES]) / scored, -sum(likelihoods[SAMPLES:]) / scored)


def random_sequences(vocab_size: int, tokens: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(vocab_size) for _ in range(tokens)] for _ in range(SAMPLES)]
