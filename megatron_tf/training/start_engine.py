"""The engine of a run, with the state that it starts from. A growth is proved on the way, from weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_tf.checkpoint.architecture import stored_model
from megatron_tf.checkpoint.reader import CheckpointReader
from megatron_tf.engine.base import Engine
from megatron_tf.engine.choice import build_engine
from megatron_tf.inference.sharded import load_stage
from megatron_tf.model.layers import TensorParallel
from megatron_tf.model.precision import DTYPES
from megatron_tf.model.projection import without_fp8
from megatron_tf.model.stage import Stage
from megatron_tf.parallel.groups import Group, make_group
from megatron_tf.runtime.agreement import together
from megatron_tf.runtime.watchdog import Watchdog
from megatron_tf.training.choices import following, recorded
from megatron_tf.training.fitted_routers import fits_routers, with_fitted_routers
from megatron_tf.training.growth_proof import compare, probe
from megatron_tf.training.moved_layers import of_all_stages
from megatron_tf.training.run_data import Loaders
from megatron_tf.training.running import Run
from megatron_tf.training.start import Start


def start_engine(run: Run, start: Start, loaders: Loaders, watchdog: Watchdog) -> tuple[Engine, Start]:
    """The engine at its start. A growth is proved on a held batch first, and the proof goes into its history."""
    topology, timeout = run.plan.topology, run.config.parallel.timeout_seconds
    tensor = make_group(topology, "tensor", timeout)
    ends = loaders.data.document_ends
    if start.grown_from is None:
        watchdog.begin("loading the weights")
        return _engine(run, start, tensor, ends), start
    watchdog.begin("proving the growth, with the smaller model")
    held = together(lambda: list(loaders.held.step_batches(0)))
    split = TensorParallel(tensor, run.config.parallel.sequence, make_group(topology, "context", timeout))
    smaller = _smaller_stage(run, start.grown_from, split, ends)
    with recorded(smaller) as own_choices:
        before = probe(smaller, held)
    entry = start.growth_history[-1]
    # where the function changes, other choices are right
    choices = of_all_stages(run, start, own_choices) if entry["preserves"] else {}
    if fits_routers(run.config, start):
        watchdog.begin("fitting the routers")
        start = replace(start, source=with_fitted_routers(run, start, smaller, loaders.data))
    del smaller
    watchdog.begin("loading the weights")
    engine = _engine(run, start, tensor, ends)
    watchdog.begin("proving the growth, with the grown model")
    stage = engine.stage()
    named = {start.name_now(name, run.config.model): own for name, own in choices.items()}
    with following(stage, named) as followed, without_fp8(stage):
        after = probe(stage, held)
    proof = compare(before, after, followed, run.config.training.compute_type, run.device, entry["preserves"])
    run.console.info(f"growth: {proof}")
    entry = {**entry, "loss_before": before.loss, "loss_after": after.loss}
    return engine, replace(start, growth_history=(*start.growth_history[:-1], entry))


def _engine(run: Run, start: Start, tensor: Group, ends: Sequence[int]) -> Engine:
    model, plan = run.config.model, run.plan
    engine = build_engine(
        run.config,
        model,
        plan.batches,
        plan.topology,
        tensor,
        start.source,
        start.first_new(model),
        ends,
        start.new_layers(model),
    )
    engine.load_loss_scaler(dict(start.run_state))
    return engine


def _smaller_stage(run: Run, smaller: CheckpointReader, tensor: TensorParallel, ends: Sequence[int]) -> Stage:
    return load_stage(
        smaller,
        stored_model(smaller.index),
        run.plan.topology,
        run.rank,
        tensor,
        DTYPES[run.config.training.compute_type],
        run.device,
        ends,
    )
