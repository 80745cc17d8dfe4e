"""Shard files: safetensors written straight from the tensors' memory, and read by slice.

A safetensors file is: u64 little endian, the length of the header | the header, a JSON object
{key: {"dtype": "F32", "shape": [n], "data_offsets": [begin, end]}}, padded with spaces | the tensors' bytes,
offsets counted from the end of the header, without holes.

The safetensors library's own writer wants a dictionary of everything and creates files of mode 0600; this one
streams, computes the checksum on the way and holds one bounded buffer, whatever the size of a tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatron_tf.checkpoint.durable import new_file
from megatron_tf.checkpoint.format import BYTES_PER_ELEMENT, StoredFile
from megatron_tf.errors import CheckpointError

BUFFER_BYTES = 16 * 2**20
_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library reads no longer header
_ALIGNMENT = 8


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a flat, contiguous fp32 CPU tensor, without a copy."""
    assert tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
    return tensor.detach().numpy().data.cast("B")


def write_shard(path: Path, tensors: Sequence[tuple[str, Tensor]], after_tensor: Callable[[], None]) -> StoredFile:
    """Write flat fp32 tensors (CPU or device) under their keys into a new file, flushed to the disk.

    `after_tensor` is called once the bytes of each tensor have been handed to the system.
    Raises OSError, for example when the disk is full.
    """
    offset = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for key, tensor in tensors:
        assert key not in header and tensor.dtype == torch.float32 and tensor.dim() == 1
        end = offset + tensor.numel() * BYTES_PER_ELEMENT
        header[key] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode("utf-8")
    encoded += b" " * (-len(encoded) % _ALIGNMENT)

    digest, total = xxhash.xxh3_128(), 0
    chunk = BUFFER_BYTES // BYTES_PER_ELEMENT
    # Hashing and writing the same bytes at the same time: both release the interpreter's lock.
    with new_file(path) as file, ThreadPoolExecutor(max_workers=1) as hasher:

        def write(view: memoryview) -> None:
            nonlocal total
            total += len(view)
            hashed = hasher.submit(digest.update, view)
            while view:
                view = view[file.write(view) :]
            hashed.result()

        write(memoryview(len(encoded).to_bytes(8, "little") + encoded))
        for _, tensor in tensors:
            buffer = None if tensor.device.type == "cpu" else torch.empty(min(chunk, tensor.numel()))
            for start in range(0, tensor.numel(), chunk):
                part = tensor.detach()[start : start + chunk]
                if buffer is not None:
                    part = buffer[: part.numel()].copy_(part)
                write(as_bytes(part))
            after_tensor()
    return StoredFile(total, digest.hexdigest())


def file_checksum(path: Path) -> str:
    """Checksum of a file, read through one bounded buffer."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(BUFFER_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


class ShardReader:
    """Reads slices of the flat fp32 tensors in one shard file. Every defect of the file is a CheckpointError."""

    def __init__(self, path: Path):
        self._path = path
        self._entries = self._parse_header()

    def numel(self, key: str) -> int:
        """Number of elements of tensor `key`."""
        begin, end = self._locate(key)
        return (end - begin) // BYTES_PER_ELEMENT

    def read_into(self, key: str, start: int, target: Tensor) -> None:
        """Fill the flat fp32 CPU tensor `target` from element `start` of tensor `key` on; no other bytes are read."""
        begin, end = self._locate(key)
        position = begin + start * BYTES_PER_ELEMENT
        view = as_bytes(target)
        assert start >= 0 and position + len(view) <= end
        with open(self._path, "rb", buffering=0) as file:
            file.seek(position)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{self._path}: ends within tensor {key!r}; the file is truncated")
                view = view[count:]

    def _locate(self, key: str) -> tuple[int, int]:
        if key not in self._entries:
            raise CheckpointError(f"{self._path}: has no tensor {key!r}")
        return self._entries[key]

    def _parse_header(self) -> dict[str, tuple[int, int]]:
        """{key: (begin, end)} in bytes from the start of the file."""
        try:
            with open(self._path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(size - 8, _HEADER_LIMIT_BYTES):
                    raise CheckpointError(f"{self._path}: header length {length} does not fit a file of {size} bytes")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            return {key: self._entry(key, entry, 8 + length, size) for key, entry in header.items()}
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be read ({error.strerror or error})") from error
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise CheckpointError(f"{self._path}: the safetensors header is damaged ({error})") from error

    def _entry(self, key: str, entry: dict[str, Any], data: int, size: int) -> tuple[int, int]:
        (numel,), (begin, end) = entry["shape"], entry["data_offsets"]
        if entry["dtype"] != "F32" or end - begin != numel * BYTES_PER_ELEMENT or not 0 <= begin <= end <= size - data:
            raise CheckpointError(f"{self._path}: tensor {key!r} has an impossible dtype, shape or position")
        return data + begin, data + end
