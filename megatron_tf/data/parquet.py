"""Records out of .parquet files, read a few rows at a time. Needs the optional package pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_tf.data.record_types import BadRecord, RawRecord, ReadLimits, bad_raw
from megatron_tf.errors import DataError

ROWS = 256


def require_pyarrow(path: Path) -> None:
    """Raise `DataError` where it is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise DataError(f"{path}: needs the package pyarrow: pip install 'megatron_tf[parquet]'") from None


def parquet_records(path: Path, limits: ReadLimits, on_read: Callable[[int], None]) -> Iterator[RawRecord]:
    """One record a row, from the column `limits.json_key`. `on_read` is told the bytes of each row group in the file.

    Raises `DataError` without pyarrow, OSError when the file cannot be opened.
    """
    require_pyarrow(path)
    import pyarrow
    import pyarrow.parquet

    where, row = str(path), 0
    with open(path, "rb") as source:
        try:
            file = pyarrow.parquet.ParquetFile(source)
            column = _column(file, limits.json_key)
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=[limits.json_key]):
                    for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        row += 1
                        yield _record(where, row, value, limits)
                on_read(file.metadata.row_group(group).column(column).total_compressed_size)
        except BadRecord as problem:
            yield bad_raw(where, row + 1, problem)
        except (pyarrow.ArrowException, OSError) as error:
            reason = f"broken Parquet data ({' '.join(str(error).split()):.200}); the file is lost from here"
            yield bad_raw(where, row + 1, BadRecord("broken", reason))


def _column(file: Any, name: str) -> int:
    """Number of the column. Raises `BadRecord` when it is missing or holds no strings."""
    import pyarrow.types as types

    schema = file.schema_arrow
    if name not in schema.names:
        raise BadRecord("missing_field", f"missing column {name!r}, its columns are {', '.join(sorted(schema.names))}")
    kind = schema.field(name).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not any(
        test(value) for test in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    ):
        raise BadRecord("not_text", f"column {name!r} is of type {kind}, not a string")
    return next(i for i in range(file.metadata.num_columns) if file.metadata.schema.column(i).path == name)


def _record(where: str, row: int, value: bytes | None, limits: ReadLimits) -> RawRecord:
    if value is None:
        return bad_raw(where, row, BadRecord("not_text", f"field {limits.json_key!r} is null, not a string"))
    if len(value) > limits.max_document_bytes:
        reason = (
            f"the document has {len(value)} bytes, at most {limits.max_document_bytes} are read (--max-document-bytes)"
        )
        return bad_raw(where, row, BadRecord("too_long", reason))
    return RawRecord(where, row, value)
