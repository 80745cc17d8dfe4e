"""Hostile changes to JSON, and to the files of a checkpoint with their checksums made right again."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch

from megatron_tf.checkpoint.format import INDEX_NAME, MANIFEST_NAME
from megatron_tf.checkpoint.shards import file_checksum

_RAW = "@raw:"
# What the JSON writer of Python would not write, put in by hand.
RAW = ("NaN", "-Infinity", "1e999", "9" * 5000, "[" * 400_000, "[" * 300 + "]" * 300, '{"a": 1, "a": 2}',
       r'"\ud800"', '"\\', "0x10", "tru")  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 1.5, 2**31, 2**53 + 1, 2**63, -(2**70), 10**30, 10**320, 1e308, -1e-320, "", "x",
    "12",
    "y" * 100_000, "../../escape", "/dev/zero", "a\0b", "\U0001f600\x1b[2J", [], {}, [[]], [1, 2], {"a": {"b": 1}},
    {"qkv": 10**9, "proj": 1, "ffn": 1}, [[0, 1, 2]], list(range(2000)), *(f"{_RAW}{raw}" for raw in RAW),
)  # fmt: skip


# What a pickle of torch can hold where weights are expected.
OBJECTS: tuple[Any, ...] = (
    *VALUES[:27], 10**5000, (), (1, 2), {1: 2}, float("nan"), torch.zeros(0), torch.tensor(1.0), torch.full((5, 8),
                                                                                                            torch.inf),
    torch.zeros(1).expand(2**30, 2**20), torch.zeros(5, 8, dtype=torch.complex64), torch.zeros(5, 8).to_sparse(),
    torch.ones(5, 8, dtype=torch.int8), torch.empty(5, 8, device="meta"), torch.zeros(5, 8).bfloat16(), torch.Size((-1,
                                                                                                                    8)),
    torch.Size((2**32, 2**32)), torch.nn.Parameter(torch.zeros(5, 8)),
)  # fmt: skip


def mutated(value: Any, chance: random.Random, values: tuple[Any, ...] = VALUES) -> Any:
    """A copy of JSON `value`, changed in one place; fields near the top are as likely as the many deep below.

    `values`: what is put in.
    """
    value = copy.deepcopy(value)
    holder, key = value, _pick(value, chance)
    while key is not None and isinstance(holder[key], (dict, list)) and holder[key] and chance.random() < 0.8:
        holder = holder[key]
        key = _pick(holder, chance)
    if key is None:
        return chance.choice(values)
    action = chance.choice(("replace", "replace", "replace", "delete", "rename", "add", "copy", "number", "repeat"))
    old = holder[key]
    if action == "delete":
        del holder[key]
    elif action == "rename" and isinstance(holder, dict):
        holder[chance.choice(("x", "", "z" * 100_000, "../up", str(key) + " "))] = holder.pop(key)
    elif action == "add" and isinstance(holder, dict):
        holder[chance.choice(("x", "\U0001f600", "z" * 5000))] = chance.choice(values)
    elif action == "copy":
        holder[key] = copy.deepcopy(chance.choice(list(_inner(value))))
    elif action == "number" and type(old) in (int, float):
        holder[key] = chance.choice((-old, old + 1, old - 1, old * 2**20, old / 3, float(old), old + 2**62))
    elif action == "repeat" and isinstance(holder, list):
        holder.extend([old] * chance.choice((1, 3)))
    else:
        holder[key] = chance.choice(values)
    return value


def _pick(holder: Any, chance: random.Random) -> Any:
    if isinstance(holder, dict) and holder:
        return chance.choice(list(holder))
    return chance.randrange(len(holder)) if isinstance(holder, list) and holder else None


def _inner(value: Any) -> Any:
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _inner(inner)


def encoded(value: Any) -> bytes:
    """JSON, with what no JSON writer writes."""
    text = json.dumps(value)
    for raw in RAW:
        text = text.replace(json.dumps(f"{_RAW}{raw}"), raw)
    return text.encode()


def damaged(text: bytes, chance: random.Random) -> bytes:
    """Bytes that are no longer what they were, now and then no JSON at all."""
    place = chance.randrange(len(text) + 1)
    return chance.choice(
        (
            b"", b"\xff\xfe", b"\xef\xbb\xbf" + text, b"[" * 400_000, b"null", b"[1]", text[:place], text + text,
            text[:place] + bytes([chance.randrange(256)]) + text[place + 1 :],
            text[:place] + bytes([chance.randrange(256)]) + text[place:],
        )
    )  # fmt: skip


class Forger:
    """Changes a checkpoint in place, makes its manifest fit, and puts everything back."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.chance = folder, random.Random(seed)
        self._files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def forge(self) -> str:
        """One random change; returns what it was, for the message of a test that fails."""
        names = [INDEX_NAME] * 6 + [name for name in self._files if name != INDEX_NAME]
        name, whole = self.chance.choice(names), self.chance.random() < 0.1
        content = self._files[name]
        if name.endswith(".safetensors"):
            content = self._other_shard(content, whole)
        elif whole:
            content = damaged(content, self.chance)
        else:
            content = encoded(mutated(json.loads(content), self.chance))
        (self.folder / name).write_bytes(content)
        if name != MANIFEST_NAME:
            self.fit(name)
        return name

    def fit(self, name: str) -> None:
        """Make the manifest say what `name` is now."""
        manifest = json.loads((self.folder / MANIFEST_NAME).read_bytes())
        path = self.folder / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "xxh3_128": file_checksum(path)}
        (self.folder / MANIFEST_NAME).write_text(json.dumps(manifest))

    def restore(self) -> None:
        for name, content in self._files.items():
            (self.folder / name).write_bytes(content)

    def _other_shard(self, content: bytes, whole: bool) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header, data = content[8 : 8 + length], content[8 + length :]
        if whole:
            header = damaged(header, self.chance)
        elif self.chance.random() < 0.2:
            place = self.chance.randrange(len(data) - 4)
            data = (
                data[:place] + self.chance.choice((b"\xff" * 4, b"\0\0\xc0\x7f", b"\0\0\x80\x7f")) + data[place + 4 :]
            )
        else:
            header = encoded(mutated(json.loads(header), self.chance))
        length = len(header) if self.chance.random() < 0.95 else self.chance.choice((0, 1, 2**40, 2**63))
        return length.to_bytes(8, "little") + header + data
