"""Saving in the background: what is saved is the state at the call, one save at a time, failures by policy."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from live import PATIENCE_SECONDS, until
from saving import saver_of

from megatron_tf.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_tf.errors import CheckpointError
from megatron_tf.training import snapshot
from megatron_tf.training.snapshot import StateCopier
from megatron_tf.training.start import Progress


@pytest.fixture(autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class SlowCopies:
    """Copies that take a while each, and do not go on without `may_go_on`. `begun`: the number of them so far."""

    def __init__(self, monkeypatch):
        self.begun, self.may_go_on, copy = 0, threading.Event(), StateCopier._copy
        self.may_go_on.set()

        def slow(copier, piece, *arguments):
            self.begun += 1
            self.may_go_on.wait(PATIENCE_SECONDS)
            time.sleep(0.01)
            return copy(copier, piece, *arguments)

        monkeypatch.setattr(StateCopier, "_copy", slow)


@pytest.fixture
def slow_copies(monkeypatch):
    return SlowCopies(monkeypatch)


def state_of(engine):
    return {piece.key: piece.tensor.clone() for piece in engine.pieces()}


def assert_holds(folder, step, state, updates):
    """The checkpoint of `step` is `state` to the last bit."""
    reader = open_checkpoint(folder / "checkpoints" / f"step_{step:08d}")
    reader.verify()
    for key, tensor in state.items():
        name, kind, start = key.split("/")
        assert torch.equal(reader.read(name, kind, int(start), int(start) + len(tensor)), tensor), key
    assert all(steps == updates for ranges in reader.index.adam_steps.values() for _, _, steps in ranges)


def test_what_is_saved_is_the_state_at_the_call(config, tmp_path):
    saver, engine, console = saver_of(config, tmp_path)
    engine.update()
    expected = state_of(engine)
    saver.save(Progress(1, 8, 128), {})
    engine.update()  # training goes on
    assert not any(torch.equal(piece.tensor, expected[piece.key]) for piece in engine.pieces())
    saver.finish()
    assert_holds(tmp_path, 1, expected, updates=1)
    assert console.lines == [f"saved {tmp_path / 'checkpoints' / 'step_00000001'}"]


def test_an_update_waits_for_a_slow_copy_and_the_forward_pass_does_not(config, tmp_path, slow_copies):
    saver, engine, _ = saver_of(config, tmp_path)
    for step in (1, 2):
        expected = state_of(engine)
        copied = slow_copies.begun
        slow_copies.may_go_on.clear()
        saver.save(Progress(step, 8, 128), {})
        assert slow_copies.begun - copied < len(expected) / 2, "the copy was to go on during the forward pass"
        slow_copies.may_go_on.set()
        engine.update()
        assert slow_copies.begun - copied == len(expected)
        engine.update()
        saver.finish()
        assert engine.before_update is None
        assert_holds(tmp_path, step, expected, updates=2 * step - 2)


def test_the_last_save_needs_no_update_after_it(config, tmp_path, slow_copies):
    saver, engine, console = saver_of(config, tmp_path)
    engine.update()
    saver.save(Progress(1, 8, 128), {})
    saver.finish()
    assert len(console.lines) == 1 and engine.before_update is None
    assert_holds(tmp_path, 1, state_of(engine), updates=1)


def test_a_copy_that_fails_is_a_failed_save_and_training_goes_on(config, tmp_path, monkeypatch):
    def no_memory(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    saver, engine, console = saver_of(config, tmp_path)
    monkeypatch.setattr(snapshot.torch, "empty", no_memory)
    saver.save(Progress(1, 8, 128), {})
    engine.update()
    saver.finish()
    monkeypatch.undo()
    (line,) = console.lines
    assert line.startswith("warning: checkpoint not saved") and "no memory for a copy of embedding.weight" in line
    assert list((tmp_path / "checkpoints").iterdir()) == []
    saver.save(Progress(2, 16, 256), {})
    saver.finish()
    assert_holds(tmp_path, 2, state_of(engine), updates=1)


def test_never_two_at_once(config, tmp_path):
    saver, _, console = saver_of(config, tmp_path)
    saver.save(Progress(1, 8, 128), {})
    saver.save(Progress(2, 16, 256), {})
    assert len(console.lines) == 1  # the first one is complete
    saver.finish()
    assert [line[-1] for line in console.lines] == ["1", "2"]


def test_a_save_in_the_background_ends_by_itself_and_is_reported_once(config, tmp_path):
    saver, _, console = saver_of(config, tmp_path)
    assert not saver.is_writing
    saver.save(Progress(1, 8, 128), {})
    until(lambda: not saver.is_writing, "the save was written")
    assert console.lines == []
    saver.finish()
    saver.finish()
    assert len(console.lines) == 1


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_a_warning(config, tmp_path, asynchronous):
    (tmp_path / "checkpoints").write_text("in the way")
    saver, _, console = saver_of(config, tmp_path, asynchronous=asynchronous)
    saver.save(Progress(1, 8, 128), {})
    saver.finish()
    (line,) = console.lines
    assert line.startswith("warning: checkpoint not saved") and "checkpoints" in line


def test_a_failed_save_can_stop_the_run(config, tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    saver, *_ = saver_of(config, tmp_path, on_failure="stop")
    saver.save(Progress(1, 8, 128), {})
    with pytest.raises(CheckpointError, match="checkpoints"):
        saver.finish()


def test_old_checkpoints_go(config, tmp_path):
    saver, *_ = saver_of(config, tmp_path, keep_last=2)
    for step in range(1, 5):
        saver.save(Progress(step, 8 * step, 128 * step), {})
    saver.finish()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000003", "step_00000004"]


def test_nothing_that_this_process_wrote_or_verified_is_read_again(config, tmp_path, monkeypatch):
    def steps(saver, first, last):
        for step in range(first, last):
            saver.save(Progress(step, 8 * step, 128 * step), {})
        saver.finish()

    saver, *_ = saver_of(config, tmp_path)
    steps(saver, 1, 4)
    root = tmp_path / "checkpoints"
    monkeypatch.setattr(CheckpointReader, "verify", lambda *_: pytest.fail("read it again"))
    saver, _, console = saver_of(config, tmp_path, keep_last=2, known_good=[root / "step_00000003"])
    steps(saver, 4, 7)
    assert sorted(p.name for p in root.iterdir()) == ["step_00000005", "step_00000006"]
    assert not any("warning" in line for line in console.lines)


def test_leftovers_that_cannot_be_deleted_stop_no_save_and_are_warned_of_once(config, tmp_path, monkeypatch):
    rmdir, root = os.rmdir, tmp_path / "checkpoints"

    def refused(path, *arguments, **options):
        if os.path.basename(path).startswith((".tmp-another", ".tmp-step_00000001-deleted")):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        rmdir(path, *arguments, **options)

    monkeypatch.setattr(os, "rmdir", refused)
    (root / ".tmp-another").mkdir(parents=True)
    saver, _, console = saver_of(config, tmp_path, keep_last=1)
    for step in range(1, 5):
        saver.save(Progress(step, 8 * step, 128 * step), {})
    saver.finish()
    left = sorted(path.name for path in root.iterdir())
    assert left[0] == ".tmp-another" and left[1].startswith(".tmp-step_00000001") and left[2:] == ["step_00000004"]
    warnings = [line for line in console.lines if line.startswith("warning")]
    assert len(warnings) == 2 and all("Permission denied" in line for line in warnings)
    assert f"{root / '.tmp-another'} cannot be deleted" in warnings[0]
    assert f"{root / 'step_00000001'} cannot be deleted" in warnings[1]
    assert sum(line.startswith("saved") for line in console.lines) == 4


def test_a_checkpoint_that_lies_elsewhere_loses_its_link_alone(config, tmp_path):
    saver, engine, console = saver_of(config, tmp_path)
    saver.save(Progress(1, 8, 128), {})
    saver.finish()
    expected = state_of(engine)
    step, elsewhere = (
        tmp_path / "checkpoints" / "step_00000001",
        tmp_path / "elsewhere" / "checkpoints" / "step_00000001",
    )
    elsewhere.parent.mkdir(parents=True)
    step.rename(elsewhere)
    step.symlink_to(elsewhere)
    saver.save(Progress(1, 8, 128), {})  # the same step again
    saver.finish()
    assert not step.is_symlink()
    assert_holds(tmp_path / "elsewhere", 1, expected, updates=0)
    assert_holds(tmp_path, 1, expected, updates=0)
    assert not any("warning" in line for line in console.lines)


def test_what_a_killed_save_left_goes_at_the_next_start(config, tmp_path):
    saver, *_ = saver_of(config, tmp_path)
    saver.save(Progress(1, 8, 128), {})
    saver.finish()
    (tmp_path / "checkpoints" / ".tmp-step_00000000-deleted").mkdir()
    saver_of(config, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
