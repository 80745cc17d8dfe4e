from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_tf.errors import ArgumentError
from megatron_tf.growth.gram import GramKeys
from megatron_tf.model import pattention
from megatron_tf.pruning import criterion
from megatron_tf.pruning.criterion import largest, summed_contributions, summed_scale_terms
from megatron_tf.state.parameters import default_scale

ACTIVATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
N, D = 24, 8


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [50, d], one row of it 0; keys and values [n, d]."""
    generator = torch.Generator().manual_seed(seed)
    x, keys, values = (torch.randn(rows, D, generator=generator, dtype=torch.float64) for rows in (50, N, N))
    x[3] = 0
    return x, keys, values * torch.linspace(0.1, 2, N, dtype=torch.float64)[:, None]


@pytest.fixture(params=[2**22, 3 * N + 1], ids=["at_once", "in_parts"])
def _parts(request, monkeypatch):
    monkeypatch.setattr(criterion, "SCORE_ELEMENTS", request.param)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("_parts")
def test_a_contribution_is_the_norm_of_a_tokens_term(activation):
    x, keys, values = draw()
    terms = [
        pattention(x, keys, torch.where(torch.arange(N)[:, None] == token, values, 0), scale=3.0, activation=activation)
        for token in range(N)
    ]
    expected = torch.stack([term.norm(dim=-1).sum() for term in terms])
    torch.testing.assert_close(summed_contributions(x, keys, values, 3.0, activation), expected)


def fitted(x, keys, values, kept, scale, activation) -> float:
    above, below = summed_scale_terms(x, keys, values, kept, scale, activation)
    return scale * above / below


def error(x, keys, values, kept, scale, new_scale, activation) -> float:
    """Squared distance of the pruned projection's outputs from the whole one's."""
    before = pattention(x, keys, values, scale=scale, activation=activation)
    after = pattention(x, keys[kept], values[kept], scale=new_scale, activation=activation)
    return float((after - before).square().sum())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("_parts")
def test_the_scale_keeps_the_output_closest(activation):
    x, keys, values = draw()
    kept = largest(summed_contributions(x, keys, values, 3.0, activation), 18)
    best = fitted(x, keys, values, kept, 3.0, activation)
    least = error(x, keys, values, kept, 3.0, best, activation)
    grid = [3.0 * (0.5 + step / 500) for step in range(500)]
    # Exact where the output is linear in τ; to first order inside GELU.
    slack = 1.01 if activation == "l2_norm_gelu" else 1 + 1e-9
    assert least <= slack * min(error(x, keys, values, kept, 3.0, scale, activation) for scale in grid)
    for other in (3.0, default_scale(18, activation)):
        assert least < error(x, keys, values, kept, 3.0, other, activation)


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_is_held_exactly_when_tokens_of_zero_key_go(activation, dtype):
    x, keys, values = (tensor.to(dtype) for tensor in draw())
    keys[16:] = 0
    assert not summed_contributions(x, keys, values, 3.3, activation)[16:].any()
    assert fitted(x, keys, values, torch.arange(16), 3.3, activation) == 3.3


def test_the_scale_goes_back_when_the_tokens_of_gram_go():
    x, keys, values = draw()
    added = GramKeys(lambda start, stop: keys.reshape(-1)[start:stop], old_tokens=N, added_tokens=40, width=D,
                     factor=40 / N, seed=1, name="p").read(N * D, (N + 40) * D).view(40, D)  # fmt: skip
    grown, zeros = torch.cat([keys, added]), torch.cat([values, torch.zeros_like(added)])
    assert largest(summed_contributions(x, grown, zeros, math.sqrt(N + 40), "l2_norm_gelu"), N).tolist() == [*range(N)]
    scale = fitted(x, grown, zeros, torch.arange(N), math.sqrt(N + 40), "l2_norm_gelu")
    assert scale == pytest.approx(math.sqrt(N), rel=1e-12)


def test_a_position_that_keeps_nothing_is_no_infinity():
    x, keys, values = draw()
    keys[:, 0] = 0
    keys[20:, 0] = 1
    x[7] = torch.eye(D, dtype=torch.float64)[0]  # only tokens that go see this one
    above, below = summed_scale_terms(x, keys, values, torch.arange(20), 3.0, "l2_norm_gelu")
    assert math.isfinite(above) and math.isfinite(below) and below > 0


def test_the_order_stays_and_of_equals_the_older():
    assert largest(torch.tensor([3.0, 1.0, 5.0, 4.0, 1.0]), 3).tolist() == [0, 2, 3]
    assert largest(torch.zeros(5000), 3000).tolist() == [*range(3000)]


def test_what_does_not_fit_is_refused():
    x, keys, values = draw()
    kept = torch.arange(18)
    for call, message in (
        (lambda: summed_contributions(x, keys, values, 3.0, "relu"), "activation: the text 'relu'"),
        (lambda: summed_contributions(x, keys, values, -3.0, "softmax"), "scale: the number -3.0"),
        (lambda: summed_contributions(x[:, 1:], keys, values, 3.0, "softmax"), r"x: the shape is \[50, 7\]"),
        (lambda: summed_scale_terms(x, keys, values, kept + 7, 3.0, "softmax"), "kept: names row 24, .* 24 tokens"),
        (lambda: summed_scale_terms(x, keys, values, kept.flip(0), 3.0, "softmax"), "kept: .* ascending"),
        (lambda: largest(torch.ones(4), 5), "count: the number 5 .* from 1 to 4"),
        (lambda: largest(torch.ones(4), 0), "count: the number 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()
