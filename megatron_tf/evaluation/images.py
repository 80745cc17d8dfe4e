"""The evaluation of a classifier: top-1 and top-5 accuracy, each image counted once, at any layout."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.data import DataSource
from megatron_tf.data.documents import boundaries
from megatron_tf.data.images.loader import ImageLoader, open_images
from megatron_tf.data.images.source import ImageFiles
from megatron_tf.durable import write_atomically
from megatron_tf.errors import CheckpointError, UserError, write_errors
from megatron_tf.evaluation import paper
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
from megatron_tf.evaluation.result_files import images_identity
from megatron_tf.paths import literal
from megatron_tf.runtime.agreement import together
from megatron_tf.runtime.watchdog import Watchdog
from megatron_tf.streams import report
from megatron_tf.tasks.data import Batch
from megatron_tf.tasks.image_classification.section import image_of
from megatron_tf.telemetry.text import table

_NORMAL_95 = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations
# The columns of timm's validate.py.
CSV_COLUMNS = (
    "model",
    "img_size",
    "top1",
    "top1_err",
    "top5",
    "top5_err",
    "param_count",
    "crop_pct",
    "interpolation",
)
_TEXT_OPTIONS = {"stride": None, "max_tokens": None, "tasks": (), "limit": None, "copying": False}


@dataclass(frozen=True)
class Counts:
    """The results on the images at `path`.

    `by_class`: fp64 [classes, 4]. Columns: number of images, summed loss, number right at top-1, number right at top-5.
    """

    path: str
    classes: tuple[str, ...]
    by_class: Tensor

    @property
    def images(self) -> int:
        return int(self.by_class[:, 0].sum())

    def mean(self, column: int) -> float:
        return float(self.by_class[:, column].sum()) / self.images


class ImageEvaluation(TaskEvaluation):
    def request_problems(self, config: RunConfig, request: EvaluationRequest) -> Iterator[str]:
        if not request.data and not config.data.validation:
            yield "data.validation: is empty. Name prepared images there, or with --data PREFIX."
        for name, default in _TEXT_OPTIONS.items():
            if getattr(request, name) != default:
                yield f"--{name.replace('_', '-')}: is about text, and model.task is image_classification. Remove it."

    def evaluate(self, evaluation: Evaluation, watchdog: Watchdog) -> None:
        config, request = evaluation.config, evaluation.request
        watchdog.begin("opening the images")
        prefixes = request.data or tuple(source.path for source in config.data.validation)
        sources = [DataSource(path=literal(prefix)) for prefix in prefixes]
        files = together(lambda: open_images(sources, image_of(config.model).classes))
        watchdog.begin("verifying the checkpoint")
        reader = open_evaluated(evaluation)
        output = output_of(evaluation, reader)
        watchdog.begin("loading the weights")
        model = load(config, reader, evaluation.rank, evaluation.device, boundaries(config.data, 0))
        settings = settings_of(evaluation, model)
        watchdog.begin("evaluating")
        found = [_count(evaluation, model, file) for file in files]

        def report_counts() -> None:
            crop = image_of(config.model).crop
            values = {**settings, "crop": crop, "data": [values_of(counts) for counts in found]}
            path = write_result(Path(f"{output}_images.json"), values, images_identity)
            rows = path.with_suffix(".csv")
            with write_errors(UserError, rows, "Choose another --output."):
                write_atomically(rows, as_csv(config, settings["parameters"], found).encode("utf-8"))
            shown = [summary_table(found), *(class_table(counts) for counts in found if request.per_class)]
            if (published := paper_line(config, settings["parameters"])) is not None:
                shown.append(published)
            report("\n".join([*shown, f"wrote {path} and {rows}"]))

        together(lambda: report_counts() if evaluation.rank == 0 else None)


def _count(evaluation: Evaluation, model: LoadedModel, file: ImageFiles) -> Counts:
    """Evaluates all images of `file`, and sums over all ranks. CheckpointError when the loss is not finite."""
    config, data_size = evaluation.config, model.topology.data
    loader = ImageLoader(
        [file],
        [1.0],
        config,
        training=False,
        micro_batch_size=config.training.micro_batch_size,
        num_micro_batches=1,
        data_rank=model.data_rank,
        data_size=data_size,
    )
    size = config.training.micro_batch_size * data_size
    by_class = torch.zeros(len(file.summary.classes), 4, dtype=torch.float64, device=evaluation.device)
    firsts = range(0, len(file), size)
    with evaluation.console.progress(len(firsts), 0, Path(file.prefix).name) as bar:
        for number, first in enumerate(firsts):
            batch = together(partial(_batch, loader, first))
            _add(by_class, model, *(tensor.to(evaluation.device) for tensor in batch))
            bar.advance(number + 1, "")
    if not model.is_reporter:
        by_class.zero_()
    dist.all_reduce(by_class)
    if not by_class[:, 1].isfinite().all():
        raise CheckpointError(
            f"{model.reader.path}: the model's loss is not finite: its training diverged. Use an earlier checkpoint."
        )
    return Counts(file.prefix, file.summary.classes, by_class.cpu())


def _batch(loader: ImageLoader, first: int) -> Batch:
    """The only micro batch of the step that begins at sample `first`."""
    return next(loader.step_batches(first))


@torch.no_grad()
def _add(by_class: Tensor, model: LoadedModel, images: Tensor, targets: Tensor) -> None:
    stage = model.stage
    logits = stage.infer(images)
    if logits is None:
        return
    layers, group = stage.task_layers, stage.tensor.group
    losses = layers.losses(stage.model, logits, targets, group)
    right = layers.metrics(stage.model, logits, targets, group)
    found = torch.stack((layers.counts(targets).double(), losses.double(), *right.double()), 1)
    by_class.index_add_(0, targets.argmax(1), found)


def interval(right: float, images: int) -> tuple[float, float]:
    """(lower, upper) 95 % bounds of the share `right` measured on so many images: Wilson's score interval."""
    square = _NORMAL_95**2 / images
    middle = right + square / 2
    half = _NORMAL_95 * math.sqrt(right * (1 - right) / images + square / (4 * images))
    return (middle - half) / (1 + square), (middle + half) / (1 + square)


