"""Adam after growths: every row has the number of updates that it has had, and is corrected for its bias by that."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.config.sections.optimizer import Optimizer
from megatron_tf.engine.optimizer import Segment, SegmentedOptimizer
from megatron_tf.growth.source import GrownSource
from megatron_tf.state.parameters import initial_scales, parameter_table
from megatron_tf.state.sources import StateSource

NAME, WIDTH = "blocks.0.ffn.key_tokens", 8
LR, EPS, DECAY, STEPS = 1e-2, 1e-8, 0.1, 12


def model(ffn: int) -> Model:
    return Model.model_validate(
        {"num_layers": 1, "hidden_size": WIDTH, "num_attention_heads": 2, "seq_length": 4, "vocab_size": 5,
         "parameter_tokens": {"qkv": 3, "proj": 3, "ffn": ffn}}
    )  # fmt: skip


class Trained:
    """What a run holds of NAME: values by state, and (start, stop, updates)."""

    def __init__(self, of: Model, states: dict[str, Tensor], ages: list[tuple[int, int, int]]):
        self.scales, self.states, self.ages = initial_scales(of), states, ages

    def read(self, name, state, start, stop):
        return self.states[state][start:stop].clone()

    def read_into(self, name, state, start, target):
        target.copy_(self.states[state][start : start + len(target)])

    def adam_steps(self, name, start, stop):
        return [(max(a, start), min(b, stop), age) for a, b, age in self.ages if a < stop and b > start]


class RowAdamW:
    """The reference: AdamW in fp64 as it is written down, the step count a number a row."""

    def __init__(self, weights: Tensor, beta1: float, beta2: float):
        self.weights, self.betas = weights.double().clone(), (beta1, beta2)
        self.mean, self.square = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.steps = torch.zeros(len(weights), 1, dtype=torch.float64)

    def append(self, rows: Tensor) -> None:
        zeros = torch.zeros_like(rows, dtype=torch.float64)
        self.weights = torch.cat([self.weights, rows.double()])
        self.mean, self.square = torch.cat([self.mean, zeros]), torch.cat([self.square, zeros])
        self.steps = torch.cat([self.steps, zeros[:, :1]])

    def step(self, gradient: Tensor) -> None:
        beta1, beta2 = self.betas
        self.steps += 1
        self.mean = beta1 * self.mean + (1 - beta1) * gradient
        self.square = beta2 * self.square + (1 - beta2) * gradient**2
        mean, square = self.mean / (1 - beta1**self.steps), self.square / (1 - beta2**self.steps)
        self.weights -= LR * (DECAY * self.weights + mean / (square.sqrt() + EPS))


def started(source: StateSource, numel: int, betas: tuple[float, float]) -> tuple[SegmentedOptimizer, Tensor]:
    """An optimizer that has taken its state from `source`, in the way the engine does."""
    flat = torch.zeros(numel)
    segments = [
        Segment(NAME, start, stop, flat, start, True, True, torch.tensor(float(age)))
        for start, stop, age in source.adam_steps(NAME, 0, numel)
    ]
    adam = SegmentedOptimizer([flat], Optimizer(lr=LR, betas=betas, eps=EPS, weight_decay=DECAY))
    adam.bind(segments)
    for segment in segments:
        for state, target in adam.states(segment).items():
            source.read_into(NAME, state, segment.start, target)
    return adam, flat


def held(adam: SegmentedOptimizer, flat: Tensor, of: Model) -> Trained:
    states = {"weight": flat} | {state: adam.state[flat][state] for state in ("exp_avg", "exp_avg_sq")}
    return Trained(of, states, [(s.start, s.stop, int(s.age)) for s in adam.segments])


@pytest.mark.parametrize("method", ["zero_key", "gram"])
@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
def test_three_generations_move_as_the_reference_says(beta2, method):
    generator = torch.Generator().manual_seed(0)
    models, betas = [model(ffn) for ffn in (10, 23, 41)], (0.9, beta2)
    numels = [parameter_table(of)[NAME].numel for of in models]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    first = random(numels[0])
    source: StateSource = Trained(models[0], dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros(numels[0]))
                                  | {"weight": first}, [(0, numels[0], 0)])  # fmt: skip
    reference = RowAdamW(first.view(-1, WIDTH), *betas)
    for generation, (of, numel) in enumerate(zip(models, numels)):
        adam, flat = started(source, numel, betas)
        if generation:
            reference.append(flat.view(-1, WIDTH)[len(reference.weights) :])
        for step in range(STEPS):
            gradient = random(numel // WIDTH, WIDTH) * 3
            before = flat.clone()
            flat.grad = gradient.view(-1).clone()
            adam.step()
            reference.step(gradient.double())
            torch.testing.assert_close(flat.view(-1, WIDTH), reference.weights.float(), rtol=1e-5, atol=1e-6)
            if generation and step == 0:
                old = numels[generation - 1]
                moved = flat[old:] - before[old:] * (1 - LR * DECAY)
                # a first update is lr · g/|g|: neither 1/√(1−β₂) times too large nor frozen, whatever β₂
                torch.testing.assert_close(moved.abs(), torch.full_like(moved, LR), rtol=1e-3, atol=0)
        if generation < 2:
            now = held(adam, flat, of)
            fresh = Trained(models[generation + 1], {"weight": random(numels[generation + 1])}, [])
            source = GrownSource(
                now, fresh, old_model=of, new_model=models[generation + 1],
                growth=Growth(source="x", method=method), seed=generation,
            )  # fmt: skip
    assert [age for _, _, age in held(adam, flat, of).ages] == [3 * STEPS, 2 * STEPS, STEPS]


def test_the_trap_is_real():
    """The age of the old rows in place of their own makes the first update of new rows 3 times too large."""
    flat = torch.zeros(1)
    adam = SegmentedOptimizer([flat], Optimizer(lr=LR, betas=(0.9, 0.999), eps=EPS, weight_decay=0.0))
    adam.bind([Segment(NAME, 0, 1, flat, 0, True, False, torch.tensor(10_000.0))])
    flat.grad = torch.ones(1)
    adam.step()
    assert abs(flat.item()) == pytest.approx(0.1 / math.sqrt(0.001) * LR, rel=1e-3)
