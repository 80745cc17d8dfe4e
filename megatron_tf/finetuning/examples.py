"""Examples from JSON-lines files as tokens, with a mark on each token that is to be learnt.

| fields of a line | what is learnt |
|---|---|
| prompt, answer | the answer, and the end of text |
| messages: [{role, content}, ...] | what the assistant says, as the tokenizer's chat template writes it |
| text | everything |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tf.checkpoint.strict_json import NotJsonError, parse_json
from megatron_tf.errors import DataError, file_errors, first_line, shown
from megatron_tf.telemetry.text import are, count_of

_KINDS = (frozenset({"prompt", "answer"}), frozenset({"messages"}), frozenset({"text"}))
_ASSISTANT = "assistant"


@dataclass(frozen=True)
class Example:
    """`ids`: tokens.  `learnt`: whether each of them is to be predicted; never the first.  `place`: file and line."""

    ids: Sequence[int]
    learnt: Sequence[bool]
    place: str


def read_examples(
    files: Sequence[str], tokenizer: Any, seq_length: int, drop_long: bool, key: str = "data.seq_length"
) -> list[Example]:
    """All examples, in the order of the files. A text of more than `seq_length` tokens is cut into pieces.

    DataError with file and line for a line that is not an example, and, unless `drop_long`, for one that is too long.
    `key`: the option that sets `seq_length`, for messages.
    """
    found: list[Example] = []
    long: list[Example] = []
    for file in files:
        before = len(found)
        for place, record in _records(file):
            example = _example(place, record, tokenizer)
            if "text" in record:
                found += _pieces(example, seq_length)
            elif len(example.ids) > seq_length:
                long.append(example)
            else:
                found.append(example)
        if len(found) == before and not long:
            raise DataError(f"{file}: holds no examples. Give a file of one JSON object a line.")
    if long and not drop_long:
        longest = max(long, key=lambda one: len(one.ids))
        raise DataError(
            f"{longest.place}: has {len(longest.ids):,} tokens, and {key} is {seq_length:,}; {len(long)} of "
            f"{count_of(len(long) + len(found), 'example')} {are(len(long))} too long. Raise {key}, "
            "shorten them, or set data.too_long to drop."
        )
    if not found:
        raise DataError(f"{', '.join(files)}: no example is left of at most {seq_length:,} tokens. Raise {key}.")
    return found


def _records(file: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with file_errors(DataError, file, "Give a readable file of one JSON object a line."), open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file}: line {number}"
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except NotJsonError as error:
                raise DataError(f"{place}: is not JSON ({error}). Write one object a line.") from error
            if not isinstance(record, dict) or not any(kind <= record.keys() for kind in _KINDS):
                keys = f"the fields {', '.join(map(str, record))}" if isinstance(record, dict) else shown(record)
                raise DataError(f"{place}: has {keys}. Give prompt and answer, or messages, or text.")
            kinds = [kind for kind in _KINDS if kind <= record.keys()]
            if len(kinds) > 1:
                both = ", as well as ".join(" and ".join(sorted(kind, reverse=True)) for kind in kinds)
                raise DataError(f"{place}: has {both}, and one of these is learnt. Leave the others out.")
            yield place, record


def _example(place: str, record: Mapping[str, Any], tokenizer: Any) -> Example:
    if "messages" in record:
        return _conversation(place, record["messages"], tokenizer)
    if "text" in record:
        ids = [*_encoded(place, record, "text", tokenizer), tokenizer.eos_token_id]
        return Example(ids, [False] + [True] * (len(ids) - 1), place)
    prompt = _encoded(place, record, "prompt", tokenizer)
    answer = [*_encoded(place, record, "answer", tokenizer, begins=False), tokenizer.eos_token_id]
    return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer), place)


def _encoded(place: str, record: Mapping[str, Any], field: str, tokenizer: Any, begins: bool = True) -> list[int]:
    """Tokens of a field, without an end of text. `begins`: add the tokens that the tokenizer puts before a text."""
    text = record[field]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{place}: {field} is {shown(text)}, and a text is expected. Give one, or take the line out.")
    ids = list(tokenizer(text, add_special_tokens=begins)["input_ids"])
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _conversation(place: str, messages: Any, tokenizer: Any) -> Example:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{place}: holds messages, and the base's tokenizer has no chat template. Put chat_template.jinja into the "
            "base's folder, or give prompt and answer."
        )
    _check_messages(place, messages)
    ids: list[int] = []
    learnt: list[bool] = []
    for number, message in enumerate(messages):
        if message["role"] != _ASSISTANT:
            continue
        before = _templated(place, messages[:number], tokenizer, add_generation_prompt=True)
        after = _templated(place, messages[: number + 1], tokenizer)
        if before[: len(ids)] != ids or after[: len(before)] != before:
            raise DataError(
                f"{place}: the chat template writes earlier messages otherwise when later ones follow, so what the "
                "assistant says cannot be told. Give prompt and answer instead."
            )
        learnt += [False] * (len(before) - len(ids)) + [True] * (len(after) - len(before))
        ids = after
    return Example(ids, [False, *learnt[1:]], place)


def _check_messages(place: str, messages: Any) -> None:
    is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    if not is_list or not all(isinstance(message.get(key), str) for message in messages for key in ("role", "content")):
        raise DataError(f"{place}: messages is {shown(messages)}. Give a list of objects with role and content.")
    if not any(message["role"] == _ASSISTANT and message["content"].strip() for message in messages):
        raise DataError(f"{place}: no message is of the assistant, so there is nothing to learn. Take the line out.")


def _templated(place: str, messages: Any, tokenizer: Any, **options: Any) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template raises what it likes, also for the order of the roles
        raise DataError(f"{place}: the chat template refuses it ({first_line(error)}). Change the messages.") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _pieces(example: Example, seq_length: int) -> Iterator[Example]:
    """A text in pieces of at most `seq_length` tokens. A piece of one token has nothing to predict and is left out."""
    for start in range(0, len(example.ids), seq_length):
        ids = example.ids[start : start + seq_length]
        if len(ids) > 1:
            yield Example(ids, [False] + [True] * (len(ids) - 1), example.place)
