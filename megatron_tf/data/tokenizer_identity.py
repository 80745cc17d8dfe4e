"""Whether two tokenizers are one: the same file, or another one that gives the same tokens.

Files are written anew by editors, by git (line ends), by json.dump and by newer versions of the libraries, which spell
defaults out and pairs differently. None of that changes a token, and data must not be prepared again for it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tf.data.tiktoken_files import is_tiktoken, tiktoken_content
from megatron_tf.data.tokenizer import BYTES, tokenizer_fingerprint
from megatron_tf.data.tokenizer_files import SAMPLING, read_tokenizer_file
from megatron_tf.errors import NOT_AS_WRITTEN

# Of a `tokenizers` file: the rest is about several texts at once, text again, and tokens that preparation leaves out.
_DECIDING = ("added_tokens", "normalizer", "pre_tokenizer", "model")
# the values of fields that a file leaves out
_MODEL_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "BPE": {
        "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
        "byte_fallback": False, "ignore_merges": False,
    },
    "Unigram": {"unk_id": None, "byte_fallback": False},
}  # fmt: skip


class TokenizerIdentity(NamedTuple):
    """`file`: SHA-256 of the file as it is.  `content`: of what decides the tokens; empty where that is not known."""

    file: str
    content: str = ""

    def same(self, other: TokenizerIdentity) -> bool:
        return self.file == other.file or self.content == other.content != ""


def tokenizer_identity(path: str | Path) -> TokenizerIdentity:
    """Without loading the tokenizer or the package for it. Raises `DataError` when it cannot be read."""
    file = tokenizer_fingerprint(path)
    if str(path) == BYTES:
        return TokenizerIdentity(file, file)
    try:
        if is_tiktoken(str(path)):
            content = tiktoken_content(str(path))
        elif Path(path).suffix == ".json":
            content = _json_content(read_tokenizer_file(Path(path)))
        else:
            return TokenizerIdentity(file, file)
    except NOT_AS_WRITTEN:
        return TokenizerIdentity(file, file)  # no tokenizer, which its loader will say
    return TokenizerIdentity(file, hashlib.sha256(content).hexdigest())


def _json_content(raw: bytes) -> bytes:
    described = json.loads(raw.removeprefix(codecs.BOM_UTF8))
    content = {name: described.get(name) for name in _DECIDING}
    content["added_tokens"] = sorted(content["added_tokens"] or [], key=lambda token: token["id"])
    content["model"] = _plain_model(content["model"])
    content["pre_tokenizer"] = _plain_step(content["pre_tokenizer"])
    return json.dumps(content, sort_keys=True).encode()


def _plain_model(model: Mapping[str, Any]) -> dict[str, Any]:
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    plain = {**_MODEL_DEFAULTS.get(str(kind), {}), **model, "type": kind}
    if kind == "BPE":
        plain["merges"] = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
            plain[affix] = plain[affix] or None
    return {name: value for name, value in plain.items() if name not in SAMPLING}


def _plain_step(step: Any) -> Any:
    """A pre-tokenizer, or a list of them."""
    if isinstance(step, list):
        return [_plain_step(part) for part in step]
    if not isinstance(step, dict):
        return step
    plain = {name: _plain_step(value) for name, value in step.items()}
    if plain.get("type") == "ByteLevel":
        plain.setdefault("use_regex", True)
        plain.pop("trim_offsets", None)
    elif plain.get("type") == "Metaspace":
        always = plain.pop("add_prefix_space", True)
        plain.setdefault("prepend_scheme", "always" if always else "never")
        plain.setdefault("split", True)
        plain.pop("str_rep", None)
    elif plain.get("type") == "Punctuation":
        plain.setdefault("behavior", "Isolated")
    return plain
