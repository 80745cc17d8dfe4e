"""What is deleted of a folder of checkpoints, and what stays."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from damaged_checkpoints import (
    damage_index,
    damage_manifest,
    damage_presence,
    damage_size,
    damage_version,
    refuse,
)

from megatron_tf.checkpoint.format import MANIFEST_NAME, shard_name
from megatron_tf.checkpoint.manager import clear_leftovers, find_latest, prune
from megatron_tf.checkpoint.moments import resolve_at
from megatron_tf.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_tf.errors import CheckpointError


def test_prune_keeps_the_newest(sandbox, three):
    assert prune(sandbox.root, 2) == [three[0]]
    assert sandbox.entries() == [three[1].name, three[2].name]
    assert prune(sandbox.root, 2) == []


def test_a_step_that_was_set_aside_is_not_kept_in_place_of_another(sandbox, three):
    aside = sandbox.root / f".old-{three[2].name}-abcd"
    shutil.copytree(three[2], aside)
    assert three[0] in prune(sandbox.root, 2)
    assert three[1].exists() and three[2].exists()


def test_what_a_decay_began_with_stays_and_is_found(sandbox, tmp_path):
    kept = sandbox.saved(step=10, run={"before_decay": True})
    others = [sandbox.saved(step=step) for step in (20, 30)]
    assert prune(sandbox.root, 1) == [others[0]]
    assert resolve_at(tmp_path, "before_decay") == resolve_at(kept, "before_decay") == kept
    assert resolve_at(tmp_path, "end") == others[1]
    with pytest.raises(CheckpointError, match="step 30, with .* of step 10: give .*checkpoints, or begin here"):
        resolve_at(others[1], "before_decay")
    shutil.rmtree(kept)
    for path in (tmp_path, others[1]):
        with pytest.raises(CheckpointError, match="checkpoints of step 30, and a decay began with none of them"):
            resolve_at(path, "before_decay")


@pytest.mark.parametrize("damage", [damage_manifest, damage_index, damage_size, damage_presence, damage_version])
def test_prune_does_not_count_a_broken_one(sandbox, three, damage):
    damage(three[2])
    assert prune(sandbox.root, 1) == [three[0]]
    assert sandbox.entries() == [three[1].name, three[2].name], "the damaged one stays for the user to see"


def test_prune_never_deletes_the_last_good_one_because_of_a_flipped_byte(sandbox, three, flip):
    flip(three[2] / shard_name(0), -1)
    flip(three[1] / shard_name(0), -1)
    assert prune(sandbox.root, 1) == []
    assert find_latest(sandbox.root, verify=True)[0] == three[0]


def test_prune_reads_nothing_twice(sandbox, three, monkeypatch):
    known = {three[2].resolve(): True}
    assert prune(sandbox.root, 2, known) == [three[0]]
    assert known == {three[2].resolve(): True, three[1].resolve(): True}
    monkeypatch.setattr(CheckpointReader, "verify", lambda *_: pytest.fail("read it again"))
    assert prune(sandbox.root, 2, known) == []
    assert prune(sandbox.root, 1, known) == [three[1]]
    assert known == {three[2].resolve(): True}


def test_prune_remembers_what_is_damaged(sandbox, three, monkeypatch, flip):
    flip(three[2] / shard_name(0), -1)
    known = {}
    assert prune(sandbox.root, 2, known) == []
    monkeypatch.setattr(CheckpointReader, "verify", lambda *_: pytest.fail("read it again"))
    assert prune(sandbox.root, 1, known) == [three[0]]


def test_prune_neither_counts_nor_deletes_an_unreadable_one(sandbox, three, monkeypatch):
    refuse(monkeypatch, three[2], MANIFEST_NAME, errno.EIO)
    assert prune(sandbox.root, 1) == [three[0]]
    assert sandbox.entries() == [three[1].name, three[2].name]


def test_leftovers_go_and_what_was_set_aside_returns(sandbox, three):
    aside = three[2].rename(sandbox.root / ".old-step_00000030-token")
    shutil.copytree(three[1], sandbox.root / ".old-step_00000020-token")
    three[0].rename(sandbox.root / ".tmp-step_00000010-deleted")
    (sandbox.root / ".failed-step_00000010-token").write_text("why")
    (sandbox.root / ".tmp-probe").write_text("a file")
    (sandbox.root / ".tmp-step_00000040-under-way").mkdir()
    (sandbox.root / "notes").mkdir()
    clear_leftovers(sandbox.root, but="under-way")
    assert not aside.exists()
    assert sandbox.entries() == [".tmp-step_00000040-under-way", "notes", "step_00000020", "step_00000030"]
    assert open_checkpoint(three[2]).index.step == 30
    clear_leftovers(sandbox.root / "missing")


def test_a_deletion_that_is_cut_off_leaves_no_broken_checkpoint(sandbox, three, monkeypatch):
    def cut_off(path, **options):
        if not options:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        prune(sandbox.root, 2)
    monkeypatch.undo()
    assert find_latest(sandbox.root, verify=True) == (three[2], [])
    sandbox.saved(step=40)
    assert not any(name.startswith(".") for name in sandbox.entries())


@pytest.fixture
def undeletable(monkeypatch):
    """Files called .nfs... are busy, as those of NFS that somebody holds open."""
    unlink = os.unlink

    def busy(path, *arguments, **options):
        if Path(os.fsdecode(path)).name.startswith(".nfs"):
            raise OSError(errno.EBUSY, "Device or resource busy", path)
        unlink(path, *arguments, **options)

    monkeypatch.setattr(os, "unlink", busy)


def test_what_cannot_be_deleted_is_reported_and_everything_else_goes(sandbox, three, undeletable):
    (three[0] / ".nfs0001").write_text("held open")
    problems = []
    assert prune(sandbox.root, 1, report=problems.append) == [three[1], three[0]]
    (problem,) = problems
    assert f"{three[0]} cannot be deleted: Device or resource busy" in problem
    (left,) = sandbox.root.glob(".tmp-*")
    assert sandbox.entries() == [left.name, three[2].name] and os.listdir(left) == [".nfs0001"]

    assert prune(sandbox.root, 1, report=problems.append) == [] and len(problems) == 1
    clear_leftovers(sandbox.root, report=problems.append)
    assert len(problems) == 2 and f"{left} cannot be deleted" in problems[1]
    sandbox.saved(step=40)
    assert prune(sandbox.root, 1, report=problems.append) == [three[2]] and len(problems) == 2


def test_what_cannot_even_be_renamed_stays_and_is_reported(sandbox, three, monkeypatch):
    rename = os.rename

    def refused(source, target):
        if Path(source) == three[0]:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    problems = []
    assert prune(sandbox.root, 1, report=problems.append) == [three[1]]
    assert len(problems) == 1 and f"{three[0]} cannot be deleted: Operation not permitted" in problems[0]
