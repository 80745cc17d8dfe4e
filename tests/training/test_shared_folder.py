"""Ranks that do not see one run folder find out before they train."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import spawn

from megatron_tf.errors import ConfigError, UserError
from megatron_tf.training import shared_folder
from megatron_tf.training.shared_folder import check_shared


def _rank(group, folder):
    is_main = group.rank == 0
    inside = folder / "made" / "checkpoints"
    for run_dir in (folder / "not" / "yet" / "there", folder / "made"):
        inside.mkdir(parents=True, exist_ok=True)
        check_shared(run_dir, is_main)
        assert not list(inside.iterdir()) and [path.name for path in folder.iterdir()] == ["made"] or not is_main
    if group.rank == 1:
        # As on a node with a disk of its own.
        shared_folder.Path.exists = lambda path: False
    with pytest.raises(UserError, match=r"run\.dir: .*made on \S+ is not the folder of rank 0, .* \(on rank 1\)$"):
        check_shared(folder / "made", is_main, 0.2)
    assert not is_main or not list(inside.iterdir())


def test_every_rank_sees_what_rank_0_writes(tmp_path):
    spawn(_rank, 2, tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ConfigError, match=rf"^run\.dir: cannot write to {tmp_path}: Permission denied\."):
        shared_folder._leave_mark(tmp_path / "new" / "run")
