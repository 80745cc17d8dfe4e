from __future__ import annotations

import math

import pytest
import torch

from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import ArgumentError
from megatron_tf.growth.source import GrownSource
from megatron_tf.pruning import source as pruned_source
from megatron_tf.pruning.source import PrunedSource
from megatron_tf.state.optimizer_states import STATES
from megatron_tf.state.parameters import initial_scales, parameter_table, projections

D = 8


def model(qkv: int, proj: int, ffn: int) -> Model:
    return Model.model_validate(
        {"num_layers": 2, "hidden_size": D, "num_attention_heads": 2, "seq_length": 8, "vocab_size": 11,
         "parameter_tokens": {"qkv": qkv, "proj": proj, "ffn": ffn}}
    )  # fmt: skip


class Numbered:
    """A source in which every element of every state is a different number; `ages` by row of the ffn of block 0."""

    def __init__(self, of: Model, ages: tuple[int, ...] = (7,)):
        self.table, self.ages = parameter_table(of), ages
        self.scales = initial_scales(of)

    def read(self, name, state, start, stop):
        return torch.arange(start, stop).float() + 10_000 * list(self.table).index(name) + STATES.index(state) / 4

    def read_into(self, name, state, start, target):
        target.copy_(self.read(name, state, start, start + target.numel()))

    def adam_steps(self, name, start, stop):
        steps = [self.ages[min(element // D, len(self.ages) - 1)] for element in range(start, stop)]
        return joined(start, steps)


def joined(start: int, steps: list[int]) -> list[tuple[int, int, int]]:
    ranges: list[tuple[int, int, int]] = []
    for position, age in enumerate(steps, start):
        first = ranges.pop()[0] if ranges and ranges[-1][2] == age else position
        ranges.append((first, position + 1, age))
    return ranges


KEPT = torch.tensor([1, 2, 3, 7, 8, 12, 30, 31])


def pruned(ages=(7,)) -> tuple[Numbered, PrunedSource]:
    old = Numbered(model(6, 6, 32), ages)
    return old, PrunedSource(old, parameter_table(model(6, 6, 8)), {"blocks.0.ffn": KEPT, "blocks.1.ffn": KEPT + 0},
                             {"blocks.0.ffn": 1.5})  # fmt: skip


@pytest.mark.parametrize("slice_elements", [2**20, 5 * D, 1])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["blocks.0.ffn.key_tokens", "blocks.1.ffn.value_tokens"])
def test_any_range_is_that_part_of_the_kept_rows(name, state, slice_elements, monkeypatch):
    monkeypatch.setattr(pruned_source, "SLICE_ELEMENTS", slice_elements)
    old, source = pruned()
    expected = old.read(name, state, 0, 32 * D).view(32, D)[KEPT].view(-1)
    for start in range(len(expected)):
        for stop in range(start, len(expected) + 1, 5):
            assert torch.equal(source.read(name, state, start, stop), expected[start:stop]), (start, stop)


def test_what_is_not_pruned_is_the_old_source():
    old, source = pruned()
    for name in ("embedding.weight", "blocks.0.attention.key.key_tokens"):
        assert torch.equal(source.read(name, "exp_avg", 3, 40), old.read(name, "exp_avg", 3, 40))
        assert source.adam_steps(name, 3, 40) == [(3, 40, 7)]
    assert source.scales == {**old.scales, "blocks.0.ffn": 1.5}


@pytest.mark.parametrize(("start", "stop"), [(0, 8 * D), (0, 0), (5, 6), (3, 61), (2 * D, 4 * D), (7 * D + 1, 8 * D)])
def test_every_row_keeps_its_age(start, stop):
    ages = (9,) * 8 + (4,) * 4 + (0,) * 30
    _, source = pruned(ages)
    of_rows = [ages[row] for row in KEPT.tolist() for _ in range(D)]
    assert source.adam_steps("blocks.0.ffn.key_tokens", start, stop) == joined(start, of_rows[start:stop])


def test_pruning_the_new_tokens_undoes_a_growth_to_the_last_bit():
    small, large = model(6, 6, 8), model(10, 6, 32)
    old = Numbered(small)
    growth = Growth(source="x", method="zero_key")
    grown = GrownSource(old, Numbered(large), old_model=small, new_model=large, growth=growth, seed=1)
    kept = {name: torch.arange(spec.tokens) for name, spec in projections(small).items()}
    back = PrunedSource(grown, parameter_table(small), kept, {})
    assert back.scales == old.scales
    for name, spec in parameter_table(small).items():
        for state in STATES:
            assert torch.equal(back.read(name, state, 0, spec.numel), old.read(name, state, 0, spec.numel))
        assert back.adam_steps(name, 0, spec.numel) == old.adam_steps(name, 0, spec.numel)


@pytest.mark.parametrize(
    ("kept", "scales", "message"),
    [
        ({"blocks.7.ffn": KEPT}, {}, "kept: names 'blocks.7.ffn'"),
        ({"blocks.0.ffn": KEPT[:5]}, {}, r"kept\['blocks.0.ffn'\]: keeps 5 tokens, the smaller model has 8"),
        ({"blocks.0.ffn": KEPT.flip(0)}, {}, "ascending"),
        ({"blocks.0.ffn": KEPT}, {"blocks.9.ffn": 1.0}, "scales: names 'blocks.9.ffn'"),
        ({"blocks.0.ffn": KEPT}, {"blocks.0.ffn": math.nan}, r"scales\['blocks.0.ffn'\]: the number nan"),
    ],
)
def test_a_source_of_other_models_is_refused(kept, scales, message):
    with pytest.raises(ArgumentError, match=message):
        PrunedSource(Numbered(model(6, 6, 32)), parameter_table(model(6, 6, 8)), kept, scales)
