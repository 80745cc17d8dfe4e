"""Prepared images: each document is its class (i32, little endian) and the bytes of an image file."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from megatron_tf.data.images.summary import ImageSummary, read_image_summary
from megatron_tf.data.indexed import IndexedDataset, data_file, index_file
from megatron_tf.data.samples import KeyedPermutation
from megatron_tf.data.summary import summary_file
from megatron_tf.errors import DataError

TOKEN_TYPE = 1  # bytes
LABEL = struct.Struct("<i")


class ImageFiles:
    """The prepared images of a prefix. DataError when its files are missing, damaged, or hold no images."""

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        self.summary: ImageSummary = read_image_summary(prefix)
        self._dataset = IndexedDataset(prefix)
        if self._dataset.dtype != np.uint8:
            raise DataError(f"{index_file(prefix)}: holds {self._dataset.dtype} tokens, and not the bytes of images.")
        found = self._dataset.num_documents, self._dataset.num_tokens
        if found != (self.summary.images, self.summary.bytes):
            raise DataError(
                f"{summary_file(prefix)}: says there are {self.summary.images} images and {self.summary.bytes} bytes, "
                f"the files next to it have {found[0]} and {found[1]}. Prepare the images again."
            )
        if not len(self):
            raise DataError(f"{data_file(prefix)}: holds no image. Prepare some with tools/prepare_images.py.")

    def __len__(self) -> int:
        return self.summary.images

    def read(self, number: int) -> tuple[int, bytes]:
        """(class, bytes of the image file) of image `number`. DataError for a class that cannot be."""
        start, stop = map(int, self._dataset.document_offsets[number : number + 2])
        content = self._dataset.content(start, stop)
        label = LABEL.unpack_from(content)[0] if len(content) > LABEL.size else -1
        if not 0 <= label < len(self.summary.classes):
            raise self.damaged(number, f"its class is {label}, but there are {len(self.summary.classes)}")
        return label, content[LABEL.size :]

    def sizes(self) -> np.ndarray:
        """Bytes of each image's document, int64 [images]: 4 for the class, and the image file."""
        return np.diff(self._dataset.document_offsets)

    def damaged(self, number: int, reason: str) -> DataError:
        """The error to raise when image `number` cannot be used."""
        return DataError(
            f"{data_file(self.prefix)}: image {number} cannot be read: {reason}. Prepare the images again, or correct "
            "model.image."
        )


class ImageSource:
    """Endless images of one prefix, shuffled anew each epoch. Sample i is a function of (files, seed, i)."""

    def __init__(self, files: ImageFiles, seed: int):
        self.files = files
        self._seed = seed
        self._newest = 0, KeyedPermutation(len(files), (seed, 0))  # replaced as a whole: threads read it

    def number(self, sample: int) -> int:
        """Number of the image that is sample `sample`."""
        epoch, position = divmod(sample, len(self.files))
        newest, order = self._newest
        if newest != epoch:
            order = KeyedPermutation(len(self.files), (self._seed, epoch))
            self._newest = epoch, order
        return order(position)
