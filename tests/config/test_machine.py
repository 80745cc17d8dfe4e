"""Files and packages that this machine lacks, each by its key."""

from __future__ import annotations

import sys

import pytest

from megatron_tf.config.machine import machine_problems


@pytest.fixture
def data(tmp_path):
    """Prefix of a pair of files."""
    for name in ("tokens.bin", "tokens.idx"):
        (tmp_path / name).touch()
    return tmp_path / "tokens"


def test_nothing_is_missing(small, data):
    assert list(machine_problems(small(f"data.train=[{{path: {data}}}]", f"data.validation=[{{path: {data}}}]"))) == []


def test_every_missing_file_has_its_key(small, data, tmp_path):
    (tmp_path / "half.bin").touch()
    overrides = [
        f"data.train=[{{path: {data}}}, {{path: {tmp_path}/half}}]",
        f"data.validation=[{{path: {data}.bin}}]",
        "data.tokenizer=no.json",
    ]
    train, validation, tokenizer = machine_problems(small(*overrides))
    assert train == (
        f"data.train[1].path: {tmp_path}/half.idx: no such file. Prepare the data with tools/preprocess_data.py, or "
        "correct the path."
    )
    assert validation.startswith(f"data.validation[0].path: {data}.bin.bin and {data}.bin.idx: no such file.")
    assert validation.endswith(f"Give the common prefix of the two files: {data}")
    assert tokenizer == "data.tokenizer: no.json: no such file. Correct the path, or remove data.tokenizer."
    *_, tokenizer = machine_problems(small(*overrides[:2], f"data.tokenizer={tmp_path}"))
    assert tokenizer.startswith(f"data.tokenizer: {tmp_path}: is a directory, and a tokenizer is a file. Correct the")


def test_trackers_that_are_not_installed(small, data, tmp_path, monkeypatch):
    config = small(f"data.train=[{{path: {data}}}]", "data.validation=[]", "logging.trackers=[wandb, tensorboard]")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("wandb", "tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "tensorboard.py").touch()
    (tmp_path / "wandb").mkdir()  # what wandb writes next to a script is no package
    (problem,) = machine_problems(config)
    assert problem == (
        "logging.trackers: wandb is named but not installed. Install it with `pip install 'megatron_tf[wandb]'`, or "
        "take it out of logging.trackers."
    )