def values_of(counts: Counts) -> dict[str, Any]:
    """The results as JSON values. Accuracies are shares; None for a class without images."""
    top1, top5 = counts.mean(2), counts.mean(3)
    return {
        "path": counts.path,
        "images": counts.images,
        "loss": counts.mean(1),
        "top1": top1,
        "top1_interval": list(interval(top1, counts.images)),
        "top5": top5,
        "top5_interval": list(interval(top5, counts.images)),
        "classes": [
            {"name": name, "images": int(images), "top1": _share(first, images), "top5": _share(five, images)}
            for name, (images, _, first, five) in zip(counts.classes, counts.by_class.tolist())
        ],
    }


def as_csv(config: RunConfig, parameters: int, found: Sequence[Counts]) -> str:
    """One row for each data set, in the columns of timm's validate.py: percentages, parameters in millions."""
    image, text = image_of(config.model), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for counts in found:
        shares = [round(100 * share, 4) for top in (counts.mean(2), counts.mean(3)) for share in (top, 1 - top)]
        name = config.run.name if len(found) == 1 else f"{config.run.name} {counts.path}"
        writer.writerow([name, image.size, *shares, round(parameters / 1e6, 2), image.crop, "bicubic"])
    return text.getvalue()


def summary_table(found: Sequence[Counts]) -> str:
    rows: list[Sequence[str]] = [("data", "images", "loss", "top-1 %", "95 %", "top-5 %")]
    for counts in found:
        low, high = interval(counts.mean(2), counts.images)
        rows.append(
            (
                counts.path,
                f"{counts.images:,}",
                f"{counts.mean(1):.4f}",
                _percent(counts.mean(2)),
                f"{_percent(low)} to {_percent(high)}",
                _percent(counts.mean(3)),
            )
        )
    return table(rows)


def class_table(counts: Counts) -> str:
    rows: list[Sequence[str]] = [(f"class of {counts.path}", "images", "top-1 %", "top-5 %")]
    for name, (images, _, first, five) in zip(counts.classes, counts.by_class.tolist()):
        shares = [_share(first, images), _share(five, images)]
        rows.append((name, f"{int(images):,}", *("–" if share is None else _percent(share) for share in shares)))
    return table(rows)


def paper_line(config: RunConfig, parameters: int) -> str | None:
    """A sentence with the paper's result for a model of this size; None when the paper has none."""
    published: Mapping[int, tuple[str, float]] = paper.VISION if image_of(config.model).classes == 1000 else {}
    if parameters not in published or config.model.architecture != "tokenformer":
        return None
    name, top1 = published[parameters]
    return f"The paper's {name} has a top-1 of {top1:.1f} % on ImageNet-1k's validation images."


def _share(right: float, images: float) -> float | None:
    return right / images if images else None


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


IMAGE_EVALUATION = ImageEvaluation()
