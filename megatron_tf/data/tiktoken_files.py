"""tiktoken's tokenizers from local files: merge ranks (NAME.tiktoken), and how text is split before merging.

Nothing is ever downloaded. What a rank file does not say (the pattern and the special tokens) is known here for
OpenAI's public encodings, and otherwise read from `NAME.tiktoken.json` next to it:

    {"pat_str": "...", "special_tokens": {"<|endoftext|>": 50256}}
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_tf.data.spans import Spans, byte_spans
from megatron_tf.data.special_tokens import LARGEST_ID, Eod, check_ids, find_eod
from megatron_tf.data.tokenizer_files import NotATokenizerError, is_library_failure, read_tokenizer_file
from megatron_tf.errors import NOT_AS_WRITTEN, DataError

NAME_PREFIX = "tiktoken:"
SUFFIX = ".tiktoken"
URL = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"  # its SHA-1 names the file in tiktoken's cache
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Spec:
    """The part of an encoding that its rank file lacks."""

    pat_str: str
    special_tokens: dict[str, int]


GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
O200K_PATTERN = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
# name -> SHA-256 of its rank file, and what belongs to it
ENCODINGS = {
    "r50k_base": (
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        Spec(GPT2_PATTERN, {END_OF_TEXT: 50256}),
    ),
    "p50k_base": (
        "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
        Spec(GPT2_PATTERN, {END_OF_TEXT: 50256}),
    ),
    "cl100k_base": (
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        Spec(
            CL100K_PATTERN,
            {
                END_OF_TEXT: 100257,
                "<|fim_prefix|>": 100258,
                "<|fim_middle|>": 100259,
                "<|fim_suffix|>": 100260,
                "<|endofprompt|>": 100276,
            },
        ),
    ),
    "o200k_base": (
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        Spec(O200K_PATTERN, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
    ),
}


def is_tiktoken(tokenizer: str) -> bool:
    return tokenizer.startswith(NAME_PREFIX) or tokenizer.endswith(SUFFIX)


def tiktoken_fingerprint(tokenizer: str) -> str:
    """SHA-256 of the rank file and the spec, hexadecimal; needs no tiktoken. Raises `DataError`."""
    return _fingerprint(*_files(tokenizer))


def tiktoken_content(tokenizer: str) -> bytes:
    """The bytes that decide the tokens, whatever the line ends of the rank file. ValueError when it is invalid."""
    ranks, spec = _files(tokenizer)
    tokens = sorted((rank, token.hex()) for token, rank in _parse_ranks(ranks).items())
    return json.dumps([tokens, asdict(spec)], sort_keys=True).encode()


class TiktokenTokenizer:
    """tiktoken as a `Tokenizer`. Special tokens written out in a text are text: only the end of a document is one."""

    unknown_id: int | None = None
    is_local = True

    def __init__(self, tokenizer: str, eod: Eod = None):
        ranks, spec = _files(tokenizer)
        self.fingerprint = _fingerprint(ranks, spec)
        try:
            import tiktoken
        except ImportError:
            raise DataError(f"{tokenizer}: needs the package tiktoken: pip install 'megatron_tf[tiktoken]'") from None
        try:
            tokens = _parse_ranks(ranks)
            self._encoding = tiktoken.Encoding(
                name=Path(tokenizer).stem,
                pat_str=spec.pat_str,
                mergeable_ranks=tokens,
                special_tokens=spec.special_tokens,
            )
        except BaseException as error:  # rubbish fails in many ways, in Python and in the library's Rust
            if not is_library_failure(error):
                raise
            raise NotATokenizerError(f"{tokenizer}: not a tiktoken rank file that fits its spec ({error}).") from None
        vocabulary = {**{repr(token): rank for token, rank in tokens.items()}, **spec.special_tokens}
        self.vocab_size = check_ids(tokenizer, vocabulary)
        self.eod_id = find_eod(tokenizer, vocabulary, eod, spec.special_tokens)
        order = sorted(tokens, key=tokens.__getitem__)
        self._ranks = np.array([tokens[token] for token in order])
        self._lengths = np.array([len(token) for token in order])  # bytes

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32) for text in texts]

    def encode_spans(self, text: str) -> Spans | None:
        ids = self.encode_arrays([text])[0]
        return byte_spans(text, ids, self._lengths[np.searchsorted(self._ranks, ids)])

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([int(number) for number in ids])


def _files(tokenizer: str) -> tuple[bytes, Spec]:
    """Content of the rank file and its spec."""
    if tokenizer.startswith(NAME_PREFIX):
        return _cached(tokenizer.removeprefix(NAME_PREFIX))
    path = Path(tokenizer)
    ranks = read_tokenizer_file(path)
    spec_path = path.with_name(path.name + ".json")
    if spec_path.exists():
        return ranks, _read_spec(spec_path)
    name = path.name.removesuffix(SUFFIX)
    if name not in ENCODINGS:
        raise NotATokenizerError(
            f"{path}: it is not known how this encoding splits text. Write {spec_path.name} next to it, with pat_str "
            f"and special_tokens, or give the file its public name ({', '.join(ENCODINGS)})."
        )
    return ranks, _known_spec(name, path, ranks)


def _known_spec(name: str, path: Path, ranks: bytes) -> Spec:
    expected, spec = ENCODINGS[name]
    found = hashlib.sha256(ranks).hexdigest()
    if found != expected:
        raise NotATokenizerError(
            f"{path}: has SHA-256 {found[:12]}, OpenAI's {name} has {expected[:12]}. Copy it again, or write "
            f"{path.name}.json next to it if it is an encoding of your own."
        )
    return spec


def _cached(name: str) -> tuple[bytes, Spec]:
    if name not in ENCODINGS:
        raise NotATokenizerError(f"{NAME_PREFIX}{name}: unknown encoding. Known are {', '.join(ENCODINGS)}.")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = Path(folder) if folder else Path(tempfile.gettempdir()) / "data-gym-cache"
    path = cache / hashlib.sha1(URL.format(name).encode()).hexdigest()
    if not path.is_file():
        raise DataError(
            f"{NAME_PREFIX}{name}: is not in tiktoken's cache ({cache}), and nothing is downloaded unasked. Get it "
            f"with `python -c \"import tiktoken; tiktoken.get_encoding('{name}')\"`, or give a {name}.tiktoken file."
        )
    ranks = read_tokenizer_file(path)
    return ranks, _known_spec(name, path, ranks)


def _read_spec(path: Path) -> Spec:
    raw = read_tokenizer_file(path)
    try:
        content = json.loads(raw)
        spec = Spec(content["pat_str"], dict(content["special_tokens"]))
        valid = isinstance(spec.pat_str, str) and all(
            type(number) is int and 0 <= number < LARGEST_ID for number in spec.special_tokens.values()
        )
    except NOT_AS_WRITTEN:
        valid = False
    if not valid:
        raise NotATokenizerError(
            f'{path}: must be {{"pat_str": "...", "special_tokens": {{"{END_OF_TEXT}": number, ...}}}}.'
        )
    return spec


def _parse_ranks(content: bytes) -> dict[bytes, int]:
    """A line is a token in base64 and its rank."""
    ranks = {}
    for line in content.removeprefix(codecs.BOM_UTF8).splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    return ranks


def _fingerprint(ranks: bytes, spec: Spec) -> str:
    return hashlib.sha256(ranks + json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()
