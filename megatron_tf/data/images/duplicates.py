"""Counts images that two prepared data sets share: validation on images seen in training does not measure learning."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_tf.data.images.source import ImageFiles

_PEEK = 64  # bytes, from the middle: files written by the same program begin the same way


def count_duplicates(files: ImageFiles, others: ImageFiles) -> int:
    """How many images of `files` are in `others` too, byte for byte.

    Only images whose size in bytes occurs in both are read.
    """
    sizes, theirs, found = files.sizes(), others.sizes(), 0
    ours: dict[tuple[int, bytes], list[int]] = {}
    for number in _among(sizes, theirs):
        ours.setdefault((int(sizes[number]), _peek(files, number)), []).append(number)
    for number in _among(theirs, sizes):
        alike = ours.get((int(theirs[number]), _peek(others, number)), [])
        if not alike:
            continue
        content = others.read(number)[1]
        same = [own for own in alike if files.read(own)[1] == content]
        for own in same:
            alike.remove(own)  # counted once
        found += len(same)
    return found


def _among(sizes: np.ndarray, others: np.ndarray) -> Iterator[int]:
    """Numbers of the images whose size occurs among `others`."""
    return map(int, np.flatnonzero(np.isin(sizes, others)))


def _peek(files: ImageFiles, number: int) -> bytes:
    content = files.read(number)[1]
    middle = len(content) // 2
    return content[middle : middle + _PEEK]
