"""Reading checkpoints: validation, and any range of any state, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_tf.checkpoint.format import (
    BYTES_PER_ELEMENT,
    INDEX_NAME,
    MANIFEST_NAME,
    CheckpointIndex,
    Manifest,
    StoredPiece,
)
from megatron_tf.checkpoint.shards import BUFFER_BYTES, ShardReader, file_checksum, read_failure
from megatron_tf.durable import plain_size, read_plain
from megatron_tf.errors import CheckpointError, DamagedError, shown
from megatron_tf.state.optimizer_states import WEIGHT
from megatron_tf.state.ranges import RangeMap

# Far beyond the index of any model on any number of ranks: a larger file is not an index.
_LARGEST_INDEX = 2**30
_LARGEST_MANIFEST = 2**26


def open_checkpoint(path: Path | str) -> CheckpointReader:
    """A reader of the checkpoint folder `path`.

    Checked: the manifest and the index in full (the index's checksum too), the presence and length of every
    file, that each element of each state has its place exactly once, and that a file is long enough for what the index
    says of it. The shards' bytes are checked by `CheckpointReader.verify`. Anything wrong is a CheckpointError, of the
    kind DamagedError when files are missing or cut, and UnreadableError when the system does not give one out.
    """
    folder = Path(path)
    manifest = Manifest.from_json(str(folder / MANIFEST_NAME), _read(folder, MANIFEST_NAME, _LARGEST_MANIFEST))
    for name, stored in manifest.files.items():
        try:
            size = plain_size(folder / name)
        except OSError as error:
            failure = read_failure(f"{folder}: {name}", folder / name, error)
            missing = isinstance(failure, DamagedError) and isinstance(error, FileNotFoundError)
            raise DamagedError(f"{folder}: {name} is missing") if missing else failure from error
        if size != stored.num_bytes:
            raise DamagedError(f"{folder}: {name} has {size} bytes, the manifest says {stored.num_bytes}")
    _verify_file(folder, INDEX_NAME, manifest)
    index = CheckpointIndex.from_json(str(folder / INDEX_NAME), _read(folder, INDEX_NAME, _LARGEST_INDEX))
    return CheckpointReader(folder, index, manifest)


class CheckpointReader:
    """An open checkpoint. Holds no file open and no tensor."""

    def __init__(self, path: Path, index: CheckpointIndex, manifest: Manifest):
        self.path = path
        self.index = index
        self.manifest = manifest
        self._shards: dict[str, ShardReader] = {}
        self._maps: dict[tuple[str, str], RangeMap[StoredPiece]] = {}
        room = {name: stored.num_bytes for name, stored in manifest.files.items()}
        for name, tensor in index.tensors.items():
            for state, pieces in tensor.states.items():
                self._maps[name, state] = RangeMap((piece.start, piece.stop, piece) for piece in pieces)
                for piece in pieces:
                    if piece.file not in room:
                        raise DamagedError(
                            f"{path}: {name}, {state} is said to lie in {piece.file}, which the manifest does not list"
                        )
                    room[piece.file] -= (piece.stop - piece.start) * BYTES_PER_ELEMENT
                    if room[piece.file] < 0:
                        raise DamagedError(
                            f"{path}: {name}, {state}: {INDEX_NAME} says that more lies in {piece.file} than its "
                            f"{manifest.files[piece.file].num_bytes:,} bytes"
                        )

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened logical tensor `name`: flat fp32 on the CPU.

        Reads only these bytes. CheckpointError when the checkpoint does not hold them.
        """
        if not start <= stop:
            raise CheckpointError(f"{self.path}: elements [{start}, {stop}) asked of {name!r}")
        result = torch.empty(stop - start, dtype=torch.float32)
        self.read_into(name, state, start, result)
        return result

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        """Fill the flat fp32 `target` with the elements of `name` from `start` on.

        Straight from the file when `target` is contiguous CPU memory, otherwise through one bounded buffer.
        """
        stop = start + target.numel()
        if (name, state) not in self._maps:
            kind = f"no state {state!r} of tensor" if name in self.index.tensors else "no tensor"
            raise CheckpointError(f"{self.path}: holds {kind} {name!r}")
        numel = self.index.tensors[name].numel
        if not 0 <= start <= stop <= numel:
            raise CheckpointError(f"{self.path}: elements [{start}, {stop}) asked of {name!r}, which has {numel}")
        direct = target.device.type == "cpu" and target.is_contiguous()
        buffer = None if direct else torch.empty(min(target.numel(), BUFFER_BYTES // BYTES_PER_ELEMENT))
        for first, last, piece in self._maps[name, state].overlapping(start, stop):
            begin, end = max(first, start), min(last, stop)
            shard, part = self._shard_of(piece), target[begin - start : end - start]
            if buffer is None:
                shard.read_into(piece.key, begin - first, part)
                continue
            for low in range(0, end - begin, len(buffer)):
                staged = buffer[: end - begin - low]
                shard.read_into(piece.key, begin - first + low, staged)
                part[low : low + len(staged)].copy_(staged)

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Compare the checksums of `files` (all by default) with the manifest, and the shards' headers with the index.

        One DamagedError names every broken file; UnreadableError when one cannot be read at all. Ranks share the
        work by passing different files, see `share`.
        """
        problems = []
        names = set(self.manifest.files if files is None else files)
        for name in sorted(names):
            try:
                _verify_file(self.path, name, self.manifest)
            except DamagedError as error:
                problems.append(error.problem)
        for tensor in self.index.tensors.values():
            for piece in (piece for pieces in tensor.states.values() for piece in pieces):
                if piece.file in names and not problems:
                    self._shard_of(piece)
        if problems:
            raise DamagedError("\n".join(problems))

    def share(self, rank: int, world_size: int) -> list[str]:
        """The files that `rank` verifies when `world_size` ranks share the work, with about equal bytes for each.

        Each file is some rank's; a checksum covers a whole file, so more ranks than files are of no use.
        """
        loads = [0] * world_size
        own = []
        for name, stored in sorted(self.manifest.files.items(), key=lambda item: (-item[1].num_bytes, item[0])):
            lightest = loads.index(min(loads))
            loads[lightest] += stored.num_bytes
            if lightest == rank:
                own.append(name)
        return own

    def _shard_of(self, piece: StoredPiece) -> ShardReader:
        """The open shard, its tensor's length compared with the index."""
        if piece.file not in self._shards:
            self._shards[piece.file] = ShardReader(self.path / piece.file)
        shard = self._shards[piece.file]
        if shard.numel(piece.key) != piece.stop - piece.start:
            raise DamagedError(
                f"{self.path}: {piece.file} holds {shard.numel(piece.key)} elements of {shown(piece.key)}, "
                f"the index says {piece.stop - piece.start}"
            )
        return shard


def read_weights(reader: CheckpointReader) -> dict[str, Tensor]:
    """Every logical weight of an open checkpoint, fp32, in its logical shape: the whole model in memory."""
    return {
        name: reader.read(name, WEIGHT, 0, tensor.numel).view(tensor.shape)
        for name, tensor in reader.index.tensors.items()
    }


def _read(folder: Path, name: str, limit: int) -> bytes:
    try:
        return read_plain(folder / name, limit)
    except OSError as error:
        failure = read_failure(f"{folder}: {name}", folder / name, error)
        if isinstance(failure, DamagedError) and isinstance(error, FileNotFoundError):
            failure = DamagedError(f"{folder}: has no {name}, so it is not a complete checkpoint")
        raise failure from error


def _verify_file(folder: Path, name: str, manifest: Manifest) -> None:
    if name not in manifest.files:
        raise DamagedError(f"{folder}: the manifest does not list {name}")
    try:
        found = file_checksum(folder / name)
    except OSError as error:
        raise read_failure(f"{folder}: {name}", folder / name, error) from error
    if found != manifest.files[name].checksum:
        raise DamagedError(
            f"{folder}: {name} is damaged: its checksum is {found[:12]}..., "
            f"the manifest says {manifest.files[name].checksum[:12]}..."
        )
