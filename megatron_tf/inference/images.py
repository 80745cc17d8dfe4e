"""The likeliest classes of single images, and the names of the classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from megatron_tf.convert.huggingface.importing import is_export, stored_classes
from megatron_tf.data.images.augment import seen
from megatron_tf.data.images.decode import BadImage, opened, upright
from megatron_tf.data.images.readers import image_file, read_names
from megatron_tf.data.images.summary import read_image_summary
from megatron_tf.durable import write_atomically
from megatron_tf.errors import ConfigError, DataError, UserError, write_errors
from megatron_tf.inference.load import file_of_run, run_config
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.tasks.image_classification.section import Image, image_of

BATCH = 64
CLASSES_NAME = "classes.txt"


def class_names(path: Path, model: TokenFormer, file: Path | None) -> tuple[str, ...]:
    """The names of the classes of the model at `path`, in the order of its logits.

    They come from `file` if given (one name a line). Otherwise from the first of these that has as many names as the
    model has classes: the export, the run's training images if they are on this machine, CLASSES_NAME in the run's
    folder. Otherwise the names are numbers. UserError when `file` has another number of names.
    """
    count = image_of(model.config).classes
    if file is not None:
        names = read_names(file)
        if len(names) != count:
            raise UserError(f"{file}: names {len(names)} classes, the model tells {count} apart. Give one a line.")
        return names
    if is_export(path) and len(names := stored_classes(path)) == count:
        return names
    with suppress(ConfigError, DataError):
        config = run_config(path)
        if config is not None:
            names = read_image_summary(config.data.train[0].path).classes
            if len(names) == count:
                return names
    kept = file_of_run(path, CLASSES_NAME)
    if kept is not None and len(names := read_names(kept)) == count:
        return names
    return tuple(map(str, range(count)))


def keep_names(run: Path, names: Sequence[str]) -> bool:
    """Writes the names of a model's classes to CLASSES_NAME in the folder `run`, where `class_names` finds them. For a
    model that comes without its images.

    Returns False and writes nothing if a file with one name a line cannot hold them: a name that is empty or occurs
    twice, or has line breaks or spaces at an end. UserError when the file cannot be written.
    """
    if len(set(names)) < len(names) or any(name.splitlines() != [name] or name.strip() != name for name in names):
        return False
    with write_errors(UserError, run / CLASSES_NAME, "Give another folder."):
        write_atomically(run / CLASSES_NAME, "".join(f"{name}\n" for name in names).encode())
    return True


@torch.no_grad()
def probabilities(model: TokenFormer, files: Sequence[Path]) -> Iterator[np.ndarray]:
    """Yields the probabilities of the classes, fp32 [classes], for each file. UserError if one is not an image."""
    image = image_of(model.config)
    for first in range(0, len(files), BATCH):
        pixels = np.stack([_read(file, image) for file in files[first : first + BATCH]])
        yield from model(torch.from_numpy(pixels)).float().softmax(1).numpy()


def _read(file: Path, image: Image) -> np.ndarray:
    """uint8 [c, size, size], prepared as in an evaluation, after turning the image upright by its EXIF data."""
    content = image_file(UserError, file, "Give files of images.")
    try:
        picture = opened(content)
        return seen(upright(picture) or picture, image)
    except BadImage as problem:
        raise UserError(f"{file}: {problem}. Give files of images that the model can see.") from None
