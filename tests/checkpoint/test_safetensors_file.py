from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from megatron_tf.checkpoint.safetensors_file import open_safetensors
from megatron_tf.errors import CheckpointError


def test_tensors_are_read_by_name(tmp_path):
    save_file({"a": torch.arange(3), "b": torch.ones(2, 2)}, tmp_path / "some")
    with open_safetensors(tmp_path / "some") as file:
        assert set(file.keys()) == {"a", "b"} and torch.equal(file.get_tensor("a"), torch.arange(3))


@pytest.mark.timeout(60)
def test_each_bad_file_has_its_remedy(tmp_path):
    save_file({"a": torch.arange(300)}, tmp_path / "cut")
    os.truncate(tmp_path / "cut", 200)
    (tmp_path / "text").write_text("text")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    messages = {
        "cut": "is no safetensors file, or a damaged one .*Copy it",
        "text": "is no safetensors file, or a damaged one .*Copy it",
        "fifo": "is a FIFO.*Give it whole",
        "folder": "Is a directory.*Give it whole",
        "nothing": "No such file.*Give it whole",
    }
    for name, message in messages.items():
        with (
            pytest.raises(CheckpointError, match=f"{name}: {message}"),
            open_safetensors(tmp_path / name, "Give it whole", damaged="Copy it"),
        ):
            pass


def test_the_remedy_is_also_that_of_a_damaged_file_without_its_own(tmp_path):
    (tmp_path / "text").write_text("text")
    with (
        pytest.raises(CheckpointError, match="damaged one .*Remove it"),
        open_safetensors(tmp_path / "text", "Remove it"),
    ):
        pass
