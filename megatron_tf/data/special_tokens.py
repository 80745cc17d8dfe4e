"""Finding the token of a vocabulary that ends a document."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_tf.errors import DataError, shown

# Of GPT-2 and most others; Llama 1 and 2, T5 and BLOOM; Gemma; Llama 3 and Granite; DeepSeek; BERT; XLNet, ProGen.
EOD_TOKENS = (
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[SEP]",
    "<eod>",
    "<|eos|>",
    "[EOS]",
    "<EOS>",
    "<EOD>",
)
# Ids are stored as int32.
LARGEST_ID = 2**31 - 1
NAMES_SHOWN = 12
# The name or the id of the token; None: find it by its name.
Eod = str | int | None


def check_ids(path: str | Path, vocabulary: Mapping[str, int]) -> int:
    """The largest id + 1. DataError when there is no token, or an id that cannot be stored."""
    if not vocabulary:
        raise DataError(f"{path}: has no token. Give a tokenizer that was trained.")
    name, number = max(vocabulary.items(), key=lambda token: token[1])
    smallest = min(vocabulary.values())
    if number >= LARGEST_ID or smallest < 0:
        raise DataError(
            f"{path}: token {shown(name)} has id {shown(number if smallest >= 0 else smallest)}, ids are 0 to "
            f"{LARGEST_ID - 1}. The file is damaged: get it anew."
        )
    return number + 1


def find_eod(
    path: str | Path, vocabulary: Mapping[str, int], eod: Eod, special: Mapping[str, int] | None = None
) -> int:
    """Id of the token that ends a document: `eod`, or the one of the usual names that is in `vocabulary`.

    `special`: tokens that ordinary text does not contain, if known. Other tokens are considered only when none of
    these has such a name. Raises `DataError` when there is no such token, or several, or when its id is also another
    token's.
    """
    name = _chosen(path, vocabulary, eod, special or {})
    number = vocabulary[name]
    others = [other for other, own in vocabulary.items() if own == number and other != name]
    if others:
        raise DataError(
            f"{path}: {shown(name)} and {shown(others[0])} both have id {number}, so text could end documents. "
            "Give each token an id of its own, or name another token with --eod-token."
        )
    return number


def _chosen(path: str | Path, vocabulary: Mapping[str, int], eod: Eod, special: Mapping[str, int]) -> str:
    if isinstance(eod, str):
        if eod not in vocabulary:
            raise DataError(f"{path}: has no token {shown(eod)} to end documents with. {_offered(vocabulary, special)}")
        return eod
    if eod is not None:
        for name, number in vocabulary.items():
            if number == eod:
                return name
        raise DataError(
            f"{path}: has no token of id {eod}, with which documents end as data.eod_id or the data's summary says. "
            "Correct data.eod_id, or name the right tokenizer."
        )
    found = [name for name in EOD_TOKENS if name in special] or [name for name in EOD_TOKENS if name in vocabulary]
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError(
            f"{path}: has no end-of-document token under a usual name ({', '.join(EOD_TOKENS[:4])}, ...). Name it with "
            f"--eod-token, in a configuration as data.eod_id. {_offered(vocabulary, special)}"
        )
    both = ", ".join(f"{name} (id {vocabulary[name]})" for name in found)
    raise DataError(
        f"{path}: several of its tokens may end documents: {both}. Name the one that does with --eod-token, in a "
        "configuration as data.eod_id."
    )


def _offered(vocabulary: Mapping[str, int], special: Mapping[str, int]) -> str:
    """The tokens that may be meant."""
    names = sorted(
        special or {name: number for name, number in vocabulary.items() if name[:1] + name[-1:] == "<>"},
        key=vocabulary.__getitem__,
    )
    if not names:
        return f"None of its {len(vocabulary)} tokens is a special one."
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"Its special tokens are {', '.join(names[:NAMES_SHOWN])}{more}."
