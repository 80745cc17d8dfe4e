"""A fourth activation, registered from outside the package: all that the package does with an activation works.

Squared ReLU after the L2 norm (So et al., 2021, arXiv 2109.08668): S = max(τA/‖A‖₂, 0)².
"""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import pytest
import torch
from distributed import spawn
from registered import check_both_ways, check_layouts
from tiny import run_config
from torch import Tensor

from megatron_tf.activations.base import Activation
from megatron_tf.activations.function import score_function
from megatron_tf.activations.l2_norm import NormedScores
from megatron_tf.architectures.spec import shard_range
from megatron_tf.architectures.work import Passes
from megatron_tf.benchmark.counting import Counting
from megatron_tf.checkpoint.architecture import check_format
from megatron_tf.config import load_config
from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.load import dump_config
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.topology import Topology
from megatron_tf.costs.estimate import memory_per_rank
from megatron_tf.costs.plan import describe
from megatron_tf.errors import CheckpointError, ConfigError
from megatron_tf.growth.source import GrownSource
from megatron_tf.model import build_model, pattention
from megatron_tf.model.pattention import partial_pattention
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.pruning.criterion import summed_scale_terms
from megatron_tf.state.sources import InitialSource
from megatron_tf.verification.layout import Layout


class SquaredRelu(NormedScores):
    def apply_(self, u: Tensor) -> Tensor:
        return u.relu_().square_()

    def differentiate_(self, gradient: Tensor, u: Tensor) -> Tensor:
        return gradient.mul_(u.relu().mul_(2))


SQUARED_RELU = Activation(
    function=f"{__name__}:SquaredRelu",
    default_scale=sqrt,
    passes=Passes(7, 22),
    ignores_zero=True,
    scales_normed_scores=True,
)


@pytest.fixture(autouse=True)
def registered():
    with ACTIVATIONS.registered("squared_relu", SQUARED_RELU):
        yield


def config(**tokens: int) -> RunConfig:
    counts = {"qkv": 13, "proj": 11, "ffn": 37, **tokens}
    return run_config(model={"activation": "squared_relu", "parameter_tokens": counts})


def random(*shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def test_a_configuration_can_name_it(tmp_path: Path):
    file = tmp_path / "run.yml"
    file.write_text(dump_config(config()))
    assert load_config(file) == config()
    with pytest.raises(
        ConfigError, match="one of l2_norm_gelu, gelu_l2_norm, softmax, squared_relu .*mean squared_relu"
    ):
        load_config(file, ["model.activation=square_relu"])
    with pytest.raises(ConfigError, match="model.activation: the number 2, but one of l2_norm_gelu, "):
        load_config(file, ["model.activation=2"])


def test_formula_and_gradients():
    x, keys, values = (tensor.requires_grad_() for tensor in random((4, 3), (6, 3), (6, 5)))
    scores = x @ keys.mT
    plain = torch.relu(1.7 * scores / scores.norm(dim=-1, keepdim=True)).square() @ values
    torch.testing.assert_close(pattention(x, keys, values, scale=1.7, activation="squared_relu"), plain)
    assert torch.autograd.gradcheck(
        lambda *tensors: pattention(*tensors, scale=1.7, activation="squared_relu"), (x, keys, values)
    )


def sharded(group):
    """Two projections of one x, with shards of 2 and 3 and of 3 and 4 tokens, and a row of zeros."""
    x, *tokens = random((5, 3), (7, 3), (10, 3), (7, 4), (10, 4))
    x[2] = 0
    grads = random((5, 4), (5, 4))

    def both_passes(own_tokens, group):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *own_tokens)]
        outs = partial_pattention(leaves[0], leaves[1:3], leaves[3:], (2.0, 3.0), "squared_relu", group)
        return outs, torch.autograd.grad(outs, leaves, grads)

    outs, (d_x, *token_grads) = both_passes(tokens, SINGLE)
    own = [slice(*shard_range(len(t), group.size, group.rank)) for t in tokens]
    own_outs, (own_d_x, *own_grads) = both_passes([t[rows] for t, rows in zip(tokens, own)], group)
    for part, whole in zip((*own_outs, own_d_x), (*outs, d_x)):
        torch.testing.assert_close(all_reduce(part.detach(), group), whole.detach(), rtol=1e-12, atol=1e-12)
    for part, whole, rows in zip(own_grads, token_grads, own):
        torch.testing.assert_close(part, whole[rows], rtol=1e-12, atol=1e-12)


def test_uneven_shards_are_one_process():
    spawn(sharded, 3)


def test_it_is_planned():
    assert memory_per_rank(config(), 2).total > 0
    assert "tokens qkv 13 / proj 11 / ffn 37" in describe(config(), 2)
    assert architecture_of(config().model).work(config()).inner_passes == Passes(7, 22)
    function, (scores, gradient) = score_function("squared_relu"), random((64, 512), (64, 512))
    with Counting() as forward:
        r, _ = function.statistic_and_weights(scores, 2.0)
    with Counting() as backward:
        function.backward_and_couple(scores, r, gradient, 2.0)
    traffic = [counted.traffic / scores.nbytes for counted in (forward, backward)]
    assert traffic == pytest.approx([7, 22], rel=0.05)


@pytest.mark.parametrize("method", ["zero_key", "gram"])
def test_it_grows_and_keeps_the_function(method):
    small, large = config().model, config(qkv=26, ffn=74).model
    source = GrownSource(
        InitialSource(small, 7), InitialSource(large, 7), old_model=small, new_model=large,
        growth=Growth.model_validate({"from": "small", "method": method}), seed=3,
    )  # fmt: skip
    before = build_model(small, seed=7, dtype=torch.float64)
    after = build_model(large, scales=source.scales, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            source.read_into(name, "weight", 0, parameter.view(-1))
    ids = torch.arange(16)[None]
    tolerance = {"zero_key": 1e-12, "gram": 1e-5}[method]  # new keys of gram are rounded to fp32
    torch.testing.assert_close(after(ids), before(ids), rtol=tolerance, atol=tolerance)


def test_dropping_tokens_with_zero_keys_keeps_the_scale():
    x, keys, values = random((50, 3), (6, 3), (6, 5))
    keys[4:] = 0
    above, below = summed_scale_terms(x, keys, values, torch.arange(4), 2.0, "squared_relu")
    assert above == below > 0


@pytest.mark.parametrize("form", ["official", "huggingface"])
def test_formats_without_a_place_for_it_refuse(form):
    with pytest.raises(CheckpointError, match=f"activation squared_relu cannot be exported: .*{form}.* l2_norm_gelu, "):
        check_format(config().model, form, "exported")


@pytest.mark.slow
def test_every_layout_is_one_process():
    check_layouts(config())


@pytest.mark.slow
@pytest.mark.scale  # a checkpoint holds nothing of an activation; tests/verification/test_resume.py has a built-in one
def test_it_resumes_at_another_layout():
    check_both_ways(config(), Layout(Topology(2, 2, 1), True))
