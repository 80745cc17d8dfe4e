from __future__ import annotations

import copy
import errno
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from live import PATIENCE_SECONDS

from megatron_tf.checkpoint.format import INDEX_NAME, MANIFEST_NAME, shard_name
from megatron_tf.checkpoint.manager import Ranks, clear_leftovers, find_latest, prune, resolve, verify_checkpoint
from megatron_tf.checkpoint.moments import resolve_at
from megatron_tf.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_tf.errors import CheckpointError, DisagreementError, UnreadableError


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


def test_prune_keeps_the_newest(sandbox, three):
    assert prune(sandbox.root, 2) == [three[0]]
    assert sandbox.entries() == [three[1].name, three[2].name]
    assert prune(sandbox.root, 2) == []


def test_what_a_decay_began_with_stays_and_is_found(sandbox, tmp_path):
    kept = sandbox.saved(step=10, run={"before_decay": True})
    others = [sandbox.saved(step=step) for step in (20, 30)]
    assert prune(sandbox.root, 1) == [others[0]]
    assert resolve_at(tmp_path, "before_decay") == resolve_at(kept, "before_decay") == kept
    assert resolve_at(tmp_path, "end") == others[1]
    with pytest.raises(CheckpointError, match="checkpoints of step 30, and a decay began with none of them"):
        resolve_at(others[1], "before_decay")


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


def test_prune_neither_counts_nor_deletes_an_unreadable_one(sandbox, three, monkeypatch):
    refuse(monkeypatch, three[2], MANIFEST_NAME, errno.EIO)
    assert prune(sandbox.root, 1) == [three[0]]
    assert sandbox.entries() == [three[1].name, three[2].name]


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


class Meeting:
    """Threads that stand for ranks, and gather."""

    def __init__(self, size):
        self.size, self.barrier, self.values = size, threading.Barrier(size), [None] * size

    def ranks(self, rank):
        def gather(value):
            self.values[rank] = value
            self.barrier.wait(PATIENCE_SECONDS)
            gathered = copy.deepcopy(self.values)
            self.barrier.wait(PATIENCE_SECONDS)
            return gathered

        return Ranks(rank, self.size, gather)

    def everywhere(self, work):
        def one(rank):
            try:
                return work(self.ranks(rank))
            except CheckpointError as error:
                return error

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))


@pytest.fixture
def sharded(sandbox):
    """Two checkpoints of four shards each."""
    return [sandbox.save(sandbox.split(sandbox.state(step), 4, step), sandbox.index(step))[0] for step in (10, 20)]


def test_nodes_with_other_checkpoints_of_one_name(sandbox, sharded):
    """Each whole in itself: parts of both would make a model."""

    def gather(value):
        if not (isinstance(value, tuple) and len(value) == 3):
            return [value]
        own, _, content = value
        return [value, (own, "rank 1 (n2)", "0123456789ab" if content else content)]

    ranks = Ranks(gather=gather)
    for work in (
        lambda: find_latest(sandbox.root, verify=True, ranks=ranks),
        lambda: verify_checkpoint(sharded[1], ranks),
    ):
        with pytest.raises(DisagreementError) as error:
            work()
        said = str(error.value)
        assert (
            said.startswith(f"{sharded[1]}: the index of this checkpoint is ") and "0123456789ab on rank 1 (n2)" in said
        )


def test_ranks_share_the_reading(sandbox, sharded, monkeypatch):
    read, verify = [], CheckpointReader.verify

    def counted(self, files):
        read.extend(files)
        verify(self, files)

    monkeypatch.setattr(CheckpointReader, "verify", counted)
    assert (
        Meeting(3).everywhere(lambda ranks: find_latest(sandbox.root, verify=True, ranks=ranks))
        == [(sharded[1], [])] * 3
    )
    assert sorted(read) == [INDEX_NAME, *map(shard_name, range(4))]


@pytest.mark.parametrize("shard", range(4))
def test_what_one_rank_finds_damaged_all_pass_over(sandbox, sharded, flip, shard):
    flip(sharded[1] / shard_name(shard), -1)
    answers = Meeting(3).everywhere(lambda ranks: find_latest(sandbox.root, verify=True, ranks=ranks))
    for path, [(skipped, reason)] in answers:
        assert (path, skipped) == (sharded[0], sharded[1]) and f"{shard_name(shard)} is damaged" in reason
    errors = Meeting(3).everywhere(lambda ranks: verify_checkpoint(sharded[1], ranks))
    assert len(set(map(str, errors))) == 1 and f"{shard_name(shard)} is damaged" in str(errors[0])


def test_what_one_rank_cannot_read_stops_all(sandbox, sharded, monkeypatch):
    refuse(monkeypatch, sharded[1], shard_name(2), errno.EIO)
    errors = Meeting(2).everywhere(lambda ranks: find_latest(sandbox.root, verify=True, ranks=ranks))
    assert all(isinstance(error, UnreadableError) and shard_name(2) in str(error) for error in errors)


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
