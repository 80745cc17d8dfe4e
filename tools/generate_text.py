"""Write text with a trained model: `python tools/generate_text.py RUN_DIR --prompt "..."`.

Needs no GPU and no launcher. The tokenizer is the one that the run was configured with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megatron_tf.config.load import load_config
from megatron_tf.data.tokenizer import load_tokenizer
from megatron_tf.errors import UserError, run_command
from megatron_tf.inference.load import load_model
from megatron_tf.inference.sampling import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="run folder, checkpoints folder or checkpoint")
    parser.add_argument("--prompt", default="", help="text to continue; empty begins a document")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens to write (default 64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=40, help="sample from the k likeliest tokens; 0: all (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument("--tokenizer", help="tokenizer file; default: data.tokenizer of the run's config.yml")
    arguments = parser.parse_args()
    if arguments.tokens < 1 or arguments.temperature < 0 or arguments.top_k < 0:
        raise UserError("--tokens must be at least 1, --temperature and --top-k at least 0")
    tokenizer = load_tokenizer(arguments.tokenizer or configured_tokenizer(Path(arguments.checkpoint)))
    model = load_model(arguments.checkpoint)
    prompt = tokenizer.encode_batch([arguments.prompt])[0] or [tokenizer.eod_id]
    ids = generate(
        model, prompt, num_tokens=arguments.tokens, context=model.config.seq_length, end=tokenizer.eod_id,
        temperature=arguments.temperature, top_k=arguments.top_k,
        generator=torch.Generator().manual_seed(arguments.seed),
    )  # fmt: skip
    print(arguments.prompt + tokenizer.decode(list(ids)))


def configured_tokenizer(path: Path) -> str:
    """data.tokenizer of the run that `path` belongs to."""
    for folder in (path, *path.resolve().parents[:2]):
        if (folder / "config.yml").is_file():
            tokenizer = load_config(folder / "config.yml").data.tokenizer
            if tokenizer is not None:
                return tokenizer
    raise UserError(f"{path}: no config.yml with data.tokenizer beside it. Give the file with --tokenizer.")


if __name__ == "__main__":
    run_command(main)
