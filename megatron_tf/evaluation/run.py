"""An evaluation from its configuration to its table: the composition root of launch/evaluate.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tf.checkpoint.architecture import check_evaluable
from megatron_tf.checkpoint.manager import Ranks, resolve, verify_checkpoint
from megatron_tf.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_tf.config.schema import DataSource, RunConfig
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import topology_for, validate_layout
from megatron_tf.costs.estimate import num_parameters
from megatron_tf.data.documents import Boundaries, boundaries, find_boundaries
from megatron_tf.data.indexed import IndexedDataset
from megatron_tf.data.loader import check_tokenizer, open_tokens
from megatron_tf.data.summary import known_end, read_summary
from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.diagnosis.run_facts import run_facts
from megatron_tf.durable import prepare_output, write_atomically
from megatron_tf.engine.device import precision_problems
from megatron_tf.errors import CheckpointError, ConfigError, DataError, UserError, file_errors
from megatron_tf.evaluation.eval_data import TASK_FOLDER
from megatron_tf.evaluation.lm_harness import HarnessTasks, check_installed
from megatron_tf.evaluation.perplexity import Score, num_batches, summed_loss
from megatron_tf.evaluation.report import DataResult, perplexity_table, perplexity_values, tasks_table
from megatron_tf.evaluation.result_files import Identity, perplexity_identity, result_file, tasks_identity
from megatron_tf.evaluation.scoring import Scorer
from megatron_tf.evaluation.text_bytes import count_text_bytes
from megatron_tf.evaluation.windows import Windows
from megatron_tf.inference.load import open_tokenizer
from megatron_tf.inference.sharded import load_stage
from megatron_tf.model.layers import TensorParallel
from megatron_tf.model.precision import DTYPES
from megatron_tf.model.stage import Stage
from megatron_tf.parallel.groups import make_group
from megatron_tf.paths import literal
from megatron_tf.runtime.agreement import gather, together
from megatron_tf.runtime.early_mistakes import told_to_all
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import NO_FACTS, join_ranks
from megatron_tf.runtime.session import session
from megatron_tf.runtime.watchdog import Watchdog
from megatron_tf.streams import report
from megatron_tf.tasks.language_model.section import check_reads_text, vocab_size_of
from megatron_tf.telemetry.console import Console


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate.

    `checkpoint`: a checkpoint, a checkpoints or a run folder; None: the newest of run.dir.  `data`: prefixes of
    prepared data; empty: data.validation, or none when there are tasks.  `stride`, `max_tokens` (of each data): None
    stands for model.seq_length and for all.  `tasks`: of lm-evaluation-harness, looked for in `task_folder` first,
    `limit` documents of each.  `output`: folder of the JSON files; None: in run.dir.
    """

    checkpoint: Path | None = None
    data: tuple[str, ...] = ()
    stride: int | None = None
    max_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    task_folder: Path = TASK_FOLDER
    limit: int | None = None
    output: Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on one rank."""

    config: RunConfig
    request: EvaluationRequest
    rank: int
    device: torch.device
    console: Console


@dataclass(frozen=True)
class LoadedModel:
    """The model on this rank, and where the rank stands."""

    stage: Stage
    documents: Boundaries
    reader: CheckpointReader
    topology: Topology
    rank: int

    @property
    def data_rank(self) -> int:
        return self.topology.coordinate("data", self.rank)

    @property
    def is_reporter(self) -> bool:
        """Whether this rank gives its replica's results: the first tensor rank of the last stage."""
        return self.stage.following is None and self.stage.tensor.group.rank == 0


def evaluate(config: RunConfig, environment: LaunchEnvironment, request: EvaluationRequest) -> None:
    """Evaluates, prints tables and writes JSON. Raises UserError, on every rank alike, for what the user can
    correct."""
    with told_to_all(environment):
        check_reads_text(config.model, "this evaluation")
        if request.tasks:
            check_installed()
        validate_layout(config, environment.world_size)
        if problems := [*precision_problems(config), *_request_problems(config, request)]:
            raise ConfigError(problems)
    facts = NO_FACTS
    if environment.world_size > 1:
        options = {f"--{name.replace('_', '-')}": value for name, value in asdict(request).items() if value != ()}
        facts = run_facts("evaluate", [config], options, request.data)
    device = join_ranks(environment, config.parallel.timeout_seconds, facts=facts)
    evaluation = Evaluation(config, request, environment.rank, device, Console(rank=environment.rank))
    with session(environment, config.run.hang_seconds) as watchdog:
        watchdog.report_to(evaluation.console, Path(config.run.dir))
        _evaluate(evaluation, watchdog)


