"""From sources to batches: the samples of a step do not depend on the layout; data that do not fit are refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_tf.config.load import load_config
from megatron_tf.config.sections.data import DataSource
from megatron_tf.costs.hardware import Assumptions, find_gpu
from megatron_tf.costs.roofline import step_time
from megatron_tf.data.documents import LossMask
from megatron_tf.data.indexed import HEADER, MAGIC, IndexedWriter
from megatron_tf.data.loader import (
    BatchLoader,
    build_dataset,
    check_tokenizer,
    content_digest,
    fingerprint,
    source_names,
)
from megatron_tf.data.summary import CorpusSummary, write_summary
from megatron_tf.data.tokenizer import tokenizer_fingerprint
from megatron_tf.errors import ConfigError, DataError
from megatron_tf.tasks.classes import IGNORED

PROJECT = Path(__file__).parents[2]
SEQ = 8


def make_source(prefix: Path, num_tokens: int, first: int = 0, weight: float = 1.0, **summary) -> DataSource:
    """Consecutive ids, so that a sample tells where it is from; with a summary when any of its fields is given."""
    with IndexedWriter(prefix, 60_000) as writer:
        writer.add_document(np.arange(first, first + num_tokens))
    if summary:
        fields = dict(  # noqa: C408 - as keywords
            documents=1, tokens=num_tokens, bytes=1, max_token_id=first + num_tokens - 1,
            tokenizer_fingerprint="f" * 64,
            vocab_size=60_000, eod_id=0, files=(), skipped_records=0, empty_documents=0,
        )  # fmt: skip
        write_summary(prefix, CorpusSummary(**{**fields, **summary}))
    return DataSource(path=str(prefix), weight=weight)


@pytest.fixture
def sources(tmp_path) -> tuple[DataSource, ...]:
    return (make_source(tmp_path / "a", 401, 0, 0.75), make_source(tmp_path / "b", 161, 1000, 0.25))


def loader(dataset, micro_batch_size=1, num_micro_batches=1, data_rank=0, data_size=1, vocab_size=60_000):
    return BatchLoader(
        dataset, micro_batch_size=micro_batch_size, num_micro_batches=num_micro_batches, data_rank=data_rank,
        data_size=data_size, vocab_size=vocab_size,
    )  # fmt: skip


def step_rows(dataset, first: int, micro: int, num_micro: int, data_size: int) -> list[list[int]]:
    """The samples of one step over all ranks, in the order of their sample index, as input rows."""
    ranks = [list(loader(dataset, micro, num_micro, r, data_size).step_batches(first)) for r in range(data_size)]
    return [row for m in range(num_micro) for rank in ranks for row in rank[m][0].tolist()]


def test_batches_are_shifted_int64(sources):
    dataset = build_dataset(sources, SEQ, 1, 60_000)
    ((inputs, labels),) = loader(dataset, micro_batch_size=3).step_batches(10)
    assert inputs.shape == labels.shape == (3, SEQ)
    assert inputs.dtype == labels.dtype == torch.int64 and inputs.is_contiguous() and labels.is_contiguous()
    for row in range(3):
        assert inputs[row].tolist() == dataset.sample(10 + row)[:-1].tolist()
        assert labels[row].tolist() == dataset.sample(10 + row)[1:].tolist()


@pytest.mark.parametrize(("micro", "num_micro", "data_size"), [(12, 1, 1), (1, 12, 1), (2, 3, 2), (1, 3, 4), (3, 1, 4)])
def test_a_step_takes_the_same_samples_at_every_layout(sources, micro, num_micro, data_size):
    dataset = build_dataset(sources, SEQ, 1, 60_000)
    expected = [dataset.sample(36 + i)[:-1].tolist() for i in range(12)]
    assert step_rows(dataset, 36, micro, num_micro, data_size) == expected


def test_a_changed_layout_neither_repeats_nor_skips(sources):
    dataset = build_dataset(sources, SEQ, 1, 60_000)
    straight = [row for step in range(8) for row in step_rows(dataset, step * 12, 12, 1, 1)]
    changed = [row for step in range(8) for row in step_rows(dataset, step * 12, *[(2, 3, 2), (1, 3, 4)][step % 2])]
    assert changed == straight


def test_weights_and_epochs(sources):
    dataset = build_dataset(sources, SEQ, 1, 60_000)
    starts = [int(dataset.sample(i)[0]) for i in range(80)]
    assert abs(sum(start >= 1000 for start in starts) - 20) <= 2
    assert len({start for start in starts[:66] if start < 1000}) == sum(start < 1000 for start in starts[:66])
    other_seed = [int(build_dataset(sources, SEQ, 2, 60_000).sample(i)[0]) for i in range(80)]
    assert other_seed != starts


def test_sources_of_equal_size_have_orders_of_their_own(tmp_path):
    twins = (make_source(tmp_path / "a", 401), make_source(tmp_path / "b", 401))
    first, second = build_dataset(twins, SEQ, 1, 60_000).sources
    assert [first.block(i) for i in range(50)] != [second.block(i) for i in range(50)]


def test_id_beyond_vocabulary_in_a_batch_names_the_file(sources, tmp_path):
    dataset = build_dataset(sources, SEQ, 1, 1000)
    with pytest.raises(
        DataError, match=rf"{tmp_path}/b\.bin: .* token id 1\d\d\d is beyond .*model\.vocab_size is 1000"
    ):
        list(loader(dataset, micro_batch_size=20, vocab_size=1000).step_batches(0))


def test_id_beyond_vocabulary_in_a_batch_names_its_place(tmp_path):
    """Data of other writers have no summary: the id shows itself in training only, wherever the shuffle puts it."""
    with IndexedWriter(tmp_path / "a", 60_000) as writer:
        for document in ([1] * 30, [2] * 10 + [777] + [2] * 29, [3] * 30):
            writer.add_document(document)
    dataset = build_dataset([DataSource(path=str(tmp_path / "a"))], SEQ, 5, 500)
    with pytest.raises(DataError) as error:
        list(loader(dataset, micro_batch_size=12, vocab_size=500).step_batches(0))
    assert str(error.value) == (
        f"{tmp_path}/a.bin: document 1, token 10 of it (token 40 of the file): token id 777 is beyond the vocabulary, "
        "model.vocab_size is 500. Raise model.vocab_size to at least 778, or prepare the data again "
        "(tools/preprocess_data.py) with the tokenizer of this model."
    )


def test_id_beyond_vocabulary_in_the_summary_is_found_on_opening(tmp_path):
    source = make_source(tmp_path / "a", 401, max_token_id=400)
    build_dataset([source], SEQ, 1, 401)
    with pytest.raises(DataError, match=r"a\.bin: token id 400 is beyond .* is 400. Raise .* to at least 401"):
        build_dataset([source], SEQ, 1, 400)


def test_negative_id_is_refused(tmp_path):
    source = make_source(tmp_path / "a", 9)
    index = bytearray((tmp_path / "a.idx").read_bytes())
    index[17] = 3  # read as signed
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(b"\xff\xff" * 9)
    with pytest.raises(
        DataError, match=r"a\.bin: document 0, .*: token id -1 is outside the vocabulary, ids are 0 to 99"
    ):
        list(loader(build_dataset([source], SEQ, 1, 100), vocab_size=100).step_batches(0))


def test_all_broken_sources_are_reported_at_once(tmp_path):
    short = make_source(tmp_path / "short", 5)
    foreign = make_source(tmp_path / "foreign", 50, tokens=49)
    with pytest.raises(DataError) as error:
        build_dataset([DataSource(path=str(tmp_path / "none")), short, foreign], SEQ, 1, 60_000)
    message = str(error.value)
    assert "none.bin: no such file" in message
    assert "short.bin: has 5 tokens, one sample needs 9" in message
    assert "foreign.json: describes 1 documents and 49 tokens" in message


def test_summary_of_an_unknown_version(tmp_path):
    source = make_source(tmp_path / "a", 50, eod_id=0)
    content = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps({**content, "format": "megatron_tf corpus 9"}))
    with pytest.raises(DataError, match=r"a\.json: has format 'megatron_tf corpus 9', known is"):
        build_dataset([source], SEQ, 1, 60_000)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_files_that_cannot_be_opened(tmp_path, suffix, monkeypatch):
    """What root may read all the same, another user may not: here the system says no to anybody."""
    source = make_source(tmp_path / "a", 50)

    def refuse(path, *arguments, **options):
        if str(path).endswith(suffix):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    real = open
    monkeypatch.setattr("builtins.open", refuse)
    for use in (lambda: build_dataset([source], SEQ, 1, 60_000), lambda: fingerprint([source], 1)):
        with pytest.raises(DataError, match=rf"a\{suffix}: Permission denied\. Make it readable"):
            use()


def test_sources_of_one_size_and_equal_ends_are_told_apart(tmp_path):
    """By the samples that their fingerprints hold."""
    entries = []
    for name, middle in (("first", 1), ("second", 2)):
        tokens = np.zeros(200_000)
        tokens[80_000:120_000] = middle
        with IndexedWriter(tmp_path / name / "text", 60_000) as writer:
            writer.add_document(tokens)
        entries += fingerprint([DataSource(path=str(tmp_path / name / "text"), weight=1.0)], 1)["sources"]
    assert {key for key in entries[0] if entries[0][key] != entries[1][key]} == {"samples_sha256"}


def test_an_index_of_other_programs_is_looked_at_whole(tmp_path):
    """It may list some documents of a .bin that others share; a summary of ours says who wrote the files."""
    source = make_source(tmp_path / "a", 400)
    index = HEADER.pack(MAGIC, 1, 8, 3, 4) + np.full(3, 100, "<i4").tobytes()
    index += np.array([0, 400, 600], "<i8").tobytes() + np.arange(4, dtype="<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(
        DataError, match=r"a\.idx: sequence 1 begins at byte 400, .* 200 bytes of a\.bin before it are in"
    ):
        build_dataset([source], SEQ, 1, 60_000)


def test_foreign_json_next_to_the_data_is_ignored(tmp_path):
    source = make_source(tmp_path / "a", 50)
    for content in ('{"text": "raw"}', "[]", "5"):
        (tmp_path / "a.json").write_text(content)
        build_dataset([source], SEQ, 1, 60_000)
        check_tokenizer([source], None)


def test_tokenizer_and_data_disagree(tmp_path):
    (tmp_path / "t.json").write_text("tokenizer")
    digest = tokenizer_fingerprint(tmp_path / "t.json")
    good = make_source(tmp_path / "a", 50, tokenizer_fingerprint=digest)
    bad = make_source(tmp_path / "b", 50, tokenizer_fingerprint="0123456789abcdef")
    unknown = make_source(tmp_path / "c", 50)
    check_tokenizer([good, unknown], str(tmp_path / "t.json"))
    check_tokenizer([good, unknown], None)
    with pytest.raises(
        DataError, match=rf"b\.json: .* tokenizer 0123456789ab, data\.tokenizer .*t\.json is {digest[:12]}"
    ):
        check_tokenizer([good, bad, unknown], str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=rf"b\.json: .* tokenizer 0123456789ab, .*/a is {digest[:12]}"):
        check_tokenizer([good, bad], None)
    # null helps where the sources agree with each other
    for sources, helps in (([bad, bad], True), ([good, bad], False)):
        with pytest.raises(DataError) as refused:
            check_tokenizer(sources, str(tmp_path / "t.json"))
        assert ("data.tokenizer=null" in str(refused.value)) == helps
    with pytest.raises(DataError, match=r"none\.json: No such file or directory\. The tokenizer"):
        check_tokenizer([good], str(tmp_path / "none.json"))


def test_fingerprint_tells_data_apart_but_not_places(sources, tmp_path):
    original = fingerprint(sources, 1)
    assert json.loads(json.dumps(original)) == original
    (tmp_path / "moved").mkdir()
    moved = (
        make_source(tmp_path / "moved" / "a", 401, 0, 0.75),
        make_source(tmp_path / "moved" / "b", 161, 1000, 0.25),
    )
    assert fingerprint(moved, 1) == original
    assert fingerprint(sources, 2) != original
    assert fingerprint(sources[::-1], 1) != original
    assert fingerprint((sources[0], DataSource(path=sources[1].path, weight=0.3)), 1) != original
    other_text = make_source(tmp_path / "moved" / "b", 161, 1001, 0.25)
    assert fingerprint((sources[0], other_text), 1) != original


def test_content_of_data_as_a_node_sees_it(tmp_path):
    source = make_source(tmp_path / "a", 50_000, bytes=7)
    found = content_digest(source.path)
    assert found.startswith("50,000 tokens in 1 documents, SHA-256 ")
    (tmp_path / "elsewhere").mkdir()
    assert content_digest(make_source(tmp_path / "elsewhere" / "b", 50_000, bytes=7, files=("other",)).path) == found
    tokens = bytearray((tmp_path / "a.bin").read_bytes())
    tokens[40_000:60_000] = bytes(20_000)  # of the same size, and the same at both ends
    (tmp_path / "a.bin").write_bytes(tokens)
    others = [content_digest(source.path)]
    others += [content_digest(make_source(tmp_path / name, 50_000, **changed).path) for name, changed in
               {"c": {"first": 1, "bytes": 7}, "d": {}, "e": {"bytes": 7, "eod_id": 3}}.items()]  # fmt: skip
    assert len({found, *others}) == 5
    with pytest.raises(DataError, match="nowhere"):
        content_digest(str(tmp_path / "nowhere"))
    assert content_digest(make_source(tmp_path / "short", 2).path).startswith("2 tokens in 1 documents")


def test_places_found_together_are_those_found_one_by_one(sources):
    dataset = build_dataset(sources, SEQ, 1, 60_000)
    samples = [*range(150), 5, 4_000]  # several epochs of both, in any order
    numbers, tokens = dataset.first_tokens(samples)
    for sample, number, token in zip(samples, numbers, tokens):
        assert number == dataset.locate(sample)[0]
        assert (
            dataset.sources[number].dataset.tokens(token, token + SEQ + 1).tolist() == dataset.sample(sample).tolist()
        )


def test_labels_without_a_loss(tmp_path):
    with IndexedWriter(tmp_path / "a", 100) as writer:
        writer.add_document([1, 2, 3, 0, 4, 5, 0, 6, 7])
    dataset = build_dataset([DataSource(path=str(tmp_path / "a"))], SEQ, 1, 100)
    masked = BatchLoader(dataset, micro_batch_size=1, num_micro_batches=1, data_rank=0, data_size=1, vocab_size=100,
                         loss_mask=LossMask(0, None))  # fmt: skip
    ((ids, labels),) = masked.step_batches(0)
    assert ids.tolist() == [[1, 2, 3, 0, 4, 5, 0, 6]]
    assert labels.tolist() == [[2, 3, 0, IGNORED, 5, 0, IGNORED, 7]]


def test_sources_of_samples(sources):
    dataset = build_dataset(sources, SEQ, 1, 60_000)
    for rank in range(2):
        two = loader(dataset, micro_batch_size=2, num_micro_batches=3, data_rank=rank, data_size=2)
        firsts = [row[0] for ids, _ in two.step_batches(24) for row in ids.tolist()]
        assert two.sample_sources(24) == [int(first >= 1000) for first in firsts]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data/owt_validation"], ["owt_validation"]),
        (["data/owt/val", "data/pile/val", "wiki"], ["owt_val", "pile_val", "wiki"]),
        (["val", "a/val", "/a/val"], ["val", "a_val", "a_val_2"]),
        (["x/val", "x/val", "x/val"], ["x_val", "x_val_2", "x_val_3"]),
        (["data/a b%c", "data/a/b"], ["a_b_c", "b"]),
        (["data/a b", "data/a%b"], ["data_a_b", "data_a_b_2"]),
        (["data/é", "/"], ["data", "source"]),
    ],
)
def test_names_of_sources(paths, names):
    assert source_names([DataSource(path=path) for path in paths]) == names


@pytest.mark.timing
def test_loading_is_far_ahead_of_the_fastest_configuration(tmp_path):
    """At least 50 times what a step on one B200 would take, by the estimate of tools/plan_run.py."""
    with IndexedWriter(tmp_path / "a", 50_000) as writer:
        tokens = np.random.default_rng(0).integers(0, 50_000, 1_000_000)
        for _ in range(50):
            writer.add_document(tokens)
    consumed, fastest = max(consumption(path) for path in (PROJECT / "configs").glob("*.yml"))
    config = load_config(PROJECT / "configs" / fastest)
    dataset = build_dataset([DataSource(path=str(tmp_path / "a"))], config.model.seq_length, 1, 50_000)
    one = loader(dataset, config.training.micro_batch_size, 1024 // config.training.micro_batch_size)
    rates = []
    for attempt in range(5):
        began = time.perf_counter()
        samples = sum(len(ids) for ids, _ in one.step_batches(attempt * 1024))
        rates.append(samples / (time.perf_counter() - began))
    print(
        f"{fastest}: {max(rates):,.0f} samples/s loaded, {consumed:,.0f} consumed: {max(rates) / consumed:,.0f} times"
    )
    assert max(rates) > 50 * consumed


def consumption(path: Path) -> tuple[float, str]:
    """Samples a second of the configuration on one B200, and its file; 0 for chains, whose stages have files too."""
    try:
        config = load_config(path, ["parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false"])
    except ConfigError:
        return 0.0, path.name
    time = step_time(config, 1, find_gpu("b200"), Assumptions())
    return time.tokens_per_second / config.model.seq_length, path.name
