"""AdamW with a moving average of the weights: the average is the textbook's, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from launching import train
from prepared import write_tokens
from tiny import run_config
from tooling import tool

from megatron_tf.checkpoint import load_logical
from megatron_tf.checkpoint.averaging import moving_average
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.config.load import dump_config
from megatron_tf.config.optimizers import rule_of
from megatron_tf.config.sections.optimizer import Optimizer
from megatron_tf.errors import CheckpointError
from megatron_tf.model import build_model
from megatron_tf.optimizers.base import UpdateBatch

DECAY = 0.6
EMA = Optimizer(type="adamw_ema", lr=0.1, ema_decay=DECAY)


def test_the_average_is_the_textbooks_and_the_update_is_adamws():
    torch.manual_seed(0)
    start, gradients = torch.randn(5, dtype=torch.float32), torch.randn(8, 5)
    ema, weights = start.double(), {}
    for settings in (Optimizer(lr=0.1), EMA):
        rule = rule_of(settings)
        weight, age = start.clone(), torch.zeros(())
        states = {state.name: [torch.full_like(weight, state.initial)] for state in rule.states}
        for gradient in gradients:
            rule.update(settings, UpdateBatch([weight], [gradient], states, [age]), lr=0.1, weight_decay=0.1)
            if settings is EMA:
                ema = DECAY * ema + (1 - DECAY) * weight.double()
        weights[settings.type] = weight
    assert torch.equal(weights["adamw"], weights["adamw_ema"])
    torch.testing.assert_close(states["ema_offset"][0] + weight, ema.float(), rtol=1e-5, atol=1e-6)


def test_the_offset_scales_with_the_weight():
    offset = rule_of(EMA).states[-1]
    assert (offset.initial, offset.factor(0.5)) == (0.0, 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three steps with a checkpoint of each, on two ranks."""
    folder = tmp_path_factory.mktemp("ema")
    write_tokens(folder / "tokens")
    config = run_config(
        run={"dir": str(folder / "run"), "seed": 5}, data={"train": ({"path": str(folder / "tokens")},)},
        training={"train_steps": 3}, checkpoint={"interval_steps": 1}, parallel={"tensor": 2},
        optimizer={"type": "adamw_ema", "ema_decay": DECAY, "lr": 0.01},
    )  # fmt: skip
    (folder / "config.yml").write_text(dump_config(config))
    done = train(folder, ranks=2)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.mark.slow
def test_a_sharded_run_saves_it_and_the_tool_takes_it_out(folder, tmp_path):
    expected = {name: p.detach().double() for name, p in build_model(run_config().model, seed=5).named_parameters()}
    for step in (1, 2, 3):
        now = load_logical(folder / "run" / "checkpoints" / f"step_{step:08d}")
        expected = {name: DECAY * ema + (1 - DECAY) * now[name].double() for name, ema in expected.items()}
    done = tool("average_checkpoints", folder / "run", "--ema", "--to", tmp_path / "ema")
    assert done.returncode == 0 and "the moving average" in done.stdout, done.stderr
    found = load_logical(tmp_path / "ema")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name].float(), rtol=1e-4, atol=1e-6)
    with pytest.raises(
        CheckpointError, match="holds no moving average of its weights. Give a checkpoint of a run with"
    ):
        moving_average(open_checkpoint(tmp_path / "ema" / "checkpoints" / "step_00000000"))