def _request_problems(config: RunConfig, request: EvaluationRequest) -> list[str]:
    problems, length = [], config.model.seq_length
    if request.stride is not None and request.stride > length:
        problems.append(
            f"--stride: {request.stride} is beyond model.seq_length {length}, and tokens between two windows would not be "
            f"scored. Choose 1 to {length}."
        )
    if request.max_tokens == 1:
        problems.append("--max-tokens: is 1, and the first token is only read. Choose 2 or more.")
    if request.tasks and config.data.tokenizer is None:
        problems.append("data.tokenizer: is not given, and the texts of tasks need one. Name the model's tokenizer.")
    if not request.data and not request.tasks and not config.data.validation:
        problems.append("data.validation: is empty. Name prepared data there, or with --data PREFIX.")
    return problems


def _evaluate(evaluation: Evaluation, watchdog: Watchdog) -> None:
    config, request, rank = evaluation.config, evaluation.request, evaluation.rank
    watchdog.begin("opening the data")
    prefixes = request.data or tuple(source.path for source in config.data.validation if not request.tasks)
    datasets = together(lambda: _open_data(config, prefixes))
    tokenizer = together(lambda: _configured_tokenizer(config))
    documents = together(lambda: _boundaries(config, prefixes, tokenizer))
    watchdog.begin("verifying the checkpoint")
    reader = _open_checkpoint(evaluation)
    output = Path(request.output or Path(config.run.dir) / "evaluation") / reader.path.name
    together(lambda: prepare_output(output) if rank == 0 else None)
    watchdog.begin("preparing the tasks")
    tasks = together(lambda: _open_tasks(config, tokenizer, request) if rank == 0 else None)
    watchdog.begin("loading the weights")
    model = load(config, reader, rank, evaluation.device, documents)
    watchdog.begin("evaluating")
    settings = _settings(evaluation, model)
    evaluation.console.info(
        f"{reader.path}: {settings['parameters']:,} parameters after {reader.index.tokens:,} tokens, on {model.topology}, "
        f"{config.training.precision}"
    )
    if datasets:
        scores = [_score(evaluation, model, dataset) for dataset in datasets]

        def report_scores() -> None:
            results = [_with_bytes(request, tokenizer, dataset, score) for dataset, score in zip(datasets, scores)]
            values = perplexity_values(results, {**settings, "max_tokens": request.max_tokens})
            path = _write(Path(f"{output}_perplexity.json"), values, perplexity_identity)
            report(f"{perplexity_table(results)}\nwrote {path}")

        together(lambda: report_scores() if rank == 0 else None)
    if request.tasks:
        watchdog.begin("evaluating tasks")
        together(lambda: _run_tasks(evaluation, model, tasks, settings, Path(f"{output}_tasks.json")))


def _open_tasks(config: RunConfig, tokenizer: Tokenizer | None, request: EvaluationRequest) -> HarnessTasks | None:
    """Before anything is scored, so that what is wrong with a task is known at once."""
    if not request.tasks:
        return None
    assert tokenizer is not None
    return HarnessTasks(tokenizer, config.model.seq_length, request.tasks, request.task_folder, request.limit)


def _run_tasks(
    evaluation: Evaluation, model: LoadedModel, tasks: HarnessTasks | None, settings: dict[str, Any], output: Path
) -> None:
    """The first rank runs the harness, the others compute what it asks."""
    config, request = evaluation.config, evaluation.request
    scorer = Scorer(
        model.stage, max_length=config.model.seq_length, batch_size=config.training.micro_batch_size,
        data_rank=model.data_rank, data_size=model.topology.data, is_reporter=model.is_reporter,
    )  # fmt: skip
    if tasks is None:
        return scorer.follow()
    try:
        results = tasks.run(scorer)
    except UserError:
        scorer.release()  # after any other error the ranks may be in the middle of an answer
        raise
    scorer.release()
    settings = {**settings, "tasks": sorted(request.tasks), "limit": request.limit}
    path = _write(output, {"megatron_tf": settings, **results}, tasks_identity)
    lines = [tasks_table(results["results"])]
    if results["lost"]:
        lines.append(
            f"WARNING: {config.data.tokenizer} has no token for {results['lost']} of the requests, which are lost"
        )
    report("\n".join([*lines, f"wrote {path}"]))


