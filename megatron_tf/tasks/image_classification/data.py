"""Prepared images as the batches of a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.data import DataSource
from megatron_tf.data.blend import MAX_DEVIATION
from megatron_tf.data.images.loader import ImageLoader, open_images
from megatron_tf.data.images.source import ImageFiles
from megatron_tf.data.loader import fingerprint
from megatron_tf.tasks.data import OpenData, TaskData
from megatron_tf.tasks.image_classification.section import image_of
from megatron_tf.telemetry.text import count_of, plural


class OpenImages(OpenData):
    def __init__(self, config: RunConfig):
        self._config = config

    def loader(
        self,
        sources: Sequence[DataSource],
        *,
        micro_batch_size: int,
        num_micro_batches: int,
        data_rank: int = 0,
        data_size: int = 1,
        training: bool = False,
    ) -> ImageLoader:
        return ImageLoader(
            open_images(sources, image_of(self._config.model).classes),
            [source.weight for source in sources],
            self._config,
            training=training,
            micro_batch_size=micro_batch_size,
            num_micro_batches=num_micro_batches,
            data_rank=data_rank,
            data_size=data_size,
        )

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(self._config.data.train, self._config.run.seed)

    @cached_property
    def _files(self) -> list[ImageFiles]:
        return open_images(self._config.data.train, image_of(self._config.model).classes)

    def epoch(self, samples: int) -> float:
        return samples / sum(map(len, self._files))

    def outlook(self, samples: int) -> tuple[str, list[str]]:
        config, files = self._config, self._files
        total = sum(source.weight for source in config.data.train)
        epochs = [samples * source.weight / total / len(file) for source, file in zip(config.data.train, files)]
        said = ", ".join(
            f"{count_of(len(file), 'image')} in {file.prefix}: {_epochs(count)}" for file, count in zip(files, epochs)
        )
        return said, list(_warnings(config, files))


def _epochs(count: float) -> str:
    number = f"{count:.3g}"
    return f"{number} {plural('epoch', float(number))}"


def _warnings(config: RunConfig, files: Sequence[ImageFiles]) -> list[str]:
    """Warnings about settings that are allowed but probably a mistake."""
    validation = open_images(config.data.validation, image_of(config.model).classes)
    paths = {file.prefix for file in files}
    found = [
        f"data.validation: {file.prefix} is training data too, so its accuracy says nothing about images that were not "
        "trained on. Prepare others."
        for file in validation
        if file.prefix in paths
    ]
    available = sum(map(len, validation))
    if validation and config.evaluation.samples < min(available, 1000):
        found.append(
            f"evaluation.samples: {config.evaluation.samples} of {available:,} validation images tell an accuracy to "
            f"some percent only. Raise it; from {_samples_for_all(config, validation):,} on it is all of them, once."
        )
    return found


def _samples_for_all(config: RunConfig, validation: Sequence[ImageFiles]) -> int:
    """The number of samples of an evaluation that has all images of each source, which are dealt by weight."""
    if len(validation) == 1:
        return len(validation[0])
    weights = [source.weight for source in config.data.validation]
    shares = [weight / sum(weights) for weight in weights]
    return max(math.ceil((len(file) + MAX_DEVIATION) / share) for file, share in zip(validation, shares))


class ImageData(TaskData):
    def checks(self, config: RunConfig) -> list[Callable[[], object]]:
        return [partial(open_images, (*config.data.train, *config.data.validation), image_of(config.model).classes)]

    def open(self, config: RunConfig) -> OpenImages:
        return OpenImages(config)


IMAGE_DATA = ImageData()
