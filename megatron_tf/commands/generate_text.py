"""Write text with a trained model: `python tools/generate_text.py RUN_DIR --prompt "..."`.

Of a run, a checkpoint, or a folder that `convert_checkpoint.py to-hf` wrote. One text appears as it is written; several
(--prompt more than once, or --prompts) are written together and shown at the end. Needs no GPU and no launcher.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tf.arguments import path, text_path
from megatron_tf.errors import UserError
from megatron_tf.text_files import read_text_file

if TYPE_CHECKING:
    from megatron_tf.data.tokenizer import Tokenizer
    from megatron_tf.model.tokenformer import TokenFormer

GIVE_TOKENIZER = "Give the tokenizer's file with --tokenizer, or --tokenizer bytes for a model of plain bytes."
MOST_TOKENS = 1_000_000  # these take weeks: a larger number is a typing error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=path, help="run folder, checkpoints folder, checkpoint or export")
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated; none begins a document")
    parser.add_argument(
        "--prompts", type=path, metavar="FILE", help="texts to continue, one a line, instead of --prompt"
    )
    parser.add_argument("--tokens", type=int, default=64, help="most tokens to write (default 64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=40, help="sample from the k likeliest tokens; 0: all (default 40)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the fewest tokens that have this share of the probability (default 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument(
        "--tokenizer",
        type=text_path,
        help="tokenizer file; default: the export's, or data.tokenizer of the run's config.yml",
    )
    parser.add_argument(
        "--eod-token", metavar="NAME", help="token that ends a text (default: what the run's data or the export say)"
    )
    arguments = parser.parse_args()
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """UserError, with all problems, for arguments that are out of range."""
    problems = []
    if not 1 <= arguments.tokens <= MOST_TOKENS:
        problems.append(f"--tokens is {arguments.tokens}. Choose 1 to {MOST_TOKENS}.")
    if not 0 <= arguments.temperature < math.inf:
        problems.append(f"--temperature is {arguments.temperature}. Choose 0 (greedy) or a finite number above it.")
    if arguments.top_k < 0:
        problems.append(f"--top-k is {arguments.top_k}. Choose 0 (all tokens) or more.")
    if not 0 < arguments.top_p <= 1:
        problems.append(f"--top-p is {arguments.top_p}. Choose a number above 0, up to 1 (all tokens).")
    if not 0 <= arguments.seed < 2**63:
        problems.append(f"--seed is {arguments.seed}. Choose 0 to {2**63 - 1}.")
    if arguments.prompt and arguments.prompts:
        problems.append("--prompt and --prompts are both given. Choose one.")
    for prompt in arguments.prompt or []:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:  # bytes of another encoding arrive as lone surrogates
            problems.append(f"--prompt is not UTF-8 at character {error.start}. Encode it as UTF-8.")
    if problems:
        raise UserError("\n".join(problems))


def main() -> None:
    arguments = parse_arguments()
    from megatron_tf.checkpoint.architecture import stored_model
    from megatron_tf.checkpoint.manager import resolve
    from megatron_tf.checkpoint.reader import open_checkpoint
    from megatron_tf.convert.huggingface.importing import is_export
    from megatron_tf.data.losses import LossFinder
    from megatron_tf.inference.load import configured_tokenizer, known_eod, load_model, open_tokenizer, other_tokenizer
    from megatron_tf.tasks.language_model.section import check_reads_text

    prompts = read_prompts(arguments.prompts) if arguments.prompts else arguments.prompt or [""]
    name = arguments.tokenizer or configured_tokenizer(arguments.checkpoint)
    if name is None:
        if is_export(arguments.checkpoint):
            raise UserError(f"{arguments.checkpoint}: has no tokenizer.json{tokenizer_remedy(arguments.checkpoint)}")
        checkpoint = resolve(arguments.checkpoint)
        check_reads_text(stored_model(open_checkpoint(checkpoint).index), "generation")
        raise UserError(f"{checkpoint}: no config.yml with data.tokenizer is next to it. {GIVE_TOKENIZER}")
    model = load_model(arguments.checkpoint)
    check_reads_text(model.config, "generation")
    tokenizer = open_tokenizer(name, model.config, arguments.eod_token or known_eod(arguments.checkpoint, name))
    if warning := other_tokenizer(arguments.checkpoint, name):
        print(f"warning: {warning}", file=sys.stderr)
    losses = LossFinder(tokenizer)
    for number, prompt in enumerate(prompts, 1):
        if loss := losses.find(prompt, tokenizer.encode_arrays([prompt])):
            print(f"warning: the tokenizer loses {loss} of prompt {number}", file=sys.stderr)
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for _, piece in pieces(model, tokenizer, prompts, arguments):
            print(piece, end="", flush=True)
        return print()
    texts = list(prompts)
    for row, piece in pieces(model, tokenizer, prompts, arguments):
        texts[row] += piece
    for number, text in enumerate(texts, 1):
        print(f"--- {number} of {len(texts)}\n{text}")


def tokenizer_remedy(export: Path) -> str:
    """The end of a sentence on an export without tokenizer.json: what to give. The tokenizer `bytes` has no file, and
    is known by the token with which it ends a text."""
    from megatron_tf.convert.huggingface.importing import stored_eod
    from megatron_tf.data.tokenizer import BYTES, ByteTokenizer

    end = ByteTokenizer.eod_id
    if stored_eod(export) == end:
        return (
            f", and by its config.json token {end} ends a text, as with the tokenizer {BYTES}, which has no file. Give "
            f"--tokenizer {BYTES}."
        )
    return f". {GIVE_TOKENIZER}"


def pieces(
    model: TokenFormer, tokenizer: Tokenizer, prompts: list[str], arguments: argparse.Namespace
) -> Iterator[tuple[int, str]]:
    """Yields (number of the prompt, text that continues it) while the text is generated."""
    from megatron_tf.inference.cache import CachedModel
    from megatron_tf.inference.sampling import generate
    from megatron_tf.inference.text import TextStream

    encoded = [ids or [tokenizer.eod_id] for ids in tokenizer.encode_batch(prompts)]
    streams = [TextStream(tokenizer, ids) for ids in encoded]
    cached = CachedModel(model)
    steps = generate(
        lambda ids, padding: cached(ids, padding)[:, : tokenizer.vocab_size],  # the model's vocabulary may be padded
        encoded,
        num_tokens=arguments.tokens,
        context=model.config.seq_length,
        end=tokenizer.eod_id,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    for step in steps:
        for row, token in enumerate(step):
            if token is not None:
                yield row, streams[row].push(token)
    for row, stream in enumerate(streams):
        yield row, stream.rest()


def read_prompts(path: Path) -> list[str]:
    # Not str.splitlines, which also splits at line separators of Unicode that editors show within a line.
    text = read_text_file(UserError, path, "Give a readable file of prompts.")
    prompts = text.removesuffix("\n").split("\n") if text else []
    if not prompts:
        raise UserError(f"{path}: is empty. Write one prompt a line.")
    return prompts
