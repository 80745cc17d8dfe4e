from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy
import pytest
import torch

from megatron_tf.convert.torch_file import Unread, check_bytes, load_torch_file
from megatron_tf.errors import CheckpointError


class Command:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_tensors_and_plain_values(tmp_path):
    file = tmp_path / "file.bin"
    torch.save({"a": torch.arange(5.0), "b": [1, "two", None]}, file)
    content = load_torch_file(file)
    assert torch.equal(content["a"], torch.arange(5.0)) and content["b"] == [1, "two", None]
    check_bytes(file)


def test_code_in_a_file_is_never_run(tmp_path):
    file, mark = tmp_path / "file.bin", tmp_path / "it_ran"
    torch.save({"weights": Command(f"touch {mark}")}, file)
    for unread in ((), ("deepspeed",)):
        with pytest.raises(CheckpointError, match="wants to run or make posix.system"):
            load_torch_file(file, unread=unread)
    file.write_bytes(pickle.dumps(Command(f"touch {mark}")))
    with pytest.raises(CheckpointError, match="not a file of torch.save"):
        load_torch_file(file)
    assert not mark.exists()
    pickle.loads(file.read_bytes())  # what is guarded against does happen
    assert mark.exists()


def test_objects_of_named_packages_are_left_unread(tmp_path):
    file = tmp_path / "file.bin"
    torch.save({"state": numpy.random.get_state(), "weights": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match="wants to run or make numpy"):
        load_torch_file(file)
    content = load_torch_file(file, unread=("numpy",))
    assert isinstance(content["state"][1], Unread) and torch.equal(content["weights"], torch.ones(2))


def test_what_is_no_whole_file_of_torch(tmp_path):
    whole = tmp_path / "whole.bin"
    torch.save({"a": torch.zeros(1000)}, whole)
    contents = {"text": b"hello", "empty": b"", "cut": whole.read_bytes()[:2000], "zip": b"PK\x03\x04" + bytes(100)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a file of torch.save, or only a part of one"):
            load_torch_file(tmp_path / name)
    with pytest.raises(CheckpointError, match="No such file"):
        load_torch_file(Path(tmp_path / "missing"))


def test_a_flipped_bit_is_found(tmp_path):
    file = tmp_path / "file.bin"
    torch.save({"a": torch.zeros(1000)}, file)
    content = bytearray(file.read_bytes())
    content[content.index(bytes(500)) + 200] = 1
    file.write_bytes(content)
    load_torch_file(file)
    with pytest.raises(CheckpointError, match="is damaged: the bytes of file/data/0"):
        check_bytes(file)
