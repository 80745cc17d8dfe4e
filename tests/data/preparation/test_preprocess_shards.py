"""A preparation that several runs share, or that goes on: parts are kept, and the outcome is that of one run."""

from __future__ import annotations

import io
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from preparing import TEXTS, documents, run, shards, token_files, write_jsonl

from megatron_tf.data.indexed import IndexedDataset
from megatron_tf.data.preparation import work as module
from megatron_tf.data.preparation.parts import Part
from megatron_tf.data.preparation.preprocess import PreprocessSettings, merge_shards, preprocess
from megatron_tf.data.preparation.progress import ProgressDisplay
from megatron_tf.data.preparation.records import read_records
from megatron_tf.data.summary import read_summary
from megatron_tf.durable import file_lock
from megatron_tf.errors import DataError


def share(tokenizer: Path, inputs: Path, prefix: Path, index: int, number: int, **options) -> tuple[dict, str]:
    """Summaries and what was shown by one of `number` runs that share the work."""
    settings = PreprocessSettings(
        (str(inputs),), str(tokenizer), str(prefix), shard_index=index, num_shards=number, **options
    )
    stream = io.StringIO()
    return preprocess(settings, ProgressDisplay(stream)), stream.getvalue()


def test_shards_in_any_order_give_what_one_run_gives(tokenizer, tmp_path):
    inputs = shards(tmp_path / "in")
    run(tokenizer, inputs, tmp_path / "whole")
    for index in (2, 0):
        summaries, shown = share(tokenizer, inputs, tmp_path / "x", index, 3)
        assert summaries == {} and "of 6 parts are still to be prepared, the first from" in shown
        assert not (tmp_path / "x.bin").exists()
    summaries, _ = share(tokenizer, inputs, tmp_path / "x", 1, 3)  # the last one merges
    assert token_files(tmp_path / "x") == token_files(tmp_path / "whole")
    assert summaries[str(tmp_path / "x")] == read_summary(tmp_path / "whole") == read_summary(tmp_path / "x")
    assert not (tmp_path / "x.parts").exists()


