"""`PREFIX.json`: what stands in `PREFIX.bin`, and which tokenizer made it. Data of other writers have none."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_tf.data.atomic import atomic_path
from megatron_tf.errors import DataError

FORMAT_NAME = "megatron_tf corpus"
FORMAT = f"{FORMAT_NAME} 1"


@dataclass(frozen=True)
class CorpusSummary:
    """Stored as a JSON object of these fields, and `format`."""

    documents: int
    tokens: int  # with the end-of-document tokens
    bytes: int  # of the documents' text in UTF-8
    max_token_id: int
    tokenizer_fingerprint: str  # SHA-256 of the tokenizer's file
    vocab_size: int  # of the tokenizer
    eod_id: int  # token after each document
    files: tuple[str, ...]  # inputs, in the order they were read
    skipped_records: int  # bad records of all inputs that were left out
    empty_documents: int  # documents of all inputs without text, left out


def summary_file(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def write_summary(prefix: str | Path, summary: CorpusSummary) -> None:
    """Write it as `PREFIX.json`, whole or not at all."""
    with atomic_path(summary_file(prefix)) as path:
        path.write_text(json.dumps({"format": FORMAT, **asdict(summary)}, indent=2) + "\n", encoding="utf-8")


def read_summary(prefix: str | Path) -> CorpusSummary | None:
    """The summary beside the data; None when there is no `PREFIX.json` or it is somebody else's file.

    Raises `DataError` when it is ours and cannot be read.
    """
    path = summary_file(prefix)
    content = _own_content(path)
    if content is None:
        return None
    names = [field.name for field in fields(CorpusSummary)]
    missing = [name for name in names if name not in content]
    if content["format"] != FORMAT or missing:
        reason = f"lacks {', '.join(missing)}" if missing else f"has format {content['format']!r}, known is {FORMAT!r}"
        raise DataError(f"{path}: {reason}. Prepare the data again with tools/preprocess_data.py.")
    values = {name: content[name] for name in names}
    return CorpusSummary(**{**values, "files": tuple(values["files"])})


def check_replaceable(prefix: str | Path) -> None:
    """Raise `DataError` when `PREFIX.json` exists and is not a summary: a rerun may replace only what a run wrote."""
    path = summary_file(prefix)
    if path.exists() and _own_content(path) is None:
        raise DataError(f"{path}: would be overwritten and is not a summary of prepared data. Choose another prefix.")


def _own_content(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file that we wrote, of any version; None for any other file and for none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    ours = isinstance(content, dict) and str(content.get("format", "")).startswith(FORMAT_NAME)
    return content if ours else None
