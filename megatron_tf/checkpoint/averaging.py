"""Averages of weights, by range: the mean of several checkpoints of one model, and the moving average in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_tf.checkpoint.architecture import stored_model
from megatron_tf.checkpoint.reader import CheckpointReader
from megatron_tf.config.differences import differing
from megatron_tf.errors import CheckpointError
from megatron_tf.optimizers.adamw_ema import EMA_OFFSET
from megatron_tf.state.optimizer_states import WEIGHT
from megatron_tf.state.ranges import StepRange
from megatron_tf.state.sources import FreshSource, copy_in_slices


def averaged(readers: Sequence[CheckpointReader]) -> FreshSource:
    """The weights averaged over `readers`, with fresh optimizer states. Holds a bounded buffer of the state.

    CheckpointError when there are fewer than two, or when they are not of one model with one τ of each projection.
    """
    if len(readers) < 2:
        raise CheckpointError(
            f"{readers[0].path}: is one checkpoint, and an average is of two or more. Give several, or a run that "
            "keeps more of them (checkpoint.keep_last)"
        )
    first, *others = readers
    for other in others:
        models = stored_model(first.index), stored_model(other.index)
        differences = [f"model.{key} {after}, and there {before}" for key, before, after in differing(*models)]
        if models[0].architecture != models[1].architecture or differences:
            told = f" ({differences[0]})" if differences else ""
            raise CheckpointError(
                f"{other.path}: is of another model than {first.path}{told}. Average checkpoints of one model"
            )
        for name, scale in first.index.scales.items():
            if other.index.scales[name] != scale:
                raise CheckpointError(
                    f"{other.path}: τ of {name} is {other.index.scales[name]:.6g}, and {scale:.6g} in {first.path}. "
                    "Average checkpoints after the same growth"
                )
    return FreshSource(_Mean(readers))


def moving_average(reader: CheckpointReader) -> FreshSource:
    """The average of the weights that optimizer.type adamw_ema keeps, with fresh optimizer states.

    CheckpointError when the checkpoint holds none.
    """
    if any(EMA_OFFSET not in tensor.states for tensor in reader.index.tensors.values()):
        raise CheckpointError(
            f"{reader.path}: holds no moving average of its weights. Give a checkpoint of a run with optimizer.type "
            "adamw_ema, or average several with --last"
        )
    return FreshSource(_MovingAverage([reader]))


class _Mean:
    """A `StateSource` of weights alone."""

    def __init__(self, readers: Sequence[CheckpointReader]):
        self._readers = readers

    @property
    def scales(self) -> Mapping[str, float]:
        return self._readers[0].index.scales

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """The mean in fp32, summed up in fp64."""
        assert state == WEIGHT
        total = torch.zeros(stop - start, dtype=torch.float64)
        for reader in self._readers:
            total += reader.read(name, WEIGHT, start, stop)
        return (total / len(self._readers)).float()

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        copy_in_slices(lambda low, high: self.read(name, state, low, high), start, target)

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        return [(start, stop, 0)] if start < stop else []


class _MovingAverage(_Mean):
    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """The weight and its offset to the average, added."""
        assert state == WEIGHT
        (reader,) = self._readers
        return reader.read(name, WEIGHT, start, stop) + reader.read(name, EMA_OFFSET, start, stop)
