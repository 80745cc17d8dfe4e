"""Write text with a trained model: `python tools/generate_text.py RUN_DIR --prompt "..."`.

Needs no GPU and no launcher. The tokenizer is the one that the run was configured with.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch

from megatron_tf.checkpoint.manager import resolve
from megatron_tf.config.load import load_config
from megatron_tf.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tf.errors import UserError, run_command
from megatron_tf.inference.load import load_model
from megatron_tf.inference.sampling import generate
from megatron_tf.model.tokenformer import TokenFormer

MOST_TOKENS = 1_000_000  # weeks of work: more is a slip of the hand


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="run folder, checkpoints folder or checkpoint")
    parser.add_argument("--prompt", default="", help="text to continue; empty begins a document")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens to write (default 64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=40, help="sample from the k likeliest tokens; 0: all (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument("--tokenizer", help="tokenizer file; default: data.tokenizer of the run's config.yml")
    arguments = parser.parse_args()
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises UserError with all that is out of range."""
    problems = []
    if not 1 <= arguments.tokens <= MOST_TOKENS:
        problems.append(f"--tokens is {arguments.tokens}. Choose 1 to {MOST_TOKENS}.")
    if not 0 <= arguments.temperature < math.inf:
        problems.append(f"--temperature is {arguments.temperature}. Choose 0 (greedy) or a finite number above it.")
    if arguments.top_k < 0:
        problems.append(f"--top-k is {arguments.top_k}. Choose 0 (all tokens) or more.")
    if not 0 <= arguments.seed < 2**63:
        problems.append(f"--seed is {arguments.seed}. Choose 0 to {2**63 - 1}.")
    try:
        arguments.prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of another encoding arrive as lone surrogates
        problems.append(f"--prompt is not UTF-8 at character {error.start}. Encode it as UTF-8.")
    if problems:
        raise UserError("\n".join(problems))


def main() -> None:
    arguments = parse_arguments()
    checkpoint = resolve(arguments.checkpoint)
    tokenizer_path = arguments.tokenizer or configured_tokenizer(Path(arguments.checkpoint))
    tokenizer = load_tokenizer(tokenizer_path)
    model = load_model(checkpoint)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{tokenizer_path}: has {tokenizer.vocab_size} tokens, the model's vocabulary {model.config.vocab_size}. "
            f"It is another model's tokenizer: give the right one with --tokenizer."
        )
    print(arguments.prompt + continuation(model, tokenizer, arguments))


def continuation(model: TokenFormer, tokenizer: Tokenizer, arguments: argparse.Namespace) -> str:
    ids = generate(
        lambda ids: model(ids)[..., : tokenizer.vocab_size],  # a model's vocabulary may be padded beyond the tokens
        tokenizer.encode_batch([arguments.prompt])[0] or [tokenizer.eod_id],
        num_tokens=arguments.tokens, context=model.config.seq_length, end=tokenizer.eod_id,
        temperature=arguments.temperature, top_k=arguments.top_k,
        generator=torch.Generator().manual_seed(arguments.seed),
    )  # fmt: skip
    return tokenizer.decode(list(ids))


def configured_tokenizer(path: Path) -> str:
    """data.tokenizer of the run that `path` belongs to."""
    for folder in (path, *path.resolve().parents[:2]):
        if os.path.isfile(folder / "config.yml"):
            tokenizer = load_config(folder / "config.yml").data.tokenizer
            if tokenizer is not None:
                return tokenizer
    raise UserError(f"{path}: no config.yml with data.tokenizer beside it. Give the file with --tokenizer.")


if __name__ == "__main__":
    run_command(main)
