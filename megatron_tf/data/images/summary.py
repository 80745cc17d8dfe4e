"""`PREFIX.json` of prepared images: how many there are, and the classes in the order of their numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_tf.data.summary import IMAGES_FORMAT, MOST_BYTES, summary_file
from megatron_tf.durable import read_plain, write_atomically
from megatron_tf.errors import NOT_AS_WRITTEN, DataError, file_errors

FORMAT = f"{IMAGES_FORMAT} 1"


@dataclass(frozen=True)
class ImageSummary:
    """Stored as a JSON object of these fields, and `format`."""

    images: int
    bytes: int  # size of .bin
    classes: tuple[str, ...]
    files: tuple[str, ...]  # inputs in the order they were read; for class folders, the folder that holds them
    skipped_records: int  # bad images that were left out


def write_image_summary(prefix: str | Path, summary: ImageSummary) -> None:
    """Write it as `PREFIX.json`, whole or not at all."""
    text = json.dumps({"format": FORMAT, **asdict(summary)}, indent=2, ensure_ascii=False) + "\n"
    write_atomically(summary_file(prefix), text.encode("utf-8"))


def read_image_summary(prefix: str | Path) -> ImageSummary:
    """Reads `PREFIX.json`. DataError when it is missing, or describes no images."""
    path = summary_file(prefix)
    remedy = "Prepare the images with tools/prepare_images.py, or correct the prefix."
    with file_errors(DataError, path, remedy):
        raw = read_plain(path, MOST_BYTES)
    try:
        content = json.loads(raw)
        if content["format"] != FORMAT:
            raise DataError(f"{path}: holds {content['format']!r:.60}, and not images ({FORMAT!r}). {remedy}")
        summary = ImageSummary(
            content["images"], content["bytes"], tuple(content["classes"]), tuple(content["files"]),
            content["skipped_records"],
        )  # fmt: skip
    except NOT_AS_WRITTEN as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else "it is no such JSON"
        raise DataError(f"{path}: does not describe images: {reason}. {remedy}") from None
    numbers, texts = (summary.images, summary.bytes, summary.skipped_records), (*summary.classes, *summary.files)
    if not all(type(number) is int for number in numbers) or not all(type(text) is str for text in texts):
        raise DataError(f"{path}: does not describe images. {remedy}")
    return summary