def _open_data(config: RunConfig, prefixes: Sequence[str]) -> list[IndexedDataset]:
    check_tokenizer([DataSource(path=literal(prefix)) for prefix in prefixes], config.data.tokenizer)
    datasets = [open_tokens(prefix, vocab_size_of(config.model)) for prefix in prefixes]
    for dataset in datasets:
        if dataset.num_tokens < 2:
            raise DataError(
                f"{dataset.prefix}.bin: has {dataset.num_tokens} tokens, and the first one is only read. Prepare more text."
            )
    return datasets


def _configured_tokenizer(config: RunConfig) -> Tokenizer | None:
    name = config.data.tokenizer
    if name is None:
        return None
    return open_tokenizer(name, config.model, known_end(config.data), "name the right one in data.tokenizer")


def _open_checkpoint(evaluation: Evaluation) -> CheckpointReader:
    """The checkpoint to evaluate; all its checksums are compared, a share by each rank."""
    config = evaluation.config
    ranks = Ranks(evaluation.rank, dist.get_world_size(), gather)
    path = resolve(evaluation.request.checkpoint or config.run.dir, ranks)
    verify_checkpoint(path, ranks)

    def read() -> CheckpointReader:
        reader = open_checkpoint(path)
        check_evaluable(reader.index, config.model)
        return reader

    return together(read)


def _boundaries(config: RunConfig, prefixes: Sequence[str], tokenizer: Tokenizer | None) -> Boundaries:
    """Where documents end, as the run had it in training; tasks alone take it from the tokenizer."""
    if prefixes:
        sources = tuple(DataSource(path=literal(prefix)) for prefix in prefixes)
        return find_boundaries(config.data.model_copy(update={"train": sources, "validation": ()}))
    assert tokenizer is not None
    return boundaries(config.data, tokenizer.eod_id)


def load(
    config: RunConfig, reader: CheckpointReader, rank: int, device: torch.device, documents: Boundaries
) -> LoadedModel:
    """The weights that this rank needs, without anything of the optimizer."""
    topology = topology_for(config, dist.get_world_size())
    group = make_group(topology, "tensor", config.parallel.timeout_seconds)
    tensor = TensorParallel(group, config.parallel.sequence)
    dtype = DTYPES[config.training.precision]
    stage = together(lambda: load_stage(reader, config.model, topology, rank, tensor, dtype, device, documents.ends))
    return LoadedModel(stage, documents, reader, topology, rank)


def _score(evaluation: Evaluation, model: LoadedModel, dataset: IndexedDataset) -> Score:
    """Over all ranks; how many bytes of text it is about is still open."""
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
    request: EvaluationRequest, tokenizer: Tokenizer | None, dataset: IndexedDataset, score: Score
) -> DataResult:
    summary = read_summary(dataset.prefix)
    text_bytes, known_from = count_text_bytes(dataset, _num_tokens(dataset, request), summary, tokenizer)
    return DataResult(dataset.prefix, replace(score, text_bytes=text_bytes), known_from)


def _num_tokens(dataset: IndexedDataset, request: EvaluationRequest) -> int:
    return min(dataset.num_tokens, request.max_tokens or dataset.num_tokens)


def _settings(evaluation: Evaluation, model: LoadedModel) -> dict[str, Any]:
    config, request, index = evaluation.config, evaluation.request, model.reader.index
    return {
        "checkpoint": str(model.reader.path),
        "step": index.step,
        "trained_tokens": index.tokens,
        "parameters": num_parameters(config.model),
        "layout": str(model.topology),
        "precision": config.training.precision,
        "window": config.model.seq_length,
        "stride": request.stride or config.model.seq_length,
    }


def _write(first: Path, values: Mapping[str, Any], identity: Callable[[Mapping[str, Any]], Identity]) -> Path:
    """To `first`, or next to it when another evaluation is there; returns where. Before anything is printed, which may
    fail: hours of evaluation are then not lost."""
    path = result_file(first, values, identity)
    with file_errors(UserError, path, "Free space or choose another --output."):
        write_atomically(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
    return path
