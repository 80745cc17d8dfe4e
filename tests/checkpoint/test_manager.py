"""Finding the checkpoint that a folder stands for."""

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

from megatron_tf.checkpoint import manager
from megatron_tf.checkpoint.format import INDEX_NAME, MANIFEST_NAME, shard_name
from megatron_tf.checkpoint.manager import find_latest, prune, resolve, verify_checkpoint
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.errors import CheckpointError, DamagedError, UnreadableError


def test_the_newest_by_content_whatever_its_name(sandbox, three):
    renamed = three[2].rename(sandbox.root / "best")
    assert find_latest(sandbox.root, verify=True) == (renamed, [])


def test_a_missing_or_empty_folder_has_none(tmp_path):
    assert find_latest(tmp_path / "missing", verify=True) == (None, [])
    assert find_latest(tmp_path, verify=True) == (None, [])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_manifest, "has no manifest.json"),
        (damage_index, "index.json has 2 bytes"),
        (damage_size, "has 100 bytes"),
        (damage_presence, "shard_00000.safetensors is missing"),
        (damage_version, "format_version is 2"),
    ],
)
def test_the_broken_one_is_named_and_the_older_used(sandbox, three, damage, reason):
    damage(three[2])
    path, [(skipped, why)] = find_latest(sandbox.root, verify=False)
    assert (path, skipped) == (three[1], three[2])
    assert reason in why


def test_a_flipped_byte_is_seen_only_when_verifying(sandbox, three, flip):
    flip(three[2] / shard_name(0), -1)
    assert find_latest(sandbox.root, verify=False) == (three[2], [])
    path, [(skipped, why)] = find_latest(sandbox.root, verify=True)
    assert (path, skipped) == (three[1], three[2]) and "damaged" in why


def test_all_broken(sandbox, three):
    for path in three:
        damage_manifest(path)
    path, skipped = find_latest(sandbox.root, verify=True)
    assert path is None and len(skipped) == 3


def test_unfinished_and_foreign_folders_are_no_checkpoints(sandbox, three):
    three[2].rename(sandbox.root / ".tmp-step_00000030-token")
    (sandbox.root / "plots").mkdir()
    (sandbox.root / "step_notes.txt").write_text("")
    assert find_latest(sandbox.root, verify=True) == (three[1], [])


def test_a_folder_set_aside_counts_until_its_successor_is_there(sandbox):
    path = sandbox.saved(step=30)
    aside = path.rename(sandbox.root / ".old-step_00000030-token")
    assert find_latest(sandbox.root, verify=True) == (aside, [])
    successor = sandbox.root / "step_00000030"
    shutil.copytree(aside, successor)
    assert find_latest(sandbox.root, verify=True) == (successor, [])


def test_resolve_takes_a_checkpoint_a_checkpoints_or_a_run_folder(tmp_path, sandbox, three):
    assert resolve(three[0]) == three[0]
    assert resolve(sandbox.root) == three[2]
    assert resolve(str(tmp_path)) == three[2]


def test_resolve_never_falls_back_from_a_checkpoint_that_was_named(three):
    damage_manifest(three[2])
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        resolve(three[2])


def test_resolve_warns_of_a_newer_one_that_is_broken(sandbox, three, tmp_path, capsys):
    """Once; of an older one that is broken nothing depends."""
    damage_manifest(three[0])
    damage_manifest(three[2])
    assert [resolve(tmp_path), resolve(sandbox.root)] == [three[1]] * 2
    found = capsys.readouterr().err
    assert found.count("warning: not used: ") == 1 and str(three[2]) in found and str(three[0]) not in found
    assert f"{three[1].name} is taken in its place" in found


def test_resolve_says_why_there_is_none(sandbox, three, tmp_path):
    for path in three:
        damage_manifest(path)
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint:\n(.*has no manifest.json.*\n?){3}"):
        resolve(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        resolve(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="/dev/null: is no folder"):
        resolve("/dev/null")


@pytest.mark.parametrize("moment", ["_entries", "open_checkpoint"])
def test_a_run_that_saves_and_deletes_old_ones_meanwhile(sandbox, three, monkeypatch, moment):
    """After the folder was listed, and before its checkpoints are opened."""

    def then_saved(*arguments):
        found = look(*arguments) if moment == "_entries" else None
        for _ in once:
            sandbox.saved(step=40)
            assert prune(sandbox.root, 1) == three[::-1]
        return found or look(*arguments)

    look, once = getattr(manager, moment), iter([None])
    monkeypatch.setattr(manager, moment, then_saved)
    assert resolve(sandbox.root).name == "step_00000040"


@pytest.mark.parametrize("name", ["not_a_folder/step_00000050", "step_00000050"])
def test_a_folder_that_lists_what_cannot_be_reached(sandbox, three, monkeypatch, name):
    """As a file system does that has lost its server: what else is there is found."""
    (sandbox.root / "not_a_folder").touch()
    look = manager._entries
    monkeypatch.setattr(manager, "_entries", lambda root: [*look(root), root / name])
    assert resolve(sandbox.root) == three[-1]


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_called_damaged(three):
    reader = open_checkpoint(three[0])
    shutil.rmtree(three[0])
    (name, state), *_ = reader._maps
    for read in (reader.verify, lambda: reader.read(name, state, 0, 1), lambda: open_checkpoint(three[0])):
        with pytest.raises(CheckpointError, match="is no longer there. A run deletes its older checkpoints") as refused:
            read()
        assert not isinstance(refused.value, DamagedError)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", [MANIFEST_NAME, INDEX_NAME, shard_name(0)])
def test_an_unreadable_newest_checkpoint_is_an_error_and_not_passed_over(sandbox, three, monkeypatch, name, number):
    refuse(monkeypatch, three[2], name, number)
    with pytest.raises(UnreadableError, match=rf"step_00000030.*{name}.*{os.strerror(number)}.*move it away"):
        find_latest(sandbox.root, verify=True)


def test_an_unreadable_older_checkpoint_does_not_matter(sandbox, three, monkeypatch):
    refuse(monkeypatch, three[1], MANIFEST_NAME, errno.EACCES)
    assert find_latest(sandbox.root, verify=True) == (three[2], [])
    (three[2] / MANIFEST_NAME).write_text("{}")
    with pytest.raises(UnreadableError, match="step_00000020.*Permission denied"):
        find_latest(sandbox.root, verify=True)


def test_what_a_user_names_and_the_system_does_not_give_out_has_a_remedy(three, monkeypatch):
    remedy = "Make it readable, or give another folder"
    with monkeypatch.context() as patch:
        refuse(patch, three[2], INDEX_NAME, errno.EACCES)
        for look in (resolve, verify_checkpoint):
            with pytest.raises(UnreadableError, match=rf"step_00000030.*Permission denied.*\. {remedy}"):
                look(three[2])

    def no_look(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_dir", no_look)
    with pytest.raises(UnreadableError, match=rf"^{three[2]}: Permission denied\. {remedy}"):
        resolve(three[2])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_missing_permissions_are_named(sandbox, three):
    three[2].chmod(0)
    try:
        with pytest.raises(UnreadableError, match="Permission denied"):
            find_latest(sandbox.root, verify=False)
    finally:
        three[2].chmod(0o755)


def test_a_folder_of_somebody_else_need_not_be_readable(sandbox, three, monkeypatch):
    (sandbox.root / "lost+found").mkdir()
    exists = Path.exists

    def refused(path):
        if path.parent.name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refused)
    assert find_latest(sandbox.root, verify=True) == (three[2], [])
