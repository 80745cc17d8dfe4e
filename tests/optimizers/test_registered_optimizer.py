"""A second optimizer, registered from outside the package: all that the package does with an optimizer works.

Gradient descent with momentum: one state, m ← βm + g + λw, w ← w − lr m.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from prepared import write_tokens
from registered import check_both_ways, check_layouts
from tiny import run_config
from tooling import assert_refused, tool

from megatron_tf.checkpoint.architecture import check_same_architecture
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.summary import summarize
from megatron_tf.config import load_config
from megatron_tf.config.fields import Beta
from megatron_tf.config.load import dump_config
from megatron_tf.config.optimizers import OPTIMIZERS
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.optimizer import Optimizer
from megatron_tf.config.topology import Topology
from megatron_tf.costs.checkpoints import checkpoint_bytes
from megatron_tf.costs.estimate import memory_per_rank, num_parameters
from megatron_tf.engine.optimizer import Segment, SegmentedOptimizer
from megatron_tf.errors import CheckpointError, ConfigError
from megatron_tf.growth.grow import grow
from megatron_tf.growth.source import GrownSource
from megatron_tf.optimizers.base import OptimizerState, UpdateRule
from megatron_tf.runtime.environment import detect
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.state.optimizer_states import declared_states
from megatron_tf.verification.layout import Layout


class MomentumOptimizer(Optimizer):
    type: Literal["momentum"] = "momentum"
    momentum: Beta = 0.9


class Momentum(UpdateRule):
    section = MomentumOptimizer
    states = (OptimizerState("momentum", gradient_power=1),)
    why_not_elsewhere = "momentum has one average"

    def update(self, optimizer, batch, lr, weight_decay):
        for weight, gradient, momentum in zip(batch.weights, batch.gradients, batch.states["momentum"]):
            momentum.mul_(optimizer.momentum).add_(gradient + weight_decay * weight)
            weight.sub_(lr * momentum)
        torch._foreach_add_(list(batch.ages), 1)

    def reference(self, optimizer, groups):
        return torch.optim.SGD(groups, lr=optimizer.lr, momentum=optimizer.momentum)


MOMENTUM = Momentum()


@pytest.fixture(autouse=True)
def registered():
    with OPTIMIZERS.registered("momentum", MOMENTUM):
        yield


def config(**changes) -> RunConfig:
    return run_config(optimizer={"type": "momentum", "lr": 1e-2, "momentum": 0.5}, **changes)


def test_its_section_is_strict(tmp_path: Path):
    file = tmp_path / "run.yml"
    file.write_text(dump_config(config()))
    assert load_config(file) == config() and isinstance(load_config(file).optimizer, MomentumOptimizer)
    with pytest.raises(ConfigError, match="optimizer.momentum: 1 is out of range"):
        load_config(file, ["optimizer.momentum=1"])
    with pytest.raises(ConfigError, match="one of adamw, adamw_ema, muon, momentum is expected. Did you mean momentum"):
        load_config(file, ["optimizer.type=momntum"])
    with pytest.raises(ConfigError, match="optimizer.betas: momentum has one average.*set optimizer.type to adamw"):
        load_config(file, ["optimizer.betas=[0.5, 0.5]"])


def test_it_is_planned():
    numel, adam = num_parameters(config().model), run_config()
    assert checkpoint_bytes(config().model, "momentum") == 8 * numel
    ours, theirs = memory_per_rank(config(), 1), memory_per_rank(adam, 1)
    assert (ours.optimizer, theirs.optimizer) == (8 * numel, 12 * numel)
    assert (ours.weights, ours.gradients, ours.activations) == (theirs.weights, theirs.gradients, theirs.activations)


def test_one_name_has_one_meaning():
    class Other(Momentum):
        states = (OptimizerState("momentum", gradient_power=2),)

    with OPTIMIZERS.registered("other", Other()), pytest.raises(ValueError, match="other declares .*momentum"):
        declared_states()


def test_a_rescaled_parameter_is_updated_as_it_would_have_been():
    """Weights times f with gradients times 1/f: what the optimizer keeps must follow the gradients, for every
    optimizer."""
    for name in OPTIMIZERS.names():
        rule, factor = OPTIMIZERS[name], 4.0
        weights = torch.ones(3)
        settings = Optimizer(type=name, lr=1e-2, weight_decay=0.0)
        optimizer = SegmentedOptimizer([weights], settings)
        optimizer.bind([Segment("a", 0, 3, weights, 0, True, True, torch.tensor(0.0))])
        state = {}
        for gradient in (1.0, 1 / factor):
            weights.grad = torch.tensor([1.0, 2.0, -3.0]) * gradient
            optimizer.bind(optimizer.segments)
            for declared in rule.states:
                optimizer.states(optimizer.segments[0])[declared.name].fill_(declared.initial)
            optimizer.step()
            state[gradient] = {k: v.clone() for k, v in optimizer.states(optimizer.segments[0]).items()}
        follow_gradients = [
            declared for declared in rule.states if declared.gradient_power > 0
        ]  # others follow the weight
        assert follow_gradients
        for declared in follow_gradients:
            expected = state[1.0][declared.name] * declared.factor(factor)
            torch.testing.assert_close(state[1 / factor][declared.name], expected)


@pytest.mark.slow
def test_every_layout_is_one_process():
    check_layouts(config())


@pytest.mark.slow
def test_it_resumes_at_another_layout():
    check_both_ways(config(), Layout(Topology(2, 1, 1), True))


def _train(rank: int, *configs: RunConfig) -> None:
    from megatron_tf.runtime.stop_signals import StopSignals
    from megatron_tf.training.run import train

    torch.set_num_threads(1)
    for one in configs:
        train([one], detect({}), StopSignals())


@pytest.mark.slow
def test_it_grows_and_is_inspected(tmp_path: Path):
    write_tokens(tmp_path / "tokens")
    larger = {"parameter_tokens": {"qkv": 20, "proj": 11, "ffn": 51}}
    common = {"data": {"train": ({"path": str(tmp_path / "tokens")},)}}
    small = config(run={"dir": str(tmp_path / "small")}, training={"train_steps": 2}, **common)
    grown = config(
        run={"dir": str(tmp_path / "grown")}, training={"train_steps": 2}, model=larger, **common,
        growth={"source": str(tmp_path / "small")},
    )  # fmt: skip
    start_ranks(_train, 1, small, grown)
    path = tmp_path / "small" / "checkpoints" / "step_00000002"
    reader = open_checkpoint(path)
    assert set(reader.index.states) == {"weight", "momentum"}
    source = grow(reader, grown.model, grown.growth, seed=1, data=None, optimizer="momentum").source
    assert isinstance(source, GrownSource)
    name, old = "blocks.0.ffn.value_tokens", 37 * 32
    assert torch.equal(source.read(name, "momentum", 0, old), reader.read(name, "momentum", 0, old))
    assert not source.read(name, "momentum", old, 51 * 32).any()
    index = open_checkpoint(tmp_path / "grown" / "checkpoints" / "step_00000002").index
    assert index.adam_steps[name] == ((0, old, 4), (old, 51 * 32, 2))

    with pytest.raises(ConfigError, match="momentum. Set optimizer.type to momentum, or set growth.moments to reset"):
        grow(reader, grown.model, grown.growth, seed=1, data=None)
    reset = Growth(source="x", moments="reset")
    assert grow(reader, grown.model, reset, seed=1, data=None).states == ("weight", "exp_avg", "exp_avg_sq")

    # a process that does not know the optimizer
    assert_refused(tool("inspect_checkpoint", path), "momentum", "is an unknown state; known are weight, exp_avg")
    tensors = summarize(reader)["tensors"]
    assert tensors["final_norm.bias"]["states"] == ["weight", "momentum"]
    assert tensors["final_norm.bias"]["bytes"] == 2 * 4 * 32

    with pytest.raises(
        CheckpointError, match="adamw keeps exp_avg and exp_avg_sq .* has momentum. Set optimizer.type to"
    ):
        check_same_architecture(reader.index, small.model)
