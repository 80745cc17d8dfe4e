from __future__ import annotations

import pytest

from megatron_tf.state.sources import InitialSource
from megatron_tf.tasks.data import OpenData
from megatron_tf.training.account import Account
from megatron_tf.training.announcement import Line, lines_about
from megatron_tf.training.start import Progress, Start


class Outlook(OpenData):
    def loader(self, sources, **sizes):
        raise AssertionError("nothing is read before the first step")

    def fingerprint(self):
        return {}

    def outlook(self, samples):
        return f"{samples} samples", ["they are few"]


def test_plan_checkpoints_start_and_data_in_this_order(config):
    run = config()
    start = Start(InitialSource(run.model, 7), "resumed from a checkpoint", Progress(step=5, samples=40, tokens=640))
    told = Account(run, ("configuration: as it was",), "", (), ineffective=("growth: has no effect",))
    plan = start.plan(run, world_size=2)
    *described, of_checkpoint, of_config, begins, changed, data, of_data = lines_about(
        plan, start, told, ["step_00000006: not used: damaged"], Outlook(), "cpu"
    )
    kinds = ["run", "model", "layout", "step", "length", "memory", "scores"]
    assert [line.text.split()[0] for line in described] == kinds
    assert of_checkpoint == Line("step_00000006: not used: damaged", is_warning=True)
    assert of_config == Line("growth: has no effect", is_warning=True)
    assert (begins.text, changed.text) == ("resumed from a checkpoint", "configuration: as it was")
    # 15 of the 20 steps are left, of 8 samples each
    assert (data.text, of_data) == ("data    160 samples", Line("they are few", is_warning=True))


@pytest.mark.parametrize(
    ("length", "said"),
    [
        ({"train_steps": 5}, None),
        ({"train_steps": 4}, "training.train_steps: 4, and the run was trained for 5 already"),
        ({"train_steps": None, "train_tokens": 520}, None),
        ({"train_steps": None, "train_tokens": 512}, "training.train_tokens: 512, and the run was trained for 640"),
        ({"train_steps": None, "train_samples": 32}, "training.train_samples: 32, and the run was trained for 40"),
    ],
)
def test_a_length_below_what_was_trained_is_said(config, length, said):
    """520 tokens are 5 steps of 128, the last of them in part."""
    run = config(training=length)
    start = Start(InitialSource(run.model, 7), "", Progress(step=5, samples=40, tokens=640))
    lines = lines_about(start.plan(run, 1), start, Account(run, (), "", ()), [], Outlook(), "cpu")
    found = [line for line in lines if line.text.startswith("training.")]
    assert [line.is_warning for line in found] == ([] if said is None else [True])
    assert said is None or said in found[0].text


@pytest.mark.parametrize(("noise", "resumed", "said"), [(0.0, False, True), (0.1, False, False), (0.0, True, False)])
def test_clones_that_never_differ_are_said(config, noise, resumed, said):
    run = config()
    width = {"from": {"hidden_size": 16}, "to": {"hidden_size": 32}, "clone_noise": noise}
    start = Start(InitialSource(run.model, 7), "", growth_history=({"width": width, "tokens": 0},), resumed=resumed)
    lines = lines_about(start.plan(run, 1), start, Account(run, (), "", ()), [], Outlook(), "cpu")
    found = [line for line in lines if line.text.startswith("growth.clone_noise is 0: clones are alike")]
    assert [line.is_warning for line in found] == ([True] if said else [])
