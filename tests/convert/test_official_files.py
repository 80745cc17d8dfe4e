from __future__ import annotations

import pytest
import torch

from megatron_tf.convert.official_files import open_official
from megatron_tf.errors import CheckpointError


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_published_file_and_its_folder(tmp_path, weights):
    file = tmp_path / "pytorch_model.bin"
    torch.save(weights, file)
    for path in (file, tmp_path):
        opened = open_official(path)
        assert_equal(opened.tensors, weights)
        assert (opened.files, opened.arguments) == ((file,), {})


@pytest.mark.parametrize("data_ranks, stages", [(1, 1), (2, 1), (5, 1), (1, 2), (3, 2)])
def test_a_training_checkpoint_gives_its_masters(tmp_path, weights, save_training, data_ranks, stages):
    tag = save_training(tmp_path, weights, data_ranks, stages)
    for path in (tmp_path, tag):
        opened = open_official(path)
        assert_equal(opened.tensors, weights)
        assert opened.description == f"training checkpoint global_step7, fp32 masters of {data_ranks} data ranks"
        assert opened.arguments["num_attention_heads"] == 1
        assert sorted(opened.files) == sorted(tag.iterdir())


@pytest.mark.parametrize("stages", [1, 2])
def test_without_masters_it_gives_the_weights_in_half_precision(tmp_path, weights, save_training, stages):
    tag = save_training(tmp_path, weights, stages=stages)
    for file in tag.glob("*_optim_states.pt"):
        file.unlink()
    opened = open_official(tag)
    assert_equal(opened.tensors, {name: tensor.half() for name, tensor in weights.items()})
    assert "float16 weights without their fp32 masters" in opened.description


def test_a_checkpoint_with_a_part_missing(tmp_path, weights, save_training):
    tag = save_training(tmp_path, weights, data_ranks=3)
    (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="holds 2 of the 3 files zero_pp_rank"):
        open_official(tag)
    (tag / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="holds none of its mp_rank files"):
        open_official(tmp_path)


def test_parts_of_different_saves(tmp_path, weights, save_training):
    tag = save_training(tmp_path / "one", weights, data_ranks=2)
    other = save_training(tmp_path / "other", {name: -tensor for name, tensor in weights.items()}, data_ranks=2)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (other / name).rename(tag / name)
    with pytest.raises(CheckpointError, match="does not round to it"):
        open_official(tag)


def test_a_state_without_zero(tmp_path, weights, save_training):
    tag = save_training(tmp_path, weights)
    torch.save({"optimizer_state_dict": {"fp32_flat_groups": []}}, tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match="zero_to_fp32.py"):
        open_official(tag)


def test_model_parallel_runs_are_refused(tmp_path, weights, save_training):
    tag = save_training(tmp_path / "layers", weights, stages=2)
    torch.save({}, tag / "layer_00-model_01-model_states.pt")
    other = save_training(tmp_path / "ranks", weights)
    (other / "mp_rank_01_model_states.pt").write_bytes((other / "mp_rank_00_model_states.pt").read_bytes())
    for folder in (tag, other):
        with pytest.raises(CheckpointError, match="model_parallel_size above 1"):
            open_official(folder)


def test_what_a_folder_means(tmp_path, weights, save_training):
    tag = save_training(tmp_path, weights)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin and .*global_step7. Give the one that is meant"):
        open_official(tmp_path)
    for file in tag.iterdir():
        with pytest.raises(CheckpointError, match="one file of a training checkpoint: give its folder"):
            open_official(file)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "latest").write_text("global_step8")
    with pytest.raises(CheckpointError, match="names 'global_step8', and there is no such folder"):
        open_official(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds neither pytorch_model.bin nor latest"):
        open_official(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="No such file"):
        open_official(tmp_path / "nothing")
    assert_equal(open_official(tag).tensors, weights)


def test_a_file_of_other_things(tmp_path):
    cases = {"expected a dict of weights": [torch.zeros(1)], "expected tensors by name": {"a": {"b": torch.zeros(1)}},
             "a is of type torch.float64": {"a": torch.zeros(1, dtype=torch.float64)}}  # fmt: skip
    for message, content in cases.items():
        torch.save(content, tmp_path / "file.bin")
        with pytest.raises(CheckpointError, match=message):
            open_official(tmp_path / "file.bin")
