"""`PREFIX.json`: facts about `PREFIX.bin` and the tokenizer that made it. Data of other programs have none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_tf.config.sections.data import Data, DataSource
from megatron_tf.data.tokenizer_identity import TokenizerIdentity
from megatron_tf.durable import read_plain, write_atomically
from megatron_tf.errors import DataError, broken_link, file_errors, shown

FORMAT_NAME = "megatron_tf corpus"
FORMAT = f"{FORMAT_NAME} 1"
IMAGES_FORMAT = "megatron_tf images"  # what images have instead: see `data.images.summary`
MOST_BYTES = 1 << 28  # of a summary: millions of input files
MOST = 2**63 - 1  # of a number in it
TEXTS = ("tokenizer_fingerprint", "tokenizer_content")  # fields that are strings; the others but `files` are numbers


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
    lost_characters: int = 0  # of all inputs, which the tokenizer has no token for
    # of what in the tokenizer's file decides the tokens; earlier versions did not write it
    tokenizer_content: str = field(default="", compare=False)

    @property
    def tokenizer(self) -> TokenizerIdentity:
        return TokenizerIdentity(self.tokenizer_fingerprint, self.tokenizer_content)


def summary_file(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def write_summary(prefix: str | Path, summary: CorpusSummary) -> None:
    """Write it as `PREFIX.json`, whole or not at all."""
    text = json.dumps({"format": FORMAT, **asdict(summary)}, indent=2) + "\n"
    write_atomically(summary_file(prefix), text.encode("utf-8"))


def read_summary(prefix: str | Path) -> CorpusSummary | None:
    """The summary next to the data; None when there is no `PREFIX.json`, or another program's.

    Raises `DataError` when it cannot be read, is torn, or is a summary with invalid fields.
    """
    path = summary_file(prefix)
    content = _own_content(path)
    if content is None:
        return None
    names = [field.name for field in fields(CorpusSummary) if field.name in content or field.default is MISSING]
    missing = [name for name in names if name not in content]
    if content["format"] != FORMAT or missing:
        reason = (
            f"lacks {', '.join(missing)}" if missing else f"has format {shown(content['format'])}, known is {FORMAT!r}"
        )
        raise DataError(f"{path}: {reason}. Prepare the data again with tools/preprocess_data.py.")
    values = {name: content[name] for name in names}
    for name, value in values.items():
        if not _fits(name, value):
            kind = (
                "a list of file names"
                if name == "files"
                else "a string"
                if name in TEXTS
                else "a number of 0 or more, below 2^63"
            )
            raise DataError(
                f"{path}: {name} is {json.dumps(value):.80}, not {kind}. The file is damaged: prepare the data again."
            )
    return CorpusSummary(**{**values, "files": tuple(values["files"])})


def bytes_per_token(sources: Sequence[DataSource]) -> float | None:
    """Bytes of text of a token of the blended `sources`, on average; None when one of them has no summary."""
    total, weights = 0.0, 0.0
    for source in sources:
        summary = read_summary(source.path)
        if summary is None or not summary.tokens:
            return None
        total += source.weight * summary.bytes / summary.tokens
        weights += source.weight
    return total / weights or None


def known_end(data: Data) -> int | None:
    """The token that ends documents: data.eod_id, or that of the first summary next to the data; None if not known.

    Raises `DataError` for a summary that cannot be read.
    """
    summaries = (read_summary(source.path) for source in (*data.train, *data.validation))
    return next((summary.eod_id for summary in summaries if summary), None) if data.eod_id is None else data.eod_id


def _fits(name: str, value: Any) -> bool:
    if name == "files":
        return isinstance(value, list) and all(isinstance(file, str) for file in value)
    if name in TEXTS:
        return isinstance(value, str)
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def check_replaceable(prefix: str | Path) -> None:
    """Raise `DataError` when `PREFIX.json` exists and is not a summary: a rerun may replace only what a run wrote."""
    path = summary_file(prefix)
    if _own_content(path) is None and path.exists():
        raise DataError(f"{path}: would be overwritten and is not a summary of prepared data. Choose another prefix.")


def _own_content(path: Path) -> dict[str, Any] | None:
    """The JSON object of a summary of any version; None for any other JSON, and when there is no file."""
    with file_errors(DataError, path, "Make it readable, or move it away if it does not describe the data next to it."):
        try:
            raw = read_plain(path, MOST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            if broken_link(path):
                raise
            return None
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: has {len(raw)} bytes that are no JSON ({error}). It should describe the data next to it: copy it "
            f"again, or delete it and the data and prepare them again."
        ) from None
    name = str(content.get("format", "")) if isinstance(content, dict) else ""
    if name.startswith(IMAGES_FORMAT):
        raise DataError(
            f"{path}: holds images, and not text. Give prepared text, or set model.task to image_classification."
        )
    ours = name.startswith(FORMAT_NAME)
    return content if ours else None
