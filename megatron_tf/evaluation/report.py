"""The results of an evaluation, as a table for people and as plain values for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tf.evaluation import paper
from megatron_tf.evaluation.copying import Copying
from megatron_tf.evaluation.perplexity import Score, pooled
from megatron_tf.tasks.language_model.perplexity import format_perplexity
from megatron_tf.telemetry.text import table


@dataclass(frozen=True)
class DataResult:
    """The score on the prepared data `path`.  `bytes_from`: how the bytes of its text were counted, in words."""

    path: str
    score: Score
    bytes_from: str


def score_values(score: Score) -> dict[str, Any]:
    """A score as JSON values. An infinite perplexity is None, because JSON has no infinity."""
    return {
        "tokens": score.tokens,
        "text_bytes": score.text_bytes,
        "loss": score.loss,
        "perplexity": None if score.perplexity == float("inf") else score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }


def perplexity_values(results: Sequence[DataResult], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a perplexity file. `settings`: of the evaluation, as JSON values."""
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
    return name, f"{score.tokens:,}", f"{score.loss:.4f}", format_perplexity(score.perplexity), bits


def copying_table(copying: Copying) -> str:
    return table(
        [
            (f"{copying.samples} × {copying.tokens} random tokens", "loss"),
            ("the first time", f"{copying.first:.4f}"),
            ("again", f"{copying.again:.4f}"),
        ]
    )


def tasks_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the harness's `results` next to the paper's, with an average if it has all six tasks of the paper."""
    rows: list[Sequence[str]] = [("task", "metric", "here", "± error", *(f"paper {size}" for size in paper.SIZES))]
    compared = []
    for task, found in results.items():
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr") or not kind:
                continue
            is_accuracy = metric in ("acc", "acc_norm")
            error = found.get(f"{metric}_stderr,{kind}")
            published: Sequence[float] = ()
            if paper.ACCURACY_METRICS.get(task) == metric:
                published = paper.ACCURACIES[task]
                compared.append(value)
            elif (task, metric) == ("lambada_openai", "perplexity"):
                published = paper.LAMBADA_PERPLEXITY
            rows.append(
                (
                    task,
                    metric,
                    _figure(value, is_accuracy),
                    _figure(error, is_accuracy),
                    *_published(published, is_accuracy),
                )
            )
    if len(compared) == len(paper.TASKS):
        rows.append(
            ("average", "acc", _figure(sum(compared) / len(compared), True), "", *_published(paper.AVERAGE, True))
        )
    return table(rows)


def _figure(value: Any, is_accuracy: bool) -> str:
    """An accuracy in percent, as in papers; another number like a perplexity; a dash for no number."""
    if not isinstance(value, (int, float)):
        return "–"
    return f"{100 * value:.1f}" if is_accuracy else format_perplexity(value)


def _published(values: Sequence[float], is_accuracy: bool) -> list[str]:
    return [f"{value:.{1 if is_accuracy else 2}f}" for value in values] or [""] * len(paper.SIZES)
