from __future__ import annotations

import errno
import os
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from megatron_tf.checkpoint import step_zero
from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.step_zero import checkpoint_bytes, target_folder, write_step_zero
from megatron_tf.checkpoint.writer import Piece, save_checkpoint
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import CheckpointError
from megatron_tf.growth.grow import grow, grown_source
from megatron_tf.state.optimizer_states import STATES
from megatron_tf.state.parameters import parameter_table
from megatron_tf.state.sources import InitialSource

DATA = {"seed": 5, "sources": []}


def model(qkv: int, ffn: int) -> Model:
    return Model.model_validate(
        {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 16, "vocab_size": 32,
         "parameter_tokens": {"qkv": qkv, "proj": qkv, "ffn": ffn}}
    )  # fmt: skip


SMALL, LARGE = model(6, 24), model(15, 37)
GROWTH = Growth(source="x", methods={"ffn": "gram"})


@pytest.fixture
def small(tmp_path):
    table, initial = parameter_table(SMALL), InitialSource(SMALL, 0)
    pieces = [
        Piece(name, state, 0, spec.numel, initial.read(name, "weight", 0, spec.numel) * (number + 1))
        for name, spec in table.items()
        for number, state in enumerate(STATES)
    ]
    index = CheckpointIndex(
        100, 800, 12_800, SMALL.model_dump(), initial.scales,
        expected_tensors({name: spec.shape for name, spec in table.items()}),
        {name: ((0, spec.numel, 100),) for name, spec in table.items()}, data=DATA,
    )  # fmt: skip
    return open_checkpoint(save_checkpoint(tmp_path / "small", pieces, index, rank=0, world_size=1, token="t"))


def test_what_is_written_is_the_grown_state_and_step_0_of_the_run(small, tmp_path, monkeypatch):
    from megatron_tf.checkpoint import shards

    monkeypatch.setattr(shards, "BUFFER_BYTES", 4 * 17)  # ranges that end within a row
    start, reported = grow(small, LARGE, GROWTH, seed=5, data=DATA), []
    path = write_step_zero(tmp_path / "large", LARGE, start, DATA, lambda done, name: reported.append((done, name)))
    assert path == tmp_path / "large" / "step_00000000"
    reader = open_checkpoint(path)
    reader.verify()
    source = grown_source(small, LARGE, GROWTH, 5)
    for name, spec in parameter_table(LARGE).items():
        for state in STATES:
            assert torch.equal(reader.read(name, state, 0, spec.numel), source.read(name, state, 0, spec.numel))
    index = reader.index
    assert (index.step, index.samples, index.tokens, index.data) == (0, 800, 12_800, DATA)
    assert index.scales == source.scales and index.model == LARGE.model_dump(mode="json")
    assert index.adam_steps["blocks.0.ffn.key_tokens"] == ((0, 192, 100), (192, 296, 0))
    (entry,) = index.growth_history
    assert entry["method"] == {"qkv": "zero_key", "proj": "zero_key", "ffn": "gram"}
    assert (entry["noise"], entry["preserves"], entry["step"], entry["tokens"]) == (0.0, True, 100, 12_800)
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)
    assert reported[-1] == (checkpoint_bytes(LARGE), "final_norm.bias")


@pytest.mark.parametrize(("data", "samples"), [(DATA, 800), (None, 800), ({"seed": 6, "sources": []}, 0)])
def test_the_same_data_goes_on_and_other_data_begins(small, data, samples):
    assert grow(small, LARGE, GROWTH, seed=5, data=data).samples == samples


def test_a_run_folder_and_its_checkpoints_folder_are_the_same_target(tmp_path):
    assert target_folder(tmp_path / "run") == target_folder(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / ".tmp-step_00000000-killed").mkdir(parents=True)
    assert target_folder(tmp_path / "run") == tmp_path / "run" / "checkpoints"


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_00000300").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="checkpoints: holds step_00000300 already. Nothing is overwritten"):
        target_folder(tmp_path / "run")
    with pytest.raises(CheckpointError, match="step_00000000: is the name of one checkpoint. Give the run's"):
        target_folder(tmp_path / "step_00000000")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/run/checkpoints cannot be made: .*file is a file. Give another"):
        target_folder(tmp_path / "file" / "run")


