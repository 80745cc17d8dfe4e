from __future__ import annotations

import errno
import os
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from live import PATIENCE_SECONDS

from megatron_tf.checkpoint.format import expected_tensors, part_name
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.writer import Piece, save_checkpoint
from megatron_tf.errors import CheckpointError


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32)


@pytest.mark.parametrize("seed", range(8))
def test_any_layout_is_written_and_any_range_read_bit_for_bit(sandbox, seed):
    rng = random.Random(seed)
    state, world_size = sandbox.state(seed), rng.randint(1, 5)
    paths = sandbox.save(sandbox.split(state, world_size, seed))
    assert paths == [sandbox.root / "step_00000010"] * world_size
    reader = open_checkpoint(paths[0])
    reader.verify()
    for _ in range(60):
        (name, kind), values = rng.choice(list(state.items()))
        start, stop = sorted(rng.choices(range(len(values) + 1), k=2))
        assert torch.equal(bits(reader.read(name, kind, start, stop)), bits(values[start:stop]))


def test_what_the_index_says_comes_back(sandbox):
    index = sandbox.index(trackers={"wandb": "id"}, run={"loss_scale": 2.0})
    (path,) = sandbox.save(sandbox.split(sandbox.state(), 1), index)
    read = open_checkpoint(path).index
    assert replace(read, tensors=index.tensors) == index


def test_the_folder_holds_only_what_the_manifest_lists(sandbox):
    path = sandbox.saved(world_size=3)
    listed = {*open_checkpoint(path).manifest.files, "manifest.json"}
    assert {file.name for file in path.iterdir()} == listed
    assert sandbox.entries() == [path.name]


def test_a_rank_that_owns_nothing_takes_part(sandbox):
    shares = [*sandbox.split(sandbox.state(), 1), []]
    path, other = sandbox.save(shares)
    assert path == other
    assert not (path / "shard_00001.safetensors").exists()


def test_empty_pieces_are_left_out(sandbox):
    (share,) = sandbox.split(sandbox.state(), 1)
    sandbox.save([[*share, Piece("final_norm.bias", "weight", 2, 2, torch.empty(0))]])
    open_checkpoint(sandbox.root / "step_00000010").verify()


def test_a_gap_is_named_and_nothing_is_published(sandbox):
    state = sandbox.state()
    short = {key: values[:3] if key == ("final_norm.bias", "exp_avg") else values for key, values in state.items()}
    results = sandbox.save(sandbox.split(short, 2))
    for result in results:
        assert isinstance(result, CheckpointError)
        assert "final_norm.bias, exp_avg: nothing holds [3, 5)" in str(result)
    assert not any(name.startswith(("step_", ".tmp")) for name in sandbox.entries())


def test_an_overlap_is_named_and_nothing_is_published(sandbox):
    shares = sandbox.split(sandbox.state(), 2)
    shares[1].append(Piece("embedding.weight", "weight", 4, 6, torch.zeros(2)))
    for result in sandbox.save(shares):
        assert "embedding.weight, weight: [4, 6) is held more than once" in str(result)
    assert not any(name.startswith(("step_", ".tmp")) for name in sandbox.entries())


def test_a_piece_that_nobody_expects_is_refused(sandbox):
    shares = sandbox.split(sandbox.state(), 1)
    shares[0].append(Piece("ghost", "weight", 0, 1, torch.zeros(1)))
    (result,) = sandbox.save(shares)
    assert isinstance(result, CheckpointError) and "rank 0 wrote ghost, weight" in str(result)


def test_incomplete_step_counts_are_refused(sandbox):
    (result,) = sandbox.save(sandbox.split(sandbox.state(), 1), sandbox.index(adam_steps={}))
    assert isinstance(result, CheckpointError) and "embedding.weight, adam_steps: nothing holds [0, 35)" in str(result)


