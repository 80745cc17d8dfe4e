from __future__ import annotations

import pytest
from prepared import write_tokens

from megatron_tf.checkpoint.step_zero import write_step_zero
from megatron_tf.config.load import load_config
from megatron_tf.state.sources import InitialSource, StepZero

CONFIG = """
run: {{dir: {folder}/run, name: test}}
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  seq_length: 16
  vocab_size: 99
  parameter_tokens: {{qkv: 13, proj: 11, ffn: 37}}
training: {{train_steps: 6, global_batch_size: 8, micro_batch_size: 2, precision: fp32}}
optimizer: {{lr: 1e-2, schedule: {{warmup_steps: 2}}}}
data:
  train: [{{path: {folder}/tokens}}]
  validation: [{{path: {folder}/held_out}}]
checkpoint: {{interval_steps: 3}}
evaluation: {{interval_steps: 3, samples: 8}}
logging: {{interval_steps: 1}}
"""


@pytest.fixture
def engine():
    """A test may give another one."""
    return "deepspeed"


@pytest.fixture
def folder(tmp_path, engine):
    """A folder with config.yml and prepared data of 4,000 tokens below 99, and 3,900 held out."""
    write_tokens(tmp_path / "tokens")
    write_tokens(tmp_path / "held_out", documents=39)
    parallel = "" if engine == "deepspeed" else f"parallel: {{engine: {engine}}}\n"
    (tmp_path / "config.yml").write_text(CONFIG.format(folder=tmp_path) + parallel)
    return tmp_path


@pytest.fixture
def started(folder):
    """`folder` with a run in it that has a checkpoint of initial weights, to be resumed, grown and evaluated."""
    model = load_config(folder / "config.yml").model
    start = StepZero(InitialSource(model, 3), 0, 0, ())
    write_step_zero(folder / "run" / "checkpoints", model, start, {}, lambda done, text: None)
    return folder
