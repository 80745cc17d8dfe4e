"""What a run that is started again says of itself: what was, what is, and which keys have no effect any more."""

from __future__ import annotations

import os

import pytest

from megatron_tf.config.load import load_config
from megatron_tf.growth.source import PRUNED
from megatron_tf.training.account import account, earlier_settings, keep_config, run_settings
from megatron_tf.training.start import Progress, Start
from megatron_tf.training.warm_start import EVENT

TOKENS = {"from": {"qkv": 10, "proj": 11, "ffn": 30}, "to": {"qkv": 13, "proj": 11, "ffn": 37}}
GROWN = {"method": "zero_key", "moments": "keep", "noise": 0.0, "source": "runs/small/checkpoints/step_00000010",
         "step": 10, "samples": 80, "tokens": 1280, "loss_before": 3.0, "loss_after": 3.0, **TOKENS}  # fmt: skip


def resumed(before=None, history=(), ranks=1, **fields):
    run_state = {"settings": run_settings(before, ranks)} if before is not None else {}
    return Start(None, "", Progress(20, 160, 2560), growth_history=history, resumed=True,
                 run_state={**run_state, **fields.pop("run_state", {})}, **fields)  # fmt: skip


def test_each_key_that_changed_is_told_with_both_values(config):
    before = config()
    now = config(optimizer={"lr": 5e-4}, training={"train_steps": 40, "global_batch_size": 16},
                 data={"train": ({"path": "unused"}, {"path": "more"})})  # fmt: skip
    told = account(now, resumed(before, changes={"data.train (content)": ["a", "b"]}), 2, None)
    assert told.config == now and told.origin == ""
    assert told.lines == (
        "configuration: 7 of its values changed since step 20",
        "  training.train_steps: 20 before, 40 now",
        "  training.global_batch_size: 8 before, 16 now",
        "  optimizer.lr: 0.001 before, 0.0005 now",
        "  ranks: 1 before, 2 now",
        "  data.train[1].path: not given before, more now",
        "  data.train[1].weight: not given before, 1.0 now",
        "  data.train (content): a before, b now",
    )
    (event,) = told.history
    assert (event["event"], event["step"], event["tokens"]) == ("resumed", 20, 2560)
    assert event["changes"]["optimizer.lr"] == ["0.001", "0.0005"] and len(event["changes"]) == 7


def test_earlier_events_stay_and_a_start_without_changes_adds_none(config):
    events = [{"event": "resumed", "step": 5, "tokens": 640, "changes": {"ranks": ["1", "2"]}}]
    told = account(config(), resumed(config(), run_state={"history": events}), 1, None)
    assert told.lines == ("configuration: as it was until step 20",) and list(told.history) == events


def test_a_checkpoint_of_an_older_version(config, tmp_path):
    """It does not hold the configuration; the run's folder does."""
    own = config(run={"dir": str(tmp_path)})
    assert earlier_settings(tmp_path) is None
    assert account(own, resumed(), 1, None).lines == ("configuration: what it was until step 20 is not known",)
    imported = Start(None, "", resumed=True)  # step 0, which no run has written
    assert account(own, imported, 1, None).lines == ()
    keep_config(tmp_path, own)
    told = account(config(run={"dir": str(tmp_path)}, optimizer={"lr": 1e-4}), resumed(), 1, earlier_settings(tmp_path))
    assert "  optimizer.lr: 0.001 before, 0.0001 now" in told.lines and "  ranks: not given before, 1 now" in told.lines
    (tmp_path / "config.yml").unlink()
    os.mkfifo(tmp_path / "config.yml")
    assert earlier_settings(tmp_path) is None


def test_a_key_that_an_older_version_did_not_have_has_not_changed(config):
    """While it has its default; nothing in the run is otherwise for it."""
    start = resumed(config())
    for key in ("run.tags", "evaluation.samples"):
        del start.run_state["settings"][key]
    now = config(run={"tags": ("long",)})
    assert account(config(), start, 1, None).lines == ("configuration: as it was until step 20",)
    assert account(now, start, 1, None).lines[1:] == ('  run.tags: not given before, ["long"] now',)


def test_a_section_that_was_not_there_is_told_by_its_keys_alone(config):
    branched = config(branch={"from": "runs/long"})
    lines = account(branched, resumed(config()), 1, None).lines
    assert lines[1] == "  branch.from: not given before, runs/long now"
    assert not any(line.startswith("  branch:") for line in lines)
    back = account(config(), resumed(branched), 1, None).lines
    assert "  branch.from: runs/long before, not given now" in back and not any("branch:" in line for line in back)


def test_a_growth_that_is_done_is_told_as_it_was(config):
    now = config(growth={"from": "runs/small", "method": "gram", "noise": 0.5, "lr_multipliers": {"old_tokens": 0.1}})
    told = account(now, resumed(config(growth={"from": "runs/small"}), [GROWN]), 1, None)
    assert told.origin == ", grown from runs/small/checkpoints/step_00000010 by zero_key"
    assert told.ineffective == (
        "growth.method: gram has no effect: the run was grown by zero_key",
        "growth.noise: 0.5 has no effect: the run was grown with 0.0",
    )
    assert told.lines == (
        "configuration: 1 of its values changed since step 20",
        "  growth.lr_multipliers.old_tokens: 1.0 before, 0.1 now",
    )
    growth = told.config.growth
    assert (growth.method, growth.noise, growth.lr_multipliers.old_tokens) == ("zero_key", 0.0, 0.1)


