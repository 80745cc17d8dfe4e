"""Both kinds of tokenizer behind the protocol, and the trained one."""

from __future__ import annotations

import hashlib
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_tf.data.bpe import train_bpe
from megatron_tf.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_tf.errors import DataError

TEXTS = ["The quick brown fox jumps over the lazy dog.\n", "def f(x):\n    return x + 1\n", "The fox and the dog. "] * 5
UNSEEN = "Zürich, 東京 and 🦊\t\x00 end  "


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(TEXTS, 300, path)
    return path


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = tmp_path_factory.mktemp("sp") / "model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(prefix), vocab_size=300, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


def test_hugging_face(bpe):
    tokenizer = load_tokenizer(bpe)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (300, 0)
    assert tokenizer.fingerprint == hashlib.sha256(bpe.read_bytes()).hexdigest()
    batch = tokenizer.encode_batch([TEXTS[0], "", UNSEEN])
    assert [tokenizer.decode(ids) for ids in batch] == [TEXTS[0], "", UNSEEN]
    assert len(batch[0]) < len(TEXTS[0]) and max(map(max, filter(None, batch))) < 300


def test_truncation_padding_and_templates_of_the_file_are_ignored(bpe, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    changed = tokenizers.Tokenizer.from_file(str(bpe))
    changed.enable_truncation(3)
    changed.enable_padding(length=50)
    changed.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    changed.save(str(tmp_path / "changed.json"))
    expected = load_tokenizer(bpe).encode_batch(TEXTS[:2])
    assert load_tokenizer(tmp_path / "changed.json").encode_batch(TEXTS[:2]) == expected


def test_sentencepiece(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (300, 2)
    ids = tokenizer.encode_batch(["The fox 東 jumps", ""])
    assert tokenizer.decode(ids[0]) == "The fox 東 jumps" and ids[1] == []
    assert tokenizer.eod_id not in ids[0] and 1 not in ids[0]  # neither <s> nor </s> is added


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (257, 256)
    batch = tokenizer.encode_batch([UNSEEN, ""])
    assert batch == [list(UNSEEN.encode()), []]
    assert tokenizer.decode([*batch[0], 256]) == UNSEEN + "<|endoftext|>"
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer_fingerprint("bytes") == tokenizer.fingerprint and len(tokenizer.fingerprint) == 64


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece_model", "bytes"])
def test_arrays_are_the_lists(kind, request):
    tokenizer = load_tokenizer(kind if kind == "bytes" else request.getfixturevalue(kind))
    texts = [TEXTS[0], "", UNSEEN]
    arrays = tokenizer.encode_arrays(texts)
    assert [array.dtype for array in arrays] == [np.int32] * 3
    assert [array.tolist() for array in arrays] == tokenizer.encode_batch(texts)


def test_sentencepiece_versions_without_arrays_give_the_same(sentencepiece_model, monkeypatch):
    tokenizer = load_tokenizer(sentencepiece_model)
    by_library = tokenizer.encode_arrays([TEXTS[0], "", UNSEEN])
    assert tokenizer._makes_arrays is ("return_type" in inspect.signature(tokenizer._processor.encode).parameters)
    monkeypatch.setattr(tokenizer, "_makes_arrays", False)
    ours = tokenizer.encode_arrays([TEXTS[0], "", UNSEEN])
    assert [array.tolist() for array in ours] == [array.tolist() for array in by_library]


def test_training_is_deterministic(bpe, tmp_path):
    """In another process too, where hash tables have another seed."""
    code = "import sys; from pathlib import Path; from megatron_tf.data.bpe import train_bpe; "
    code += f"train_bpe({TEXTS!r}, 300, Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "again.json")], check=True, cwd=Path(__file__).parents[2]
    )
    assert (tmp_path / "again.json").read_bytes() == bpe.read_bytes()


def test_too_little_text_gives_a_smaller_vocabulary(tmp_path):
    assert train_bpe(["ab"], 4096, tmp_path / "t.json") == 258


def test_a_path_with_a_nul(tmp_path):
    with pytest.raises(DataError, match=r"t.x00\.json': can be no path"):
        load_tokenizer(f"{tmp_path}/t\0.json")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (256, "is 256, bytes alone need 257"),
        (0, "is 0, bytes"),
        (10**12, "is 1000000000000, at most 1048576 is possible"),
    ],
)
def test_vocabulary_sizes_out_of_range(tmp_path, size, message):
    with pytest.raises(DataError, match=f"vocabulary size {message}"):
        train_bpe(TEXTS, size, tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_nobody_would_recognise(tmp_path):
    (tmp_path / "in.txt").write_text("an input")
    with pytest.raises(DataError, match=r"in\.txt: a tokenizer is recognised by the ending \.json"):
        train_bpe(TEXTS, 300, tmp_path / "in.txt")
    assert (tmp_path / "in.txt").read_text() == "an input"


def write_json(path: Path) -> None:
    path.write_text('{"not": "a tokenizer"}')


def write_without_eod(path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(path))


BAD_FILES = {
    "missing": (
        "t.json",
        lambda path: None,
        "No such file or directory. The tokenizer cannot be read: correct the path",
    ),
    "folder": ("t.json", lambda path: path.mkdir(), "Is a directory. The tokenizer cannot be read"),
    "name too long": ("x" * 300 + ".json", lambda path: None, "File name too long. The tokenizer cannot be read"),
    "broken json": ("t.json", write_json, "not a Hugging Face tokenizers file"),
    "broken model": ("t.model", lambda path: path.write_bytes(b"rubbish"), "not a SentencePiece model"),
    "suffix": (
        "t.bin",
        lambda path: None,
        "unknown kind of tokenizer. Give a .*json, a .*model, a .tiktoken file, or 'bytes'",
    ),
    "no eod": ("t.json", write_without_eod, r"no end-of-document token; looked for <\|endoftext\|>, </s>, <eos>. Add"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    name, write, message = BAD_FILES[case]
    write(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: .*{message}"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize(("name", "module"), [("t.json", "tokenizers"), ("t.model", "sentencepiece")])
def test_missing_package_is_named(tmp_path, monkeypatch, name, module):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"needs the package {module}: pip install 'megatron_tf"):
        load_tokenizer(tmp_path / name)
