"""The demo corpus: real text, split by name, the same each time."""

from __future__ import annotations

from itertools import chain

import pytest

from megatron_tf.corpora.corpus import (
    Document,
    python_docstrings,
    python_modules,
    python_topics,
    within_bytes,
    write_corpus,
)
from megatron_tf.data.preparation.records import read_records, read_texts
from megatron_tf.errors import DataError, UserError

pytest.importorskip("zstandard")


def test_modules_are_the_standard_library_without_tests():
    modules = {document.name: document.text for document in python_modules()}
    assert "class ArgumentParser" in modules["module:argparse"]
    assert "module:json" in modules and "module:email.message" in modules
    excluded = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    assert not any(excluded & set(name.removeprefix("module:").split(".")[:-1]) for name in modules)
    assert sum(map(len, modules.values())) > 3_000_000


def test_docstrings_are_english_in_the_order_of_the_source():
    text = next(document.text for document in python_docstrings() if document.name == "module:argparse")
    places = [
        text.index(words) for words in ("Command-line parsing library", "Object for parsing command line strings")
    ]
    assert places == sorted(places) and "import " not in text.partition("\n")[0] and "def __init__" not in text


def test_within_bytes_skips_what_does_not_fit_and_what_is_empty():
    documents = [Document("a", "x" * 6), Document("b", " \n"), Document("c", "ä" * 4), Document("d", "xxxx")]
    assert [document.name for document in within_bytes(documents, 10)] == ["a", "d"]


def test_corpus_is_deterministic_and_split_by_name(tmp_path):
    chosen = list(within_bytes(chain(python_topics(), python_modules()), 1_000_000))
    counts = write_corpus(chosen, tmp_path / "a", "3.x")
    write_corpus(reversed(chosen), tmp_path / "reverse", "3.x")
    write_corpus(chosen, tmp_path / "again", "3.x")
    names = ["LICENSE.txt", "train.jsonl.zst", "validation.jsonl.zst"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert "Python Software Foundation License" in (tmp_path / "a" / "LICENSE.txt").read_text()
    texts = {}
    for split in ("train", "validation"):
        path, reverse = tmp_path / "a" / f"{split}.jsonl.zst", tmp_path / "reverse" / f"{split}.jsonl.zst"
        texts[split] = list(read_texts([path], "text"))
        assert counts[split] == (len(texts[split]), sum(len(text.encode()) for text in texts[split]))
        assert texts[split] == list(read_texts([reverse], "text"))[::-1]
        assert all(b'"name"' in record.payload for record in read_records([path]))
    assert sorted(texts["train"] + texts["validation"]) == sorted(document.text for document in chosen)


def test_too_little_for_two_splits(tmp_path):
    with pytest.raises(DataError, match="no document for (train|validation). Raise the number of megabytes"):
        write_corpus([Document("a", "text")], tmp_path / "out", "3.x")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["train.jsonl.zst", "validation.jsonl.zst", "LICENSE.txt"])
def test_a_folder_in_the_way_is_refused_before_anything_is_written(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name}: is a folder"):
        write_corpus(pytest.fail, tmp_path, "3.x")
    assert [path.name for path in tmp_path.iterdir()] == [name]
