"""Blocks of a text that are held out: nothing is lost, both sides get some, in about the share that is asked for."""

from __future__ import annotations

import random

import pytest

from megatron_tf.data.preparation.split import MOST_BLOCK_CHARACTERS, split_blocks


def text_of(characters: int) -> str:
    generator = random.Random(characters)
    words = ["ä", "word", "longer", "a line.\n", "paragraph.\r\n\r\n", "end.\n\n", "\u2028"]
    return "".join(generator.choice(words) + " " for _ in range(characters))[:characters]


def held_share(text: str, fraction: float) -> float:
    segments = split_blocks(text, fraction)
    assert "".join(segment for segment, _ in segments) == text and all(segment for segment, _ in segments)
    sides = [held for _, held in segments]
    assert all(first != second for first, second in zip(sides, sides[1:])), "neighbours of a kind are joined"
    return sum(len(segment) for segment, held in segments if held) / len(text)


@pytest.mark.parametrize("fraction", [1e-9, 0.001, 0.05, 0.5, 0.95, 1 - 1e-9])
@pytest.mark.parametrize("characters", [2, 3, 40, 1000, 100_000])
def test_any_text_is_split(characters, fraction):
    assert 0 < held_share(text_of(characters), fraction) < 1


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("characters", [2_000, 50_000, 2_000_000])
def test_the_share_is_about_what_is_asked_for(characters, fraction):
    assert held_share(text_of(characters), fraction) == pytest.approx(fraction, rel=0.5, abs=2 / characters)


def test_a_long_text_is_held_out_in_many_places():
    text = text_of(200 * MOST_BLOCK_CHARACTERS)
    segments = [segment for segment, held in split_blocks(text, 0.05) if held]
    assert 5 < len(segments) <= 13 and max(map(len, segments)) < 4 * MOST_BLOCK_CHARACTERS
    assert split_blocks(text, 0.05) == split_blocks(text, 0.05)


def test_blocks_end_with_paragraphs_lines_or_words():
    for separator in ("\n\n", "\n", " "):
        text = separator.join("word" for _ in range(5000))
        assert all(segment.endswith(separator) for segment, _ in split_blocks(text, 0.1)[:-1])


def test_words_without_an_end():
    assert held_share("x" * 10_000, 0.1) == pytest.approx(0.1, rel=0.1)


def test_a_single_character_stays_whole():
    assert [segment for segment, _ in split_blocks("x", 0.5)] == ["x"]
