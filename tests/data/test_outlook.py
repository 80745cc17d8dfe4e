"""What is known about a run's data before its first step."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from images import image_config, made_up, write_images

from megatron_tf.config.schema import RunConfig
from megatron_tf.data.indexed import IndexedWriter
from megatron_tf.data.outlook import data_warnings, describe_passes, evaluation_warning, passes_over, tokenizer_problem
from megatron_tf.data.summary import CorpusSummary, write_summary
from megatron_tf.errors import DataError

SEQ_LENGTH = 10


def write(prefix: Path, tokens: int, first: int = 0, **summary) -> Path:
    """Data of ascending ids; with a summary when there is something to say in it."""
    with IndexedWriter(prefix, 60_000) as writer:
        writer.add_document(np.arange(first, first + tokens))
    if summary:
        values = {
            "documents": 1, "tokens": tokens, "bytes": 1, "max_token_id": first + tokens - 1, "skipped_records": 0,
            "tokenizer_fingerprint": "f" * 64, "vocab_size": 300, "eod_id": 0, "files": (), "empty_documents": 0,
        }  # fmt: skip
        write_summary(prefix, CorpusSummary(**{**values, **summary}))
    return prefix


def config(train, validation=(), *, vocab_size: int = 300, tokenizer: str | None = None, samples: int = 2) -> RunConfig:
    """`train`: paths, or paths and weights."""
    sources = tuple({"path": str(s)} if isinstance(s, Path) else {"path": str(s[0]), "weight": s[1]} for s in train)
    return RunConfig.model_validate(
        {
            "run": {"dir": "runs/x"},
            "model": {
                "num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": SEQ_LENGTH,
                "vocab_size": vocab_size, "parameter_tokens": {"qkv": 4, "proj": 4, "ffn": 8},
            },
            "training": {"train_steps": 1, "global_batch_size": 4, "micro_batch_size": 1},
            "optimizer": {"lr": 1e-3},
            "data": {
                "train": sources, "validation": tuple({"path": str(path)} for path in validation),
                "tokenizer": tokenizer,
            },
            "evaluation": {"samples": samples},
        }
    )  # fmt: skip


def warnings(own: RunConfig, samples: int = 1) -> list[str]:
    return data_warnings(own, passes_over(own, samples))


def test_passes_follow_from_samples_and_weights(tmp_path):
    small, large = write(tmp_path / "small", 101), write(tmp_path / "large", 1001)
    assert [(p.path, p.tokens, p.passes) for p in passes_over(config([small]), 5)] == [(str(small), 101, 0.5)]
    found = passes_over(config([(small, 3.0), (large, 1.0)]), 400)
    assert [source.passes for source in found] == [30.0, 1.0]
    assert describe_passes(found) == f"1,102 tokens in 2 sources: {small} 30 passes, {large} 1 pass"
    assert describe_passes(found[:1]) == f"101 tokens in {small}, 30 passes over them"
    many = passes_over(config([write(tmp_path / f"s{number}", 101) for number in range(7)]), 7 * 1234)
    assert describe_passes(many).count(" 123 passes") == 4 and describe_passes(many).endswith(", 3 more less often")
    with pytest.raises(DataError, match="none.bin: no such file"):
        passes_over(config([tmp_path / "none"]), 1)


def test_images_are_counted_as_images(tmp_path):
    prefix = write_images(tmp_path / "images", *made_up(9), tuple("abcde"))
    own = image_config(data={"train": [{"path": str(prefix)}]})
    found = passes_over(own, 36)
    assert describe_passes(found) == f"9 images in {prefix}, 4 passes over them" and not data_warnings(own, found)


def test_many_passes_are_a_warning(tmp_path):
    small, large = write(tmp_path / "small", 101), write(tmp_path / "large", 1001)
    assert warnings(config([small]), 40) == []
    (warning,) = warnings(config([small, large]), 100)
    assert warning.startswith(f"data.train: the run makes 5 passes over {small} (101 tokens). Beyond 4 passes")


def held(tmp_path: Path, case: str) -> Path:
    """Validation data that stand in some relation to the training data `tmp_path`/x_train."""
    inputs = {"files": ("a.jsonl", "b.jsonl")}
    train = write(tmp_path / "x_train", 500, **inputs)
    other = tmp_path / "other"
    if case == "same name":
        return train
    if case == "another way to it":
        (tmp_path / "sub").mkdir()
        return tmp_path / "sub" / ".." / "x_train"
    if case == "link":
        for ending in (".bin", ".idx"):
            os.symlink(f"{train}{ending}", f"{other}{ending}")
    if case == "copy":
        for ending in (".bin", ".idx"):
            shutil.copyfile(f"{train}{ending}", f"{other}{ending}")
    if case == "same inputs":
        write(other, 400, first=7, files=("b.jsonl",))
    if case == "other inputs":
        write(other, 500, first=7, files=("c.jsonl",))
    if case == "no summary":
        write(other, 500, first=7)
    if case == "its own half":
        return write(tmp_path / "x_validation", 50, first=7, **inputs)
    return other


SAME = {
    "same name": "it is in data.train under the same name",
    "another way to it": "it is in data.train under the same name",
    "link": "x_train.bin is the same file",
    "copy": "x_train.bin has the same content",
    "same inputs": "x_train.json names b.jsonl as an input, and so does",
    "other inputs": None,
    "no summary": None,
    "its own half": None,
}


@pytest.mark.parametrize("case", SAME)
def test_validation_data_that_are_training_data(tmp_path, case):
    validation = held(tmp_path, case)
    found = warnings(config([write(tmp_path / "more", 300, first=11), tmp_path / "x_train"], [validation]))
    if SAME[case] is None:
        assert found == []
    else:
        (warning,) = found
        assert warning.startswith(f"data.validation: {validation} is training data too (")
        assert str(SAME[case]) in warning and "--validation-fraction" in warning


def test_more_samples_than_there_are(tmp_path):
    (warning,) = warnings(config([write(tmp_path / "a", 500)], [write(tmp_path / "b", 31, first=9)], samples=9))
    assert warning.startswith("evaluation.samples: 9, but the validation data has 3 samples")


def test_a_source_that_an_evaluation_begins_again(tmp_path):
    """By weight, although there are samples enough in all."""
    long, short = write(tmp_path / "b", 201, first=9), write(tmp_path / "c", 41, first=7)
    assert warnings(config([write(tmp_path / "a", 500)], [long, short], samples=8)) == []
    (warning,) = warnings(config([tmp_path / "a"], [long, short], samples=9))
    assert "evaluation.samples: 9, which are 12 in whole batches of 4, but" in warning
    assert f"all of {short}, 4 samples, is read once after 8: more of it counts again. Set it to at most 8" in warning
    tiny = write(tmp_path / "d", 11, first=5)
    (warning,) = warnings(config([tmp_path / "a"], [long, tiny], samples=1))
    assert f"all of {tiny}, 1 sample, is read once after 2" in warning
    assert "Set training.global_batch_size to at most 2, or the weights by the sizes." in warning


def test_ends_of_documents_that_differ(tmp_path):
    sources = [write(tmp_path / "a", 500, eod_id=0), write(tmp_path / "b", 500, first=3, eod_id=2)]
    (warning,) = warnings(config(sources))
    assert warning.startswith(
        f"data: documents end with different tokens: 0 in {sources[0]}, 2 in {sources[1]}. Prepare"
    )


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path):
    data = write(tmp_path / "a", 50, vocab_size=403)
    problem = tokenizer_problem(config([data], vocab_size=400, tokenizer="t.json"))
    assert problem == (
        "model.vocab_size: 400, but data.tokenizer t.json has 403 tokens, and some of them would have no row in the "
        "model. Set model.vocab_size to at least 403."
    )
    assert tokenizer_problem(config([data], vocab_size=403, tokenizer="t.json")) is None
    own = config([data], vocab_size=400)
    assert tokenizer_problem(own) is None
    (warning,) = warnings(own)
    assert warning.startswith("model.vocab_size: 400, but the data were made with a tokenizer of 403 tokens")


def test_a_tokenizer_for_data_of_other_programs(tmp_path):
    data = write(tmp_path / "a", 50)
    problem = tokenizer_problem(config([data], vocab_size=256, tokenizer="bytes"))
    assert problem is not None and "data.tokenizer bytes has 257 tokens" in problem
    assert tokenizer_problem(config([data], vocab_size=257, tokenizer="bytes")) is None
    # Training does without the tokenizer, and says itself what it cannot read.
    assert tokenizer_problem(config([data], vocab_size=5, tokenizer=str(tmp_path / "none.json"))) is None


def test_a_tokenizer_of_no_known_kind(tmp_path):
    data, other = write(tmp_path / "a", 50), write(tmp_path / "b", 50, vocab_size=403)
    path = tmp_path / "tokenizer.txt"
    missing = config([data], vocab_size=403, tokenizer=str(path))
    # which is said of the machine
    assert tokenizer_problem(missing) is None
    path.write_text("{}")
    for prefix in (data, other):
        assert tokenizer_problem(config([prefix], vocab_size=403, tokenizer=str(path))) == (
            f"data.tokenizer: {path}: unknown kind of tokenizer. Give a Hugging Face tokenizers .json, a SentencePiece "
            ".model, a .tiktoken file, or 'bytes'."
        )


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a.json", "not a Hugging Face tokenizers file"),
        ("a.model", "not a SentencePiece model"),
        ("a.tiktoken", "it is not known how this encoding splits text"),
        ("cl100k_base.tiktoken", "has SHA-256"),
        ("tiktoken:none", "unknown encoding"),
    ],
)
def test_a_tokenizer_that_is_none(tmp_path, name, problem):
    if name.endswith(".model"):
        pytest.importorskip("sentencepiece")
    path = name if name.startswith("tiktoken:") else str(tmp_path / name)
    if path != name:
        Path(path).write_text("[]")
    found = tokenizer_problem(config([write(tmp_path / "b", 50)], vocab_size=403, tokenizer=path))
    assert found is not None and found.startswith(f"data.tokenizer: {path}: {problem}")


def test_an_evaluation_within_the_validation_data_is_silent():
    assert evaluation_warning(64, 64) is None


def test_an_evaluation_that_goes_round_its_data():
    assert evaluation_warning(10_000, 40) == (
        "evaluation.samples: 10,000, but the validation data has 40 samples: each evaluation goes round it 250.0 times "
        "and takes as much longer. Set it to at most 40."
    )
    assert "has 1 sample:" in evaluation_warning(2, 1)
