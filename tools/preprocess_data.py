"""Turn text into token files: PREFIX.bin, PREFIX.idx (the format of Megatron-LM and GPT-NeoX) and PREFIX.json."""

from __future__ import annotations

import argparse
import sys

from megatron_tf.data.preprocess import PreprocessSettings, Progress, preprocess
from megatron_tf.errors import run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or quoted globs: .txt (one document a file), .jsonl, .jsonl.zst (one document a line)",
    )
    parser.add_argument("--tokenizer", required=True, help="Hugging Face tokenizers .json or SentencePiece .model")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path of the output without suffix")
    parser.add_argument("--json-key", default="text", help="field of a .jsonl line that holds the text (default: text)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that encode (default: 1)")
    parser.add_argument(
        "--on-error",
        choices=("fatal", "skip"),
        default="fatal",
        help="a record without text ends the run (default), or is named, counted and left out",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="hold out this share of the documents, chosen by hash: writes PREFIX_train and PREFIX_validation",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    settings = PreprocessSettings(
        inputs=tuple(arguments.input),
        tokenizer=arguments.tokenizer,
        output_prefix=arguments.output_prefix,
        json_key=arguments.json_key,
        workers=arguments.workers,
        on_error=arguments.on_error,
        validation_fraction=arguments.validation_fraction,
    )
    for prefix, summary in preprocess(settings, Progress(sys.stderr)).items():
        print(f"{prefix}: {summary.documents} documents, {summary.tokens} tokens, {summary.bytes} bytes of text")


if __name__ == "__main__":
    run_command(main)
