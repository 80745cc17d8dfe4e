"""What is refused before the ranks meet."""

from __future__ import annotations

import pytest
from sparse_models import with_bank

from megatron_tf.errors import ConfigError
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.training.preflight import memory_problems, preflight

ALONE = LaunchEnvironment("python", 0, 1, 0, 1, "127.0.0.1", 0)
# rank 8 of 16 on two nodes
OTHER_NODE = LaunchEnvironment("torchrun", 8, 16, 0, 8, "127.0.0.1", 0)


@pytest.fixture
def good(config, tmp_path):
    """A run for 16 ranks or fewer, whose data is there."""
    for name in ("tokens.bin", "tokens.idx"):
        (tmp_path / name).touch()
    return config(data={"train": ({"path": str(tmp_path / "tokens")},)}, training={"global_batch_size": 32})


def problems_of(stages, environment=ALONE):
    with pytest.raises(ConfigError) as error:
        preflight(stages, environment)
    return error.value.problems


def test_a_good_run(good):
    preflight([good], ALONE)
    preflight([good, good], OTHER_NODE)


def test_rules_files_and_device_come_together(config, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("megatron_tf.engine.deepspeed.patches.has_fp16", lambda: False)
    bad = config(parallel={"pipeline": 3}, training={"precision": "fp16"})
    keys = [problem.partition(":")[0] for problem in problems_of([bad])]
    assert keys == ["parallel", "parallel.pipeline", "data.train[0].path", "training.precision"]


def test_a_problem_of_a_chain_names_its_stage(good, config):
    first = good.model_copy(update={"run": good.run.model_copy(update={"name": "small"})})
    second = config(run={"dir": "unused", "name": "large"})
    (problem,) = problems_of([first, second])
    assert problem.startswith("stage large: data.train[0].path: unused.bin and unused.idx: no such file.")


@pytest.mark.parametrize("name", ["cuda", "gpu", ""])
def test_accelerator_that_is_not_here(good, name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", name)
    fp16 = good.model_copy(update={"training": good.training.model_copy(update={"precision": "fp16"})})
    assert problems_of([fp16, good]) == [
        f"DS_ACCELERATOR={name}, but PyTorch's device here is cpu. Unset it, or use a machine with a GPU."
    ]


def test_memory(good):
    assert list(memory_problems(good, 1, 2**30)) == []
    (problem,) = memory_problems(good, 1, 2**10)
    assert problem.startswith("model: a rank needs about 0.0 GiB")
    large = good.model_copy(update={"model": good.model.model_copy(update={"hidden_size": 2**30, "vocab_size": 2**30})})
    (problem,) = memory_problems(large, 1, 80 * 2**30)
    assert "but it has 80.0 GiB. Raise parallel.tensor or parallel.pipeline" in problem
    assert problem.endswith("lower training.micro_batch_size, or make the model smaller.")
    (problem,) = memory_problems(with_bank(), 1, 2**10)
    assert "lower training.micro_batch_size or model.sparse.ffn.candidates, or make the model smaller." in problem
