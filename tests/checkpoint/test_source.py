from __future__ import annotations

import math

import torch

from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.source import CheckpointSource
from megatron_tf.checkpoint.writer import Piece, save_checkpoint
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model, ParameterTokens
from megatron_tf.growth.grow import grown_source
from megatron_tf.growth.source import growth_entry
from megatron_tf.state.optimizer_states import STATES
from megatron_tf.state.parameters import parameter_table
from megatron_tf.state.sources import InitialSource, StateSource


def model(qkv: int, ffn: int) -> Model:
    return Model(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        seq_length=16,
        vocab_size=32,
        parameter_tokens=ParameterTokens(qkv=qkv, proj=qkv, ffn=ffn),
    )


SMALL, MIDDLE, LARGE = model(6, 24), model(9, 24), model(9, 50)


def save(root, source: StateSource, of: Model, step: int, history=()) -> str:
    table = parameter_table(of)
    index = CheckpointIndex(
        step=step,
        samples=step,
        tokens=step,
        model=of.model_dump(),
        scales=source.scales,
        tensors=expected_tensors({name: spec.shape for name, spec in table.items()}),
        adam_steps={name: tuple(source.adam_steps(name, 0, spec.numel)) for name, spec in table.items()},
        growth_history=tuple(history),
    )
    pieces = [
        Piece(name, state, 0, spec.numel, source.read(name, state, 0, spec.numel))
        for name, spec in table.items()
        for state in STATES
    ]
    return save_checkpoint(root, pieces, index, rank=0, world_size=1, token="t")


class Trained(InitialSource):
    """Weights and moments of no particular meaning, after 100 steps."""

    def read(self, name, state, start, stop):
        generator = torch.Generator().manual_seed(len(name) * 10 + len(state))
        return torch.randn(self._table[name].numel, generator=generator)[start:stop]

    def adam_steps(self, name, start, stop):
        return [(start, stop, 100)]


def test_a_checkpoint_gives_back_what_was_saved(tmp_path):
    original = Trained(SMALL, 0)
    source = CheckpointSource(open_checkpoint(save(tmp_path, original, SMALL, 100)))
    assert source.scales == original.scales
    for name, spec in parameter_table(SMALL).items():
        for state in STATES:
            assert torch.equal(source.read(name, state, 3, spec.numel), original.read(name, state, 3, spec.numel))
        assert source.adam_steps(name, 3, spec.numel) == [(3, spec.numel, 100)]


def test_weights_only_are_of_age_0(tmp_path):
    index = CheckpointIndex(1, 1, 1, {}, {}, expected_tensors({"a": (4,)}, ["weight"]), {})
    path = save_checkpoint(
        tmp_path, [Piece("a", "weight", 0, 4, torch.zeros(4))], index, rank=0, world_size=1, token="t"
    )
    assert CheckpointSource(open_checkpoint(path)).adam_steps("a", 1, 3) == [(1, 3, 0)]


def test_two_growths_through_checkpoints(tmp_path):
    """Small → middle → large: old rows and τ untouched to the last bit, each generation with its own age and draw."""
    growth = Growth(source="x")
    small = open_checkpoint(save(tmp_path / "a", Trained(SMALL, 0), SMALL, 100))
    entry = growth_entry(
        method="zero_key", moments="keep", source=str(small.path), step=100, samples=100, tokens=100,
        old_model=SMALL, new_model=MIDDLE,
    )  # fmt: skip
    middle = open_checkpoint(
        save(tmp_path / "b", grown_source(small, MIDDLE, growth, seed=5), MIDDLE, 100, history=[entry])
    )
    large = grown_source(middle, LARGE, growth, seed=5)

    assert middle.index.growth_history[0]["from"] == {"qkv": 6, "proj": 6, "ffn": 24}
    assert middle.index.growth_history[0]["to"] == {"qkv": 9, "proj": 9, "ffn": 24}
    assert large.scales["blocks.0.ffn"] == math.sqrt(24) and large.scales["blocks.1.attention.proj"] == math.sqrt(6)
    for name, spec in parameter_table(SMALL).items():
        for state in STATES:
            assert torch.equal(large.read(name, state, 0, spec.numel), small.read(name, state, 0, spec.numel))
    assert large.adam_steps("blocks.0.attention.key.value_tokens", 0, 72) == [(0, 48, 100), (48, 72, 0)]
    assert large.adam_steps("blocks.0.ffn.key_tokens", 100, 400) == [(100, 192, 100), (192, 400, 0)]
    assert not large.read("blocks.0.ffn.key_tokens", "weight", 192, 400).any()
    new = large.read("blocks.0.ffn.value_tokens", "weight", 192, 400)
    first_run = grown_source(small, LARGE, growth, seed=5).read("blocks.0.ffn.value_tokens", "weight", 192, 400)
    fresh = InitialSource(LARGE, 5).read("blocks.0.ffn.value_tokens", "weight", 192, 400)
    assert new.std() > 0
    assert not torch.equal(new, first_run) and not torch.equal(new, fresh) and not torch.equal(first_run, fresh)
