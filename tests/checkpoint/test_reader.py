from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from megatron_tf.checkpoint.format import INDEX_NAME, MANIFEST_NAME, Manifest, StoredFile, shard_name
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.shards import ShardReader, file_checksum
from megatron_tf.errors import CheckpointError, UnreadableError


@pytest.fixture
def path(sandbox):
    return sandbox.saved(world_size=2)


def refused(path, *fragments):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    for fragment in (str(path), *fragments):
        assert fragment in str(caught.value)


def test_missing_manifest(path):
    (path / MANIFEST_NAME).unlink()
    refused(path, "has no manifest.json, so it is not a complete checkpoint")


def test_missing_index(path):
    (path / INDEX_NAME).unlink()
    refused(path, "index.json is missing")


def test_missing_shard(path):
    (path / shard_name(1)).unlink()
    refused(path, "shard_00001.safetensors is missing")


@pytest.mark.parametrize("name", [INDEX_NAME, shard_name(0)])
def test_truncated_file(path, name):
    size = (path / name).stat().st_size
    os.truncate(path / name, size - 1)
    refused(path, f"{name} has {size - 1} bytes, the manifest says {size}")


def test_truncated_manifest(path):
    os.truncate(path / MANIFEST_NAME, 30)
    refused(path, "manifest.json: not valid JSON")


def test_flipped_byte_in_the_index(path, flip):
    flip(path / INDEX_NAME, 20)
    refused(path, "index.json is damaged")


def test_flipped_byte_in_a_shard_is_found_by_verify_and_named(path, flip):
    flip(path / shard_name(1), -3)
    reader = open_checkpoint(path)
    reader.verify([shard_name(0)])
    with pytest.raises(CheckpointError, match="shard_00001.safetensors is damaged: its checksum is"):
        reader.verify()


def test_verify_names_every_broken_file(path, flip):
    flip(path / shard_name(0), -3)
    flip(path / shard_name(1), -3)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).verify()
    assert shard_name(0) in str(caught.value) and shard_name(1) in str(caught.value)


def test_a_swapped_shard_of_equal_length_is_found(path, sandbox):
    other = sandbox.save(sandbox.split(sandbox.state(5), 2), sandbox.index(step=11))[0]
    (path / shard_name(0)).write_bytes((other / shard_name(0)).read_bytes())
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(path).verify()


def rewrite_index(path, change):
    """Change index.json and make the manifest fit again, as a buggy writer would have left it."""
    content = json.loads((path / INDEX_NAME).read_bytes())
    change(content)
    text = json.dumps(content).encode()
    (path / INDEX_NAME).write_bytes(text)
    manifest = Manifest.from_json("", (path / MANIFEST_NAME).read_bytes())
    stored = StoredFile(len(text), file_checksum(path / INDEX_NAME))
    (path / MANIFEST_NAME).write_bytes(Manifest("t", {**manifest.files, INDEX_NAME: stored}).to_json())


def first_piece(content):
    return content["tensors"]["final_norm.bias"]["states"]["weight"]["pieces"][0]


def test_a_piece_in_a_file_that_the_manifest_does_not_list(path):
    rewrite_index(path, lambda content: first_piece(content).__setitem__(2, "elsewhere.safetensors"))
    refused(path, "final_norm.bias, weight is said to lie in elsewhere.safetensors")


@pytest.mark.parametrize("key", ["embedding.weight/weight/999", "embedding.weight/exp_avg/0"])
def test_an_index_that_contradicts_a_shard_is_found(path, key):
    rewrite_index(path, lambda content: first_piece(content).__setitem__(3, key))
    reader = open_checkpoint(path)
    for action in (reader.verify, lambda: reader.read("final_norm.bias", "weight", 0, 5)):
        with pytest.raises(CheckpointError, match=r"has no tensor|the index says"):
            action()


@pytest.mark.parametrize(
    ("name", "state", "start", "stop", "message"),
    [
        ("ghost", "weight", 0, 1, "holds no tensor 'ghost'"),
        ("final_norm.bias", "velocity", 0, 1, "holds no state 'velocity' of tensor 'final_norm.bias'"),
        ("final_norm.bias", "weight", 2, 6, r"elements \[2, 6\) asked of 'final_norm.bias', which has 5"),
        ("final_norm.bias", "weight", -1, 2, r"elements \[-1, 2\)"),
    ],
)
def test_what_is_not_there_is_named(path, name, state, start, stop, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path).read(name, state, start, stop)


def test_a_read_touches_only_the_bytes_asked_for(path, monkeypatch):
    asked = []
    read_into = ShardReader.read_into

    def counted(self, key, start, target):
        asked.append(target.numel())
        read_into(self, key, start, target)

    monkeypatch.setattr(ShardReader, "read_into", counted)
    open_checkpoint(path).read("blocks.0.ffn.key_tokens", "exp_avg", 7, 40)
    assert sum(asked) == 33


def test_shares_are_of_about_equal_size_and_together_everything(sandbox):
    reader = open_checkpoint(sandbox.save(sandbox.split(sandbox.state(), 6))[0])
    for world_size in (1, 2, 3, 10):
        shares = [reader.share(rank, world_size) for rank in range(world_size)]
        assert sorted(name for share in shares for name in share) == sorted(reader.manifest.files)
        loads = [sum(reader.manifest.files[name].num_bytes for name in share) for share in shares]
        assert max(loads) - min(loads) <= max(file.num_bytes for file in reader.manifest.files.values())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_read_that_the_system_refuses_is_named(path, monkeypatch, number):
    reader = open_checkpoint(path)
    reader.verify()
    piece = reader.index.tensors["final_norm.bias"].states["weight"][0]

    def refused(file, *arguments, **options):
        raise OSError(number, os.strerror(number), str(file))

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(UnreadableError, match=f"{piece.file}: cannot be read .{os.strerror(number)}"):
        reader.read("final_norm.bias", "weight", 0, 5)


def test_an_empty_range_is_empty(path):
    assert open_checkpoint(path).read("final_norm.bias", "weight", 3, 3).shape == (0,)


def test_a_folder_can_be_moved(path, tmp_path):
    moved = tmp_path / "elsewhere"
    path.rename(moved)
    reader = open_checkpoint(moved)
    reader.verify()
    assert reader.read("final_norm.bias", "weight", 0, 5).dtype == torch.float32
