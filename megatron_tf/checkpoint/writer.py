"""Saving: every rank writes its own share, rank 0 puts the checkpoint together and publishes it.

Ranks meet through files only, never through a collective, so a save can run in a background thread during
training. They need one file system and a `token` that all of them know and that no other save uses.

    every rank   creates .tmp-<step>-<token>/, writes its shard, then its part file (or the reason it could not)
    rank 0       waits for all parts, checks that each element of each state is there exactly once,
                 writes index and manifest, renames the folder to its final name
    other ranks  wait until the final folder carries the token, or a failure note appears

Whichever rank dies, and wherever, the folder has its final name only when every byte is on the disk. If any rank
fails, nothing is published, the temporary folder goes, and every rank raises a CheckpointError with the reason.

A folder of the same step that exists already is replaced: it can only stem from a run that was abandoned and
started over in the same place, so the newer state counts. It is set aside under `.old-` for the moment between
two renames, where `find_latest` finds it if the save dies there, and the next save puts it back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_tf.checkpoint.format import (
    INDEX_NAME,
    MANIFEST_NAME,
    CheckpointIndex,
    Manifest,
    RankContribution,
    StoredFile,
    StoredPiece,
    folder_name,
    part_name,
    shard_name,
)
from megatron_tf.checkpoint.manager import FAILED_PREFIX, REPLACED_PREFIX, UNFINISHED_PREFIX, clear_leftovers, remove
from megatron_tf.checkpoint.shards import ComputedTensor, file_checksum, tensor_length, write_shard
from megatron_tf.durable import sync_folder, write_atomically
from megatron_tf.errors import CheckpointError

_POLL_SECONDS = 0.02
_OUTCOME_GRACE_SECONDS = 10.0  # from the temporary folder's end until a shared file system shows the outcome

# Where `at` is called, in this order; those after "part" on rank 0 only. "tensor" comes once for each piece.
FAULT_POINTS = ("start", "folder", "tensor", "shard", "part", "parts", "index", "manifest", "renamed", "done")
# Besides, when a folder of this step is replaced, between "manifest" and "renamed":
REPLACING_POINT = "set_aside"


@dataclass(frozen=True)
class _Range:
    """Elements [start, stop) of one state of a flattened logical tensor."""

    name: str
    state: str
    start: int
    stop: int

    @property
    def key(self) -> str:
        return f"{self.name}/{self.state}/{self.start}"


@dataclass(frozen=True)
class Piece(_Range):
    """Elements [start, stop) of one state of a flattened logical tensor.

    `tensor`: flat fp32, stop - start elements, on the CPU (written from its own memory) or on a device
    (copied through a bounded buffer). It must not change until the save is over.
    """

    tensor: Tensor


@dataclass(frozen=True)
class ComputedPiece(_Range):
    """The same, computed while it is written, through a bounded buffer. `fill` counts from `start` of the piece."""

    tensor: ComputedTensor


def save_checkpoint(
    root: Path | str,
    pieces: Iterable[Piece | ComputedPiece],
    index: CheckpointIndex,
    *,
    rank: int,
    world_size: int,
    token: str,
    timeout_seconds: float = 1800.0,
    at: Callable[[str], None] = lambda point: None,
) -> Path:
    """Save this rank's `pieces` under `root` (created if missing); returns the published folder on every rank.

    `index`: everything but the pieces; its `tensors` name what must come together over all ranks (see
    `expected_tensors`). Only rank 0's is written, its step must be the same on all ranks.
    `token`: letters, digits, - and _; the same on every rank of this save and of no other.
    `at`: called at each of FAULT_POINTS, for tests that kill or fail a save there.
    CheckpointError on every rank when any rank could not write, an element is missing or held twice, or a
    rank is silent for `timeout_seconds`; nothing is published then and older checkpoints are as they were.
    """
    assert token.replace("-", "").replace("_", "").isalnum() and 0 <= rank < world_size
    attempt = _Attempt(Path(root), folder_name(index.step), token, time.monotonic() + timeout_seconds, at, world_size)
    try:
        attempt.at("start")
        if rank == 0:
            # what cannot be removed is in nobody's way, and those who start a run or a tool are told of it then
            clear_leftovers(attempt.root, but=token, report=lambda problem: None)
        attempt.write_share(rank, pieces)
        if rank == 0:
            attempt.publish(index, attempt.collect(world_size))
        else:
            attempt.await_outcome()
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or attempt.folder})"
        # A rank that is still writing when rank 0 gives up finds its folder gone: the cause is rank 0's then.
        who = f"rank {rank} could not save" if world_size > 1 else "could not be saved"
        message = attempt.reason_of_rank_0() or f"{attempt.final}: {who}: {reason}"
        attempt.abandon(rank, reason, message)
        raise CheckpointError(message) from error
    except CheckpointError as error:
        attempt.abandon(rank, str(error), str(error))
        raise
    except Exception as error:  # a bug: raised as it is, but no other rank may wait for this one
        reason = f"{type(error).__name__}: {error}"
        attempt.abandon(rank, reason, f"{attempt.final}: rank {rank} could not save: {reason}")
        raise
    attempt.at("done")
    return attempt.final


class _Attempt:
    """One attempt to save one step, as one rank sees it."""

    def __init__(self, root: Path, name: str, token: str, deadline: float, at: Callable[[str], None], world_size: int):
        self.root = root
        self.token = token
        self.at = at
        self._deadline = deadline
        self._world_size = world_size
        self._handed_over = False  # from here on this rank's shard belongs to rank 0, which may be publishing it
        self.final = root / name
        self.folder = root / f"{UNFINISHED_PREFIX}{name}-{token}"
        self.replaced = root / f"{REPLACED_PREFIX}{name}-{token}"
        self.failed = root / f"{FAILED_PREFIX}{name}-{token}"

    def write_share(self, rank: int, pieces: Iterable[Piece | ComputedPiece]) -> None:
        """Write this rank's shard and then its part file, which says that the shard is complete."""
        self._raise_if_failed()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.at("folder")
        share = [piece for piece in pieces if piece.stop > piece.start]
        for piece in share:
            assert tensor_length(piece.tensor) == piece.stop - piece.start, f"{piece.key}: {piece.stop}"
        part = RankContribution(rank)
        if share:
            tensors = [(piece.key, piece.tensor) for piece in share]
            stored = write_shard(self.folder / shard_name(rank), tensors, lambda: self.at("tensor"))
            entries = tuple((piece.name, piece.state, piece.start, piece.stop, piece.key) for piece in share)
            part = RankContribution(rank, None, shard_name(rank), stored.num_bytes, stored.checksum, entries)
        self.at("shard")
        write_atomically(self.folder / part_name(rank), part.to_json())
        self._handed_over = True
        self.at("part")

    def collect(self, world_size: int) -> list[RankContribution]:
        """The parts of all ranks, as soon as they are there; CheckpointError as soon as one of them is an error."""
        parts: dict[int, RankContribution] = {}

        def missing() -> list[int]:
            return [rank for rank in range(world_size) if rank not in parts]

        for _ in self._poll(lambda: f"no word from rank {', '.join(map(str, missing()))}"):
            for rank in missing():
                path = self.folder / part_name(rank)
                if path.exists():
                    parts[rank] = RankContribution.from_json(str(path), path.read_bytes())
            errors = [f"rank {part.rank} could not save: {part.error}" for part in parts.values() if part.error]
            if errors:
                raise CheckpointError(f"{self.final}: " + "; ".join(errors))
            if len(parts) == world_size:
                break
        return [parts[rank] for rank in range(world_size)]

    def publish(self, index: CheckpointIndex, parts: list[RankContribution]) -> None:
        """Write index and manifest and give the folder its name."""
        self.at("parts")
        complete = self._assemble(index, parts)
        files = {part.file: StoredFile(part.num_bytes, part.checksum) for part in parts if part.file}
        for name, stored in files.items():
            if (self.folder / name).stat().st_size != stored.num_bytes:
                raise CheckpointError(f"{self.final}: {name} is not {stored.num_bytes} bytes long as its rank wrote it")
        for part in parts:
            (self.folder / part_name(part.rank)).unlink()
        write_atomically(self.folder / INDEX_NAME, encoded := complete.to_json())
        files[INDEX_NAME] = StoredFile(len(encoded), file_checksum(self.folder / INDEX_NAME))
        self.at("index")
        sync_folder(self.folder)
        write_atomically(self.folder / MANIFEST_NAME, Manifest(self.token, files).to_json())
        sync_folder(self.folder)
        self.at("manifest")
        if os.path.lexists(self.final):
            os.rename(self.final, self.replaced)
            self.at(REPLACING_POINT)
        os.rename(self.folder, self.final)
        sync_folder(self.root)
        self.at("renamed")
        _try(lambda: remove(self.replaced))

    def await_outcome(self) -> None:
        """Return when rank 0 has published this attempt; CheckpointError with its reason when it gave up."""
        gone_since = None
        for _ in self._poll(lambda: "no word from rank 0"):
            if self._is_published():
                return
            self._raise_if_failed()
            if self.folder.exists():
                gone_since = None
                continue
            gone_since = gone_since or time.monotonic()
            if time.monotonic() - gone_since > _OUTCOME_GRACE_SECONDS:
                raise CheckpointError(f"{self.final}: rank 0 gave up the save and could not leave the reason")

    def reason_of_rank_0(self) -> str | None:
        """Why rank 0 gave this attempt up, None as long as it has not."""
        return self.failed.read_text("utf-8") if self.failed.exists() else None

    def abandon(self, rank: int, reason: str, message: str) -> None:
        """Tell the other ranks, and take away what this attempt has written; best effort, on a disk that may be full.

        `reason` is for rank 0, which names the rank itself; `message` is what all ranks then raise.
        """
        if rank == 0:
            if os.path.lexists(self.replaced) and not os.path.lexists(self.final):
                _try(lambda: os.rename(self.replaced, self.final))
            _try(lambda: (self.folder / shard_name(0)).unlink())  # room for the reason
            if self._world_size > 1:  # else nobody waits for it
                _try(lambda: write_atomically(self.failed, message.encode("utf-8")))
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.failed.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        elif not self._handed_over:
            _try(lambda: self.folder.mkdir(parents=True, exist_ok=True))
            _try(lambda: (self.folder / shard_name(rank)).unlink())
            _try(
                lambda: write_atomically(self.folder / part_name(rank), RankContribution(rank, error=reason).to_json())
            )

    def _assemble(self, index: CheckpointIndex, parts: list[RankContribution]) -> CheckpointIndex:
        """The index with every rank's pieces; CheckpointError unless they make up each tensor exactly."""
        pieces: dict[tuple[str, str], list[StoredPiece]] = {}
        for part in parts:
            for name, state, start, stop, key in part.pieces:
                if name not in index.tensors or state not in index.tensors[name].states:
                    raise CheckpointError(f"{self.final}: rank {part.rank} wrote {name}, {state}, which nobody expects")
                pieces.setdefault((name, state), []).append(StoredPiece(start, stop, part.file or "", key))
        complete = index.with_pieces(pieces)
        if problems := complete.problems():
            raise CheckpointError(f"{self.final}: not published: " + "; ".join(problems))
        return complete

    def _is_published(self) -> bool:
        try:
            text = (self.final / MANIFEST_NAME).read_bytes()
            return Manifest.from_json(str(self.final / MANIFEST_NAME), text).token == self.token
        except (OSError, CheckpointError):
            return False

    def _raise_if_failed(self) -> None:
        if reason := self.reason_of_rank_0():
            raise CheckpointError(reason)

    def _poll(self, silent: Callable[[], str]) -> Iterator[None]:
        """Go round at a slackening pace; CheckpointError at the deadline."""
        pause = _POLL_SECONDS
        while True:
            yield
            if time.monotonic() > self._deadline:
                raise CheckpointError(f"{self.final}: not saved: {silent()} before the time-out")
            time.sleep(pause)
            pause = min(pause * 1.2, 0.5)


def _try(action: Callable[[], object]) -> None:
    with contextlib.suppress(OSError):
        action()
