from __future__ import annotations

import pytest
import torch

from megatron_tf.checkpoint import load_logical
from megatron_tf.checkpoint.format import shard_name
from megatron_tf.errors import CheckpointError


def test_weights_in_their_logical_shapes(sandbox, tmp_path):
    sandbox.saved(seed=4, world_size=3)
    weights, state = load_logical(tmp_path), sandbox.state(4)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        "embedding.weight": (7, 5),
        "blocks.0.ffn.key_tokens": (11, 5),
        "final_norm.bias": (5,),
    }
    for name, tensor in weights.items():
        assert torch.equal(tensor.view(-1).view(torch.int32), state[name, "weight"].view(torch.int32))


def test_damaged_weights_are_never_returned(sandbox, flip):
    path = sandbox.saved()
    flip(path / shard_name(0), -1)
    with pytest.raises(CheckpointError, match="damaged"):
        load_logical(path)
