"""Reads records from .parquet files, a few rows at a time. Needs the optional package pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_tf.data.preparation.record_types import BadRecord, RawRecord, ReadLimits, bad_raw
from megatron_tf.durable import open_plain
from megatron_tf.errors import DataError, file_errors
from megatron_tf.telemetry.text import count_of

ROWS = 256
MAGIC = b"PAR1"


def require_pyarrow(path: Path) -> None:
    """Raise a `DataError` that names `path` when pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise DataError(f"{path}: needs the package pyarrow: pip install 'megatron_tf[parquet]'") from None


def parquet_records(path: Path, limits: ReadLimits, on_read: Callable[[int], None]) -> Iterator[RawRecord]:
    """One record per row, from the column `limits.json_key`.

    `on_read` is told the compressed bytes of that column, after each row group. Broken data yield a record that says
    so. Raises `DataError` without pyarrow, OSError when the file cannot be opened.
    """
    require_pyarrow(path)
    import pyarrow
    import pyarrow.parquet

    where, row = str(path), 0
    with open_plain(path) as source:
        try:
            file = pyarrow.parquet.ParquetFile(source)
            if (problem := column_problem(file, limits.json_key)) is not None:
                raise problem
            paths = [file.metadata.schema.column(number).path for number in range(file.metadata.num_columns)]
            column = paths.index(limits.json_key)
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=[limits.json_key]):
                    for value in _values(batch.column(limits.json_key)):
                        row += 1
                        yield _record(where, row, value, limits)
                on_read(file.metadata.row_group(group).column(column).total_compressed_size)
        except BadRecord as problem:
            yield bad_raw(where, row + 1, problem)
        except (pyarrow.ArrowException, OSError) as error:
            reason = f"broken Parquet data ({' '.join(str(error).split()):.200}); the file is lost from here"
            yield bad_raw(where, row + 1, BadRecord("broken", reason))


def check_columns(paths: Iterable[Path], json_key: str) -> None:
    """Raise `DataError` for a Parquet file without a column `json_key` of text: now, not when the file's turn comes."""
    for path in paths:
        with file_errors(DataError, path, "Make it readable, or leave it out."), open_plain(path) as source:
            if source.read(len(MAGIC)) != MAGIC:
                continue
            require_pyarrow(path)
            import pyarrow.parquet

            try:
                problem = column_problem(pyarrow.parquet.ParquetFile(source), json_key)
            except (pyarrow.ArrowException, OSError):
                # reported when the file is read, like any other damage
                continue
        if problem is not None:
            raise DataError(f"{path}: {problem.reason}. Or leave such files out with --on-error skip.")


def column_problem(file: Any, name: str) -> BadRecord | None:
    """Why an open ParquetFile has no single column `name` of strings or bytes; None when it has one."""
    import pyarrow.types as types

    lost = f"so that {count_of(file.metadata.num_rows, 'row')} cannot be read"
    schema = file.schema_arrow
    count = schema.names.count(name)
    if count != 1:
        if count:
            return BadRecord("repeated_field", f"{count} columns are called {name!r}, {lost}: rename all but one")
        nested = [f"{field.name}.{name}" for field in schema if types.is_struct(field.type) and name in _inner(field)]
        hint = f"; make {nested[0]} a column of its own" if nested else ""
        columns = ", ".join(sorted(schema.names))
        return BadRecord("missing_field", f"missing column {name!r}, its columns are {columns:.200}, {lost}{hint}")
    kind = schema.field(name).type
    if _is_text(kind.value_type if types.is_dictionary(kind) else kind):
        return None
    remedy = "name another column with --json-key"
    if types.is_list(kind) or types.is_large_list(kind):
        remedy = "join its items to one string, or make a row of each"
    elif types.is_struct(kind):
        remedy = (
            f"make the field of it that holds the text ({', '.join(_inner(schema.field(name)))}) a column of its own"
        )
    return BadRecord("not_text", f"column {name!r} is of type {str(kind):.100}, not a string, {lost}: {remedy}")


def _inner(field: Any) -> list[str]:
    """Names of the fields of a struct."""
    return [field.type.field(number).name for number in range(field.type.num_fields)]


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return any(
        test(kind)
        for test in (
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
        )
    )


def _values(column: Any) -> list[bytes | None]:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary()).to_pylist()


def _record(where: str, row: int, value: bytes | None, limits: ReadLimits) -> RawRecord:
    if value is None:
        return bad_raw(where, row, BadRecord("not_text", f"field {limits.json_key!r} is null, not a string"))
    if len(value) > limits.max_document_bytes:
        reason = (
            f"the document has {len(value)} bytes, at most {limits.max_document_bytes} are read (--max-document-bytes)"
        )
        return bad_raw(where, row, BadRecord("too_long", reason))
    return RawRecord(where, row, value)
