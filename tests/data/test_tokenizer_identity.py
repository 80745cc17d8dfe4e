"""A tokenizer's file that is written anew is the same tokenizer as long as it gives the same tokens."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_tf.config.sections.data import DataSource
from megatron_tf.data.loader import check_tokenizer
from megatron_tf.data.preparation.bpe import train_bpe
from megatron_tf.data.preparation.preprocess import PreprocessSettings, preprocess
from megatron_tf.data.preparation.progress import ProgressDisplay
from megatron_tf.data.summary import read_summary
from megatron_tf.data.tokenizer_identity import TokenizerIdentity, tokenizer_identity
from megatron_tf.errors import DataError

TEXT = ["the cat sat on the mat, and Ångström ate a naïve façade " * 20]
END = AddedToken("<|endoftext|>", special=True)


def bpe(path: Path) -> Tokenizer:
    train_bpe(TEXT, 290, path)
    return Tokenizer.from_file(str(path))


def unigram(path: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=60, special_tokens=[END], show_progress=False)
    )
    tokenizer.save(str(path))
    return tokenizer


def word_piece(path: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [END, AddedToken("[UNK]", special=True)]
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(path))
    return tokenizer


@pytest.fixture(params=[bpe, unigram, word_piece], ids=lambda made: made.__name__)
def file(request, tmp_path) -> Path:
    request.param(tmp_path / "t.json")
    return tmp_path / "t.json"


def anew(file: Path, content: str | bytes) -> TokenizerIdentity:
    again = file.with_name("again.json")
    again.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tokenizer_identity(again)


def test_the_same_tokens_in_another_file(file):
    own, text = tokenizer_identity(file), file.read_text(encoding="utf-8")
    described = json.loads(text)
    used = Tokenizer.from_file(str(file))
    used.enable_padding(length=8)
    used.enable_truncation(4)
    used.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    used.save(str(file.with_name("used.json")))
    spellings = [
        json.dumps(described, ensure_ascii=True),
        json.dumps(described, indent=4, ensure_ascii=False, sort_keys=True),
        text.replace("\n", "\r\n"),
        b"\xef\xbb\xbf" + text.encode(),
        json.dumps({**described, "added_tokens": described["added_tokens"][::-1]}),
        file.with_name("used.json").read_text(encoding="utf-8"),
    ]
    for spelling in spellings:
        other = anew(file, spelling)
        assert other.file != own.file or spelling == text
        assert other.same(own) and own.same(other)


def test_as_earlier_versions_of_the_library_wrote_it(tmp_path):
    tokenizer = bpe(tmp_path / "t.json")
    described = json.loads(tokenizer.to_str())
    model, pre = described["model"], described["pre_tokenizer"]
    for new in ("type", "byte_fallback", "ignore_merges"):
        del model[new]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    del pre["use_regex"]
    assert anew(tmp_path / "t.json", json.dumps(described)).same(tokenizer_identity(tmp_path / "t.json"))
    unigram(tmp_path / "u.json")
    described = json.loads((tmp_path / "u.json").read_text())
    old = {"type": "Metaspace", "replacement": "▁", "str_rep": "▁", "add_prefix_space": True}
    described["pre_tokenizer"]["pretokenizers"] = [{"type": "Punctuation"}, old]
    assert anew(tmp_path / "u.json", json.dumps(described)).same(tokenizer_identity(tmp_path / "u.json"))


def change_vocabulary(described):
    vocabulary = described["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary[-1], vocabulary[-2] = vocabulary[-2], vocabulary[-1]
    else:
        one, other = list(vocabulary)[-2:]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def change_merges(described):
    described["model"].update(merges=described["model"].get("merges", [["a", "b"]])[:-1], max_input_chars_per_word=5)


DIFFERENT = {
    "vocabulary": change_vocabulary,
    "merges": change_merges,
    "normalizer": lambda described: described.update(normalizer={"type": "Lowercase"}),
    "pre-tokenizer": lambda described: described.update(pre_tokenizer={"type": "WhitespaceSplit"}),
    "added token": lambda described: described["added_tokens"][0].update(lstrip=True),
    "another added token": lambda described: described["added_tokens"].append(
        {**described["added_tokens"][0], "id": 500, "content": "the"}
    ),
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_other_tokens_are_another_tokenizer(file, change):
    described = json.loads(file.read_text(encoding="utf-8"))
    DIFFERENT[change](described)
    assert not anew(file, json.dumps(described)).same(tokenizer_identity(file))


@pytest.mark.parametrize("content", ["", "[]", "5", "{", '{"model": 5}', "[" * 100_000])
def test_what_is_no_tokenizer_is_itself_alone(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    own = tokenizer_identity(tmp_path / "t.json")
    assert own.same(own) and not own.same(anew(tmp_path / "t.json", content + " "))


def test_line_ends_of_a_rank_file(tmp_path):
    spec = json.dumps({"pat_str": r"\S+|\s+", "special_tokens": {"<|endoftext|>": 2}})
    contents = {"a": b"YQ== 0\nYg== 1\n", "b": b"YQ== 0\r\nYg== 1", "c": b"Yg== 0\nYQ== 1\n"}
    identities = {}
    for name, content in contents.items():
        (tmp_path / f"{name}.tiktoken").write_bytes(content)
        (tmp_path / f"{name}.tiktoken.json").write_text(spec)
        identities[name] = tokenizer_identity(tmp_path / f"{name}.tiktoken")
    assert identities["a"].same(identities["b"]) and not identities["a"].same(identities["c"])
    assert tokenizer_identity("bytes").same(tokenizer_identity("bytes"))
    assert not tokenizer_identity("bytes").same(identities["a"])


def test_data_fit_a_file_that_was_written_anew(tmp_path):
    bpe(tmp_path / "t.json")
    (tmp_path / "text.txt").write_text("the cat sat")
    settings = PreprocessSettings(
        inputs=(str(tmp_path / "text.txt"),), output_prefix=str(tmp_path / "data"), tokenizer=str(tmp_path / "t.json")
    )
    preprocess(settings, ProgressDisplay(io.StringIO()))
    described = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    anew(tmp_path / "t.json", json.dumps(described))
    source = DataSource(path=str(tmp_path / "data"))
    check_tokenizer([source], str(tmp_path / "again.json"))

    summary = json.loads((tmp_path / "data.json").read_text())
    del summary["tokenizer_content"]  # as earlier versions wrote it
    (tmp_path / "data.json").write_text(json.dumps(summary))
    assert read_summary(source.path).tokenizer_content == ""
    check_tokenizer([source], str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"made with tokenizer .* prepare the data again. Where .* data.tokenizer=null"):
        check_tokenizer([source], str(tmp_path / "again.json"))
