"""A corpus out of packages: nothing twice, nothing on both sides, nothing half-written, nothing fetched again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from packing import deb, pages, path_with, prose, sdist, serve_apt

from megatron_tf.corpora import readers
from megatron_tf.corpora.build import CorpusSettings, build_corpus
from megatron_tf.corpora.catalogue import DebianPackage, PythonPackage, Source
from megatron_tf.corpora.packages import Downloads, UnavailableError, sha256_of
from megatron_tf.data.preparation.records import read_records, read_texts
from megatron_tf.durable import file_lock
from megatron_tf.errors import DataError

ALPHA = Source("alpha", "first", "permissive", "X", DebianPackage(("alpha-2", "alpha"), readers.html_pages))
BETA = Source("beta", "second", "permissive", "Y", DebianPackage(("beta",), readers.html_pages))
# beta repeats half of alpha's pages
PACKAGES = {"alpha": deb(pages("alpha", range(60))), "beta": deb(pages("beta", range(30, 90)))}


@pytest.fixture
def apt(tmp_path, monkeypatch):
    folder = serve_apt(tmp_path / "apt", PACKAGES)
    monkeypatch.setenv("PATH", path_with(folder))
    return tmp_path / "apt"


def build(tmp_path: Path, *sources: Source, notes: list[str] | None = None, **options):
    settings = CorpusSettings(tmp_path / "out", sources, **{"validation_fraction": 0.2, **options})
    return build_corpus(settings, Downloads(tmp_path / "downloads"), (notes if notes is not None else []).append)


def texts(folder: Path) -> list[str]:
    return list(read_texts(sorted(folder.glob("*.jsonl.zst")), "text"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_text_is_once_and_on_one_side(apt, tmp_path):
    reports = build(tmp_path, ALPHA, BETA)
    train, validation = texts(tmp_path / "out" / "train"), texts(tmp_path / "out" / "validation")
    assert sorted(text.strip() for text in train + validation) == sorted(prose(number).strip() for number in range(90))
    assert 8 <= len(validation) <= 35
    documents = {name: report.documents for name, report in reports.items()}
    assert sum(count["validation"] for count in documents.values()) == len(validation)
    assert sum(report.left_out.get("repeated", 0) for report in reports.values()) == 30
    assert reports["alpha"].version == "1.0-1"


def test_sources_held_out_are_for_validation_only(apt, tmp_path):
    build(tmp_path, ALPHA, BETA, held_out=frozenset({"beta"}), validation_fraction=0.0)
    train, validation = texts(tmp_path / "out" / "train"), texts(tmp_path / "out" / "validation")
    # what both have stays in validation and is gone from training
    assert sorted(text.strip() for text in validation) == sorted(prose(number).strip() for number in range(30, 90))
    assert sorted(text.strip() for text in train) == sorted(prose(number).strip() for number in range(30))
    assert [path.name for path in (tmp_path / "out" / "validation").iterdir()] == ["beta-00000.jsonl.zst"]


def test_the_same_again_and_in_smaller_files(apt, tmp_path):
    build(tmp_path, ALPHA)
    first, whole = files(tmp_path / "out"), texts(tmp_path / "out" / "train")
    build(tmp_path, ALPHA)
    assert files(tmp_path / "out") == first
    build(tmp_path, ALPHA, shard_bytes=50_000)
    assert len(list((tmp_path / "out" / "train").iterdir())) > 2 and texts(tmp_path / "out" / "train") == whole
    record = json.loads(next(read_records(sorted((tmp_path / "out" / "train").iterdir()))).payload)
    assert set(record) == {"source", "name", "text"} and record["name"].startswith("alpha/html/")


def test_licences_are_next_to_the_text(apt, tmp_path):
    build(tmp_path, ALPHA, BETA)
    text = (tmp_path / "out" / "LICENSES.txt").read_text()
    for fragment in ("version 1.0-1", "licence: Y (permissive)", "usr/share/doc/alpha/copyright in alpha_1.0-1_all.deb",
                     "Licence of beta."):  # fmt: skip
        assert fragment in text


def test_downloads_are_kept_and_verified(apt, tmp_path, monkeypatch):
    build(tmp_path, ALPHA, BETA)
    build(tmp_path, ALPHA, BETA)
    assert (apt / "log").read_text().split() == ["alpha", "beta"]
    damaged = tmp_path / "downloads" / "beta_1.0-1_all.deb"
    damaged.write_bytes(damaged.read_bytes()[:-9])  # a package that is not what it was is fetched again
    build(tmp_path, ALPHA, BETA)
    assert (apt / "log").read_text().split() == ["alpha", "beta", "beta"]
    monkeypatch.setenv("PATH", path_with(None))  # what is here needs no apt
    build(tmp_path, ALPHA, BETA)


def test_a_package_that_is_not_what_the_lists_say_is_refused(apt, tmp_path):
    (apt / "beta_1.0-1_all.deb").write_bytes(PACKAGES["alpha"])
    with pytest.raises(DataError, match=r"beta_1.0-1_all.deb: has SHA-256 \w+..., expected is .* --sources"):
        build(tmp_path, ALPHA, BETA)
    assert list((tmp_path / "out").iterdir()) == []
    pinned = DebianPackage(("alpha",), readers.html_pages, {"alpha_1.0-1_all.deb": "0" * 64})
    with pytest.raises(DataError, match=r"alpha_1.0-1_all.deb: has SHA-256 \w+..., expected is 0000000000000000\.\.\."):
        pinned.open(Downloads(tmp_path))


def test_all_that_is_missing_is_said_at_once_and_what_to_do(apt, tmp_path, monkeypatch):
    other = Source("gamma", "", "permissive", "Z", DebianPackage(("gamma", "delta"), readers.html_pages))
    with pytest.raises(DataError) as raised:
        build(tmp_path, other, ALPHA)
    assert str(raised.value).splitlines() == [
        "1 of 2 sources cannot be fetched here:",
        "  gamma: apt knows no package gamma or delta; apt-get update may help",
        "What was fetched is kept. Correct it and run again, or go on without them: --sources alpha",
    ]
    assert list((tmp_path / "out").iterdir()) == [] and (tmp_path / "downloads" / "alpha_1.0-1_all.deb").exists()
    monkeypatch.setenv("PATH", path_with(None))
    with pytest.raises(
        DataError, match="beta: needs apt, of Debian and its descendants\n.*none of the sources is left"
    ):
        build(tmp_path, BETA)


@pytest.mark.parametrize("folder", ["out", "out.older", "out.partial"])
def test_files_of_the_user_are_not_deleted_with_an_older_corpus(apt, tmp_path, folder):
    build(tmp_path, ALPHA)
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "tokenizer.json").write_text("mine")
    with pytest.raises(
        DataError, match=f"{folder}: holds 'tokenizer.json', which is of no corpus and would be deleted"
    ):
        build(tmp_path, ALPHA)
    assert (tmp_path / folder / "tokenizer.json").read_text() == "mine"


def test_what_is_no_corpus_is_not_replaced(apt, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="out: holds 'mine.txt' but no corpus.json, so it is no corpus"):
        build(tmp_path, ALPHA)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine" and not (apt / "log").exists()


def test_an_older_corpus_stays_when_the_new_one_fails(apt, tmp_path, monkeypatch):
    build(tmp_path, ALPHA)
    before = files(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("megatron_tf.corpora.shards.ShardWriter.add", _full_disk)
        with pytest.raises(DataError, match="out: No space left on device. Free space"):
            build(tmp_path, ALPHA, BETA)
    assert files(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apt", "downloads", "out"]
    build(tmp_path, BETA)  # and the next one replaces all of it
    assert [path.name for path in (tmp_path / "out" / "train").iterdir()] == ["beta-00000.jsonl.zst"]


def _full_disk(self, record):
    raise OSError(28, "No space left on device")


def test_what_a_killed_run_left_is_in_nobodys_way(apt, tmp_path):
    (tmp_path / "out.partial" / "train").mkdir(parents=True)
    (tmp_path / "out.partial" / "train" / "half.jsonl.zst").write_text("half")
    build(tmp_path, ALPHA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apt", "downloads", "out"]
    assert [path.name for path in (tmp_path / "out" / "train").iterdir()] == ["alpha-00000.jsonl.zst"]


def test_two_runs_do_not_write_one_folder(apt, tmp_path):
    with (
        file_lock(tmp_path / "out.lock"),
        pytest.raises(DataError, match="out: another run is writing it. Wait for its"),
    ):
        build(tmp_path, ALPHA)
    assert list((tmp_path / "out").iterdir()) == []


def test_too_little_for_two_sides(apt, tmp_path):
    with pytest.raises(DataError, match="no document for validation. Take more sources or another fraction"):
        build(tmp_path, ALPHA, validation_fraction=0.0)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A source archive that pip finds, and nothing else; the file that its setup.py would write."""
    folder, marker = tmp_path / "index", tmp_path / "setup_was_run"
    folder.mkdir()
    archive = folder / "words-0.5.tar.gz"
    archive.write_bytes(sdist("words", "0.5", {"COPYING": b"Licence of words.", "x.html": prose(3).encode()}, marker))
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return archive, marker


