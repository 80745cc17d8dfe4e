"""Routers of a split, fitted to what the smaller model's projections get on training samples."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_tf.architectures.spec import BankSpec
from megatron_tf.config.schema import RunConfig
from megatron_tf.growth.methods import SPLIT
from megatron_tf.growth.routers import fit_routers
from megatron_tf.growth.source import growth_seed
from megatron_tf.model.observing import observed
from megatron_tf.model.projection import Pattention
from megatron_tf.model.stage import Stage
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.groups import make_group
from megatron_tf.runtime.agreement import together
from megatron_tf.state.optimizer_states import WEIGHT
from megatron_tf.state.parameters import candidate_counts, in_layer, layer_of, projections
from megatron_tf.state.sources import StateSource, WithWeights
from megatron_tf.tasks.data import OpenData
from megatron_tf.training.moved_layers import of_all_stages
from megatron_tf.training.running import Run
from megatron_tf.training.start import Start

# Positions that routers are fitted to: for each candidate of a slot, and at most.
POSITIONS, MOST_POSITIONS = 256, 8192


def fits_routers(config: RunConfig, start: Start) -> bool:
    """Whether the run begins with the split of dense projections, and its configuration wants fitted routers."""
    growth, model = config.growth, config.model
    if growth is None or growth.routers != "clusters" or growth.method != SPLIT:
        return False
    if start.grown_from is None and not start.missing_source:
        return False
    old = start.model_before(model)
    return old.hidden_size == model.hidden_size and candidate_counts(old).keys() < candidate_counts(model).keys()


@torch.no_grad()
def with_fitted_routers(run: Run, start: Start, smaller: Stage, data: OpenData) -> StateSource:
    """`start.source` with the routers of `growth.routers` in all projections of this rank that become slots, also in
    new layers that are copies of others.

    `smaller`: this rank's part of the smaller model. All ranks call it together. Others than the first of the replicas
    take its routers: they must be equal to the last bit, and clusters could make more of a difference in rounding.
    """
    model, topology, training = run.config.model, run.plan.topology, run.config.training
    new, banks, dense = projections(model), {}, {}
    for name, module in smaller.named_modules():
        if isinstance(module, Pattention) and (bank := new[start.name_now(name, model)].bank) is not None:
            banks[name], dense[name] = bank, module
    rows = min(POSITIONS * max(candidate_counts(model).values()), MOST_POSITIONS)
    positions = training.micro_batch_size * model.seq_length // topology.context
    loader = together(
        lambda: data.loader(
            run.config.data.train,
            micro_batch_size=training.micro_batch_size,
            num_micro_batches=-(-rows // positions),
        )
    )
    inputs: dict[str, list[Tensor]] = {name: [] for name in dense}
    with observed((module, partial(_keep, inputs[name], rows)) for name, module in dense.items()):
        for batch, _ in together(lambda: list(loader.step_batches(0))):
            smaller.infer(batch.to(run.device))
    replicas = make_group(topology, "replicas", run.config.parallel.timeout_seconds)
    seed = growth_seed(run.config.run.seed, len(start.growth_history))
    fitted = {}
    for name, bank in banks.items():
        x = torch.cat(inputs[name])
        if replicas.rank == 0:
            keys = _keys(start.source, start.name_now(name, model), bank, x.shape[1])
            router, balance = fit_routers(x, keys, bank.candidates, seed)
        else:
            router = x.new_zeros(bank.slots, bank.candidates, x.shape[1], dtype=torch.float64)
            balance = router.new_zeros(router.shape[:2])
        fitted[f"{name}.bank.router"] = all_reduce(router, replicas).float().cpu()
        fitted[f"{name}.bank.balance"] = all_reduce(balance, replicas).float().cpu()
    run.console.info(f"growth: new routers follow clusters of {rows:,} positions of training data")
    everywhere = of_all_stages(run, start, fitted)
    return WithWeights(
        start.source,
        {
            in_layer(name, at): value
            for name, value in everywhere.items()
            for at, layer in enumerate(start.taken_from(model))
            if layer == layer_of(name)
        },
    )


def _keep(parts: list[Tensor], rows: int, x: Tensor) -> None:
    """Adds the positions of x [..., d] to `parts`, which are at most `rows` in all."""
    left = rows - sum(len(part) for part in parts)
    if left > 0:
        parts.append(x.flatten(0, -2)[:left])


def _keys(source: StateSource, name: str, bank: BankSpec, width: int) -> Tensor:
    """[slots, group_size, d]: the keys of each slot's first candidate. All others are copies of it."""
    size = bank.group_size * width
    starts = range(0, bank.slots * bank.candidates * size, bank.candidates * size)
    keys = [source.read(f"{name}.bank.key_tokens", WEIGHT, start, start + size) for start in starts]
    return torch.stack(keys).view(bank.slots, bank.group_size, width)
