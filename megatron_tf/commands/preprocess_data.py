"""Turn text into token files: PREFIX.bin, PREFIX.idx (the format of Megatron-LM and GPT-NeoX) and PREFIX.json.

A run that was interrupted goes on where it stopped when it is started again. Several runs with --shard-index and
--num-shards, on any nodes, share the work; the last to finish merges. PREFIX.report.json says what was left out and
why.
"""

from __future__ import annotations

import argparse
import sys

from megatron_tf.arguments import text_path
from megatron_tf.data.preparation.options import add_preparation_options
from megatron_tf.data.preparation.record_types import ReadLimits
from megatron_tf.telemetry.text import count_of


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preparation_options(
        parser,
        metavar="FILE",
        inputs="files or quoted globs: .jsonl, .ndjson or .json (one document a line), .txt (one document), .tar (an "
        "archive of such files, or of archives), each also with .zst, .gz, .xz or .bz2; .parquet",
        things="documents",
        bad="a record without text",
        does="encode",
    )
    parser.add_argument(
        "--tokenizer",
        type=text_path,
        required=True,
        help="Hugging Face tokenizers .json, SentencePiece .model, a .tiktoken file, tiktoken:cl100k_base and the like "
        "when tiktoken's cache has it, or bytes",
    )
    parser.add_argument(
        "--eod-token",
        metavar="NAME",
        help="token to put after each document (default: the tokenizer's <|endoftext|>, </s>, <eos> or the like)",
    )
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="field of a .jsonl line, column of a .parquet, that holds the text (default: text)",
    )
    parser.add_argument(
        "--keep-lossy",
        action="store_true",
        help="keep documents with characters that the tokenizer has no token for, and count what is lost; otherwise "
        "such a document is a bad record",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=ReadLimits().max_document_bytes,
        metavar="N",
        help="a longer document is a bad record; a process may need fifteen times as much memory, and for one that "
        "cannot be taken apart (the report says which) two hundred times (default: %(default)s)",
    )
    parser.add_argument(
        "--split-by",
        choices=("documents", "blocks"),
        help="hold out whole documents, or blocks of each one (default: blocks where there is one document)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from megatron_tf.data.preparation.preprocess import PreprocessSettings, merge_shards, preprocess
    from megatron_tf.data.preparation.progress import ProgressDisplay

    settings = PreprocessSettings(
        inputs=tuple(arguments.input),
        tokenizer=arguments.tokenizer,
        output_prefix=arguments.output_prefix,
        json_key=arguments.json_key,
        workers=arguments.workers,
        on_error=arguments.on_error,
        validation_fraction=arguments.validation_fraction,
        split_by=arguments.split_by,
        max_document_bytes=arguments.max_document_bytes,
        shard_index=arguments.shard_index,
        num_shards=arguments.num_shards,
        replace=arguments.replace,
        eod_token=arguments.eod_token,
        keep_lossy=arguments.keep_lossy,
    )
    command = merge_shards if arguments.merge else preprocess
    for prefix, summary in command(settings, ProgressDisplay(sys.stderr)).items():
        print(
            f"{prefix}: {count_of(summary.documents, 'document')}, {summary.tokens} tokens, {summary.bytes} bytes of "
            "text"
        )
        if summary.skipped_records or summary.empty_documents:
            print(
                f"{prefix}: left out of the input: {count_of(summary.skipped_records, 'bad record')} and "
                f"{count_of(summary.empty_documents, 'empty document')}, see {settings.output_prefix}.report.json"
            )
