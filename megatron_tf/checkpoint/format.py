"""The checkpoint format, version 1, field by field.

A checkpoint is one folder, `step_00001000/` (step, at least 8 digits):

    shard_00000.safetensors  ranges of fp32 state that rank 0 owned when it saved, and so on, a file a rank
    index.json               facts about the checkpoint, and the place of each range of each tensor
    manifest.json            length and checksum of every other file; written last

It holds *logical* (unsharded, unpadded) tensors and knows no rank: any reader puts the ranges together again.
A folder without a valid manifest is not a checkpoint. Nothing is pickled. JSON files are UTF-8 without
duplicate fields, and without fields other than these:

index.json
    format_version  1; a reader refuses what is newer than itself
    step            optimizer steps done
    samples         training samples consumed: the position in the data
    tokens          training tokens consumed
    model           the `model` section of the configuration, the activation among it
    scales          {projection: τ}, for example {"blocks.0.ffn": 48.0}; never recomputed from token counts
    growth_history  list of objects, oldest first, one for each growth (see `megatron_tf.growth.source.growth_entry`)
    data            fingerprint of the training data, an object of the data package
    trackers        {tracker: id of the run there}
    run             further state of the run that saved, such as the loss scaler; an object of the training package
    adam_steps      {tensor: [[start, stop, steps], ...]}: how many times the optimizer has updated these elements; rows
                    that growth has added are younger than the others. Covers every tensor that has more than its weight
    tensors         {tensor: {"shape": [...], "states": {state: {"dtype": "float32", "pieces": [...]}}}}
                    state: "weight" (fp32 master), and the states that the optimizer declares, by its names for them,
                    such as AdamW's "exp_avg" and "exp_avg_sq"; each tensor has the same states
                    piece: [start, stop, file, key], elements [start, stop) of the flattened tensor are the flat
                    tensor `key` of `file`; the pieces of a state hold each of its elements exactly once

manifest.json
    format_version  1
    token           random text of the save attempt that wrote the folder
    files           {name: {"bytes": length, "xxh3_128": 32 hexadecimal digits}}, every file of the folder but this one;
                    a checksum against damage, many times faster than a disk, not a seal against forgery

shard_NNNNN.safetensors: the safetensors format; flat float32 little-endian tensors, one a piece,
    with the keys "<tensor>/<state>/<start>"

While a save is under way, the folder is called `.tmp-step_00001000-<token>` and holds for each rank also
shard_NNNNN.json, the rank's part, which is deleted when the index has been written from all parts:
    rank    of the writer
    error   null, or why this rank could not write; then the other fields are empty
    file    null (this rank owned nothing) or the name of its shard, with its `bytes` and `xxh3_128`
    pieces  [[tensor, state, start, stop, key], ...]
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_tf.checkpoint.records import record_problems
from megatron_tf.checkpoint.strict_json import MOST, Fields, parse_object
from megatron_tf.errors import CheckpointError, shown
from megatron_tf.state.optimizer_states import STATES, WEIGHT, declared_states
from megatron_tf.state.ranges import StepRange, coverage_problems

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
MANIFEST_NAME = "manifest.json"
DTYPE = "float32"
BYTES_PER_ELEMENT = 4
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # never a path: a checkpoint only names files of its own folder
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_LONGEST_NAME = 512  # of a tensor or projection
_MOST_DIMENSIONS = 8


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def shard_name(rank: int) -> str:
    return f"shard_{rank:05d}.safetensors"


def part_name(rank: int) -> str:
    return f"shard_{rank:05d}.json"


@dataclass(frozen=True)
class StoredPiece:
    """Elements [start, stop) of a flattened tensor are the flat tensor `key` of the file `file`."""

    start: int
    stop: int
    file: str
    key: str


@dataclass(frozen=True)
class StoredTensor:
    """`shape`: logical shape.  `states`: the pieces of each state, in ascending order; empty before a save."""

    shape: tuple[int, ...]
    states: Mapping[str, tuple[StoredPiece, ...]]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def expected_tensors(shapes: Mapping[str, tuple[int, ...]], states: Iterable[str] = STATES) -> dict[str, StoredTensor]:
    """The tensors that a save must contain, each with all of `states` and without pieces yet."""
    return {name: StoredTensor(tuple(shape), {state: () for state in states}) for name, shape in shapes.items()}


@dataclass(frozen=True)
class CheckpointIndex:
    """index.json. The module's docstring describes each field."""

    step: int
    samples: int
    tokens: int
    model: Mapping[str, Any]
    scales: Mapping[str, float]
    tensors: Mapping[str, StoredTensor]
    adam_steps: Mapping[str, tuple[StepRange, ...]]
    growth_history: tuple[Mapping[str, Any], ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    trackers: Mapping[str, str] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def with_pieces(self, pieces: Mapping[tuple[str, str], Iterable[StoredPiece]]) -> CheckpointIndex:
        """The same index with the pieces of every (tensor, state) filled in, in ascending order."""
        tensors = {
            name: replace(
                tensor,
                states={
                    state: tuple(sorted(pieces.get((name, state), ()), key=lambda piece: piece.start))
                    for state in tensor.states
                },
            )
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    @property
    def states(self) -> tuple[str, ...]:
        """The states that every tensor has."""
        kept = [tensor.states for tensor in self.tensors.values()]
        return tuple(state for state in (kept[0] if kept else ()) if all(state in states for states in kept))

    def problems(self) -> list[str]:
        """A problem for each state, and for the step counts, in which an element is missing or there twice."""
        problems = []
        for name, tensor in self.tensors.items():
            for state, pieces in tensor.states.items():
                for problem in coverage_problems(tensor.numel, [(piece.start, piece.stop) for piece in pieces]):
                    problems.append(f"{name}, {state}: {problem}")
            if tensor.states.keys() - {WEIGHT}:
                ranges = [(start, stop) for start, stop, _ in self.adam_steps.get(name, ())]
                for problem in coverage_problems(tensor.numel, ranges):
                    problems.append(f"{name}, adam_steps: {problem}")
        for name in self.adam_steps:
            if name not in self.tensors:
                problems.append(f"{name}, adam_steps: there is no such tensor")
        return problems

    def to_json(self) -> bytes:
        value = {
            "format_version": self.format_version,
            "step": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "model": dict(self.model),
            "scales": dict(self.scales),
            "growth_history": [dict(entry) for entry in self.growth_history],
            "data": dict(self.data),
            "trackers": dict(self.trackers),
            "run": dict(self.run),
            "adam_steps": {name: [list(entry) for entry in entries] for name, entries in self.adam_steps.items()},
            "tensors": {
                name: {
                    "shape": list(tensor.shape),
                    "states": {
                        state: {"dtype": DTYPE, "pieces": [[p.start, p.stop, p.file, p.key] for p in pieces]}
                        for state, pieces in tensor.states.items()
                    },
                }
                for name, tensor in self.tensors.items()
            },
        }
        return encode(INDEX_NAME, value)

    @classmethod
    def from_json(cls, file: str, text: bytes) -> CheckpointIndex:
        """Parse index.json; anything malformed is a CheckpointError that names `file` and the field."""
        fields = parse_object(file, text)
        _check_version(fields)
        fields.only(*cls.__dataclass_fields__)
        trackers, scales, steps = fields.object("trackers"), fields.object("scales"), fields.object("adam_steps")
        index = cls(
            step=fields.integer("step"),
            samples=fields.integer("samples"),
            tokens=fields.integer("tokens"),
            model=fields.plain("model"),
            scales={_name(scales, name): scales.positive(name) for name in scales},
            tensors={_name(tensor, name): _parse_tensor(tensor) for name, tensor in fields.objects("tensors")},
            adam_steps={name: _parse_steps(steps, name) for name in steps},
            growth_history=fields.plain_objects("growth_history"),
            data=fields.plain("data"),
            trackers={name: trackers.text(name) for name in trackers},
            run=fields.plain("run"),
        )
        records = record_problems(index.growth_history, index.data, index.run, index.tokens, complete=False)
        if problems := [*index.problems(), *records]:
            raise CheckpointError(f"{file}: " + "; ".join(problems))
        return index


@dataclass(frozen=True)
class StoredFile:
    num_bytes: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json. The module's docstring describes each field."""

    token: str
    files: Mapping[str, StoredFile]

    def to_json(self) -> bytes:
        files = {name: {"bytes": entry.num_bytes, "xxh3_128": entry.checksum} for name, entry in self.files.items()}
        return encode(MANIFEST_NAME, {"format_version": FORMAT_VERSION, "token": self.token, "files": files})

    @classmethod
    def from_json(cls, file: str, text: bytes) -> Manifest:
        fields = parse_object(file, text)
        _check_version(fields)
        fields.only("format_version", "token", "files")
        files = {}
        for name, entry in fields.objects("files"):
            if not _FILE_NAME.fullmatch(name):
                raise fields.error("files", f"holds {shown(name)}, which is not a file name")
            entry.only("bytes", "xxh3_128")
            files[name] = StoredFile(entry.integer("bytes"), _parse_checksum(entry))
        if INDEX_NAME not in files:
            raise fields.error("files", f"has no {INDEX_NAME}")
        return cls(fields.text("token"), files)


@dataclass(frozen=True)
class RankContribution:
    """What one rank contributes to a save: its shard and the (tensor, state, start, stop, key) in it, or an error."""

    rank: int
    error: str | None = None
    file: str | None = None
    num_bytes: int = 0
    checksum: str = ""
    pieces: tuple[tuple[str, str, int, int, str], ...] = ()

    def to_json(self) -> bytes:
        value = {
            "format_version": FORMAT_VERSION,
            "rank": self.rank,
            "error": self.error,
            "file": self.file,
            "bytes": self.num_bytes,
            "xxh3_128": self.checksum,
            "pieces": [list(piece) for piece in self.pieces],
        }
        return encode(part_name(self.rank), value)

    @classmethod
    def from_json(cls, file: str, text: bytes) -> RankContribution:
        fields = parse_object(file, text)
        _check_version(fields)
        pieces = []
        for entry in fields.array("pieces"):
            if not isinstance(entry, list) or [type(value) for value in entry] != [str, str, int, int, str]:
                raise fields.error("pieces", f"holds {shown(entry)}, expected [tensor, state, start, stop, key]")
            pieces.append(tuple(entry))
        return cls(
            rank=fields.integer("rank"),
            error=fields.optional_text("error"),
            file=fields.optional_text("file"),
            num_bytes=fields.integer("bytes"),
            checksum=fields.text("xxh3_128"),
            pieces=tuple(pieces),
        )


def encode(file: str, value: Any) -> bytes:
    """JSON bytes. NaN and infinity are refused, because they have no JSON form and the file could not be read."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: holds a value that JSON cannot express ({error})") from error


def _check_version(fields: Fields) -> None:
    version = fields.integer("format_version", minimum=1)
    if version > FORMAT_VERSION:
        raise fields.error(
            "format_version",
            f"is {version}, this program reads up to {FORMAT_VERSION}. Use a newer version of megatron_tf",
        )


def _name(fields: Fields, name: str) -> str:
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise fields.error("", f"holds {shown(name)}, which is no name of a tensor")
    return name


def _parse_tensor(fields: Fields) -> StoredTensor:
    fields.only("shape", "states")
    states = {}
    for state, entry in fields.objects("states"):
        if state not in (known := (WEIGHT, *declared_states())):
            raise entry.error("", f"is an unknown state; known are {', '.join(known)}")
        entry.only("dtype", "pieces")
        if entry.text("dtype") != DTYPE:
            raise entry.error("dtype", f"is {shown(entry.text('dtype'))}, this format version stores {DTYPE} only")
        states[state] = tuple(_parse_piece(entry, piece) for piece in entry.array("pieces"))
    shape = fields.integers("shape", minimum=1)
    if len(shape) > _MOST_DIMENSIONS or math.prod(shape) > MOST:
        raise fields.error("shape", f"is {shown(list(shape))}, which is too large for a tensor")
    return StoredTensor(shape, states)


def _parse_piece(fields: Fields, value: Any) -> StoredPiece:
    if not isinstance(value, list) or [type(entry) for entry in value] != [int, int, str, str]:
        raise fields.error("pieces", f"holds {shown(value)}, expected [start, stop, file, key]")
    piece = StoredPiece(*value)
    if not 0 <= piece.start < piece.stop <= MOST:
        start, stop = shown(piece.start), shown(piece.stop)
        raise fields.error("pieces", f"holds [{start}, {stop}), which is not a range")
    if not _FILE_NAME.fullmatch(piece.file):
        raise fields.error("pieces", f"names {shown(piece.file)}, which is not a file name")
    return piece


def _parse_steps(fields: Fields, name: str) -> tuple[StepRange, ...]:
    entries = fields.array(name)
    for entry in entries:
        if not isinstance(entry, list) or [type(value) for value in entry] != [int, int, int] or min(entry) < 0:
            raise fields.error(name, f"holds {shown(entry)}, expected [start, stop, steps], none below 0")
        if max(entry) > MOST:
            raise fields.error(name, f"holds {shown(entry)}, expected none above {MOST}")
    return tuple(tuple(entry) for entry in entries)


def _parse_checksum(fields: Fields) -> str:
    value = fields.text("xxh3_128")
    if not _CHECKSUM.fullmatch(value):
        raise fields.error("xxh3_128", f"is {shown(value)}, expected 32 hexadecimal digits")
    return value
