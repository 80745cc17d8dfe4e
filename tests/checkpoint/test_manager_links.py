"""Links among checkpoints: they are followed, and one to nowhere is named."""

from __future__ import annotations

import pytest

from megatron_tf.checkpoint.format import MANIFEST_NAME, shard_name
from megatron_tf.checkpoint.manager import clear_leftovers, find_latest, prune, resolve
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.errors import CheckpointError, UnreadableError


def moved(path, elsewhere):
    """The checkpoint on other storage, and a link in its place; returns where it lies."""
    elsewhere.mkdir(exist_ok=True)
    path.rename(elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)
    return elsewhere / path.name


def test_a_link_is_followed(sandbox, three, tmp_path):
    moved(three[2], tmp_path / "storage")
    assert find_latest(sandbox.root, verify=True) == (three[2], [])
    assert resolve(tmp_path) == resolve(three[2]) == three[2]
    linked = tmp_path / "linked"
    linked.symlink_to(sandbox.root)
    assert resolve(linked) == linked / three[2].name


@pytest.mark.parametrize("name", ["step_00000030", "best"])
def test_a_link_that_leads_nowhere_is_refused_by_name(tmp_path, name):
    for target in ("nowhere", name):  # missing, and in a circle
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(target)
        with pytest.raises(UnreadableError, match=f"{name}: is a link to {target},.*move it away"):
            find_latest(tmp_path, verify=True)


def test_of_links_that_lead_nowhere_only_a_newer_one_is_in_the_way(sandbox, three):
    stale = {"best": "step_00000005", "mine": "gone", "step_00000025": "/not/mounted/step_00000025"}
    for name, target in stale.items():
        (sandbox.root / name).symlink_to(target)
    path, skipped = find_latest(sandbox.root, verify=True)
    assert path == three[2] and {link.name for link, _ in skipped} == set(stale)
    assert all(f"{link}: is a link to {stale[link.name]}, and nothing is there" == why for link, why in skipped)
    newer = sandbox.root / "newer"
    newer.symlink_to("/not/mounted/step_00000040")
    with pytest.raises(UnreadableError, match="newer: is a link to /not/mounted/step_00000040"):
        find_latest(sandbox.root, verify=True)


def test_a_shard_and_a_manifest_may_be_links_and_one_to_nowhere_is_named(sandbox, three, tmp_path):
    for name in (shard_name(0), MANIFEST_NAME):
        moved(three[2] / name, tmp_path / "storage")
    assert find_latest(sandbox.root, verify=True) == (three[2], [])
    (tmp_path / "storage" / shard_name(0)).unlink()
    with pytest.raises(UnreadableError, match=f"{shard_name(0)} is a link to .*, and nothing is there"):
        find_latest(sandbox.root, verify=True)


def test_a_folder_behind_a_link_that_leads_nowhere_is_not_an_empty_one(tmp_path):
    run = tmp_path / "run"
    run.symlink_to(tmp_path / "unmounted")
    for work in (
        lambda: find_latest(run / "checkpoints", verify=True),
        lambda: resolve(run),
        lambda: resolve(run / "a"),
    ):
        with pytest.raises(CheckpointError, match="is a link to .*unmounted, and nothing is there"):
            work()


def test_prune_deletes_links_and_never_what_they_lead_to(sandbox, three, tmp_path):
    kept = moved(three[0], tmp_path / "storage")
    assert prune(sandbox.root, 1) == [three[1], three[0]]
    assert sandbox.entries() == [three[2].name]
    assert open_checkpoint(kept).index.step == 10


def test_a_checkpoint_that_is_reached_twice_is_one(sandbox, three):
    (sandbox.root / "latest").symlink_to(three[2].name)
    (sandbox.root / "first").symlink_to(three[0])
    (sandbox.root / "round").symlink_to("round")
    assert [path.name for path, _ in find_latest(sandbox.root, verify=True)[1]] == ["round"]
    assert prune(sandbox.root, 2) == [three[0]]
    assert sandbox.entries() == ["latest", "round", three[1].name, three[2].name]


def test_leftovers_may_be_links(sandbox, three, tmp_path):
    for name in (".tmp-step_00000010-deleted", ".failed-step_00000010-a", ".old-step_00000020-a"):
        (sandbox.root / name).symlink_to(tmp_path / "nowhere")
        (sandbox.root / f"{name}-b").symlink_to(three[0])
    clear_leftovers(sandbox.root)
    assert sandbox.entries() == [path.name for path in three]
    assert open_checkpoint(three[0]).index.step == 10
