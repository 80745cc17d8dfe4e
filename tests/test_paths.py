from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from live import PATIENCE_SECONDS

from megatron_tf.arguments import config_file, input_path, path, text_path
from megatron_tf.paths import expand, literal

PROJECT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("IN_HOME", "~/of")
    monkeypatch.setenv("PRICE", "a$SCRATCH")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOPE", raising=False)


@pytest.mark.parametrize(("text", "expected"), [
    ("runs/x", "runs/x"),
    ("~", "/home/ada"),
    ("~/x", "/home/ada/x"),
    ("~root/x", os.path.expanduser("~root") + "/x"),
    ("./~/x", "./~/x"),
    ("a~b/~", "a~b/~"),
    ("$SCRATCH/x", "/scratch/x"),
    ("${SCRATCH}x/$SCRATCH", "/scratchx//scratch"),
    ("$IN_HOME/x", "/home/ada/of/x"),
    ("$PRICE", "a$SCRATCH"),
    ("a$$b/$$NOPE", "a$b/$NOPE"),
    ("a$/$1/b$", "a$/$1/b$"),
])  # fmt: skip
def test_expand(text, expected):
    assert expand(text) == expected
    assert expand(literal(expected)) == expected


@pytest.mark.parametrize(("text", "said"), [
    ("$NOPE/x", "'NOPE' is not set"),
    ("${NOPE}", "'NOPE' is not set"),
    ("${SCRATCH:-x}", "'SCRATCH:-x' is not set"),
    ("${}", "'' is not set"),
    ("$EMPTY/x", "'EMPTY' is empty"),
    ("~no-such-user/x", "there is no user 'no-such-user'; write ./~no-such-user"),
])  # fmt: skip
def test_what_cannot_be_replaced_is_named(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        expand(text)
    with pytest.raises(argparse.ArgumentTypeError) as wrong:
        path(text)
    assert str(wrong.value).startswith(f"{text!r}: ") and said in str(wrong.value)


def test_an_empty_home_is_not_the_root(monkeypatch):
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ValueError, match="no home folder is known for ~; set HOME"):
        expand("~/x")


def test_arguments(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert path("~/x") == Path("/home/ada/x") and text_path("~/x/") == "/home/ada/x/"
    (tmp_path / "a$NOPE.txt").touch()
    assert input_path("a$NOPE.txt") == "a$NOPE.txt"  # as a shell's glob gives it
    assert input_path("$SCRATCH/*.txt") == "/scratch/*.txt"


def test_a_configuration_that_comes_with_the_package_is_known_by_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shipped = PROJECT / "configs" / "tiny.yml"
    assert config_file("tiny") == config_file("tiny.yml") == shipped
    assert config_file("./tiny.yml") == Path("tiny.yml")
    assert config_file("configs/tiny.yml") == Path("configs/tiny.yml")
    assert config_file("tinny") == Path("tinny")
    (tmp_path / "tiny.yml").touch()
    assert config_file("tiny.yml") == Path("tiny.yml")


def test_a_command_makes_no_folder_called_tilde(tmp_path):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    (home / "in.txt").write_text("hello")
    command = [sys.executable, "-m", "megatron_tf", "preprocess", "--input=$PLACE/*.txt", "--tokenizer=bytes",
               "--output-prefix=~/out/data"]  # fmt: skip
    variables = {**os.environ, "PYTHONPATH": str(PROJECT), "HOME": str(home), "PLACE": "~"}
    done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    assert (home / "out" / "data.idx").is_file() and list(work.iterdir()) == []
