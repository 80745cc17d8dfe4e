"""Ending early by the validation loss, and the text that is written at evaluations."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from launching import PROJECT, environment, warm
from live import PATIENCE_SECONDS
from tiny import run_config

from megatron_tf.config.load import dump_config
from megatron_tf.config.sections.training import StopWhen
from megatron_tf.config.validate import validate
from megatron_tf.data.indexed import IndexedWriter
from megatron_tf.errors import ConfigError
from megatron_tf.training.early_stop import EarlyStop


def followed(losses, state=(), **settings):
    stop = EarlyStop(StopWhen(**settings) if settings else None, dict(state))
    for loss in losses:
        stop.watch(loss)
    return stop


def test_a_loss_that_is_low_enough_ends_the_run():
    assert followed([5.0, 3.0], loss_below=3.0).reason is None
    found = followed([5.0, 2.9], loss_below=3.0).reason
    assert found == "the validation loss 2.9000 is below 3 (training.stop_when.loss_below)"
    assert followed([5.0, 2.9, float("nan")], loss_below=3.0).reason == found


def test_no_improvement_for_a_while_ends_the_run():
    assert followed([5.0, 4.0, 4.1], patience=2).reason is None
    assert followed([5.0, 4.0, 4.1, 4.0], patience=2).reason == (
        "2 evaluations in a row brought nothing better than 4.0000 (training.stop_when.patience 2)"
    )
    assert followed([5.0, 4.0, 3.9, 3.8], patience=2).reason is None
    assert followed([5.0, 4.0, 3.95, 3.92], patience=2, min_improvement=0.1).reason is not None
    assert followed([5.0, float("nan"), float("nan")], patience=2).reason is not None
    assert followed([], patience=1).reason is None


def test_a_resumed_run_decides_as_one_that_was_not_interrupted():
    state = json.loads(json.dumps(followed([5.0, 4.0, 4.1]).state()))
    assert followed([4.2], state, patience=2).reason is not None
    assert followed([], state, patience=1).reason is not None  # asked again with other settings
    assert followed([4.2], state).reason is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"training": {"stop_when": {"patience": 2}}}, "training.stop_when: without evaluation.interval_steps"),
        ({"training": {"stop_when": {}}, "evaluation": {"interval_steps": 2}}, "training.stop_when: says no condition"),
        ({"evaluation": {"sample_prompts": ("a",)}}, "evaluation.sample_prompts: need data.tokenizer"),
    ],
)
def test_settings_without_an_effect_are_refused(changes, problem):
    with pytest.raises(ConfigError) as raised:
        validate(run_config(**changes), 1)
    assert any(found.startswith(problem) for found in raised.value.problems)


SCRIPT = """
import json, sys
from megatron_tf import train
runs = [train("config.yml", overrides) for overrides in json.loads(sys.argv[1])]
print(json.dumps([[run.checkpoint.name, run.metrics] for run in runs]))
"""


def test_a_run_ends_early_is_complete_and_can_go_on(tmp_path):
    for name in ("train", "validation"):
        with IndexedWriter(tmp_path / name, vocab_size=257) as writer:
            for _ in range(40):
                writer.add_document([*b"to be, or not to be: that is the question. " * 2, 256])
    sources = {name: ({"path": name},) for name in ("train", "validation")}
    config = run_config(
        run={"dir": "run"}, model={"vocab_size": 257}, data={**sources, "tokenizer": "bytes"},
        training={"train_steps": 6, "stop_when": {"loss_below": 100.0}}, logging={"interval_steps": 1},
        evaluation={"interval_steps": 2, "samples": 8, "sample_prompts": ("to", ""), "sample_tokens": 5},
    )  # fmt: skip
    (tmp_path / "config.yml").write_text(dump_config(config))
    overrides = [[], [], ["training.stop_when=null"]]
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        warm([sys.executable, tmp_path / "script.py", json.dumps(overrides)]), cwd=tmp_path, capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(PROJECT)), timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (first, metrics), (again, _), (last, all_metrics) = json.loads(done.stdout.splitlines()[-1])
    assert (first, again, last) == ("step_00000002", "step_00000002", "step_00000006")
    below = "because the validation loss"
    assert f"step 2: the run ends here, {below}" in done.stdout
    assert f"step 2 of 6: the run is complete, {below}" in done.stdout
    samples = {record["step"]: record["sample/1"] for record in all_metrics if "sample/1" in record}
    assert list(samples) == [0, 2, 4, 6] and all(text.startswith("to") for text in samples.values())
    assert all(len(text) <= 7 for text in samples.values()) and f"writes  {samples[6]!r}" in done.stdout
    assert [record["step"] for record in metrics if "eval/loss" in record] == [0, 2]
