"""The records that readers yield: a document before it is parsed, or the reason why there is none."""

from __future__ import annotations

from typing import Literal, NamedTuple

BadKind = Literal[
    "invalid_json",
    "missing_field",
    "repeated_field",
    "not_text",  # the field holds something else than a string
    "not_utf8",
    "empty",
    "too_long",
    "truncated",  # a file or an archive that breaks off
    "broken",  # a file or an archive that is damaged
    "unknown_member",  # a file, in an archive or alone, of an unknown format
    "not_encodable",  # the tokenizer failed
    "lost_text",  # the tokenizer has no token for some characters
    "bad_image",  # it cannot be decoded
    "bad_label",  # an image without a class, or with one that does not exist
]


class BadRecord(Exception):
    """A record without a usable document; `reason` is a phrase without file and line."""

    def __init__(self, kind: BadKind, reason: str):
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason


class RawRecord(NamedTuple):
    """A document that is not parsed yet, so that another process can do that."""

    file: str  # members of archives as archive:member
    line: int  # counted from 1, rows of a .parquet too; 1 for a file that is one document
    payload: bytes
    is_json: bool = False  # an object with the text in a field; else the payload is the text
    problem: tuple[BadKind, str] | None = None  # set when nothing could be read here; there is then no payload


class BadSample(NamedTuple):
    """A bad record, for the report."""

    kind: BadKind
    file: str
    line: int
    reason: str
    excerpt: str  # the beginning of the record


KeptKind = Literal[
    "lost_text",
    "encoded_whole",  # long, but without a place where it could be split for encoding
]


class KeptSample(NamedTuple):
    """A document that was prepared, with a remark for the report."""

    kind: KeptKind
    file: str
    line: int
    reason: str


class ReadLimits(NamedTuple):
    json_key: str = "text"  # field of a .jsonl line, column of a .parquet
    max_document_bytes: int = 1 << 27  # of a record as it stands in its file; a longer one is bad


def bad_raw(file: str, line: int, problem: BadRecord) -> RawRecord:
    return RawRecord(file, line, b"", problem=(problem.kind, problem.reason))
