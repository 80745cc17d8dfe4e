"""Prepares text files as token files.

The output depends only on the inputs, the tokenizer and the settings that decide what a document is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from megatron_tf.data.indexed import token_type
from megatron_tf.data.losses import SAMPLE, comes_back
from megatron_tf.data.preparation.encoding import EncodeSettings, encode_group
from megatron_tf.data.preparation.inputs import expand_inputs
from megatron_tf.data.preparation.parquet import check_columns
from megatron_tf.data.preparation.part_writer import OnError, PartJob
from megatron_tf.data.preparation.parts import plan_parts
from megatron_tf.data.preparation.progress import ProgressDisplay
from megatron_tf.data.preparation.record_types import ReadLimits
from megatron_tf.data.preparation.records import is_one_document, read_records
from megatron_tf.data.preparation.report import Report
from megatron_tf.data.preparation.work import Preparation, Share, carry_out, check_share, is_output, merge_only
from megatron_tf.data.summary import CorpusSummary, check_replaceable, read_summary, write_summary
from megatron_tf.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tf.data.tokenizer_identity import tokenizer_identity
from megatron_tf.errors import DataError

SplitBy = Literal["documents", "blocks"]


@dataclass(frozen=True)
class PreprocessSettings:
    inputs: tuple[str, ...]  # files and globs
    tokenizer: str  # as `load_tokenizer` takes it
    output_prefix: str
    json_key: str = "text"  # field of a .jsonl line, column of a .parquet, that holds the document
    workers: int = 1  # processes that encode; 1 encodes in this one
    on_error: OnError = "stop"  # a bad record ends the preparation ("stop"), or is counted and left out ("skip")
    validation_fraction: float = 0.0  # share of documents, by hash of their text, that goes to PREFIX_validation
    split_by: SplitBy | None = None  # hold out documents, or blocks of each; None: blocks if there is one document
    max_document_bytes: int = ReadLimits().max_document_bytes  # of a record as it stands in its file
    eod_token: str | None = None  # the token that ends a document; None: the tokenizer's, found by the usual names
    keep_lossy: bool = False  # keep documents of which the tokenizer loses characters; otherwise they are bad
    shard_index: int = 0  # of num_shards runs that share the parts, each on its own
    num_shards: int = 1
    replace: bool = False  # replace other data under the prefix, which otherwise are an error

    @property
    def share(self) -> Share:
        """The share of the work that this run does."""
        return Share(self.workers, self.shard_index, self.num_shards)


@dataclass(frozen=True)
class TextPreparation(Preparation[CorpusSummary]):
    settings: PreprocessSettings
    tokenizer: Tokenizer

    def write_summary(self, prefix: str, report: Report, ending: str) -> None:
        counts = report.splits[ending]
        summary = CorpusSummary(
            documents=counts.documents,
            tokens=counts.tokens,
            bytes=counts.bytes,
            max_token_id=counts.max_token_id,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            eod_id=self.tokenizer.eod_id,
            files=tuple(str(path) for path in self.files),
            skipped_records=report.bad,
            empty_documents=report.empty,
            lost_characters=report.loss.characters,
            tokenizer_content=tokenizer_identity(self.settings.tokenizer).content,
        )
        write_summary(prefix, summary)

    def read_summary(self, prefix: str) -> tuple[CorpusSummary, tuple[int, int]] | None:
        summary = read_summary(prefix)
        return None if summary is None else (summary, (summary.documents, summary.tokens))

    def remedy_for_nothing(self, report: Report) -> str:
        if report.documents == 0:
            return "Give files with text in them."
        if self.settings.split_by == "blocks":
            return "Give more text."
        return (
            "Each document goes to one side whole, by its hash: hold out a part of each instead with --split-by "
            "blocks, or give more documents or another --validation-fraction."
        )

    def remarks(self) -> Iterator[str]:
        if (returned := comes_back(self.tokenizer)) is not None:
            yield f"{self.settings.tokenizer}: changes text: {SAMPLE!r} comes back from its tokens as {returned!r}"


def preprocess(settings: PreprocessSettings, progress: ProgressDisplay) -> dict[str, CorpusSummary]:
    """Prepare text; returns and raises as `carry_out` does.

    Writes PREFIX.bin, .idx and .json, with a validation fraction those of PREFIX_train and PREFIX_validation instead;
    also PREFIX.report.json.
    """
    return carry_out(plan_preparation(settings, progress.note), settings.share, progress)


def merge_shards(settings: PreprocessSettings, progress: ProgressDisplay) -> dict[str, CorpusSummary]:
    """Only merge: the summaries as `preprocess` returns them. Raises `DataError` when parts are missing."""
    return merge_only(plan_preparation(settings), progress)


def plan_preparation(settings: PreprocessSettings, note: Callable[[str], None] = lambda text: None) -> TextPreparation:
    """Check the settings and find the inputs, about which `note` is told remarks. Raises `DataError`."""
    if not 0 <= settings.validation_fraction < 1:
        raise DataError(f"--validation-fraction is {settings.validation_fraction}. Choose 0 or more, below 1.")
    if settings.max_document_bytes < 1:
        raise DataError(f"--max-document-bytes is {settings.max_document_bytes}. Choose at least 1.")
    check_share(settings.share, settings.output_prefix)
    files = tuple(expand_inputs(settings.inputs, note, partial(is_output, settings.output_prefix)))
    if settings.on_error == "stop":
        check_columns(files, settings.json_key)
    settings = _with_split(settings, files, note)
    tokenizer = load_tokenizer(settings.tokenizer, settings.eod_token)
    encode = _encode_settings(settings, tokenizer)
    parts = plan_parts(settings.output_prefix, files, decisive(encode, _limits(settings), tokenizer.fingerprint))
    endings = ("_train", "_validation") if settings.validation_fraction else ("",)
    job = PartJob(
        read=partial(read_records, limits=_limits(settings)),
        encode=partial(encode_group, encode),
        on_error=settings.on_error,
        vocab_size=tokenizer.vocab_size,
        code=token_type(tokenizer.vocab_size)[0],
        endings=endings,
    )
    plan = TextPreparation(
        settings.output_prefix, files, tuple(parts), endings, job, settings.replace, settings, tokenizer
    )
    for prefix in plan.prefixes.values():
        check_replaceable(prefix)
    return plan


def decisive(encode: EncodeSettings, limits: ReadLimits, fingerprint: str) -> object:
    """Everything besides its files that decides the content of a part, as JSON. `fingerprint`: of the tokenizer."""
    return [{**asdict(encode), "tokenizer": fingerprint}, limits._asdict()]


def _with_split(settings: PreprocessSettings, files: Sequence[Path], note: Callable[[str], None]) -> PreprocessSettings:
    """The settings with `split_by` decided."""
    if settings.split_by is not None or not settings.validation_fraction:
        return settings
    if not is_one_document(files, _limits(settings)):
        return replace(settings, split_by="documents")
    note(f"{files[0]}: holds one document, of which {100 * settings.validation_fraction:.3g} % are held out, in blocks")
    return replace(settings, split_by="blocks")


def _encode_settings(settings: PreprocessSettings, tokenizer: Tokenizer) -> EncodeSettings:
    return EncodeSettings(
        settings.tokenizer,
        settings.json_key,
        settings.validation_fraction,
        tokenizer.eod_id,
        settings.keep_lossy,
        blocks=settings.split_by == "blocks",
    )


def _limits(settings: PreprocessSettings) -> ReadLimits:
    return ReadLimits(settings.json_key, settings.max_document_bytes)
