"""Prepares images as a .bin/.idx pair and a .json with the classes, in parts, as text is prepared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_tf.data.images.decode import BadImage, encoded, in_channels, is_grey, opened, upright
from megatron_tf.data.images.parquet import is_parquet, named_classes, parquet_records
from megatron_tf.data.images.readers import (
    class_folders,
    folder_records,
    idx_records,
    is_idx,
    labels_file,
    read_labels,
    read_names,
    tar_records,
)
from megatron_tf.data.images.source import LABEL, TOKEN_TYPE
from megatron_tf.data.images.summary import ImageSummary, read_image_summary, write_image_summary
from megatron_tf.data.losses import Loss
from megatron_tf.data.preparation.encoding import EncodedBatch
from megatron_tf.data.preparation.inputs import find_inputs
from megatron_tf.data.preparation.part_writer import OnError, PartJob, Read
from megatron_tf.data.preparation.parts import plan_parts
from megatron_tf.data.preparation.progress import ProgressDisplay
from megatron_tf.data.preparation.record_types import BadSample, RawRecord
from megatron_tf.data.preparation.report import Report
from megatron_tf.data.preparation.split import is_held_out
from megatron_tf.data.preparation.work import Preparation, Share, carry_out, check_share, merge_only
from megatron_tf.data.summary import summary_file
from megatron_tf.errors import DataError

MOST_CLASSES = 1_000_000
_GIVE_CLASSES = "Give --classes, a file with one name a line or how many there are, or --classes-from."


@dataclass(frozen=True)
class ImageSettings:
    inputs: tuple[str, ...]  # one folder of class folders, or files and globs of one kind
    output_prefix: str
    classes: str | None = None  # a file with one name a line, or how many there are
    classes_from: str | None = None  # prefix of prepared images with the same classes
    shortest_side: int | None = None  # pixels; larger images are made smaller, and written anew
    ignore_orientation: bool = False  # instead of turning images as EXIF says
    validation_fraction: float = 0.0  # share of images, by hash of their content, that goes to PREFIX_validation
    on_error: OnError = "stop"
    share: Share = Share()
    replace: bool = False


@dataclass(frozen=True)
class _Changes:
    """The changes to each image, and the share that is held out; see `ImageSettings`."""

    shortest_side: int | None
    ignore_orientation: bool
    validation_fraction: float


@dataclass(frozen=True)
class ImagePreparation(Preparation[ImageSummary]):
    classes: tuple[str, ...]
    unit: ClassVar[str] = "images"

    def write_summary(self, prefix: str, report: Report, ending: str) -> None:
        counts, files = report.splits[ending], tuple(map(str, self.files))
        write_image_summary(prefix, ImageSummary(counts.documents, counts.tokens, self.classes, files, report.bad))

    def read_summary(self, prefix: str) -> tuple[ImageSummary, tuple[int, int]] | None:
        if not summary_file(prefix).exists():
            return None
        summary = read_image_summary(prefix)
        return summary, (summary.images, summary.bytes)

    def remedy_for_nothing(self, report: Report) -> str:
        return "Give more images, or another --validation-fraction." if report.documents else "Give images."


def prepare_images(settings: ImageSettings, progress: ProgressDisplay) -> dict[str, ImageSummary]:
    """Prepare images; returns and raises as `carry_out` does."""
    return carry_out(plan_images(settings, progress), settings.share, progress)


def merge_images(settings: ImageSettings, progress: ProgressDisplay) -> dict[str, ImageSummary]:
    """Only merge: the summaries as `prepare_images` returns them. Raises `DataError` when parts are missing."""
    return merge_only(plan_images(settings, progress), progress)


def plan_images(settings: ImageSettings, progress: ProgressDisplay) -> ImagePreparation:
    """Check the settings, and find inputs and classes. Raises `DataError`."""
    if not 0 <= settings.validation_fraction < 1:
        raise DataError(f"--validation-fraction is {settings.validation_fraction}. Choose 0 or more, below 1.")
    check_share(settings.share, settings.output_prefix)
    known = _known_classes(settings)
    if len(settings.inputs) == 1 and os.path.isdir(settings.inputs[0]):
        top = Path(settings.inputs[0])
        files, classes, read, state = _of_folders(top, known)
        inputs: Sequence[Path] = (top,)
    else:
        _check_one_folder(settings.inputs)
        inputs = files = find_inputs(settings.inputs, progress.note, ending=".tar")
        classes, read, state = _of_files(files, known)
    changes = _Changes(settings.shortest_side, settings.ignore_orientation, settings.validation_fraction)
    parts = plan_parts(settings.output_prefix, files, ["images 1", vars(changes), classes, state])
    endings = ("_train", "_validation") if settings.validation_fraction else ("",)
    job = PartJob(read, partial(encode_images, changes), settings.on_error, 256, TOKEN_TYPE, endings)
    work = ImagePreparation(
        settings.output_prefix, tuple(inputs), tuple(parts), endings, job, settings.replace, tuple(classes)
    )
    for prefix in work.prefixes.values():
        if summary_file(prefix).exists():
            # only a summary of images may be replaced
            read_image_summary(prefix)
    return work


def _check_one_folder(inputs: Sequence[str]) -> None:
    """DataError for a folder among several inputs."""
    folder = next((name for name in inputs if os.path.isdir(name)), None)
    if folder is not None:
        raise DataError(
            f"{folder}: is a folder, and {len(inputs)} inputs are given. Give one folder with a folder for each class, "
            "or files and globs alone."
        )


def _known_classes(settings: ImageSettings) -> tuple[str, ...] | None:
    """The classes that the settings give; None when they follow from the inputs. Raises `DataError`."""
    if settings.classes_from is not None:
        return read_image_summary(settings.classes_from).classes
    if settings.classes is None:
        return None
    if settings.classes.isdecimal():
        count = int(settings.classes[:10])  # ten digits are too many already
        names = tuple(map(str, range(min(count, MOST_CLASSES + 1))))
    else:
        names = read_names(Path(settings.classes))
    if not 2 <= len(names) <= MOST_CLASSES:
        given = "" if settings.classes.isdecimal() else f", and the file names {len(names):,}"
        raise DataError(
            f"--classes: {settings.classes}: 2 to {MOST_CLASSES:,} classes can be told apart{given}. Give how many "
            "there are, or a file with one name a line."
        )
    return names


def _of_folders(top: Path, known: tuple[str, ...] | None) -> tuple[list[Path], tuple[str, ...], Read, Any]:
    """(files, classes, their reader, further JSON state that decides the content). `known`: classes of the settings."""
    found = class_folders(top)
    classes = known or tuple(found)
    foreign = [name for name in found if name not in classes]
    if foreign:
        raise DataError(
            f"{top / foreign[0]}: is none of the {len(classes)} classes, which begin with {', '.join(classes[:3])}. "
            "Remove the folder, or give other classes."
        )
    numbers = {str(top / name): classes.index(name) for name in found}
    files = [file for images in found.values() for file in images]
    return files, classes, partial(folder_records, classes=numbers), None


def _of_files(files: Sequence[Path], known: tuple[str, ...] | None) -> tuple[tuple[str, ...], Read, Any]:
    """(classes, reader, further JSON state that decides the content). `known`: classes of the settings."""
    if all(map(is_idx, files)):
        labels = [read_labels(path) for path in files]
        classes = known or tuple(map(str, range(1 + max(int(label.max(initial=0)) for label in labels))))
        states = [os.stat(labels_file(path)) for path in files]
        return classes, partial(idx_records, num_classes=len(classes)), [[s.st_size, s.st_mtime_ns] for s in states]
    if all(map(is_parquet, files)):
        named = [named_classes(path) for path in files]
        other = next((path for path, names in zip(files, named) if names != named[0]), None)
        if other is not None:
            raise DataError(f"{other}: has other names for its classes than {files[0]}. Give files of one data set.")
        parquet_classes = known or named[0]
        if parquet_classes is None:
            raise DataError(f"{files[0]}: has no names for its classes. {_GIVE_CLASSES}")
        return parquet_classes, partial(parquet_records, num_classes=len(parquet_classes)), None
    other = next((path for path in files if ".tar" not in path.suffixes), None)
    if other is not None:
        raise DataError(
            f"{other}: is neither a .tar nor a .parquet nor a file of images of the MNIST family, or not all are of "
            "one kind. Give such files, or one folder with a folder for each class."
        )
    if known is None:
        raise DataError(f"{files[0]}: a .tar has numbers of classes and not their names. {_GIVE_CLASSES}")
    return known, partial(tar_records, num_classes=len(known)), None


def encode_images(changes: _Changes, group: Sequence[RawRecord]) -> EncodedBatch:
    """Check and change every image of a group. Bad ones are returned, not raised, so that they are handled in order."""
    bad: list[BadSample] = []
    documents: list[bytes] = []
    for record in group:
        if record.problem is not None:
            bad.append(BadSample(record.problem[0], record.file, record.line, record.problem[1], ""))
            continue
        label, content = record.payload[: LABEL.size], record.payload[LABEL.size :]
        try:
            documents.append(label + _changed(content, changes))
        except BadImage as problem:
            bad.append(BadSample("bad_image", record.file, record.line, str(problem), content[:16].hex()))
    lengths = np.array([len(document) for document in documents], np.int64)
    fraction = changes.validation_fraction
    held_out = [fraction > 0 and is_held_out(document, fraction) for document in documents]
    return EncodedBatch(
        token_ids=np.frombuffer(b"".join(documents), np.uint8),
        lengths=lengths,
        text_bytes=lengths,
        held_out=np.array(held_out, dtype=bool),
        bad_records=tuple(bad),
        kept=(),
        loss=Loss(),
    )


def _changed(content: bytes, changes: _Changes) -> bytes:
    """The image file with the changes, or `content` itself when none is needed. Raises BadImage."""
    image = opened(content)
    turned = None if changes.ignore_orientation else upright(image)
    picture, side = turned or image, changes.shortest_side
    shrinks = side is not None and min(picture.size) > side
    if shrinks:
        assert side is not None
        scale = side / min(picture.size)
        size = (max(side, round(picture.size[0] * scale)), max(side, round(picture.size[1] * scale)))
        from PIL.Image import Resampling

        picture = in_channels(picture, 1 if is_grey(picture) else 3).resize(size, Resampling.BICUBIC)
    if turned is not None or shrinks:
        return encoded(picture)
    in_channels(image, 3)
    return content
