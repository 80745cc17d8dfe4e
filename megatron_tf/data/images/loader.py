"""From prepared images to the batches of one data-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.data import DataSource
from megatron_tf.data.blend import Shares
from megatron_tf.data.images.augment import augmented, finished, seen, targets_of
from megatron_tf.data.images.decode import BadImage, opened
from megatron_tf.data.images.source import ImageFiles, ImageSource
from megatron_tf.data.samples import derived_seed, samples_of_rank
from megatron_tf.errors import DataError
from megatron_tf.tasks.image_classification.section import image_of

CLASSES_NAMED = 3


class ImageLoader:
    """Yields micro batches of images uint8 [b, c, h, w] and targets fp32 [b, C] for one data-parallel rank.

    What a step reads follows from its first sample alone. In training, images are augmented, targets are smoothed, and
    samples go on for ever. In evaluation each image comes once; after the last one follow black images whose targets
    are 0, so that they do not count.
    """

    def __init__(
        self,
        files: Sequence[ImageFiles],
        weights: Sequence[float],
        config: RunConfig,
        *,
        training: bool,
        micro_batch_size: int,
        num_micro_batches: int,
        data_rank: int = 0,
        data_size: int = 1,
    ):
        seed = config.run.seed
        self._sources = [ImageSource(file, derived_seed(seed, number)) for number, file in enumerate(files)]
        self._shares = Shares(weights, seed)
        self._config = config
        self._image = image_of(config.model)
        self._training = training
        self._micro_batch_size = micro_batch_size
        # threads suffice: Pillow releases the interpreter's lock while it works
        self._threads = ThreadPoolExecutor(config.data.workers, "images") if config.data.workers > 1 else None
        self._place = micro_batch_size, num_micro_batches, data_rank, data_size

    def step_batches(self, first_sample: int) -> Iterator[tuple[Tensor, Tensor]]:
        samples = samples_of_rank(first_sample, *self._place)
        for first in range(0, len(samples), self._micro_batch_size):
            yield self._batch(samples[first : first + self._micro_batch_size])

    def sample_sources(self, first_sample: int) -> list[int]:
        return [self.source_of(sample) for sample in samples_of_rank(first_sample, *self._place)]

    def source_of(self, sample: int) -> int:
        return self._shares.locate(sample)[0]

    def _batch(self, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        image = self._image
        images = np.zeros((len(samples), image.channels, image.size, image.size), np.uint8)
        labels = np.full(len(samples), -1)
        run = map if self._threads is None else self._threads.map
        for row, found in enumerate(run(self._sample, samples)):
            if found is not None:
                labels[row], images[row] = found
        if self._training:
            images, targets = finished(images, labels, samples, self._config)
        else:
            targets = targets_of(labels, image.classes)
        return torch.from_numpy(images), torch.from_numpy(targets)

    def _sample(self, sample: int) -> tuple[int, np.ndarray] | None:
        """(class, pixels uint8 [c, h, w]); None after the last image of an evaluation. DataError for a bad image."""
        config = self._config
        source_number, within = self._shares.locate(sample)
        source = self._sources[source_number]
        if not self._training and within >= len(source.files):
            return None
        number = source.number(within)
        label, content = source.files.read(number)
        try:
            picture = opened(content)
            if self._training:
                return label, augmented(picture, self._image, config.data.augmentation, config.run.seed, sample)
            return label, seen(picture, self._image)
        except BadImage as problem:
            raise source.files.damaged(number, str(problem)) from None


def open_images(sources: Sequence[DataSource], num_classes: int) -> list[ImageFiles]:
    """The files of all sources. Raises one DataError with all problems.

    A problem is also a number of classes other than `num_classes`, or other classes than those of the first source.
    """
    files: list[ImageFiles] = []
    problems = []
    for source in sources:
        try:
            file = ImageFiles(source.path)
            _check_classes(file, num_classes, files[0] if files else None)
            files.append(file)
        except DataError as problem:
            problems.append(str(problem))
    if problems:
        raise DataError("\n".join(problems))
    return files


def _check_classes(file: ImageFiles, num_classes: int, other: ImageFiles | None) -> None:
    own = file.summary.classes
    if len(own) != num_classes:
        beyond = ", ".join(map(repr, own[num_classes : num_classes + CLASSES_NAMED]))
        more = f" (beyond: {beyond})" if beyond else ""
        raise DataError(
            f"{file.prefix}.json: {len(own):,} classes{more}, model.image.classes is {num_classes:,}. Set it to "
            f"{len(own)}, or prepare other images."
        )
    if other is None or own == other.summary.classes:
        return
    pairs = [(a, b) for a, b in zip(own, other.summary.classes) if a != b][:CLASSES_NAMED]
    differing = ", ".join(f"{a!r} for {b!r}" for a, b in pairs)
    raise DataError(
        f"{file.prefix}.json: has other classes than {other.prefix}.json, or in another order ({differing}). Prepare "
        f"the images with --classes-from {other.prefix}."
    )