def test_clones_and_scaled_moments_are_told_as_they_were(config):
    width = {"from": {"hidden_size": 16}, "to": {"hidden_size": 32}, "clone_noise": 0.2}
    now = config(growth={"from": "runs/small", "moments_factor": 0.5})
    told = account(now, resumed(now, [{**GROWN, "width": width, "moments_factor": 0.25}]), 1, None)
    assert told.origin == ", grown from runs/small/checkpoints/step_00000010 by width 16 -> 32 by cloning, zero_key"
    assert told.ineffective == (
        "growth.clone_noise: 0.1 has no effect: the run was grown with 0.2",
        "growth.moments_factor: 0.5 has no effect: the run was grown with 0.25",
    )
    assert (told.config.growth.clone_noise, told.config.growth.moments_factor) == (0.2, 0.25)


def test_a_bank_stays_the_method_of_the_whole_model(config):
    entry = {**GROWN, "method": {"qkv": "gram", "ffn": "bank"}, "sparse": {"from": None, "to": {}}}
    growth = account(config(growth={"from": "runs/small"}), resumed(config(), [entry]), 1, None).config.growth
    assert (growth.method, growth.method_of("qkv"), growth.method_of("ffn")) == ("bank", "gram", "bank")


def test_methods_of_single_projections_and_another_source(config):
    entry = {**GROWN, "method": {"qkv": "gram", "ffn": "zero_key"}}
    as_it_was = config(growth={"from": "runs/small", "method": "gram", "methods": {"ffn": "zero_key"}})
    assert account(as_it_was, resumed(as_it_was, [entry]), 1, None).lines == ("configuration: as it was until step 20",)
    told = account(config(growth={"from": "runs/other", "moments": "reset"}), resumed(as_it_was, [entry]), 1, None)
    assert told.ineffective == (
        "growth.method: zero_key has no effect: the run was grown by qkv gram, ffn zero_key",
        "growth.moments: reset has no effect: the run was grown with keep",
        "growth.from: runs/other has no effect: the run was grown from runs/small/checkpoints/step_00000010",
    )
    growth = told.config.growth
    assert (growth.method_of("qkv"), growth.method_of("ffn"), growth.moments) == ("gram", "zero_key", "keep")
    assert growth.source == GROWN["source"] and told.origin.endswith("by qkv gram, ffn zero_key")


@pytest.mark.parametrize("history, origin", [
    ((), ""),
    ([GROWN, {**GROWN, "method": PRUNED, "source": "runs/big/step"}], ", pruned from runs/big/step"),
])  # fmt: skip
def test_a_run_that_was_not_grown_claims_no_growth(config, history, origin):
    now = config(growth={"from": "runs/small", "method": "gram"})
    told = account(now, resumed(config(), history), 1, None)
    assert told.config.growth is None and told.origin == origin
    assert told.ineffective == (f"growth: has no effect: the run goes on from a checkpoint of its own{origin}",)


def test_weights_that_a_run_began_with(config):
    event = {"event": EVENT, "source": "runs/a/checkpoints/step_00000006", "step": 6, "tokens": 768}
    warm = config(training={"init_from": "runs/a"})
    begun = account(warm, Start(None, "", run_state={"history": [event]}), 1, None)
    assert (begun.lines, begun.history) == ((), (event,))
    assert begun.origin == ", begun with the weights of runs/a/checkpoints/step_00000006"
    again = resumed(warm, run_state={"history": [event]})
    assert account(warm, again, 1, None).lines == ("configuration: as it was until step 20",)
    told = account(config(training={"init_from": "runs/b"}), again, 1, None)
    assert told.ineffective == (
        "training.init_from: runs/b has no effect: the run began with runs/a/checkpoints/step_00000006",
    )
    assert told.config.training.init_from == "runs/a/checkpoints/step_00000006"
    told = account(warm, resumed(config()), 1, None)
    assert told.ineffective[0].endswith("the run began with other weights") and told.config.training.init_from is None


def test_config_yml_keeps_its_earlier_versions(config, tmp_path):
    rates = (1e-3, 1e-3, 5e-4, 2e-4)
    for rate in rates:
        keep_config(tmp_path, config(optimizer={"lr": rate}))
    kept = {path.name: load_config(path).optimizer.lr for path in tmp_path.iterdir()}
    assert kept == {"config.1.yml": 1e-3, "config.2.yml": 5e-4, "config.yml": 2e-4}
    mine = tmp_path / "mine.yml"
    (tmp_path / "config.yml").rename(mine)
    (tmp_path / "config.yml").symlink_to(mine)
    keep_config(tmp_path, config(optimizer={"lr": 1e-4}))
    assert load_config(mine).optimizer.lr == load_config(tmp_path / "config.3.yml").optimizer.lr == 2e-4
    assert load_config(tmp_path / "config.yml").optimizer.lr == 1e-4


def test_a_growth_in_depth_is_told_and_cannot_be_changed_any_more(config):
    layers = {"method": "stack", "from": 1, "to": 2, "old_at": [0]}
    entry = {**GROWN, "method": {}, "from": TOKENS["to"], "layers": layers}
    now = config(growth={"source": "runs/small"})
    told = account(now, resumed(now, history=(entry,)), 1, None)
    assert told.origin == f", grown from {GROWN['source']} by 1 -> 2 layers by stack"
    assert told.config.growth.depth_method == "stack"
    assert "growth.depth_method: identity has no effect: the run was grown by stack" in told.ineffective
