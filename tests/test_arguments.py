from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_tf.arguments import number, path, whole_number


@pytest.mark.parametrize(("parse", "text"), [
    (whole_number(9), "0"),
    (whole_number(9), "10"),
    (whole_number(9, least=0), "-1"),
    (whole_number(9), "1.0"),
    (whole_number(9), ""),
    (number(1, 2), "nan"),
    (number(1, 2), "2.1"),
    (number(1, 2), "x"),
    (path, ""),
    (path, "a\0b"),
])  # fmt: skip
def test_refused_with_what_it_was(parse, text):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        parse(text)
    assert str(error.value).startswith(f"{text!r} is n")


def test_taken():
    assert whole_number(9, least=0)("0") == 0 and whole_number(9)("9") == 9
    assert number(1, 2)("2") == 2
    assert path(".") == Path(".") and path("a b/c") == Path("a b/c")
