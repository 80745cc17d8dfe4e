"""Text files as editors leave them."""

from __future__ import annotations

import os

import pytest

from megatron_tf.errors import ConfigError, UserError
from megatron_tf.text_files import read_text_file


@pytest.mark.parametrize("content", [b"a\nb\n", b"a\r\nb\r\n", b"a\rb\r", b"\xef\xbb\xbfa\nb\n"])
def test_marks_and_line_ends_of_all_systems(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert read_text_file(UserError, tmp_path / "a", "Correct it.") == "a\nb\n"


def test_other_characters_stay(tmp_path):
    (tmp_path / "a").write_text("a\u2028b\x0cc\ufeff", encoding="utf-8")
    assert read_text_file(UserError, tmp_path / "a", "Correct it.") == "a\u2028b\x0cc\ufeff"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ab\xff", "byte 2 is not UTF-8 text. Save the file as UTF-8"),
        ("a".encode("utf-16"), "is UTF-16 text. Save the file as UTF-8"),
        ("ab".encode("utf-32"), "is UTF-16 text|is UTF-32 text"),
    ],
)
def test_other_encodings_are_named(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_text_file(ConfigError, tmp_path / "a", "Correct it.")


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(UserError, match="a: is a FIFO, where a file is expected. Correct it."):
        read_text_file(UserError, tmp_path / "a", "Correct it.")
