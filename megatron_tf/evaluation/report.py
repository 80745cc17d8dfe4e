"""What an evaluation found, as a table for people and as plain values for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tf.evaluation.perplexity import Score, pooled


@dataclass(frozen=True)
class DataResult:
    """The score on the prepared data `path`.  `bytes_from`: how the bytes of its text are known."""

    path: str
    score: Score
    bytes_from: str


def score_values(score: Score) -> dict[str, Any]:
    """A score as JSON values; what is not finite has no form there and is None."""
    return {
        "tokens": score.tokens,
        "text_bytes": score.text_bytes,
        "loss": score.loss,
        "perplexity": None if score.perplexity == float("inf") else score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }


def perplexity_values(results: Sequence[DataResult], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All of an evaluation; `settings`: what it was done with."""
    return {
        **settings,
        "data": [
            {"path": result.path, **score_values(result.score), "text_bytes_from": result.bytes_from}
            for result in results
        ],
        "all": score_values(pooled([result.score for result in results])),
    }


def perplexity_table(results: Sequence[DataResult]) -> str:
    rows: list[Sequence[str]] = [("data", "tokens", "loss", "perplexity", "bits/byte")]
    rows += [_score_row(result.path, result.score) for result in results]
    if len(results) > 1:
        rows.append(_score_row("all", pooled([result.score for result in results])))
    return table(rows)


def _score_row(name: str, score: Score) -> tuple[str, ...]:
    bits = "–" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
    return name, f"{score.tokens:,}", f"{score.loss:.4f}", f"{score.perplexity:,.2f}", bits


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells in columns; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )
