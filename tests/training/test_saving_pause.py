"""How long a save in the background keeps training from going on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median

import pytest
import torch
import torch.multiprocessing
from saving import Recorder

from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.config.run_plan import plan_batches, plan_run
from megatron_tf.config.topology import Topology
from megatron_tf.engine.deepspeed.joining import join
from megatron_tf.parallel.groups import make_group
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import leave
from megatron_tf.state.sources import InitialSource
from megatron_tf.tasks.layers import example_batches
from megatron_tf.telemetry.trackers import Trackers
from megatron_tf.training.running import Run
from megatron_tf.training.start import Progress

LARGEST_SHARE = 0.15
ROUNDS = 5


def seconds(action) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


@pytest.mark.timing
def test_the_pause_is_a_small_share_of_a_save(config, tmp_path):
    """The pause is the call of `save` and what the next update waits for the copy; `-s` shows the figures."""
    model = {"num_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "seq_length": 64, "vocab_size": 8192,
             "parameter_tokens": {"qkv": 512, "proj": 512, "ffn": 8192}}  # fmt: skip
    run_config = config(
        model=model, run={"dir": str(tmp_path)}, checkpoint={"keep_last": 1},
        training={"global_batch_size": 4, "micro_batch_size": 4},
    )  # fmt: skip
    torch.multiprocessing.spawn(_measure, (run_config, str(tmp_path)), nprocs=1)
    figures = json.loads((tmp_path / "figures.json").read_text())
    pauses = [call + wait for call, wait in zip(figures["call"], figures["wait"])]
    print(f"\n{figures['bytes'] / 1e9:.2f} GB; seconds, medians of {ROUNDS}: " + ", ".join(
        f"{name} {median(figures[name]):.3f}" for name in ("synchronous", "call", "wait", "copy", "step",
                                                           "step_during_copy")
    ))  # fmt: skip
    print(f"the pause is {median(pauses) / median(figures['synchronous']):.1%} of a synchronous save; "
          f"the first one, which allocates, {figures['first'] / median(figures['synchronous']):.1%}")  # fmt: skip
    assert median(pauses) <= LARGEST_SHARE * median(figures["synchronous"])


def _measure(rank, config, folder):
    from megatron_tf.engine.deepspeed.engine import DeepSpeedEngine
    from megatron_tf.training.saving import Saver

    join(LaunchEnvironment("torchrun", 0, 1, 0, 1, "localhost", 0), 120.0, f"{folder}/store")
    plan, topology = plan_batches(config, 1), Topology()
    engine = DeepSpeedEngine(config, config.model, plan, topology, make_group(topology, "tensor", 120.0),
                    InitialSource(config.model, 1))  # fmt: skip

    def saver(asynchronous):
        checkpoint = config.checkpoint.model_copy(update={"asynchronous": asynchronous})
        console = Recorder()
        own = config.model_copy(update={"checkpoint": checkpoint})
        run = Run(own, plan_run(own, 1), 0, torch.device("cpu"), console)
        return Saver(run, engine, Trackers([], console.warning), token=f"t{asynchronous:d}", data={})

    def step(number):
        engine.train_step(number, example_batches(config, plan, number, 0, 1))

    def save(kind, number):
        return seconds(lambda: both[kind].save(Progress(number), {}))

    def waited():
        """Runs a step; how long its update waited for the copy, and the step took."""
        hook, waits = engine.before_update, []
        engine.before_update = lambda: waits.append(seconds(hook))
        taken = seconds(lambda: step(5))
        assert engine.before_update is None
        return waits[0], taken

    both = {kind: saver(kind) for kind in (False, True)}
    figures = {name: [] for name in ("synchronous", "call", "wait", "copy", "step", "step_during_copy")}
    figures["bytes"] = sum(piece.tensor.nbytes for piece in engine.pieces())
    step(5)
    for number in range(ROUNDS + 1):
        figures["synchronous"].append(save(False, number + 1))
        figures["step"].append(seconds(lambda: step(5)))
        state = {piece.key: piece.tensor.clone() for piece in engine.pieces()}
        call = save(True, number + 1)
        wait, taken = waited()
        both[True].finish()
        reader = open_checkpoint(Path(folder, "checkpoints", f"step_{number + 1:08d}"))
        for piece in engine.pieces():
            saved = reader.read(piece.name, piece.state, piece.start, piece.stop)
            assert torch.equal(saved, state[piece.key]) and not torch.equal(saved, piece.tensor)
        copies = [seconds(lambda: both[True]._copier.start(engine.pieces()).result())]
        if number == 0:
            figures["first"] = call + wait
            continue
        for name, value in (("call", call), ("wait", wait), ("copy", copies[0]), ("step_during_copy", taken)):
            figures[name].append(value)
    Path(folder, "figures.json").write_text(json.dumps(figures))
    leave()
