from __future__ import annotations

import pytest

from megatron_tf.checkpoint.source import InitialSource, StepZero
from megatron_tf.checkpoint.step_zero import write_step_zero
from megatron_tf.config.schema import Model
from megatron_tf.data.indexed import IndexedWriter

SMALL = {
    "num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "vocab_size": 99,
    "parameter_tokens": {"qkv": 13, "proj": 11, "ffn": 37},
}  # fmt: skip


@pytest.fixture
def model() -> Model:
    """A model whose token counts and vocabulary divide by nothing."""
    return Model.model_validate(SMALL)


@pytest.fixture
def checkpoint(tmp_path, model):
    """A checkpoint of it, with the initial weights of seed 3."""
    start = StepZero(InitialSource(model, 3), 0, 0, ())
    return write_step_zero(tmp_path / "run" / "checkpoints", model, start, {}, lambda done, text: None)


@pytest.fixture
def tokens(tmp_path):
    """Prefix of prepared data of 1,003 tokens below 99 in 17 documents of 59."""
    with IndexedWriter(tmp_path / "tokens", vocab_size=99) as writer:
        for document in range(17):
            writer.add_document([(document * 7 + position * position) % 98 for position in range(58)] + [98])
    return str(tmp_path / "tokens")
