"""Learning rates of the tokens that a growth added, which go to 1, at every layout as by a plain formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import run_config

from megatron_tf.config.optimizers import rule_of
from megatron_tf.config.run_plan import plan_batches
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.topology import Topology
from megatron_tf.engine.choice import build_engine
from megatron_tf.engine.schedule import learning_rate, new_tokens_factor
from megatron_tf.errors import exit_now
from megatron_tf.model import build_model
from megatron_tf.model.layers import task_layers
from megatron_tf.parallel.groups import make_group
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.state.parameters import matrix_rows, parameter_table, projections
from megatron_tf.state.sources import initial_source
from megatron_tf.tasks.layers import example_batches
from megatron_tf.verification.layout import Layout, joined

STEPS = 5
NEW_FROM = {"qkv": 8, "proj": 11, "ffn": 20}  # of 13, 11 and 37: proj did not grow
RATES = {"old_tokens": 0.5, "new_tokens": 4.0, "new_tokens_decay_steps": 3}


def growth(**rates):
    return Growth.model_validate({"from": "small", "lr_multipliers": rates})


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"new_tokens": 3.0}, [3.0, 3.0, 3.0, 3.0, 3.0]),
        ({"new_tokens": 3.0, "new_tokens_decay_steps": 4}, [3.0, 2.5, 2.0, 1.5, 1.0]),
        ({"new_tokens": 0.0, "new_tokens_decay_steps": 2}, [0.0, 0.5, 1.0, 1.0, 1.0]),
        ({"new_tokens": 3.0, "new_tokens_decay_steps": 4, "new_tokens_decay_shape": "cosine"},
         [3.0, 2 + 0.5**0.5, 2.0, 2 - 0.5**0.5, 1.0]),
    ],
)  # fmt: skip
def test_the_factor_goes_to_one(rates, expected):
    assert [new_tokens_factor(step, growth(**rates)) for step in range(5)] == pytest.approx(expected)
    assert new_tokens_factor(100, growth(**rates)) == expected[-1]


def test_a_run_without_growth_has_none():
    assert new_tokens_factor(0, None) == 1


@pytest.mark.parametrize("type_", ["adamw", "muon"])
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_two_ranks_update_as_the_plain_formula(engine, type_, tmp_path):
    """Tokens are cut between tensor ranks, and between data-parallel ranks in the middle of a row."""
    optimizer = {"type": type_, "lr": 1e-2, "schedule": {"type": "constant", "warmup_steps": 1}}
    config = run_config(optimizer=optimizer, parallel={"engine": engine})
    config = config.model_copy(update={"growth": growth(**RATES)})
    layouts = [Layout(Topology(2, 1, 1)), Layout(Topology(1, 2, 1))]
    if engine == "torch" or type_ == "adamw":  # DeepSpeed cuts rows
        layouts.append(Layout(Topology(1, 1, 2)))
    start_ranks(_train, 2, config, layouts, str(tmp_path))
    expected = _plain(config)
    for number in range(len(layouts)):
        parts = [load_file(tmp_path / f"{number}.{rank}.safetensors") for rank in range(2)]
        flat = {name: torch.full((tensor.numel(),), float("nan")) for name, tensor in expected.items()}
        for key, part in ((key, part) for found in parts for key, part in found.items()):
            name, start = key.split(":")
            flat[name][int(start) : int(start) + part.numel()] = part
        for name, tensor in expected.items():
            assert torch.allclose(flat[name], tensor.flatten(), rtol=0, atol=2e-6), (layouts[number], name)


def _first_new(model):
    """Element where new tokens begin, of each tensor that has tokens."""
    return {
        f"{projection}.{tensor}": NEW_FROM[found.kind] * model.hidden_size
        for projection, found in projections(model).items()
        for tensor in (*found.keys, *found.values)
    }


def _train(rank, config, layouts, folder):
    with joined([config], rank, 2, folder):
        for number, layout in enumerate(layouts):
            of, topology = layout.apply(config), layout.topology
            plan, tensor = plan_batches(of, 2), make_group(topology, "tensor", 60.0)
            part = topology.coordinate("data", rank)
            engine = build_engine(of, of.model, plan, topology, tensor, initial_source(of), _first_new(of.model))
            for step in range(STEPS):
                engine.train_step(step, example_batches(of, plan, step, part, topology.data))
            weights = {
                f"{piece.name}:{piece.start}": piece.tensor.clone()
                for piece in engine.pieces()
                if piece.state == "weight"
            }
            save_file(weights, Path(folder) / f"{number}.{rank}.safetensors")
            engine.close()
    exit_now()


def _plain(config):
    """One process: a step of torch's optimizer at the schedule's rate, then each element's change times its factor.

    Updates, weight decay included, are proportional to the rate.
    """
    plan = plan_batches(Layout(Topology()).apply(config), 1)
    model = build_model(config.model, seed=config.run.seed)
    table, first_new, settings = parameter_table(config.model), _first_new(config.model), config.optimizer
    groups = [
        {
            "params": [parameter],
            "weight_decay": settings.weight_decay if table[name].decayed else 0.0,
            "matrix_rows": matrix_rows(table[name]),
        }
        for name, parameter in model.named_parameters()
    ]
    optimizer = rule_of(settings).reference(settings, groups)
    layers = task_layers(config.model)
    for step, factor in zip(range(STEPS), [4.0, 3.0, 2.0, 1.0, 1.0], strict=True):
        optimizer.zero_grad()
        micro_batches = list(example_batches(config, plan, step, 0, 1))
        count = sum(int(layers.counts(targets).sum()) for _, targets in micro_batches)
        for inputs, targets in micro_batches:
            (layers.plain_loss(model(inputs), targets) / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings, plan.train_steps)
        optimizer.step()
        with torch.no_grad():
            for name, start in first_new.items():
                weight, old = model.get_parameter(name).view(-1), before[name].view(-1)
                factors = torch.where(torch.arange(old.numel()) < start, 0.5, factor)
                weight.copy_(old + factors * (weight - old))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
