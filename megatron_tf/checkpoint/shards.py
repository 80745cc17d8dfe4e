"""Shard files: safetensors written straight from the tensors' memory, and read by slice.

A safetensors file is: u64 little endian, the length of the header | the header, a JSON object
{key: {"dtype": "F32", "shape": [n], "data_offsets": [begin, end]}}, padded with spaces | the tensors' bytes,
offsets counted from the end of the header, without holes.

The safetensors library's own writer wants a dictionary of everything and creates files of mode 0600; this one
streams, computes the checksum on the way and holds one bounded buffer, whatever the size of a tensor.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatron_tf.checkpoint.format import BYTES_PER_ELEMENT, StoredFile
from megatron_tf.checkpoint.strict_json import Fields, parse_object
from megatron_tf.durable import NotPlainError, new_file, open_plain
from megatron_tf.errors import CheckpointError, DamagedError, UnreadableError, broken_link, shown

BUFFER_BYTES = 16 * 2**20
_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library reads no longer header
_ALIGNMENT = 8


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a flat, contiguous fp32 CPU tensor, without a copy."""
    assert tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
    return tensor.detach().numpy().data.cast("B")


@dataclass(frozen=True)
class ComputedTensor:
    """A flat fp32 tensor that is never whole: `fill(start, target)` computes its elements from `start` on."""

    length: int
    fill: Callable[[int, Tensor], None]


def write_shard(
    path: Path, tensors: Sequence[tuple[str, Tensor | ComputedTensor]], after_tensor: Callable[[], None]
) -> StoredFile:
    """Write flat fp32 tensors (CPU, device or computed) under their keys into a new file, flushed to the disk.

    `after_tensor` is called once the bytes of each tensor have been handed to the system.
    Raises OSError, for example when the disk is full.
    """
    offset = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for key, tensor in tensors:
        assert key not in header
        end = offset + tensor_length(tensor) * BYTES_PER_ELEMENT
        header[key] = {"dtype": "F32", "shape": [tensor_length(tensor)], "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode("utf-8")
    encoded += b" " * (-len(encoded) % _ALIGNMENT)

    digest, total = xxhash.xxh3_128(), 0
    pending: list[Future[None]] = []
    completes_tensor = False
    # Hashing and writing the same bytes at the same time, while the next ones are computed or copied from a device:
    # all of it releases the interpreter's lock.
    with new_file(path) as file, ThreadPoolExecutor(max_workers=2) as pool:

        def write(view: memoryview) -> None:
            while view:
                view = view[file.write(view) :]

        def finish() -> None:
            while pending:
                pending.pop().result()
            if completes_tensor:
                after_tensor()

        prefix = memoryview(len(encoded).to_bytes(8, "little") + encoded)
        for view, is_last in itertools.chain([(prefix, False)], _parts(tensors)):
            finish()
            total += len(view)
            pending += [pool.submit(digest.update, view), pool.submit(write, view)]
            completes_tensor = is_last
        finish()
    return StoredFile(total, digest.hexdigest())


def _parts(tensors: Sequence[tuple[str, Tensor | ComputedTensor]]) -> Iterator[tuple[memoryview, bool]]:
    """The bytes of all tensors in parts of bounded size, and whether a part is its tensor's last.

    A part may be overwritten by the one after the next: two buffers take turns.
    """
    chunk = BUFFER_BYTES // BYTES_PER_ELEMENT
    buffers: list[Tensor] = []
    for _, tensor in tensors:
        length = tensor_length(tensor)
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            if not isinstance(tensor, ComputedTensor) and tensor.device.type == "cpu":
                part = tensor.detach()[start:stop]
            else:
                if not buffers:
                    buffers = [torch.empty(chunk), torch.empty(chunk)]
                buffers.reverse()
                part = buffers[0][: stop - start]
                if isinstance(tensor, ComputedTensor):
                    tensor.fill(start, part)
                else:
                    part.copy_(tensor.detach()[start:stop])
            yield as_bytes(part), stop == length


def tensor_length(tensor: Tensor | ComputedTensor) -> int:
    """Elements of a tensor that `write_shard` takes."""
    if isinstance(tensor, ComputedTensor):
        return tensor.length
    assert tensor.dtype == torch.float32 and tensor.dim() == 1
    return tensor.numel()


def file_checksum(path: Path) -> str:
    """Checksum of a file, read through one bounded buffer."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(BUFFER_BYTES))
    with open_plain(path) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def read_failure(what: str, path: Path, error: OSError) -> CheckpointError:
    """The error to raise when `path`, which messages call `what`, could not be read.

    DamagedError when it is missing or no file, else UnreadableError: also when it is a link that leads nowhere, for
    what it led to may be whole. CheckpointError when the whole folder is gone.
    """
    if link := broken_link(path):
        return UnreadableError(f"{what} {link}")
    if isinstance(error, FileNotFoundError) and not os.path.lexists(path.parent):
        return CheckpointError(
            f"{path.parent}: is no longer there. A run deletes its older checkpoints while it trains "
            "(checkpoint.keep_last): start this again, with the run's newest one"
        )
    kind = DamagedError if isinstance(error, _DAMAGE) else UnreadableError
    return kind(f"{what} cannot be read ({error.strerror or error})")


_DAMAGE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, NotPlainError)


class ShardReader:
    """Reads slices of the flat fp32 tensors in one shard file. Every defect of the file is a DamagedError."""

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
        try:
            with open_plain(self._path) as file:
                file.seek(position)
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise DamagedError(f"{self._path}: ends within tensor {key!r}; the file is truncated")
                    view = view[count:]
        except OSError as error:
            raise read_failure(f"{self._path}:", self._path, error) from error

    def _locate(self, key: str) -> tuple[int, int]:
        if key not in self._entries:
            raise DamagedError(f"{self._path}: has no tensor {shown(key)}")
        return self._entries[key]

    def _parse_header(self) -> dict[str, tuple[int, int]]:
        """{key: (begin, end)} in bytes from the start of the file."""
        try:
            with open_plain(self._path) as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(size - 8, _HEADER_LIMIT_BYTES):
                    raise DamagedError(f"{self._path}: header length {length} does not fit a file of {size} bytes")
                text = file.read(length)
        except OSError as error:
            raise read_failure(f"{self._path}:", self._path, error) from error
        header = parse_object(f"{self._path}, the safetensors header", text, DamagedError)
        begin, found = 8 + length, {}
        for key in header:
            if key == "__metadata__":
                header.object(key)
            else:
                found[key] = _place(header.object(key), begin, size)
        return found


def _place(entry: Fields, data: int, size: int) -> tuple[int, int]:
    """(begin, end) in a file of `size` bytes of a tensor that the header describes; the tensors begin at `data`."""
    entry.only("dtype", "shape", "data_offsets")
    shape, offsets = entry.integers("shape"), entry.integers("data_offsets")
    if entry.text("dtype") != "F32" or len(shape) != 1 or len(offsets) != 2:
        raise entry.error("", f"is of {shown(entry.text('dtype'))} with {len(shape)} dimensions, expected a flat F32")
    begin, end = offsets
    if end - begin != shape[0] * BYTES_PER_ELEMENT or end > size - data:
        raise entry.error(
            "data_offsets",
            f"is impossible: [{begin}, {end}] is not {shape[0]} elements within the {size - data} bytes of all tensors",
        )
    return data + begin, data + end
