"""The composition root: from a configuration to a trained model. Only here everything is known."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tf.checkpoint.architecture import stored_model
from megatron_tf.checkpoint.durable import write_atomically
from megatron_tf.checkpoint.source import CheckpointSource
from megatron_tf.config.load import dump_config
from megatron_tf.config.schema import DataSource, RunConfig
from megatron_tf.config.validate import BatchPlan, plan_batches, topology_for, validate
from megatron_tf.data.loader import BatchLoader, build_dataset, check_tokenizer, fingerprint
from megatron_tf.errors import ConfigError, UserError
from megatron_tf.parallel.environment import LaunchEnvironment
from megatron_tf.parallel.groups import Group, make_group
from megatron_tf.parallel.topology import Topology
from megatron_tf.plan import describe
from megatron_tf.telemetry.console import Console
from megatron_tf.telemetry.trackers import open_trackers
from megatron_tf.training.agreement import from_rank_zero, together
from megatron_tf.training.distributed import join, leave
from megatron_tf.training.engine import Batch, Engine
from megatron_tf.training.growth_proof import Probe, compare, probe
from megatron_tf.training.loop import Trainer
from megatron_tf.training.saving import Saver
from megatron_tf.training.start import Start, begin, checkpoints_folder, choose


def train(config: RunConfig, environment: LaunchEnvironment) -> None:
    """Trains, evaluates and saves as `config` says, resuming or growing where there is something to.

    Raises UserError, on every rank alike, before anything is written, for whatever the user can mend.
    """
    validate(config, environment.world_size)
    plan, topology = plan_batches(config, environment.world_size), topology_for(config, environment.world_size)
    device = join(environment, config.parallel.timeout_seconds)
    try:
        _train(config, plan, topology, environment, device)
    except UserError:  # all ranks are here; after any other error some may be in a collective, and waiting would hang
        leave()
        raise
    leave()


def _train(
    config: RunConfig, plan: BatchPlan, topology: Topology, environment: LaunchEnvironment, device: torch.device
) -> None:
    tensor = make_group(topology, "tensor", config.parallel.timeout_seconds)

    data_rank = topology.coordinate("data", environment.rank)
    model, data = config.model, config.data
    everything = (*data.train, *data.validation)

    def loader(sources: Sequence[DataSource]) -> BatchLoader:
        return BatchLoader(
            build_dataset(sources, model.seq_length, config.run.seed, model.vocab_size),
            micro_batch_size=plan.micro_batch_size, num_micro_batches=plan.num_micro_batches,
            data_rank=data_rank, data_size=topology.data, vocab_size=model.vocab_size,
        )  # fmt: skip

    together(lambda: check_tokenizer(everything, data.tokenizer))
    training = together(lambda: loader(data.train))
    validation = together(lambda: loader(data.validation)) if data.validation else None
    data_fingerprint = together(lambda: fingerprint(data.train, config.run.seed))
    path, passed_over = from_rank_zero(lambda: choose(config))
    start = together(lambda: begin(config, path, data_fingerprint))

    run_dir = Path(config.run.dir)
    together(lambda: _prepare_folder(config, run_dir, is_main=environment.rank == 0))
    console = Console(environment.rank == 0, run_dir / "train.log")
    for line in describe(config, environment.world_size).splitlines():
        console.info(line)
    for line in passed_over if environment.rank == 0 else ():
        console.warning(line)
    console.info(start.description)

    growing = start.grown_from is not None  # the held batch is read for the proof of a growth only
    held = together(lambda: list((validation or training).step_batches(0))) if growing else []
    before = _probe_smaller(config, plan, topology, tensor, start, held)
    engine = Engine(config, model, plan, topology, tensor, start.source)
    engine.load_loss_scaler(dict(start.run_state))
    if before is not None:
        after = probe(engine, held)
        console.info("growth: " + compare(before, after, config.training.precision, device))
        entry = {**start.growth_history[-1], "loss_before": before.loss, "loss_after": after.loss}
        start = replace(start, growth_history=(*start.growth_history[:-1], entry))

    trackers = together(
        lambda: open_trackers(
            config, run_dir, start.progress.step, dict(start.trackers), environment.rank == 0, console.warning
        )
    )
    token = from_rank_zero(lambda: secrets.token_hex(4))
    saver = Saver(config, engine, environment.rank, environment.world_size, token, data_fingerprint,
                  start.growth_history, trackers, console)  # fmt: skip
    try:
        Trainer(config, plan, engine, training, validation, saver, trackers, console, device, start.progress).fit()
    except UserError as error:
        if environment.rank:  # the others wait in a collective and cannot say it
            console.warning(str(error))
        raise
    finally:
        trackers.close()
        console.close()
    dist.barrier()


def _prepare_folder(config: RunConfig, run_dir: Path, is_main: bool) -> None:
    if is_main:
        try:
            checkpoints_folder(config).mkdir(parents=True, exist_ok=True)
            write_atomically(run_dir / "config.yml", dump_config(config).encode())
        except OSError as error:
            raise ConfigError(
                f"run.dir: cannot write to {run_dir}: {error.strerror}. Choose another folder."
            ) from error


def _probe_smaller(
    config: RunConfig, plan: BatchPlan, topology: Topology, tensor: Group, start: Start, held: list[Batch]
) -> Probe | None:
    """The answer of the model that is about to grow, under this layout; None when nothing grows."""
    if start.grown_from is None:
        return None
    smaller = stored_model(start.grown_from.index)
    engine = Engine(config, smaller, plan, topology, tensor, CheckpointSource(start.grown_from))
    answer = probe(engine, held)
    engine.close()
    return answer
