from __future__ import annotations

import os

import pytest
import torch
import xxhash
from peak_memory import counted_from_zero
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_tf.checkpoint import shards
from megatron_tf.checkpoint.shards import ShardReader, file_checksum, write_shard
from megatron_tf.errors import CheckpointError


def nothing() -> None:
    pass


@pytest.fixture
def tensors():
    return [("b/weight/0", torch.randn(17)), ("a/weight/4", torch.randn(5)), ("ä/exp_avg/0", torch.randn(1))]


def test_the_safetensors_library_reads_our_files(tmp_path, tensors):
    write_shard(tmp_path / "shard", tensors, nothing)
    loaded = load_file(tmp_path / "shard")
    assert set(loaded) == {key for key, _ in tensors}
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors)
    with safe_open(tmp_path / "shard", "pt") as file:
        assert torch.equal(file.get_slice("b/weight/0")[3:9], tensors[0][1][3:9])


def test_we_read_the_safetensors_librarys_files(tmp_path, tensors):
    save_file(dict(tensors), tmp_path / "shard")
    out = torch.empty(6)
    ShardReader(tmp_path / "shard").read_into("b/weight/0", 3, out)
    assert torch.equal(out, tensors[0][1][3:9])


def test_length_and_checksum_are_those_of_the_file(tmp_path, tensors):
    stored = write_shard(tmp_path / "shard", tensors, nothing)
    content = (tmp_path / "shard").read_bytes()
    assert (stored.num_bytes, stored.checksum) == (len(content), xxhash.xxh3_128(content).hexdigest())
    assert file_checksum(tmp_path / "shard") == stored.checksum


@pytest.mark.parametrize("buffer_bytes", [4, 12, 64])
def test_tensors_longer_than_the_buffer(tmp_path, tensors, monkeypatch, buffer_bytes):
    monkeypatch.setattr(shards, "BUFFER_BYTES", buffer_bytes)
    stored = write_shard(tmp_path / "shard", tensors, nothing)
    assert all(torch.equal(load_file(tmp_path / "shard")[key], tensor) for key, tensor in tensors)
    assert file_checksum(tmp_path / "shard") == stored.checksum


def test_others_may_read_the_file_as_the_umask_says(tmp_path, tensors):
    old = os.umask(0o027)
    try:
        write_shard(tmp_path / "shard", tensors, nothing)
    finally:
        os.umask(old)
    assert (tmp_path / "shard").stat().st_mode & 0o777 == 0o640


def test_a_shard_is_never_written_over(tmp_path, tensors):
    write_shard(tmp_path / "shard", tensors, nothing)
    with pytest.raises(FileExistsError):
        write_shard(tmp_path / "shard", tensors, nothing)


def test_a_device_tensor_is_copied_through_the_bounded_buffer(tmp_path, monkeypatch):
    """No accelerator here: a tensor that claims another device and counts what is copied at once."""
    monkeypatch.setattr(shards, "BUFFER_BYTES", 32)
    values, largest = torch.randn(27), 0

    class OnDevice:
        dtype, device = torch.float32, torch.device("cuda")
        numel, dim, detach = values.numel, values.dim, lambda self: self

        def __getitem__(self, part):
            nonlocal largest
            largest = max(largest, values[part].numel())
            return values[part]

    write_shard(tmp_path / "shard", [("a", OnDevice())], nothing)
    assert torch.equal(load_file(tmp_path / "shard")["a"], values)
    assert largest == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_tensor(tmp_path):
    values = torch.randn(100_000)
    write_shard(tmp_path / "shard", [("a", values.cuda())], nothing)
    assert torch.equal(load_file(tmp_path / "shard")["a"], values)


def test_writing_holds_no_copy_of_the_share(tmp_path):
    """Peak resident memory in a fresh process: the tensors, and then the save on top of them."""
    import subprocess
    import sys

    script = f"""
import resource, torch
from pathlib import Path
from megatron_tf.checkpoint.shards import write_shard
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tensor = torch.ones(64 * 2**20)  # 256 MiB
write_shard(Path({str(tmp_path)!r}) / "warm", [("a", tensor[:1000])], lambda: None)
before = peak()
write_shard(Path({str(tmp_path)!r}) / "shard", [("a", tensor)], lambda: None)
print(peak() - before)
"""
    done = subprocess.run(counted_from_zero([sys.executable, "-c", script]), check=True, capture_output=True, text=True)
    assert int(done.stdout) < 4 * shards.BUFFER_BYTES


@pytest.mark.parametrize("keep", [0, 4, 8, 40])
def test_a_truncated_file_is_refused(tmp_path, tensors, keep):
    write_shard(tmp_path / "shard", tensors, nothing)
    os.truncate(tmp_path / "shard", keep)
    with pytest.raises(CheckpointError, match="shard"):
        ShardReader(tmp_path / "shard")


def test_a_file_cut_within_its_tensors_is_refused(tmp_path, tensors):
    stored = write_shard(tmp_path / "shard", tensors, nothing)
    os.truncate(tmp_path / "shard", stored.num_bytes - 1)
    with pytest.raises(CheckpointError, match="impossible"):
        ShardReader(tmp_path / "shard")


def test_a_file_cut_after_it_was_opened_is_refused(tmp_path, tensors):
    stored = write_shard(tmp_path / "shard", tensors, nothing)
    reader = ShardReader(tmp_path / "shard")
    os.truncate(tmp_path / "shard", stored.num_bytes - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        reader.read_into("ä/exp_avg/0", 0, torch.empty(1))


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]}}',
        b'{"a": {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]}}',
        b"{nonsense",
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header):
    (tmp_path / "shard").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match="shard"):
        ShardReader(tmp_path / "shard")


def test_missing_file_and_missing_key(tmp_path, tensors):
    with pytest.raises(CheckpointError, match="No such file"):
        ShardReader(tmp_path / "shard")
    write_shard(tmp_path / "shard", tensors, nothing)
    with pytest.raises(CheckpointError, match="has no tensor 'c'"):
        ShardReader(tmp_path / "shard").numel("c")