def test_a_tensor_of_another_length_is_our_bug_and_reaches_every_rank(sandbox):
    shares = sandbox.split(sandbox.state(), 2)
    shares[1].append(Piece("final_norm.bias", "weight", 0, 5, torch.zeros(4)))
    first, second = sandbox.save(shares)
    assert isinstance(second, AssertionError)
    assert isinstance(first, CheckpointError) and "rank 1 could not save: AssertionError" in str(first)


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("point", ["start", "folder", "tensor", "shard"])
def test_a_full_disk_on_one_rank_fails_every_rank_with_its_reason(sandbox, failing, point):
    good = sandbox.saved(step=5)

    def at(rank: int, where: str) -> None:
        if (rank, where) == (failing, point):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    started = time.monotonic()
    results = sandbox.save(sandbox.split(sandbox.state(), 3, seed=1), at=at)
    assert time.monotonic() - started < PATIENCE_SECONDS, "a failure must not wait for a time-out"
    for result in results:
        assert isinstance(result, CheckpointError)
        assert f"rank {failing} could not save: No space left on device" in str(result)
    assert [name for name in sandbox.entries() if not name.startswith(".failed-")] == [good.name]
    open_checkpoint(good).verify()


@pytest.mark.parametrize("point", ["parts", "index", "manifest"])
def test_a_failure_while_publishing_fails_every_rank(sandbox, point):
    def at(rank: int, where: str) -> None:
        if where == point:
            raise OSError(errno.EIO, "the disk is broken")

    for result in sandbox.save(sandbox.split(sandbox.state(), 2), at=at):
        assert isinstance(result, CheckpointError) and "rank 0 could not save: the disk is broken" in str(result)
    assert not any(name.startswith(("step_", ".tmp")) for name in sandbox.entries())


def test_a_rank_that_fails_after_it_handed_over_takes_nothing_away(sandbox):
    """Rank 0 may be publishing that shard already, so a rank that gives up waiting must leave it alone."""

    def at(rank: int, where: str) -> None:
        if (rank, where) == (1, "part"):
            raise OSError(errno.EINTR, "gave up")

    path, other = sandbox.save(sandbox.split(sandbox.state(), 2), at=at)
    assert isinstance(other, CheckpointError)
    open_checkpoint(path).verify()


def test_the_save_after_a_failed_one_succeeds_and_cleans_up(sandbox):
    def at(rank: int, where: str) -> None:
        if where == "shard":
            raise OSError(errno.ENOSPC, "full")

    shares = sandbox.split(sandbox.state(), 2)
    assert all(isinstance(result, CheckpointError) for result in sandbox.save(shares, at=at))
    path, _ = sandbox.save(shares)
    assert sandbox.entries() == [path.name]


def test_a_place_that_cannot_be_written_is_named(tmp_path, sandbox):
    (tmp_path / "file").write_text("")
    sandbox.root = tmp_path / "file" / "checkpoints"
    for result in sandbox.save(sandbox.split(sandbox.state(), 2)):
        assert isinstance(result, CheckpointError)
        assert "could not save: Not a directory" in str(result) and str(tmp_path / "file") in str(result)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_folder_is_named(sandbox):
    sandbox.root.mkdir()
    sandbox.root.chmod(0o500)
    (result,) = sandbox.save(sandbox.split(sandbox.state(), 1))
    sandbox.root.chmod(0o700)
    assert isinstance(result, CheckpointError) and "Permission denied" in str(result)