def words(sha256: str, version: str = "0.5") -> PythonPackage:
    return PythonPackage("words", version, sha256, "COPYING", readers.html_pages)


def test_a_source_archive_is_fetched_by_pip_and_never_run(index, tmp_path):
    archive, marker = index
    downloads = Downloads(tmp_path / "downloads")
    downloads.folder.mkdir()
    opened = words(sha256_of(archive)).open(downloads)
    assert (opened.license_text, opened.version) == ("Licence of words.", "0.5")
    assert [document.name for document in opened.documents] == ["words-0.5/x.html"] and not marker.exists()
    archive.unlink()
    assert words(sha256_of(downloads.folder / archive.name)).open(downloads).version == "0.5"
    assert sorted(path.name for path in downloads.folder.iterdir()) == ["downloads.json", "words-0.5.tar.gz"]


def test_packages_are_fetched_into_a_relative_folder(index, apt, tmp_path, monkeypatch):
    """The package managers run in folders of their own; before Python 3.12 even temporary folders had relative
    names."""
    archive, _ = index
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_FIND_LINKS", "index")
    package = Source("words", "third", "permissive", "Z", words(sha256_of(archive)))
    build_corpus(CorpusSettings(Path("out"), (ALPHA, package), validation_fraction=0.2), Downloads(Path("down")), print)
    assert {path.name for path in Path("down").iterdir()} == {"alpha_1.0-1_all.deb", "downloads.json", archive.name}
    assert sorted(path.name for path in Path("out").iterdir()) == ["LICENSES.txt", "corpus.json", "train", "validation"]


def test_a_source_archive_with_another_content_is_not_looked_at(index, tmp_path):
    _, marker = index
    with pytest.raises(UnavailableError, match="(?i)hash"):
        words("0" * 64).open(Downloads(tmp_path))
    assert not marker.exists() and not (tmp_path / "words-0.5.tar.gz").exists()


def test_a_version_that_pip_does_not_find(index, tmp_path, monkeypatch):
    with pytest.raises(UnavailableError, match="ERROR: No matching distribution found for words==9"):
        words("0" * 64, "9").open(Downloads(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UnavailableError, match="exit code 1"):
        words("0" * 64).open(Downloads(tmp_path))
