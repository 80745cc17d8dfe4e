"""Saving in the background: what is saved is the state at the call, one save at a time, failures by policy."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from saving import saver_of

from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.errors import CheckpointError
from megatron_tf.training.start import Progress


@pytest.fixture(autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_is_saved_is_the_state_at_the_call(config, tmp_path):
    saver, engine, console = saver_of(config, tmp_path)
    expected = [piece.tensor.clone() for piece in engine.pieces()]
    saver.save(Progress(1, 8, 128))
    for piece in engine.pieces():
        piece.tensor.add_(1)  # training goes on
    saver.finish()
    reader = open_checkpoint(tmp_path / "checkpoints" / "step_00000001")
    for piece, tensor in zip(engine.pieces(), expected):
        assert torch.equal(reader.read(piece.name, piece.state, piece.start, piece.stop), tensor)
    assert console.lines == [f"saved {reader.path}"]


def test_never_two_at_once(config, tmp_path):
    saver, _, console = saver_of(config, tmp_path)
    saver.save(Progress(1, 8, 128))
    saver.save(Progress(2, 16, 256))
    assert len(console.lines) == 1  # the first one is complete
    saver.finish()
    assert [line[-1] for line in console.lines] == ["1", "2"]


def test_poll_reports_when_it_is_over_and_only_once(config, tmp_path):
    saver, _, console = saver_of(config, tmp_path)
    saver.poll()
    saver.save(Progress(1, 8, 128))
    deadline = time.monotonic() + 30
    while not console.lines and time.monotonic() < deadline:
        saver.poll()
    saver.poll()
    saver.finish()
    assert len(console.lines) == 1


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_a_warning(config, tmp_path, asynchronous):
    (tmp_path / "checkpoints").write_text("in the way")
    saver, _, console = saver_of(config, tmp_path, asynchronous=asynchronous)
    saver.save(Progress(1, 8, 128))
    saver.finish()
    (line,) = console.lines
    assert line.startswith("warning: checkpoint not saved, training goes on") and "checkpoints" in line


def test_a_failed_save_can_stop_the_run(config, tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    saver, *_ = saver_of(config, tmp_path, on_failure="stop")
    saver.save(Progress(1, 8, 128))
    with pytest.raises(CheckpointError, match="checkpoints"):
        saver.finish()


def test_old_checkpoints_go(config, tmp_path):
    saver, *_ = saver_of(config, tmp_path, keep_last=2)
    for step in range(1, 5):
        saver.save(Progress(step, 8 * step, 128 * step))
    saver.finish()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000003", "step_00000004"]