def test_a_real_write_error_of_the_system(tmp_path):
    """The process may write files of 64 KiB at most, so the shard's write fails half way, as on a full disk."""
    import subprocess
    import sys

    script = f"""
import resource, signal, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.writer import Piece, save_checkpoint
from megatron_tf.errors import CheckpointError
index = CheckpointIndex(1, 1, 1, {{}}, {{}}, expected_tensors({{"a": (99999,)}}, ["weight"]), {{}})
piece = Piece("a", "weight", 0, 99999, torch.zeros(99999))
try:
    save_checkpoint({str(tmp_path / "ck")!r}, [piece], index, rank=0, world_size=1, token="t")
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert ": could not be saved: File too large" in done.stdout
    assert list((tmp_path / "ck").iterdir()) == [], "no other rank waits for a note"


def test_a_silent_rank_is_named_at_the_time_out(sandbox):
    (result,) = sandbox.save(sandbox.split(sandbox.state(), 1) + [[], []], timeout_seconds=0.2, ranks=[0])
    assert isinstance(result, CheckpointError) and "no word from rank 1, 2 before the time-out" in str(result)
    assert not any(name.startswith(("step_", ".tmp")) for name in sandbox.entries())


def test_a_rank_waits_for_rank_0_no_longer_than_the_time_out(sandbox):
    (result,) = sandbox.save(sandbox.split(sandbox.state(), 2), timeout_seconds=0.2, ranks=[1])
    assert isinstance(result, CheckpointError) and "no word from rank 0" in str(result)


def test_a_rank_that_starts_late_is_waited_for(sandbox):
    def at(rank: int, where: str) -> None:
        if (rank, where) == (2, "start"):
            time.sleep(0.3)

    assert len(set(sandbox.save(sandbox.split(sandbox.state(), 3), at=at))) == 1


def test_a_rank_that_starts_after_the_failure_learns_of_it(sandbox):
    failed = threading.Event()

    def at(rank: int, where: str) -> None:
        if (rank, where) == (0, "folder"):
            raise OSError(errno.EROFS, "read-only")
        if (rank, where) == (1, "start"):
            failed.wait(PATIENCE_SECONDS)

    shares = sandbox.split(sandbox.state(), 2)
    threading.Timer(0.3, failed.set).start()
    _, late = sandbox.save(shares, at=at)
    assert isinstance(late, CheckpointError) and "rank 0 could not save: read-only" in str(late)
    assert not any(name.startswith(".tmp") for name in sandbox.entries())


def test_a_folder_of_the_same_step_is_replaced(sandbox):
    sandbox.saved(seed=1)
    path = sandbox.saved(seed=2, world_size=2)
    values = sandbox.state(2)["final_norm.bias", "weight"]
    assert torch.equal(bits(open_checkpoint(path).read("final_norm.bias", "weight", 0, 5)), bits(values))
    assert sandbox.entries() == [path.name]


def test_a_broken_folder_of_the_same_step_is_replaced(sandbox):
    path = sandbox.saved()
    (path / "manifest.json").unlink()
    open_checkpoint(sandbox.saved()).verify()


def test_a_failure_while_replacing_leaves_the_old_one(sandbox):
    old = sandbox.saved(seed=1)

    def at(rank: int, where: str) -> None:
        if where == "set_aside":
            raise OSError(errno.EIO, "broken")

    (result,) = sandbox.save(sandbox.split(sandbox.state(2), 1), at=at)
    assert isinstance(result, CheckpointError)
    values = sandbox.state(1)["final_norm.bias", "weight"]
    assert torch.equal(bits(open_checkpoint(old).read("final_norm.bias", "weight", 0, 5)), bits(values))


def test_leftovers_of_earlier_attempts_go_and_those_of_this_one_stay(sandbox):
    sandbox.root.mkdir()
    for name in (".tmp-step_00000007-dead", ".tmp-step_00000010-attempt1"):
        (sandbox.root / name).mkdir()
    (sandbox.root / ".failed-step_00000007-dead").write_text("")
    (sandbox.root / "notes.txt").write_text("the user's own")
    path = sandbox.saved()
    assert sandbox.entries() == ["notes.txt", path.name]


def test_a_part_of_another_attempt_is_never_mixed_in(sandbox):
    """Rank 1 of a dead attempt has left its part; the new attempt must wait for its own rank 1."""
    shares = sandbox.split(sandbox.state(), 2)
    sandbox.save(shares, timeout_seconds=0.1, ranks=[1])
    stale = next(sandbox.root.glob(f".tmp-*/{part_name(1)}"), None)
    assert stale is not None
    (result,) = sandbox.save(shares, timeout_seconds=0.2, ranks=[0])
    assert isinstance(result, CheckpointError) and "no word from rank 1" in str(result)


def test_pieces_may_be_generated_lazily_and_need_no_moments(tmp_path: Path):
    index = sandboxless_index()
    pieces = (Piece("a", "weight", start, start + 2, torch.full((2,), float(start))) for start in (2, 0))
    path = save_checkpoint(tmp_path, pieces, index, rank=0, world_size=1, token="t")
    assert open_checkpoint(path).read("a", "weight", 0, 4).tolist() == [0, 0, 2, 2]


def sandboxless_index():
    from megatron_tf.checkpoint.format import CheckpointIndex

    return CheckpointIndex(1, 1, 1, {}, {}, expected_tensors({"a": (4,)}, ["weight"]), {})
