"""Damage to the checkpoint in a folder, and files that the system does not give out."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_tf.checkpoint.format import INDEX_NAME, MANIFEST_NAME, shard_name


def damage_manifest(path):
    (path / MANIFEST_NAME).unlink()


def damage_index(path):
    (path / INDEX_NAME).write_text("{}")


def damage_size(path):
    os.truncate(path / shard_name(0), 100)


def damage_presence(path):
    (path / shard_name(0)).unlink()


def damage_version(path):
    (path / MANIFEST_NAME).write_text('{"format_version": 2}')


def refuse(monkeypatch, folder, name, number):
    """The system does not give out a file. By the calls that read it, since root may read whatever its mode says."""

    def refusing(call):
        def refused(path, *arguments, **options):
            if str(path) == str(folder / name):
                raise OSError(number, os.strerror(number), str(path))
            return call(path, *arguments, **options)

        return refused

    monkeypatch.setattr("builtins.open", refusing(open))
    monkeypatch.setattr(Path, "read_bytes", refusing(Path.read_bytes))
