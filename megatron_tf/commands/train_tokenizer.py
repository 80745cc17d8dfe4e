"""Train a byte-level BPE tokenizer on text; id 0 ends a document. Writes a Hugging Face tokenizers file."""

from __future__ import annotations

import argparse

from megatron_tf.arguments import input_path, path
from megatron_tf.data.preparation.bpe import train_bpe
from megatron_tf.data.preparation.inputs import expand_inputs
from megatron_tf.data.preparation.records import read_texts
from megatron_tf.data.special_tokens import EOD_TOKENS


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        type=input_path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or quoted globs, as preprocess_data.py reads them",
    )
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="number of tokens (default: 4096)")
    parser.add_argument("--output", type=path, required=True, metavar="FILE", help="the file to write, a .json")
    parser.add_argument("--json-key", default="text", help="field of a .jsonl line that holds the text (default: text)")
    parser.add_argument(
        "--eod-token",
        default=EOD_TOKENS[0],
        metavar="NAME",
        help="the token that ends a document (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    texts = read_texts(expand_inputs(arguments.input), arguments.json_key)
    size = train_bpe(texts, arguments.vocab_size, arguments.output, arguments.eod_token)
    note = "" if size == arguments.vocab_size else f" ({arguments.vocab_size} asked for; the text gives no more)"
    print(f"{arguments.output}: {size} tokens{note}")