def test_merging_too_early_names_what_is_missing(tokenizer, tmp_path):
    inputs = shards(tmp_path / "in")
    settings = PreprocessSettings((str(inputs),), str(tokenizer), str(tmp_path / "x"))
    with pytest.raises(DataError, match=r"x\.parts: 6 of 6 parts are still to be prepared, the first from .*0\.jsonl"):
        merge_shards(settings, ProgressDisplay(io.StringIO()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    share(tokenizer, inputs, tmp_path / "x", 0, 2)
    with pytest.raises(DataError, match=r"3 of 6 parts are still .*1\.jsonl"):
        merge_shards(settings, ProgressDisplay(io.StringIO()))
    for index in (1, 0):  # the merging job that comes after does nothing
        share(tokenizer, inputs, tmp_path / "x", index, 2)
    before = (tmp_path / "x.bin").stat().st_mtime_ns
    assert merge_shards(settings, ProgressDisplay(io.StringIO())) == {str(tmp_path / "x"): read_summary(tmp_path / "x")}
    assert (tmp_path / "x.bin").stat().st_mtime_ns == before and not (tmp_path / "x.parts").exists()


def test_finished_parts_are_not_done_again(tokenizer, tmp_path, monkeypatch):
    """A bad record stops the run in the fourth file; the first three are kept, the fourth is done anew."""
    inputs = shards(tmp_path / "in")
    good = (tmp_path / "in" / "3.jsonl").read_bytes()
    (tmp_path / "in" / "3.jsonl").write_bytes(good + b"{")
    with pytest.raises(DataError, match=r"3\.jsonl:251: invalid JSON .*--on-error skip"):
        run(tokenizer, inputs, tmp_path / "x")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x.parts").iterdir()}
    assert len(kept) == 9 and not (tmp_path / "x.bin").exists()
    (tmp_path / "in" / "3.jsonl").write_bytes(good)
    read = []
    monkeypatch.setattr(
        "megatron_tf.data.preparation.preprocess.read_records",
        lambda paths, **rest: read.extend(path.name for path in paths) or read_records(paths, **rest),
    )
    summaries, shown = share(tokenizer, inputs, tmp_path / "x", 0, 1)
    assert read == ["3.jsonl", "4.jsonl", "5.jsonl"] and "finished before: 3 of 6 parts" in shown
    run(tokenizer, inputs, tmp_path / "whole")
    assert token_files(tmp_path / "x") == token_files(tmp_path / "whole")
    read.clear()
    again, shown = share(tokenizer, inputs, tmp_path / "x", 0, 1)
    assert (again, read) == (summaries, []) and "was prepared from the same files" in shown


def test_the_last_part_is_finished_while_another_run_has_the_lock_of_the_merge(tokenizer, tmp_path, monkeypatch):
    """It has looked at the parts already, and the run that finished the last one finds the lock taken."""
    inputs, others = shards(tmp_path / "in", 2), iter([1])

    @contextmanager
    def lock(path, patience_seconds):
        with file_lock(path, 0) as held:
            yield held
            for index in others:
                summaries, shown = share(tokenizer, inputs, tmp_path / "x", index, 2)
                assert summaries == {} and "another process is merging the parts" in shown

    monkeypatch.setattr(module, "file_lock", lock)
    summaries, _ = share(tokenizer, inputs, tmp_path / "x", 0, 2)
    assert summaries[str(tmp_path / "x")] == read_summary(tmp_path / "x")
    assert not (tmp_path / "x.parts").exists()


@pytest.fixture
def unmerged(tokenizer, tmp_path, monkeypatch):
    """The inputs of a preparation whose parts are all finished, and which is not merged yet."""
    inputs = shards(tmp_path / "in", 2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_merge_if_possible", lambda *arguments, **options: {})
        run(tokenizer, inputs, tmp_path / "x")
    return inputs


def test_a_run_that_starts_while_another_one_merges_does_nothing_again(tokenizer, tmp_path, unmerged, monkeypatch):
    """The output was not there when the run looked for it, and the parts were gone when it looked for these."""
    read, others = [], iter([None])

    def finished(work):
        found = original(work)
        for _ in others:
            module._merge_if_possible(work, ProgressDisplay(io.StringIO()), insist=True)
        return found

    original = module._finished
    monkeypatch.setattr(module, "_finished", finished)
    monkeypatch.setattr(
        "megatron_tf.data.preparation.preprocess.read_records",
        lambda paths, **rest: read.extend(path.name for path in paths) or read_records(paths, **rest),
    )
    summaries = run(tokenizer, unmerged, tmp_path / "x")
    assert summaries == {str(tmp_path / "x"): read_summary(tmp_path / "x")} and read == []


def test_the_output_of_a_merge_that_ends_just_now_is_our_own(tokenizer, tmp_path, unmerged, monkeypatch):
    """The report was not there, and the parts were gone a moment later."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(module, "write_report", lambda *arguments: 1 / 0)
        run(tokenizer, unmerged, tmp_path / "x")
    assert (tmp_path / "x.idx").exists() and not (tmp_path / "x.report.json").exists()

    def check(work):
        others = iter([None])

        def then_merged(look):
            def looked(*arguments):
                found = look(*arguments)
                for _ in others:
                    module._merge_if_possible(work, ProgressDisplay(io.StringIO()), insist=True)
                return found

            return looked

        with monkeypatch.context() as patch:
            patch.setattr(Part, "report", then_merged(Part.report))
            patch.setattr(module, "read_report", then_merged(module.read_report))
            original(work)
        assert (tmp_path / "x.report.json").exists()

    original = module.check_others
    monkeypatch.setattr(module, "check_others", check)
    summaries = run(tokenizer, unmerged, tmp_path / "x")
    assert summaries == {str(tmp_path / "x"): read_summary(tmp_path / "x")}


def test_a_finished_preparation_is_done_again_when_something_changed(tokenizer, tmp_path):
    inputs = shards(tmp_path / "in", 2)
    run(tokenizer, inputs, tmp_path / "x")
    write_jsonl(tmp_path / "in" / "1.jsonl", ["other"])
    with pytest.raises(DataError, match=r"x\.bin: is there already .* --replace"):
        run(tokenizer, inputs, tmp_path / "x")
    assert IndexedDataset(tmp_path / "x").num_documents == 1500
    assert run(tokenizer, inputs, tmp_path / "x", replace=True)[str(tmp_path / "x")].documents == 751
    Path(f"{tmp_path}/x.bin").write_bytes(b"")
    assert run(tokenizer, inputs, tmp_path / "x")[str(tmp_path / "x")].documents == 751
    assert documents(tmp_path / "x", tokenizer)[-1] == "other"


def test_data_of_another_program_are_not_replaced(tokenizer, corpus, tmp_path):
    (tmp_path / "x.idx").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"x\.idx: is there already"):
        run(tokenizer, corpus, tmp_path / "x")
    assert (tmp_path / "x.idx").read_bytes() == b"precious" and not (tmp_path / "x.parts").exists()


def test_a_preparation_keeps_the_parts_of_another_with_its_prefix(tokenizer, tmp_path):
    inputs, other = shards(tmp_path / "in", 4), shards(tmp_path / "other", 1)
    assert not run(tokenizer, inputs, tmp_path / "x", num_shards=2, shard_index=0)
    run(tokenizer, other, tmp_path / "x")
    with pytest.raises(DataError, match="is there already"):
        run(tokenizer, inputs, tmp_path / "x", num_shards=2, shard_index=1)
    shards_of_both = {"num_shards": 2, "shard_index": 1, "replace": True}
    assert run(tokenizer, inputs, tmp_path / "x", **shards_of_both)[str(tmp_path / "x")].documents == 1500
    assert not (tmp_path / "x.parts").exists()


def test_a_damaged_part_is_made_again(tokenizer, tmp_path):
    inputs = shards(tmp_path / "in", 4)
    run(tokenizer, inputs, tmp_path / "whole")
    run(tokenizer, inputs, tmp_path / "x", num_shards=2, shard_index=0)
    damaged = next((tmp_path / "x.parts").glob("*.bin"))
    os.truncate(damaged, damaged.stat().st_size - 2)
    run(tokenizer, inputs, tmp_path / "x")
    assert (tmp_path / "x.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_a_glob_does_not_match_what_the_preparation_itself_writes(tokenizer, tmp_path):
    """Neither its parts when it was cut off, nor its output when it is asked for again."""
    write_jsonl(tmp_path / "in" / "a.json", TEXTS[:10])
    write_jsonl(tmp_path / "in" / "b.jsonl", TEXTS[10:20])
    inputs = tmp_path / "in" / "**" / "*"
    for index in (0, 1, 0):
        run(tokenizer, inputs, tmp_path / "in" / "x", shard_index=index, num_shards=2)
    assert read_summary(tmp_path / "in" / "x").documents == 20
    assert len(list((tmp_path / "in").iterdir())) == 6
