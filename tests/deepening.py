"""Small models about to grow, with state of which nothing is 0, and what they compute in fp64."""

from __future__ import annotations

import torch
from tiny import run_config

from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.growth.source import GrownSource
from megatron_tf.model import build_model
from megatron_tf.state.optimizer_states import STATES
from megatron_tf.state.sources import InitialSource


def model(layers: int = 2, **changes) -> Model:
    return run_config(model={"num_layers": layers, **changes}).model


class Trained(InitialSource):
    """A model whose weights, moments and ages are all those of training: nothing is 0 and nothing is 1."""

    def read(self, name, state, start, stop):
        seed = 1000 * STATES.index(state) + sum(map(ord, name))
        numel = self._table[name].numel
        drawn = torch.rand(numel, generator=torch.Generator().manual_seed(seed))
        return (0.3 * (drawn - 0.5))[start:stop]

    def adam_steps(self, name, start, stop):
        return [(start, stop, 7)] if start < stop else []


def grown(old: Model, new: Model, seed: int = 3, **growth) -> GrownSource:
    return GrownSource(
        Trained(old, 0), InitialSource(new, seed), old_model=old, new_model=new,
        growth=Growth(source="x", **growth), seed=seed,
    )  # fmt: skip


def built(source, of: Model):
    network = build_model(of, scales=source.scales, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            source.read_into(name, "weight", 0, parameter.view(-1))
    return network


IDS = torch.arange(32).view(2, 16) * 7 % 99
