"""The seat for methods and axes that are not in the package: registered here, with no line changed there.

`clone` doubles tokens by copying keys and values. `width` doubles the hidden states by repeating them (HyperCloning,
arXiv 2409.12903).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from deepening import IDS, Trained, built, grown, model

from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.growth import methods
from megatron_tf.growth.axes import AXES, Axis, steps
from megatron_tf.growth.methods import GrowingProjection, NewTokens
from megatron_tf.growth.rules import growth_problems
from megatron_tf.state.parameters import parameter_table


def clone(projection: GrowingProjection) -> NewTokens:
    """Every token twice. With τ' = √2 τ each weight of the L2 forms is what it was, and half of each value is added
    twice; for softmax each weight is halved, and the value added twice."""
    assert projection.new_tokens == 2 * projection.old_tokens
    half = projection.old_tokens * projection.width
    is_softmax = projection.activation == "softmax"

    def copied(read, factor: float):
        return lambda start, stop: read(start - half, stop - half).double() * factor

    factor = 1.0 if is_softmax else 0.5
    return NewTokens(
        scale=projection.scale * (1.0 if is_softmax else 2**0.5),
        keys={name: copied(read, 1.0) for name, read in projection.old_keys.items()},
        values={name: copied(read, factor) for name, read in projection.old_values.items()},
        old_values_factor=factor,
    )


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_a_method_sees_old_keys_and_old_values(monkeypatch, activation):
    monkeypatch.setitem(methods.METHODS, "zero_key", clone)
    small = model(2, activation=activation)
    large = model(2, activation=activation, parameter_tokens={"qkv": 26, "proj": 22, "ffn": 74})
    before, after = built(Trained(small, 0), small), built(grown(small, large), large)
    torch.testing.assert_close(after(IDS), before(IDS), rtol=0, atol=1e-12)


class Repeated:
    """State of a model of twice the width. Queries, keys and values come out repeated because their heads do."""

    def __init__(self, old, old_model: Model, new_model: Model):
        self._old, self._before, self._after = old, parameter_table(old_model), parameter_table(new_model)
        self.scales: Mapping[str, float] = old.scales

    def read(self, name, state, start, stop):
        target = torch.empty(stop - start)
        self.read_into(name, state, start, target)
        return target

    def read_into(self, name, state, start, target):
        before, after = self._before[name], self._after[name]
        old = self._old.read(name, state, 0, before.numel).view(-1, before.shape[-1])
        # a product over the repeated channels counts everything twice
        factor = 0.5 if name.endswith("key_tokens") or name.startswith("final_norm") else 1.0
        target.copy_((old * factor).repeat(1, 2).view(-1)[start : start + target.numel()])
        assert after.numel == 2 * before.numel

    def adam_steps(self, name, start, stop):
        return [(start, stop, 0)]


class Width(Axis):
    order = 0
    keys = ("hidden_size", "num_attention_heads")
    changes = "width"

    def between(self, old: Model, new: Model) -> Model:
        return old.model_copy(update={key: getattr(new, key) for key in self.keys})

    def preserves(self, old: Model, new: Model, growth: Growth) -> bool:
        return True

    def record(self, old: Model, new: Model, growth: Growth) -> dict[str, Any]:
        return {"width": [old.hidden_size, new.hidden_size]}

    def source(self, old, fresh, *, old_model, new_model, growth, seed):
        return Repeated(old, old_model, new_model)


def test_columns_tokens_and_layers_in_one_growth():
    small = model(2)
    large = model(4, hidden_size=64, num_attention_heads=8, parameter_tokens={"qkv": 20, "proj": 11, "ffn": 51})
    assert any(
        "Growth changes token counts, candidates and model.num_layers only" in p for p in growth_problems(small, large)
    )
    with AXES.registered("repeated", Width()):
        assert [step.axis.changes for step in steps(small, large)] == ["width", "token counts", "model.num_layers"]
        source = grown(small, large)
        assert source.preserves and source.record["width"] == [32, 64]
        before, after = built(Trained(small, 0), small), built(source, large)
        torch.testing.assert_close(after(IDS), before(IDS), rtol=0, atol=1e-12)
