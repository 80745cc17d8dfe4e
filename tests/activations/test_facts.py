"""What an activation declares is what its function computes."""

from __future__ import annotations

import pytest
import torch

from megatron_tf.activations.function import score_function
from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.model.kernels import fused_passes

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


def test_kernels_read_and_write_scores_as_often_as_declared(monkeypatch):
    """Over tensor ranks as `kernel_passes` says; of whole rows, and in the Gram form, `gram_saves` less."""
    passes = []

    def count(name, scores, *arguments):
        scored = [tensor for tensor in (scores, *arguments) if getattr(tensor, "shape", None) == scores.shape]
        changes_gradient = name.startswith(("backward", "couple"))
        passes.append(len(scored) + changes_gradient)

    monkeypatch.setattr(fused_passes, "_run", count)
    monkeypatch.setattr(fused_passes, "usable", lambda scores: True)
    function, facts = score_function("l2_norm_gelu"), ACTIVATIONS["l2_norm_gelu"]
    scores, gradient, r = torch.zeros(3, 32), torch.zeros(3, 32), torch.ones(3, 1)

    def counted(*calls):
        passes.clear()
        for call in calls:
            call()
        return sum(passes)

    def weights():
        function.weights(scores, r, 1.0)

    def backward():
        function.backward(scores, r, gradient, 1.0)

    sharded, saved = facts.kernel_passes, facts.gram_saves
    assert counted(lambda: function.statistic(scores), weights) == sharded.forward
    assert counted(backward, lambda: function.couple(scores, r, r, gradient, 1.0)) == sharded.backward
    assert counted(lambda: function.statistic_and_weights(scores, 1.0)) == sharded.forward - saved.forward
    assert counted(lambda: function.backward_and_couple(scores, r, gradient, 1.0)) == sharded.backward - saved.backward
    assert counted(weights) == sharded.forward - saved.forward
    assert counted(backward) == sharded.backward - saved.backward
