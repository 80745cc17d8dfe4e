from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_tf.config.schema import Growth, Model
from megatron_tf.errors import ArgumentError
from megatron_tf.growth import pruning
from megatron_tf.growth.gram import GramKeys
from megatron_tf.growth.pruning import PrunedSource, largest, summed_contributions, summed_scale_terms
from megatron_tf.growth.source import GrownSource
from megatron_tf.model import pattention
from megatron_tf.state.parameters import default_scale, initial_scales, parameter_table, projections

ACTIVATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
STATES = ("weight", "exp_avg", "exp_avg_sq")
N, D = 24, 8


def model(qkv: int, proj: int, ffn: int) -> Model:
    return Model.model_validate(
        {"num_layers": 2, "hidden_size": D, "num_attention_heads": 2, "seq_length": 8, "vocab_size": 11,
         "parameter_tokens": {"qkv": qkv, "proj": proj, "ffn": ffn}}
    )  # fmt: skip


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [50, d], one row of it 0; keys and values [n, d]."""
    generator = torch.Generator().manual_seed(seed)
    x, keys, values = (torch.randn(rows, D, generator=generator, dtype=torch.float64) for rows in (50, N, N))
    x[3] = 0
    return x, keys, values * torch.linspace(0.1, 2, N, dtype=torch.float64)[:, None]


@pytest.fixture(params=[2**22, 3 * N + 1], ids=["at_once", "in_parts"])
def _parts(request, monkeypatch):
    monkeypatch.setattr(pruning, "_SCORE_ELEMENTS", request.param)


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
    monkeypatch.setattr(pruning, "SLICE_ELEMENTS", slice_elements)
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
