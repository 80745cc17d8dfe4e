"""Reads images from .parquet files as Hugging Face's datasets write them: columns `image` {bytes, path} and `label`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_tf.data.images.source import LABEL
from megatron_tf.data.preparation.parquet import MAGIC, require_pyarrow
from megatron_tf.data.preparation.record_types import BadRecord, RawRecord, bad_raw
from megatron_tf.errors import NOT_AS_WRITTEN, DataError, file_errors

ROWS = 64
IMAGE, LABEL_COLUMN = "image", "label"
REMEDY = "Make it readable, or leave it out."


def is_parquet(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def named_classes(path: Path) -> tuple[str, ...] | None:
    """The file's names of its classes; None when it has none. DataError when a column is missing or data are broken."""
    with _opened(path) as file:
        schema = file.schema_arrow
        missing = [name for name in (IMAGE, LABEL_COLUMN) if name not in schema.names]
        if missing:
            raise DataError(
                f"{path}: has no column {missing[0]!r}, its columns are {', '.join(schema.names):.200}. Images stand "
                f"in {IMAGE!r}, with their bytes, and their classes in {LABEL_COLUMN!r}."
            )
        try:
            written = json.loads((schema.metadata or {})[b"huggingface"])
            return tuple(map(str, written["info"]["features"][LABEL_COLUMN]["names"]))
        except NOT_AS_WRITTEN:
            return None


def parquet_records(paths: Iterable[Path], *, num_classes: int, on_read: Callable[[int], None]) -> Iterator[RawRecord]:
    """One record per row: class and image file, as in `readers`. A broken file yields a record that says so."""
    for path in paths:
        row = 0
        try:
            with _opened(path) as file:
                for batch in file.iter_batches(ROWS, columns=[IMAGE, LABEL_COLUMN]):
                    for value in batch.to_pylist():
                        row += 1
                        yield _record(str(path), row, value, num_classes)
        except DataError as error:
            yield bad_raw(str(path), row + 1, BadRecord("broken", str(error)))
        on_read(path.stat().st_size)


def _record(file: str, row: int, value: dict[str, Any], num_classes: int) -> RawRecord:
    image, label = value[IMAGE], value[LABEL_COLUMN]
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        return bad_raw(file, row, BadRecord("bad_image", "the row has no bytes of an image"))
    if type(label) is not int or not 0 <= label < num_classes:
        return bad_raw(file, row, BadRecord("bad_label", f"its class is {label}, but there are {num_classes}"))
    return RawRecord(file, row, LABEL.pack(label) + content)


class _opened:
    """Context manager of an open ParquetFile; turns pyarrow's errors in the block into a DataError."""

    def __init__(self, path: Path):
        require_pyarrow(path)
        self._path = path

    def __enter__(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            with file_errors(DataError, self._path, REMEDY):
                self._file = pyarrow.parquet.ParquetFile(self._path)
        except pyarrow.ArrowException as error:
            raise self._broken(error) from None
        return self._file

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        import pyarrow

        self._file.close()
        if isinstance(error, pyarrow.ArrowException | OSError):
            raise self._broken(error) from None

    def _broken(self, error: BaseException) -> DataError:
        return DataError(f"{self._path}: broken Parquet data ({' '.join(str(error).split()):.200}). Copy it again.")
