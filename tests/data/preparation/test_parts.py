"""Parts: what they are named after, when they are finished, and that no two processes write one."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tf.data.indexed import IndexedWriter
from megatron_tf.data.preparation import parts
from megatron_tf.data.preparation.encoding import EncodeSettings
from megatron_tf.data.preparation.parts import Part, plan_parts
from megatron_tf.data.preparation.preprocess import decisive
from megatron_tf.data.preparation.record_types import BadSample, ReadLimits
from megatron_tf.data.preparation.report import SAMPLES_PER_KIND, Report, SplitCounts, read_report, write_report
from megatron_tf.errors import DataError

ENCODE = EncodeSettings("tokenizer.json", "text", 0.1)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{number}.txt" for number in range(10)]
    for number, path in enumerate(paths):
        path.write_text("x" * number)
    return paths


def plan(files: list[Path], encode: EncodeSettings = ENCODE, fingerprint: str = "f", **limits) -> list[Part]:
    return plan_parts("out/x", files, decisive(encode, ReadLimits(**limits), fingerprint))


def test_a_part_is_a_file_named_after_all_that_decides_its_content(files):
    first = plan(files)
    assert [part.files for part in first] == [(path,) for path in files]
    assert [part.bytes for part in first] == list(range(10)) and len({part.key for part in first}) == 10
    assert {part.folder for part in first} == {Path("out/x.parts")}
    assert plan(files) == first and plan(files[3:5]) == first[3:5]
    changed = [
        plan(files, replace(ENCODE, json_key="body")),
        plan(files, replace(ENCODE, validation_fraction=0.2)),
        plan(files, fingerprint="g"),
        plan(files, max_document_bytes=5),
    ]
    assert not {part.key for part in first} & {part.key for other in changed for part in other}
    assert plan(files, replace(ENCODE, tokenizer="moved.json")) == first  # the same one, by its fingerprint


def test_a_file_that_changed_is_another_part(files):
    first = plan(files)
    files[2].write_text("longer than before")
    os.utime(files[4], ns=(0, 0))
    assert [part.key == old.key for part, old in zip(plan(files), first, strict=True)] == [
        number not in (2, 4) for number in range(10)
    ]


def test_very_many_files_share_parts(files, monkeypatch):
    monkeypatch.setattr(parts, "MOST_PARTS", 4)
    assert [len(part.files) for part in plan(files)] == [3, 3, 3, 1]


def test_a_file_that_is_gone(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt: No such file or directory. Make it readable"):
        plan([tmp_path / "gone.txt"])


@pytest.fixture
def part(tmp_path) -> Part:
    return Part(tmp_path / "x.parts", "key", (Path("a.txt"),), 5)


def finish(part: Part) -> Report:
    part.folder.mkdir(exist_ok=True)
    with IndexedWriter(part.prefix(""), 10) as writer:
        writer.add_document([1, 2])
    report = Report({"": SplitCounts(1, 2, 5, 2)}, Counter({"empty": 3}), [BadSample("empty", "f", 1, "why", "")], 1.5)
    write_report(part.report_path, report, part.key, ["a.txt"])
    return report


def test_a_part_is_finished_when_its_report_is_there_and_its_tokens_are(part):
    assert part.report() is None
    report = finish(part)
    assert part.report() == report and (report.documents, report.empty, report.bad) == (1, 3, 0)
    part.prefix("").with_suffix(".idx").unlink()
    assert part.report() is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "megatron_tf preparation 1", "key": "key"}'])
def test_a_torn_report_is_none(part, content):
    finish(part)
    part.report_path.write_bytes(content)
    assert part.report() is None


def test_a_report_of_other_work_is_none(part):
    finish(part)
    assert read_report(part.report_path, "other") is None


def test_samples_are_the_first_of_each_kind():
    def sample(kind, line: int) -> BadSample:
        return BadSample(kind, "f", line, "why", "")

    report, other = Report({"": SplitCounts()}), Report({"": SplitCounts(1, 2, 3, 4)})
    report.add_bad(sample("empty", line) for line in range(8))
    other.add_bad([*(sample("empty", line) for line in range(100, 130)), sample("not_utf8", 5)])
    report.add(other)
    assert report.skipped == {"empty": 38, "not_utf8": 1} and report.splits[""] == SplitCounts(1, 2, 3, 4)
    assert [item.line for item in report.samples] == [*range(8), 100, 101, 5] and SAMPLES_PER_KIND == 10