def test_a_read_only_target_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.statvfs", lambda place: SimpleNamespace(f_flag=os.ST_RDONLY, f_blocks=9))
    with pytest.raises(CheckpointError, match="cannot be made: .* is on a read-only file system. Mount the"):
        target_folder(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_of_one_process_has_a_remedy_and_no_rank(small, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("megatron_tf.checkpoint.writer.write_shard", full)
    start = grow(small, LARGE, GROWTH, seed=5, data=DATA)
    with pytest.raises(CheckpointError) as caught:
        write_step_zero(tmp_path / "large", LARGE, start, DATA, lambda done, tensor: None)
    text = str(caught.value)
    assert "step_00000000: could not be saved: No space left on device" in text and "rank" not in text
    assert text.endswith("Free space there, or give another folder.")


def test_a_target_may_be_a_link_to_a_folder_and_not_to_nowhere(tmp_path):
    (tmp_path / "storage").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "storage")
    assert target_folder(tmp_path / "run") == tmp_path / "run" / "checkpoints"
    (tmp_path / "storage").rmdir()
    for target in (tmp_path / "run", tmp_path / "run" / "inner"):
        with pytest.raises(CheckpointError, match="run is a link to .*storage, and nothing is there. Give another"):
            target_folder(target)


def test_leftovers_of_others_are_warned_of_and_in_nobodys_way(small, tmp_path, monkeypatch, capsys):
    leftover = tmp_path / "large" / ".tmp-step_00000000-theirs"
    leftover.mkdir(parents=True)
    rmdir = os.rmdir

    def refused(path, *arguments, **options):
        if os.path.basename(path) == leftover.name:
            raise PermissionError(errno.EPERM, "Operation not permitted", path)
        rmdir(path, *arguments, **options)

    monkeypatch.setattr(os, "rmdir", refused)
    start = grow(small, LARGE, GROWTH, seed=7, data=DATA)
    path = write_step_zero(tmp_path / "large", LARGE, start, DATA, lambda done, name: None)
    assert open_checkpoint(path).index.step == 0
    assert capsys.readouterr().err.startswith(f"warning: {leftover} cannot be deleted: Operation not permitted")


def test_a_full_disk_is_said_before_anything_is_written(small, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(step_zero.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5, 5))
    monkeypatch.setattr(step_zero, "_contents", None)  # that takes minutes for a million candidates
    start = grow(small, LARGE, GROWTH, seed=5, data=DATA)
    with pytest.raises(CheckpointError, match=f"takes {checkpoint_bytes(LARGE):,} bytes, and 5 are free there"):
        write_step_zero(tmp_path / "large", LARGE, start, DATA, lambda done, name: None)
    assert not (tmp_path / "large").exists()


def test_what_is_interrupted_leaves_nothing(small, tmp_path):
    def interrupt(done, name):
        raise KeyboardInterrupt

    start = grow(small, LARGE, GROWTH, seed=5, data=DATA)
    with pytest.raises(KeyboardInterrupt):
        write_step_zero(tmp_path / "large" / "checkpoints", LARGE, start, DATA, interrupt)
    assert not (tmp_path / "large").exists()
    (tmp_path / "large").mkdir()
    with pytest.raises(KeyboardInterrupt):
        write_step_zero(tmp_path / "large" / "checkpoints", LARGE, start, DATA, interrupt)
    assert list((tmp_path / "large").iterdir()) == []


def test_the_source_may_hold_weights_only(small, tmp_path):
    """Such as imported ones: moments and ages begin at 0."""
    table = parameter_table(SMALL)
    index = CheckpointIndex(
        0, 0, 0, SMALL.model_dump(), InitialSource(SMALL, 0).scales,
        expected_tensors({name: spec.shape for name, spec in table.items()}, ["weight"]), {},
    )  # fmt: skip
    pieces = [
        Piece(name, "weight", 0, spec.numel, small.read(name, "weight", 0, spec.numel)) for name, spec in table.items()
    ]
    path = save_checkpoint(tmp_path / "weights", pieces, index, rank=0, world_size=1, token="t")
    start = grow(open_checkpoint(path), LARGE, GROWTH, seed=5, data=None)
    reader = open_checkpoint(write_step_zero(tmp_path / "large", LARGE, start, {}, lambda done, name: None))
    name = "blocks.1.ffn.value_tokens"
    assert not reader.read(name, "exp_avg", 0, 37 * 8).any() and reader.index.adam_steps[name] == ((0, 296, 0),)
    assert torch.equal(reader.read(name, "weight", 0, 24 * 8), small.read(name, "weight", 0, 24 * 8))
