"""What candidates (model.sparse) cost a rank more than the work that positions do with them, and what makes it less.

A position uses one candidate of each slot, but a rank holds all, with their gradients and optimizer states, and
data-parallel ranks exchange the gradients of all. So with many candidates one of the two limits a run. Then candidates
have to be shared out over more ranks, or be fewer. Every remedy is estimated like a layout of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from megatron_tf.architectures.tokenformer.section import TokenFormerModel
from megatron_tf.config.nearest import divisors
from megatron_tf.config.run_plan import topology_for
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.parallel import Shard
from megatron_tf.config.validate import validate
from megatron_tf.costs.estimate import candidates_per_rank, stage_candidates, stage_parameters
from megatron_tf.costs.hardware import Assumptions, Gpu
from megatron_tf.costs.layouts import Estimate, estimate
from megatron_tf.errors import ConfigError

# The share of a step from which on the exchange of gradients and weights is called its bottleneck.
BOTTLENECK = 0.2
_SHARDS = get_args(Shard)


@dataclass(frozen=True)
class Remedy:
    """Other settings of the same run on the same GPUs. `overrides`: arguments of launch/train.py."""

    overrides: tuple[str, ...]
    memory_total: int  # bytes on a rank
    fits: bool
    step_seconds: float
    data_share: float  # of a step, for the exchange between data-parallel ranks


@dataclass(frozen=True)
class BankCosts:
    """What candidates take on a rank of the fullest pipeline stage.

    `does_not_fit`: whether they are why the memory does not suffice: they are most of what is needed, or do not fit by
        themselves.
    `is_bottleneck`: whether the exchange of gradients and weights takes `BOTTLENECK` of a step or more.
    `memory_remedies`: with which the run fits, of each kind the least change; if there are none, with which it needs
        least. Empty unless needed.
    `exchange_remedies`: with which it fits and the exchange takes less, and so does the step: of each kind the least
        change with which the exchange is no bottleneck; if there are none, that with the shortest step. Empty unless
        needed.
    """

    parameters: int
    bytes: int  # of weights, gradients and optimizer states
    exchange_share: float  # of a step, for the gradients and weights of all parameters
    exchanged_share: float  # of the parameters that are exchanged
    does_not_fit: bool
    is_bottleneck: bool
    memory_remedies: tuple[Remedy, ...]
    exchange_remedies: tuple[Remedy, ...]


def bank_costs(
    chosen: Estimate, gpu: Gpu, assumed: Assumptions, can_run: Callable[[RunConfig], bool] = lambda config: True
) -> BankCosts | None:
    """None for a model without candidates. `can_run`: whether a valid configuration can take the place of the chosen
    one, such as between the other stages of a chain."""
    config, world = chosen.config, chosen.world_size
    parameters, num_bytes = candidates_per_rank(config, world)
    if not parameters:
        return None
    is_most = num_bytes > chosen.memory.total - num_bytes
    does_not_fit = not chosen.fits and (is_most or not assumed.fits(num_bytes, gpu))
    is_bottleneck = _exchange_share(chosen) >= BOTTLENECK
    kinds = list(_others(config, world, gpu, assumed, can_run)) if does_not_fit or is_bottleneck else []
    return BankCosts(
        parameters,
        num_bytes,
        _exchange_share(chosen),
        _exchanged_share(chosen),
        does_not_fit,
        is_bottleneck,
        _to_fit(kinds, chosen) if does_not_fit else (),
        _to_exchange_less(kinds, chosen) if is_bottleneck else (),
    )


_Changes = list[tuple[tuple[str, ...], Estimate]]  # of one kind, the least change first


def _to_fit(kinds: Sequence[_Changes], chosen: Estimate) -> tuple[Remedy, ...]:
    fitting = [[change for change in kind if change[1].fits] for kind in kinds]
    if any(fitting):
        return tuple(_remedy(*kind[0]) for kind in fitting if kind)
    least = [min(kind, key=lambda change: change[1].memory.total) for kind in kinds if kind]
    return tuple(_remedy(*change) for change in least if change[1].memory.total < chosen.memory.total)


def _to_exchange_less(kinds: Sequence[_Changes], chosen: Estimate) -> tuple[Remedy, ...]:
    faster = [
        [
            (overrides, other)
            for overrides, other in kind
            if other.fits and other.time.data < chosen.time.data and other.time.total < chosen.time.total
        ]
        for kind in kinds
    ]
    enough = [[change for change in kind if _exchange_share(change[1]) < BOTTLENECK] for kind in faster]
    if any(enough):
        return tuple(_remedy(*kind[0]) for kind in enough if kind)
    return tuple(_remedy(*min(kind, key=lambda change: change[1].time.total)) for kind in faster if kind)


def _remedy(overrides: tuple[str, ...], own: Estimate) -> Remedy:
    return Remedy(overrides, own.memory.total, own.fits, own.time.total, _exchange_share(own))


def _exchanged_share(own: Estimate) -> float:
    """The share of candidates in the parameters of the fullest rank, which data-parallel ranks exchange."""
    model, topology = own.config.model, topology_for(own.config, own.world_size)
    stages = 0, topology.pipeline - 1
    stage = max(stages, key=lambda stage: stage_parameters(model, topology, stage))
    return stage_candidates(model, topology, stage) / stage_parameters(model, topology, stage)


def _exchange_share(own: Estimate) -> float:
    return own.time.data / own.time.total


def _others(
    config: RunConfig, world_size: int, gpu: Gpu, assumed: Assumptions, can_run: Callable[[RunConfig], bool]
) -> Iterator[_Changes]:
    """The valid ones of `_kinds`."""
    for kind in _kinds(config, world_size, gpu):
        valid = []
        for overrides, changed in kind:
            try:
                validate(changed, world_size)
            except ConfigError:
                continue
            if can_run(changed):
                valid.append((overrides, estimate(changed, world_size, gpu, assumed)))
        yield valid


def _kinds(config: RunConfig, world_size: int, gpu: Gpu) -> Iterator[list[tuple[tuple[str, ...], RunConfig]]]:
    """Other settings by kind: sharded state, tensor ranks, pipeline stages, fewer candidates."""
    parallel = config.parallel
    if parallel.engine == "deepspeed" and config.zero.stage == 0:
        yield [(("zero.stage=1",), _with(config, "zero", {"stage": 1}))]
    engine = () if parallel.engine == "torch" else ("parallel.engine=torch",)
    yield [
        ((*engine, f"parallel.shard={shard}"), _with(config, "parallel", {"engine": "torch", "shard": shard}))
        for shard in (_SHARDS if engine else _SHARDS[_SHARDS.index(parallel.shard) + 1 :])
    ]
    for axis, most in (("tensor", gpu.per_node), ("pipeline", config.model.num_layers)):
        yield [
            ((f"parallel.{axis}={size}",), _with(config, "parallel", {axis: size}))
            for size in divisors(world_size)
            if getattr(parallel, axis) < size <= most
        ]
    yield list(_with_fewer_candidates(config))


def _with_fewer_candidates(config: RunConfig) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """With all numbers of candidates divided by the same number, the least first, as far as 2 or more are left."""
    model = config.model
    if not isinstance(model, TokenFormerModel) or model.sparse is None:
        return
    banks = model.sparse.banks()
    for divisor in divisors(math.gcd(*(bank.candidates for bank in banks.values())))[1:]:
        fewer = {kind: bank.candidates // divisor for kind, bank in banks.items()}
        if min(fewer.values()) < 2:
            return
        changed = {kind: bank.model_copy(update={"candidates": fewer[kind]}) for kind, bank in banks.items()}
        overrides = tuple(f"model.sparse.{kind}.candidates={count}" for kind, count in fewer.items())
        yield overrides, _with(config, "model", {"sparse": model.sparse.model_copy(update=changed)})


def _with(config: RunConfig, section: str, update: dict[str, object]) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=update)})
