"""A block's auxiliary loss acts on the gradient alike at every layout, and its value comes into the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from tiny import run_config
from torch import Tensor

from megatron_tf.architectures.tokenformer.architecture import TokenFormerArchitecture
from megatron_tf.architectures.tokenformer.block import tokenformer_block
from megatron_tf.architectures.tokenformer.section import TokenFormerModel
from megatron_tf.config.architectures import ARCHITECTURES
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.config.topology import Topology
from megatron_tf.model import build_model
from megatron_tf.model.context import BlockContext, Reports
from megatron_tf.model.layers import Block, TensorParallel
from megatron_tf.verification.layout import Layout, compare, reference, run_layouts


class PenaltyModel(TokenFormerModel):
    architecture: Literal["penalty"] = "penalty"


class PenaltyArchitecture(TokenFormerArchitecture):
    section = PenaltyModel
    block = f"{__name__}:penalty_block"

    def losses(self, model: Model) -> tuple[str, ...]:
        return ("penalty",)

    def metrics(self, model: Model) -> tuple[str, ...]:
        return ("mean_square",)


class PenaltyBlock(Block):
    """Penalises the squared scores of the feed-forward projection: a loss of the input, and of the tokens on this
    rank."""

    def feed_forward(self, x: Tensor, losses: Reports, metrics: Reports) -> Tensor:
        losses["penalty"] = 0.1 * (x @ self.ffn.key_tokens.mT).square().mean(tuple(range(x.dim() - 1))).sum()
        metrics["mean_square"] = x.detach().square().mean() / self.tensor.group.size
        return super().feed_forward(x, losses, metrics)


def penalty_block(model: Model, layer: int, scales: Mapping[str, float], tensor: TensorParallel) -> Block:
    block = tokenformer_block(model, layer, scales, tensor)
    block.__class__ = PenaltyBlock
    return block


PENALTY = PenaltyArchitecture()


@pytest.fixture(autouse=True)
def registered():
    with ARCHITECTURES.registered("penalty", PENALTY):
        yield


def config(architecture: str = "penalty", **training: object) -> RunConfig:
    return run_config(
        model={"architecture": architecture, "num_layers": 3},
        training=training,
        data={"train": ({"path": "unused"},), "mask_eod_loss": True},
    )


def test_the_sum_of_loss_and_auxiliary_losses_is_the_objective():
    """`attach` gives the gradient that adding the losses gives."""
    gradients = []
    ids = torch.arange(16)[None]
    for weight in (None, 0.5):
        model = build_model(config().model, dtype=torch.float64)
        context = BlockContext(loss_weight=weight)
        loss = model(ids, context=context).square().mean()
        assert context.losses["penalty"].requires_grad is (weight is None)
        (loss + 0.5 * context.losses["penalty"] if weight is None else loss).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_recomputed_blocks_report_once():
    model, contexts = build_model(config().model), [BlockContext(loss_weight=1.0) for _ in range(2)]
    for block, recompute in ((block, r) for r in (False, True) for block in model.blocks):
        block.recompute = recompute
        if block is model.blocks[-1]:
            model(torch.arange(16)[None], context=contexts[recompute]).sum().backward()
    assert contexts[0].losses == contexts[1].losses and contexts[0].metrics == contexts[1].metrics


def test_the_reference_feels_it():
    with_it, without = reference(config(), 1), reference(config("tokenformer"), 1)
    assert with_it.losses == without.losses and with_it.grad_norms[0] > 1.01 * without.grad_norms[0]
    assert len(with_it.reports) == 2 and not without.reports


TWO_RANKS = [Layout(Topology(2, 1, 1), True), Layout(Topology(1, 2, 1)), Layout(Topology(1, 1, 2))]
FOUR_RANKS = [Layout(Topology(2, 2, 1)), Layout(Topology(1, 2, 2))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpointing", "chosen"),
    [
        (False, [*TWO_RANKS, *FOUR_RANKS]),
        # a block that is recomputed is so on its own rank
        (True, TWO_RANKS),
        pytest.param(True, FOUR_RANKS, marks=pytest.mark.scale),
    ],
)
def test_every_layout_is_one_process(checkpointing, chosen):
    run = config(activation_checkpointing=checkpointing)
    expected = reference(run, 2)
    for layout, trace in zip(chosen, run_layouts(run, chosen, 2)):
        assert len(trace.reports) == len(expected.reports) == 4
        difference = compare(trace, expected)
        assert difference.agrees(1e-5), f"{layout}: {difference}"
