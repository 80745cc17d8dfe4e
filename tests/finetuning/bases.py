"""A tiny model with a tokenizer of single characters in a folder, and examples for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
from decoders import decoder  # noqa: E402
from tokenformers import tokenformer as tokenformer  # noqa: E402

CHARACTERS = [chr(code) for code in range(32, 125)]  # 93, after the three below
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_base(folder: Path, template: str | None = TEMPLATE, model: nn.Module | None = None) -> Path:
    """`model`: None is a Llama."""
    from transformers import PreTrainedTokenizerFast

    (model or decoder()).save_pretrained(folder)
    vocabulary = {token: number for number, token in enumerate(["[pad]", "[bos]", "[eos]", *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[pad]"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[eos]", bos_token="[bos]", pad_token="[pad]")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def write_lines(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def questions(count: int = 24) -> list[dict[str, str]]:
    return [{"prompt": f"{number} + 1 =", "answer": f" {number + 1}"} for number in range(count)]
