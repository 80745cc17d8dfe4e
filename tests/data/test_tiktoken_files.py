"""tiktoken's tokenizers from files alone."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path

import pytest

from megatron_tf.data import tiktoken_files
from megatron_tf.data.tiktoken_files import ENCODINGS, GPT2_PATTERN, URL, Spec
from megatron_tf.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_tf.errors import DataError

TEXT = "The fox<|endoftext|> jumps over the Zürich 東京 🦊\t end  "
MERGED = [b"Th", b"The", b" f", b"ox", b" fox", b"ju", b"mp"]
SPEC = {"pat_str": GPT2_PATTERN, "special_tokens": {"<|endoftext|>": 263, "<|pad|>": 270}}


def rank_file() -> bytes:
    tokens = [bytes([number]) for number in range(256)] + MERGED
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "own.tiktoken").write_bytes(rank_file())
    (tmp_path / "own.tiktoken.json").write_text(json.dumps(SPEC))
    return tmp_path / "own.tiktoken"


def test_a_file_and_its_spec(path):
    tiktoken = pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (271, 263)
    oracle = tiktoken.Encoding(
        "own",
        pat_str=GPT2_PATTERN,
        mergeable_ranks={base64.b64decode(t): int(r) for t, r in map(bytes.split, rank_file().splitlines())},
        special_tokens=SPEC["special_tokens"],
    )
    (ids, empty) = tokenizer.encode_batch([TEXT, ""])
    assert ids == oracle.encode_ordinary(TEXT) and ids[0] == 257 and 263 not in ids and empty == []
    assert [array.tolist() for array in tokenizer.encode_arrays([TEXT, ""])] == [ids, []]
    assert tokenizer.decode([*ids, 263]) == TEXT + "<|endoftext|>"
    assert load_tokenizer(path, "<|pad|>").eod_id == load_tokenizer(path, 270).eod_id == 270
    with pytest.raises(DataError, match=r"has no token '</s>' .* special tokens are <\|endoftext\|>, <\|pad\|>"):
        load_tokenizer(path, "</s>")


def test_files_as_other_systems_write_them(path):
    """With byte order marks and carriage returns."""
    pytest.importorskip("tiktoken")
    expected = load_tokenizer(path).encode_batch(["abc ab"])
    for file in (path, path.with_name(path.name + ".json")):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert load_tokenizer(path).encode_batch(["abc ab"]) == expected


def test_the_fingerprint_needs_no_package_and_depends_on_both_files(path, monkeypatch):
    pytest.importorskip("tiktoken")
    loaded = load_tokenizer(path).fingerprint
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert tokenizer_fingerprint(path) == loaded
    path.with_name("own.tiktoken.json").write_text(json.dumps({**SPEC, "pat_str": "."}))
    assert tokenizer_fingerprint(path) != loaded
    path.with_name("own.tiktoken.json").write_text(json.dumps(SPEC))
    path.write_bytes(rank_file()[:-9])
    assert tokenizer_fingerprint(path) != loaded


def test_the_public_encodings_are_those_of_the_library(monkeypatch):
    """Their patterns, special tokens, addresses and hashes, asked of the library without its download."""
    public = pytest.importorskip("tiktoken_ext.openai_public")
    asked = []
    monkeypatch.setattr(
        public, "load_tiktoken_bpe", lambda url, expected_hash: asked.append((url, expected_hash)) or {}
    )
    for name, (digest, spec) in ENCODINGS.items():
        theirs = getattr(public, name)()
        assert (theirs["pat_str"], theirs["special_tokens"]) == (spec.pat_str, spec.special_tokens)
        assert asked.pop() == (URL.format(name), digest)


def test_a_public_encoding_by_file_name_and_from_the_cache(tmp_path, monkeypatch):
    pytest.importorskip("tiktoken")
    content = rank_file()
    known = (hashlib.sha256(content).hexdigest(), Spec(**SPEC))
    monkeypatch.setattr(tiktoken_files, "ENCODINGS", {"cl100k_base": known})
    (tmp_path / "cl100k_base.tiktoken").write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"tiktoken:cl100k_base: is not in tiktoken's cache .*nothing is downloaded"):
        load_tokenizer("tiktoken:cl100k_base")
    url = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(content)
    tokenizers = [load_tokenizer(name) for name in ("tiktoken:cl100k_base", tmp_path / "cl100k_base.tiktoken")]
    assert tokenizers[0].encode_batch([TEXT]) == tokenizers[1].encode_batch([TEXT])
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint == tokenizer_fingerprint("tiktoken:cl100k_base")
    with pytest.raises(DataError, match="tiktoken:nonsense: unknown encoding. Known are cl100k_base"):
        load_tokenizer("tiktoken:nonsense")


def write(path: Path, ranks: bytes | None, spec: str | None) -> None:
    path.unlink()
    path.with_name(path.name + ".json").unlink()
    if ranks is not None:
        path.write_bytes(ranks)
    if spec is not None:
        path.with_name(path.name + ".json").write_text(spec)


NO_EOD = json.dumps({**SPEC, "special_tokens": {"<|pad|>": 263}})
BAD_FILES = {
    "missing": (None, None, r"own\.tiktoken: No such file or directory. The tokenizer cannot be read"),
    "no spec": (b"", None, r"not known how this encoding splits text. Write own\.tiktoken\.json next to it"),
    "spec no json": (b"", "{", r"own\.tiktoken\.json: must be {\"pat_str\""),
    "spec incomplete": (b"", '{"pat_str": "."}', r"own\.tiktoken\.json: must be"),
    "spec of other types": (b"", '{"pat_str": ".", "special_tokens": {"a": "b"}}', r"\.json: must be"),
    "no end": (
        rank_file(),
        NO_EOD,
        r"has no end-of-document token under a usual name .* special tokens are <\|pad\|>\.",
    ),
    "end that is a rank": (rank_file(), json.dumps({**SPEC, "special_tokens": {"</s>": 3}}), "both have id 3, so text"),
    "ids beyond int32": (rank_file(), json.dumps({**SPEC, "special_tokens": {"</s>": 2**31}}), r"\.json: must be"),
    "ranks beyond int32": (rank_file() + b"eHl6 3000000000\n", json.dumps(SPEC), "id 3000000000, ids are 0 to"),
    "no ranks": (b"rubbish\n", json.dumps(SPEC), "not a tiktoken rank file"),
    "no base64": (b"***** 3\n", json.dumps(SPEC), "not a tiktoken rank file"),
    "bad pattern": (rank_file(), json.dumps({**SPEC, "pat_str": "(("}), "not a tiktoken rank file that fits its spec"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(path, case):
    pytest.importorskip("tiktoken")
    ranks, spec, message = BAD_FILES[case]
    write(path, ranks, spec)
    with pytest.raises(DataError, match=message):
        load_tokenizer(path)


def test_a_public_name_with_other_content(tmp_path):
    (tmp_path / "r50k_base.tiktoken").write_bytes(rank_file())
    with pytest.raises(DataError, match=r"r50k_base\.tiktoken: has SHA-256 .*OpenAI's r50k_base has 306cd27f03c1"):
        tokenizer_fingerprint(tmp_path / "r50k_base.tiktoken")


def test_missing_package(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(DataError, match=r"needs the package tiktoken: pip install 'megatron_tf\[tiktoken\]'"):
        load_tokenizer(path)
