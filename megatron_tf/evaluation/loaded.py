"""The parts that all evaluations share: the request, the checkpoint, the model on this rank, the file of results."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tf.checkpoint.architecture import check_evaluable
from megatron_tf.checkpoint.manager import Ranks, resolve, verify_checkpoint
from megatron_tf.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_tf.config.run_plan import topology_for
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.tasks import task_of
from megatron_tf.config.topology import Topology
from megatron_tf.costs.estimate import num_parameters
from megatron_tf.data.documents import Boundaries
from megatron_tf.durable import file_lock, prepare_output, write_atomically
from megatron_tf.errors import UserError, write_errors
from megatron_tf.evaluation.eval_data import TASK_FOLDER
from megatron_tf.evaluation.result_files import Identity, result_file
from megatron_tf.inference.sharded import load_stage
from megatron_tf.model.layers import TensorParallel
from megatron_tf.model.precision import DTYPES
from megatron_tf.model.stage import Stage
from megatron_tf.parallel.groups import make_group
from megatron_tf.runtime.agreement import gather, together
from megatron_tf.runtime.watchdog import Watchdog
from megatron_tf.telemetry.console import Console


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate.

    `checkpoint`: a checkpoint, a checkpoints or a run folder; None: the newest of run.dir.  `data`: prefixes of
    prepared data; empty: data.validation, or none with tasks or copying.  `stride`: tokens; None: model.seq_length.
    `max_tokens`: of each data set; None: all.  `tasks`: names of lm-evaluation-harness, looked for in `task_folder`
    first.  `limit`: documents of each task; None: all.  `copying`: measure the loss of random tokens read twice, and
    nothing else.  `per_class`: also show each class of images.  `output`: folder of the results; None: in run.dir.
    """

    checkpoint: Path | None = None
    data: tuple[str, ...] = ()
    stride: int | None = None
    max_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    task_folder: Path = TASK_FOLDER
    limit: int | None = None
    copying: bool = False
    per_class: bool = False
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
    """The model's part on this rank, and the rank's place in the layout."""

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
        """Whether this rank reports its replica's results: the first tensor rank of the last stage."""
        return self.stage.following is None and self.stage.tensor.group.rank == 0


class TaskEvaluation(ABC):
    """How models of one task are evaluated."""

    @abstractmethod
    def request_problems(self, config: RunConfig, request: EvaluationRequest) -> Iterator[str]:
        """Yields a sentence for each part of the request that is impossible. UserError for a missing package."""

    @abstractmethod
    def evaluate(self, evaluation: Evaluation, watchdog: Watchdog) -> None:
        """Prints tables and writes files. Raises the same UserError on every rank for errors the user can correct."""


def open_evaluated(evaluation: Evaluation) -> CheckpointReader:
    """The checkpoint to evaluate. All its checksums are compared first, a share of them by each rank."""
    config = evaluation.config
    ranks = Ranks(evaluation.rank, dist.get_world_size(), gather)
    path = resolve(evaluation.request.checkpoint or config.run.dir, ranks)
    verify_checkpoint(path, ranks)

    def read() -> CheckpointReader:
        reader = open_checkpoint(path)
        check_evaluable(reader.index, config.model)
        return reader

    return together(read)


def load(
    config: RunConfig, reader: CheckpointReader, rank: int, device: torch.device, documents: Boundaries
) -> LoadedModel:
    """Loads the weights that this rank needs, without optimizer states. All ranks call it together."""
    topology = topology_for(config, dist.get_world_size())
    group = make_group(topology, "tensor", config.parallel.timeout_seconds)
    tensor = TensorParallel(group, config.parallel.sequence)
    dtype = DTYPES[config.training.compute_type]
    stage = together(lambda: load_stage(reader, config.model, topology, rank, tensor, dtype, device, documents.ends))
    return LoadedModel(stage, documents, reader, topology, rank)


def output_of(evaluation: Evaluation, reader: CheckpointReader) -> Path:
    """The beginning of the paths of the result files. All ranks call it together. UserError if it is not writable."""
    output = Path(evaluation.request.output or Path(evaluation.config.run.dir) / "evaluation") / reader.path.name
    together(lambda: prepare_output(output) if evaluation.rank == 0 else None)
    return output


def settings_of(evaluation: Evaluation, model: LoadedModel) -> dict[str, Any]:
    """Describes the evaluated model as JSON values, and logs it."""
    config, index = evaluation.config, model.reader.index
    parameters = num_parameters(config.model)
    task = task_of(config.model)
    trained = f"{task.in_units(config.model, index.tokens):,.0f} {task.unit}"
    evaluation.console.info(
        f"{model.reader.path}: {parameters:,} parameters after {trained}, on {model.topology}, "
        f"{config.training.compute_type}"
    )
    return {
        "checkpoint": str(model.reader.path),
        "step": index.step,
        "trained_tokens": index.tokens,
        "parameters": parameters,
        "layout": str(model.topology),
        "precision": config.training.compute_type,
    }


def write_result(first: Path, values: Mapping[str, Any], identity: Callable[[Mapping[str, Any]], Identity]) -> Path:
    """Writes `values` to `first`, or next to it if that file is of another evaluation; returns the path. UserError.

    Call it before anything is printed: printing may fail, and hours of evaluation would be lost.
    """
    content = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    # Two evaluations that end at once must not both take a name that is free. When the lock is not to be had, the
    # result is written all the same: to lose it would be worse.
    with (
        write_errors(UserError, first, "Choose another --output."),
        file_lock(first.with_name(f"{first.name}.lock")),
    ):
        path = result_file(first, values, identity)
        write_atomically(path, content)
    return path
