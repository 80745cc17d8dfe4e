from __future__ import annotations

import os

import pytest

from megatron_tf.checkpoint.format import INDEX_NAME, MANIFEST_NAME, shard_name
from megatron_tf.checkpoint.manager import find_latest, prune, resolve
from megatron_tf.errors import CheckpointError


@pytest.fixture
def three(sandbox):
    return [sandbox.saved(step=step, seed=step) for step in (10, 20, 30)]


def test_the_newest_by_content_whatever_its_name(sandbox, three):
    renamed = three[2].rename(sandbox.root / "best")
    assert find_latest(sandbox.root, verify=True) == (renamed, [])


def test_a_missing_or_empty_folder_has_none(tmp_path):
    assert find_latest(tmp_path / "missing", verify=True) == (None, [])
    assert find_latest(tmp_path, verify=True) == (None, [])


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
    import shutil

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


def test_resolve_says_why_there_is_none(sandbox, three, tmp_path):
    for path in three:
        damage_manifest(path)
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint:\n(.*has no manifest.json.*\n?){3}"):
        resolve(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        resolve(tmp_path / "missing")


def test_prune_keeps_the_newest(sandbox, three):
    assert prune(sandbox.root, 2) == [three[0]]
    assert sandbox.entries() == [three[1].name, three[2].name]
    assert prune(sandbox.root, 2) == []


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


def test_prune_trusts_what_this_process_has_written(sandbox, three, monkeypatch):
    from megatron_tf.checkpoint.reader import CheckpointReader

    monkeypatch.setattr(CheckpointReader, "verify", lambda *_: pytest.fail("read it again"))
    assert prune(sandbox.root, 1, known_good=[three[2]]) == [three[1], three[0]]


def test_a_deletion_that_is_cut_off_leaves_no_broken_checkpoint(sandbox, three, monkeypatch):
    import shutil

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
