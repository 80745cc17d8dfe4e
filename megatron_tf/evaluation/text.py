"""The evaluation of a language model: perplexity on prepared data, zero-shot tasks, and copying."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.data import DataSource
from megatron_tf.data.documents import Boundaries, boundaries, find_boundaries
from megatron_tf.data.indexed import IndexedDataset
from megatron_tf.data.loader import check_tokenizer, open_tokens
from megatron_tf.data.summary import known_end, read_summary
from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.errors import CheckpointError, DataError, UserError
from megatron_tf.evaluation.copying import measure_copying
from megatron_tf.evaluation.lm_harness import HarnessTasks, check_installed
from megatron_tf.evaluation.loaded import (
    Evaluation,
    EvaluationRequest,
    LoadedModel,
    TaskEvaluation,
    load,
    open_evaluated,
    output_of,
    settings_of,
    write_result,
)
from megatron_tf.evaluation.perplexity import Score, num_batches, summed_loss
from megatron_tf.evaluation.report import DataResult, copying_table, perplexity_table, perplexity_values, tasks_table
from megatron_tf.evaluation.result_files import copying_identity, perplexity_identity, tasks_identity
from megatron_tf.evaluation.scoring import Scorer
from megatron_tf.evaluation.text_bytes import count_text_bytes
from megatron_tf.evaluation.windows import Windows
from megatron_tf.inference.load import open_tokenizer
from megatron_tf.paths import literal
from megatron_tf.runtime.agreement import together
from megatron_tf.runtime.watchdog import Watchdog
from megatron_tf.streams import report
from megatron_tf.tasks.language_model.section import vocab_size_of
from megatron_tf.telemetry.text import count_of


class TextEvaluation(TaskEvaluation):
    """Perplexity on prepared data, zero-shot tasks, and copying."""

    def request_problems(self, config: RunConfig, request: EvaluationRequest) -> Iterator[str]:
        length = config.model.seq_length
        if request.stride is not None and request.stride > length:
            yield (
                f"--stride: {request.stride} is beyond model.seq_length {length}, and tokens between two windows would "
                f"not be scored. Choose 1 to {length}."
            )
        if request.max_tokens == 1:
            yield "--max-tokens: is 1, and the first token is only read. Choose 2 or more."
        if request.tasks and config.data.tokenizer is None:
            yield "data.tokenizer: is not given, and the texts of tasks need one. Name the model's tokenizer."
        yield from _unused_options(request)
        if request.copying and length < 4:
            yield f"--copying: model.seq_length is {length}, and two tokens twice are 4. Evaluate a longer context."
        if not request.data and not request.tasks and not request.copying and not config.data.validation:
            yield "data.validation: is empty. Name prepared data there, or with --data PREFIX."
        if request.per_class:
            yield "--per-class: a model of text has no classes. Remove it."
        if request.tasks:
            check_installed()

    def evaluate(self, evaluation: Evaluation, watchdog: Watchdog) -> None:
        config, request, rank = evaluation.config, evaluation.request, evaluation.rank
        watchdog.begin("opening the data")
        needs_text = not request.tasks and not request.copying
        prefixes = request.data or tuple(source.path for source in config.data.validation if needs_text)
        datasets = together(lambda: _open_data(config, prefixes))
        tokenizer = together(lambda: _configured_tokenizer(config))
        documents = Boundaries() if request.copying else together(lambda: _boundaries(config, prefixes, tokenizer))
        watchdog.begin("verifying the checkpoint")
        reader = open_evaluated(evaluation)
        output = output_of(evaluation, reader)
        watchdog.begin("preparing the tasks")
        tasks = together(lambda: _open_tasks(config, tokenizer, request) if rank == 0 else None)
        watchdog.begin("loading the weights")
        model = load(config, reader, rank, evaluation.device, documents)
        watchdog.begin("evaluating")
        length = config.model.seq_length
        settings = {**settings_of(evaluation, model), "window": length, "stride": request.stride or length}
        masks = config.data.model_dump(include={"reset_at_eod", "mask_eod_loss", "pad_id"})
        if datasets:
            scores = [_score(evaluation, model, dataset) for dataset in datasets]

            def report_scores() -> None:
                results = [
                    _with_bytes(request, tokenizer, documents, dataset, score)
                    for dataset, score in zip(datasets, scores)
                ]
                values = perplexity_values(results, {**settings, **masks, "max_tokens": request.max_tokens})
                path = write_result(Path(f"{output}_perplexity.json"), values, perplexity_identity)
                report(f"{perplexity_table(results)}\nwrote {path}")

            together(lambda: report_scores() if rank == 0 else None)
        if request.tasks:
            watchdog.begin("evaluating tasks")
            settings |= {"reset_at_eod": config.data.reset_at_eod, "tokenizer": config.data.tokenizer}
            together(lambda: _run_tasks(evaluation, model, tasks, settings, Path(f"{output}_tasks.json")))
        if request.copying:
            together(lambda: _measure_copying(evaluation, model, settings, Path(f"{output}_copying.json")))


def _unused_options(request: EvaluationRequest) -> Iterator[str]:
    """A sentence for each option that would have no effect: the user must not believe that it had one."""
    if request.copying:
        for name in ("data", "tasks", "stride", "max_tokens"):
            if getattr(request, name):
                option = f"--{name.replace('_', '-')}"
                yield f"--copying: reads random tokens alone, and {option} is given too. Leave one of them out."
    if request.tasks and not request.data:
        if request.stride:
            yield f"--stride: {request.stride} is for data, and --tasks reads none. Remove it, or give --data PREFIX."
        if request.max_tokens:
            yield f"--max-tokens: {request.max_tokens} is for data, and --tasks reads none. Give --limit instead."
    if request.limit and not request.tasks:
        yield f"--limit: {request.limit} is for tasks, and --tasks is not given. Give --max-tokens instead."


def _measure_copying(evaluation: Evaluation, model: LoadedModel, settings: dict[str, Any], output: Path) -> None:
    """The first rank sends requests; the others help to compute the answers."""
    scorer = _scorer(evaluation.config, model)
    if evaluation.rank != 0:
        return scorer.follow()
    found = measure_copying(scorer, vocab_size_of(evaluation.config.model), evaluation.config.model.seq_length)
    scorer.release()
    path = write_result(output, {**settings, "copying": asdict(found)}, copying_identity)
    report(f"{copying_table(found)}\nwrote {path}")


def _open_tasks(config: RunConfig, tokenizer: Tokenizer | None, request: EvaluationRequest) -> HarnessTasks | None:
    """Loads and rehearses the tasks before anything is scored, so that a broken task shows at once."""
    if not request.tasks:
        return None
    assert tokenizer is not None
    return HarnessTasks(tokenizer, config.model.seq_length, request.tasks, request.task_folder, request.limit)


def _run_tasks(
    evaluation: Evaluation, model: LoadedModel, tasks: HarnessTasks | None, settings: dict[str, Any], output: Path
) -> None:
    """The first rank runs the harness; the others help to compute the answers to its requests."""
    config, request = evaluation.config, evaluation.request
    scorer = _scorer(config, model)
    if tasks is None:
        return scorer.follow()
    try:
        results = tasks.run(scorer)
    except UserError:
        scorer.release()  # after any other error the ranks may be in the middle of an answer
        raise
    scorer.release()
    settings = {**settings, "tasks": sorted(request.tasks), "limit": request.limit}
    path = write_result(output, {"megatron_tf": settings, **results}, tasks_identity)
    lines = [tasks_table(results["results"])]
    if results["lost"]:
        lines.append(
            f"WARNING: {config.data.tokenizer} has no token for {results['lost']} of the requests, which are lost"
        )
    report("\n".join([*lines, f"wrote {path}"]))


def _scorer(config: RunConfig, model: LoadedModel) -> Scorer:
    return Scorer(
        model.stage,
        max_length=config.model.seq_length,
        batch_size=config.training.micro_batch_size,
        data_rank=model.data_rank,
        data_size=model.topology.data,
        is_reporter=model.is_reporter,
    )


def _open_data(config: RunConfig, prefixes: Sequence[str]) -> list[IndexedDataset]:
    check_tokenizer([DataSource(path=literal(prefix)) for prefix in prefixes], config.data.tokenizer)
    datasets = [open_tokens(prefix, vocab_size_of(config.model)) for prefix in prefixes]
    for dataset in datasets:
        if dataset.num_tokens < 2:
            raise DataError(
                f"{dataset.prefix}.bin: has {count_of(dataset.num_tokens, 'token')}, and the first one is only read. "
                "Prepare more text."
            )
    return datasets


def _configured_tokenizer(config: RunConfig) -> Tokenizer | None:
    name = config.data.tokenizer
    if name is None:
        return None
    return open_tokenizer(name, config.model, known_end(config.data), "name the right one in data.tokenizer")


def _boundaries(config: RunConfig, prefixes: Sequence[str], tokenizer: Tokenizer | None) -> Boundaries:
    """Document boundaries as in training. When there are only tasks, the end token comes from the tokenizer."""
    if prefixes:
        sources = tuple(DataSource(path=literal(prefix)) for prefix in prefixes)
        return find_boundaries(config.data.model_copy(update={"train": sources, "validation": ()}))
    assert tokenizer is not None
    return boundaries(config.data, tokenizer.eod_id)


def _score(evaluation: Evaluation, model: LoadedModel, dataset: IndexedDataset) -> Score:
    """The score of all ranks together, without `text_bytes`, which `_with_bytes` adds."""
    config, request = evaluation.config, evaluation.request
    length = config.model.seq_length
    windows = Windows(_num_tokens(dataset, request), length, request.stride or length)
    batch, data_size = config.training.micro_batch_size, model.topology.data
    total = num_batches(windows, batch, model.data_rank, data_size)
    with evaluation.console.progress(total, 0, Path(dataset.prefix).name) as bar:
        own, scored = together(
            lambda: summed_loss(
                model.stage,
                dataset,
                windows,
                vocab_size=vocab_size_of(config.model),
                batch_size=batch,
                data_rank=model.data_rank,
                data_size=data_size,
                loss_mask=model.documents.loss_mask,
                progress=lambda done: bar.advance(done, ""),
            )
        )
    of_this_rank = [own, scored] if model.is_reporter else [0.0, 0.0]
    sums = torch.tensor(of_this_rank, dtype=torch.float64, device=evaluation.device)
    dist.all_reduce(sums)
    nats, tokens = sums.tolist()
    if not tokens:
        raise DataError(f"{dataset.prefix}: data.pad_id and data.mask_eod_loss leave no token to score.")
    if not math.isfinite(nats):
        raise CheckpointError(
            f"{model.reader.path}: the model's loss is not finite: its training diverged. Use an earlier checkpoint."
        )
    return Score(nats, int(tokens), None)


def _with_bytes(
    request: EvaluationRequest,
    tokenizer: Tokenizer | None,
    documents: Boundaries,
    dataset: IndexedDataset,
    score: Score,
) -> DataResult:
    if (mask := documents.loss_mask) is not None:
        # The loss leaves out the first token of each document, or after padding, whose bytes cannot be left out.
        key = "data.pad_id" if mask.eod_id is None else "data.mask_eod_loss"
        return DataResult(dataset.prefix, score, f"not known: {key} leaves tokens out")
    summary = read_summary(dataset.prefix)
    text_bytes, known_from = count_text_bytes(dataset, _num_tokens(dataset, request), summary, tokenizer)
    return DataResult(dataset.prefix, replace(score, text_bytes=text_bytes), known_from)


def _num_tokens(dataset: IndexedDataset, request: EvaluationRequest) -> int:
    return min(dataset.num_tokens, request.max_tokens or dataset.num_tokens)


TEXT_EVALUATION = TextEvaluation()
