"""What an activation declares is what its function computes."""

from __future__ import annotations

import pytest
import torch

from megatron_tf.activations.function import score_function
from megatron_tf.config.activations import ACTIVATIONS

SCORES = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def weights(activation, scores, scale=2.0):
    function = score_function(activation)
    return function.weights(scores, function.statistic(scores), scale)


@pytest.mark.parametrize("activation", ACTIVATIONS.names())
def test_whether_zero_scores_are_ignored(activation):
    with_zeros = weights(activation, torch.cat((SCORES, torch.zeros(4, 3)), -1))
    unchanged = torch.allclose(with_zeros[:, :9], weights(activation, SCORES), rtol=1e-12)
    assert ACTIVATIONS[activation].ignores_zero is (unchanged and not with_zeros[:, 9:].any())


@pytest.mark.parametrize("activation", ACTIVATIONS.names())
def test_whether_weights_are_proportional_to_scale(activation):
    is_proportional = torch.allclose(weights(activation, SCORES, 6.0), 3 * weights(activation, SCORES), rtol=1e-12)
    assert ACTIVATIONS[activation].proportional_to_scale is is_proportional


@pytest.mark.parametrize("activation", ACTIVATIONS.names())
def test_whether_weights_are_of_normed_scores(activation):
    function = score_function(activation)
    r = function.statistic(SCORES)
    is_norm = torch.allclose(r, SCORES.norm(dim=-1, keepdim=True), rtol=1e-12)
    same = torch.allclose(function.weights(2 * SCORES, 4 * r, 4.0), function.weights(SCORES, r, 2.0), rtol=1e-12)
    assert ACTIVATIONS[activation].scales_normed_scores is (is_norm and same)
