"""Both kinds of tokenizer behind the protocol, and the trained one."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_tf.data.preparation.bpe import train_bpe
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


@pytest.mark.parametrize("model", ["BPE", "Unigram"])
def test_sampling_that_a_file_asks_for_is_switched_off(bpe, tmp_path, model):
    tokenizers = pytest.importorskip("tokenizers")
    text = "the fox " * 200
    content = json.loads(bpe.read_text())
    content["model"]["dropout"] = 0.3
    if model == "Unigram":
        pieces = [("<unk>", 0.0), ("</s>", 0.0), *((piece, -1.0) for piece in ("a", "ab", "b", "aba", "▁"))]
        content = json.loads(tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0)).to_str())
        content["model"] |= {"alpha": 0.1, "nbest_size": 5}
        text = "abab" * 200
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    found = [tokenizer.encode_batch([text, text]) for _ in range(3)]
    assert found[0][0] == found[0][1] and found[0] == found[1] == found[2]
    if model == "BPE":
        assert found[0][0] == load_tokenizer(bpe).encode_batch([text])[0]


def test_a_byte_order_mark_changes_nothing_but_the_fingerprint(bpe, tmp_path):
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf" + bpe.read_bytes())
    assert load_tokenizer(tmp_path / "t.json").encode_batch(TEXTS) == load_tokenizer(bpe).encode_batch(TEXTS)


def with_special_tokens(path: Path, *tokens: str, plain: tuple[str, ...] = ()) -> Path:
    """A tokenizers file of a few words, of which `plain` are tokens that are not special."""
    tokenizers = pytest.importorskip("tokenizers")
    names = ["a", *plain, *tokens]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.add_special_tokens(list(tokens))
    tokenizer.save(str(path))
    return path


EOD_CASES = {
    "of Llama 3": (("<|begin_of_text|>", "<|end_of_text|>"), (), None, 2),
    "of DeepSeek": (("<｜end▁of▁sentence｜>",), (), None, 1),
    "of BERT": (("[CLS]", "[SEP]"), (), None, 2),
    "a special one before a word of such a name": (("<eos>",), ("</s>",), None, 2),
    "a word of such a name": ((), ("</s>",), None, 1),
    "named": (("</s>", "<|endoftext|>"), (), "</s>", 1),
    "named, of a name of its own": (("<end>", "<|endoftext|>"), (), "<end>", 1),
    "by its id": (("</s>", "<|endoftext|>"), (), 2, 2),
}


@pytest.mark.parametrize("case", EOD_CASES)
def test_the_token_that_ends_a_document(tmp_path, case):
    special, plain, eod, number = EOD_CASES[case]
    assert load_tokenizer(with_special_tokens(tmp_path / "t.json", *special, plain=plain), eod).eod_id == number


EOD_MISTAKES = {
    "several": (("</s>", "<|endoftext|>"), None,
                r"several .*: <\|endoftext\|> \(id 2\), </s> \(id 1\)\. Name .* --eod-token"),
    "none": (("<end>",), None, r"has no end-of-document token under a usual name .* Its special tokens are <end>\."),
    "a name that it lacks": (("<end>",), "</s>",
                             r"has no token '</s>' to end documents with. Its special tokens are <end>"),
    "an id that it lacks": (("<end>",), 7, r"has no token of id 7, with which documents end .* Correct data.eod_id"),
}  # fmt: skip


@pytest.mark.parametrize("case", EOD_MISTAKES)
def test_an_end_of_documents_that_is_not_clear(tmp_path, case):
    special, eod, message = EOD_MISTAKES[case]
    with pytest.raises(DataError, match=rf"t\.json: {message}"):
        load_tokenizer(with_special_tokens(tmp_path / "t.json", *special), eod)


def test_bytes_have_one_end_of_documents():
    assert load_tokenizer("bytes", "<|endoftext|>").eod_id == load_tokenizer("bytes", 256).eod_id == 256
    with pytest.raises(DataError, match="bytes: has no token '</s>'"):
        load_tokenizer("bytes", "</s>")


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
    code = "import sys; from pathlib import Path; from megatron_tf.data.preparation.bpe import train_bpe; "
    code += f"train_bpe({TEXTS!r}, 300, Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "again.json")], check=True, cwd=Path(__file__).parents[2]
    )
    assert (tmp_path / "again.json").read_bytes() == bpe.read_bytes()


def test_too_little_text_gives_a_smaller_vocabulary(tmp_path):
    assert train_bpe(["ab"], 4096, tmp_path / "t.json") == 258


def test_a_path_with_a_nul(tmp_path):
    with pytest.raises(DataError, match=r"t.x00\.json': cannot be a path"):
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


def write_vocabulary(vocabulary: dict) -> Callable[[Path], None]:
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    return lambda path: path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def write_huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a hole


BAD_FILES = {
    "missing": (
        "t.json",
        lambda path: None,
        "No such file or directory. The tokenizer cannot be read: correct the path",
    ),
    "folder": (
        "t.json",
        lambda path: path.mkdir(),
        "Is a directory. The tokenizer cannot be read",
    ),
    "name too long": ("x" * 300 + ".json", lambda path: None, "File name too long. The tokenizer cannot be read"),
    "broken json": ("t.json", write_json, "not a Hugging Face tokenizers file"),
    "broken model": ("t.model", lambda path: path.write_bytes(b"rubbish"), "not a SentencePiece model"),
    "suffix": (
        "t.bin",
        lambda path: None,
        "unknown kind of tokenizer. Give a .*json, a .*model, a .tiktoken file, or 'bytes'",
    ),
    "no eod": ("t.json", write_without_eod, r"no end-of-document token under a usual name \(<\|endoftext\|>, </s>, "),
    "brackets": ("t.json", lambda path: path.write_text("[" * 400_000), "not a Hugging Face tokenizers file"),
    "huge": ("t.json", write_huge, "is larger than 268,435,456 bytes, which no such file is"),
    "huge model": ("t.model", write_huge, "is larger than 268,435,456 bytes"),
    "fifo": ("t.json", os.mkfifo, "is a FIFO, where a file is expected"),
    "device": ("t.model", lambda path: path.symlink_to("/dev/zero"), "is a device, where a file is expected"),
    "no token": ("t.json", write_vocabulary({}), "has no token. Give a tokenizer that was trained"),
    "ids beyond int32": (
        "t.json",
        write_vocabulary({"</s>": 2**32 - 1, "a": 0}),
        "token '</s>' has id 4294967295, ids",
    ),
    "ids beyond u32": ("t.json", write_vocabulary({"</s>": 2**70}), "not a Hugging Face tokenizers file"),
    "two of one id": (
        "t.json",
        write_vocabulary({"</s>": 1, "b": 1}),
        "'</s>' and 'b' both have id 1, so text could end",
    ),
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
