"""Turn text into token files: PREFIX.bin, PREFIX.idx (the format of Megatron-LM and GPT-NeoX) and PREFIX.json.

A run that was interrupted goes on where it stopped when it is started again. Several runs with --shard-index and
--num-shards, on any nodes, share the work; the last to finish merges. PREFIX.report.json says what was left out and
why.
"""

from __future__ import annotations

import argparse
import sys

from megatron_tf.arguments import input_path, text_path
from megatron_tf.data.preparation.record_types import ReadLimits


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        type=input_path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or quoted globs: .jsonl, .ndjson or .json (one document a line), .txt (one document), .tar (an "
        "archive of such files, or of archives), each also with .zst, .gz, .xz or .bz2; .parquet",
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
        "--output-prefix", type=text_path, required=True, metavar="PREFIX", help="path of the output without suffix"
    )
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="field of a .jsonl line, column of a .parquet, that holds the text (default: text)",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that encode (default: 1)")
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="a record without text ends the run (default), or is named, counted and left out",
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
        "--validation-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="hold out this share of the documents, chosen by hash: writes PREFIX_train and PREFIX_validation",
    )
    parser.add_argument(
        "--split-by",
        choices=("documents", "blocks"),
        help="hold out whole documents, or blocks of each one (default: blocks where there is one document)",
    )
    parser.add_argument(
        "--shard-index", type=int, default=0, metavar="I", help="which share of the files this run does (default: 0)"
    )
    parser.add_argument(
        "--num-shards", type=int, default=1, metavar="N", help="number of runs that share the files (default: 1)"
    )
    parser.add_argument(
        "--replace", action="store_true", help="let go of other data under PREFIX, which otherwise is an error"
    )
    parser.add_argument("--merge", action="store_true", help="only merge what all shards have written")
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
        print(f"{prefix}: {summary.documents} documents, {summary.tokens} tokens, {summary.bytes} bytes of text")
        if summary.skipped_records or summary.empty_documents:
            print(
                f"{prefix}: {summary.skipped_records} bad records and {summary.empty_documents} empty documents of the "
                f"input were left out, see {settings.output_prefix}.report.json"
            )
