"""Moments that a growth keeps may be scaled, as if the gradients before it had been other ones."""

from __future__ import annotations

import pytest
import torch
from deepening import Trained, grown, model
from pydantic import ValidationError

from megatron_tf.config.sections.growth import Growth
from megatron_tf.growth.rules import growth_problems
from megatron_tf.state.parameters import parameter_table

SMALL = model(2)
LARGE = model(3, parameter_tokens={"qkv": 45, "proj": 43, "ffn": 70})


def test_each_moment_is_scaled_by_its_power_of_the_gradient():
    kept, scaled = grown(SMALL, LARGE), grown(SMALL, LARGE, moments_factor=0.5)
    assert scaled.record["moments_factor"] == 0.5 and "moments_factor" not in kept.record
    assert scaled.scales == kept.scales and scaled.preserves
    for name, spec in parameter_table(LARGE).items():
        for state, factor in {"weight": 1.0, "exp_avg": 0.5, "exp_avg_sq": 0.25}.items():
            own, other = (source.read(name, state, 0, spec.numel) for source in (scaled, kept))
            assert torch.equal(own, factor * other)
        assert scaled.adam_steps(name, 0, spec.numel) == kept.adam_steps(name, 0, spec.numel)
    # of old tokens there are moments, of new ones none
    moments = scaled.read("blocks.0.ffn.key_tokens", "exp_avg", 0, 70 * 32)
    assert torch.equal(moments[:9], 0.5 * Trained(SMALL, 0).read("blocks.0.ffn.key_tokens", "exp_avg", 0, 9))
    assert not moments[37 * 32 :].any()


def test_a_factor_that_overflows_is_refused():
    assert Growth(source="x", moments_factor=1000.0)
    with pytest.raises(ValidationError, match="less than or equal to 1000"):
        Growth(source="x", moments_factor=1e30)


def test_what_is_reset_cannot_be_scaled():
    problems = growth_problems(SMALL, LARGE, Growth(source="x", moments="reset", moments_factor=0.5))
    assert problems == [
        "growth.moments_factor: 0.5 is of moments that are kept, and growth.moments is reset. Set it to 1, or "
        "growth.moments to keep."
    ]
