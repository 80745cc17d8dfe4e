"""What an optimizer is to the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_tf.config.sections.optimizer import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHT = "weight"  # the state that every parameter has: its fp32 master


@dataclass(frozen=True)
class OptimizerState:
    """One fp32 number that an optimizer keeps for each element of a parameter, in addition to its weight.

    `name`: in checkpoints. Optimizers may share a name only if they mean the same by it.
    `gradient_power`: the state is proportional to this power of the gradient, which says what becomes of it when the
        parameter is rescaled: weights times f have gradients times 1/f.
    `initial`: of an element that was never updated, such as one of a token that growth has just added.
    """

    name: str
    gradient_power: int
    initial: float = 0.0
    bytes: ClassVar[int] = 4  # of an element, in memory and in a checkpoint

    def factor(self, weight_factor: float) -> float:
        """What the state is multiplied by when the weight is multiplied by `weight_factor`."""
        return 1 / weight_factor**self.gradient_power


@dataclass(frozen=True)
class UpdateBatch:
    """Elements that are updated alike, as lists of flat fp32 tensors: one tensor for each segment.

    `states`: by name, in the order of the weights.  `ages`: updates so far, a tensor [] each.
    """

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    states: Mapping[str, Sequence[Tensor]]
    ages: Sequence[Tensor]


class UpdateRule(ABC):
    """An optimizer that works element by element. Nothing here imports torch before `update` or `reference` is called.

    `section`: the `optimizer:` section of a configuration.
    `states`: what it keeps in addition to the weight. Checkpoints, growth, estimates, plans and checks read it.
    `why_not_elsewhere`: the reason, as a clause, why keys of other optimizers mean nothing to it.
    """

    section: ClassVar[type[Optimizer]]
    states: ClassVar[tuple[OptimizerState, ...]]
    why_not_elsewhere: ClassVar[str] = "another optimizer has this key"

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of all states of a parameter, the weight first."""
        return (WEIGHT, *(state.name for state in self.states))

    @property
    def state_bytes(self) -> int:
        """Bytes of an element in addition to its weight."""
        return sum(state.bytes for state in self.states)

    @abstractmethod
    def update(self, optimizer: Optimizer, batch: UpdateBatch, lr: float, weight_decay: float) -> None:
        """One step, in place. Adds 1 to each of `batch.ages`.

        `lr`: of this step and these elements.  `weight_decay`: theirs; 0 for what is not decayed.
        """

    @abstractmethod
    def reference(self, optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The same optimizer by other means, for checks: of parameter groups with a weight_decay each."""


class MatrixRule(ABC):
    """What an optimizer has in addition that updates a block's matrices whole: W ← W − lr (size · D·P + λW).

    D [n, d] is a matrix's direction, of which each rank has some rows, and P [d, d] a function of DᵀD alone. So ranks
    exchange nothing but the sum of their rows' DᵀD.
    """

    @abstractmethod
    def directions(self, optimizer: Optimizer, batch: UpdateBatch) -> list[Tensor]:
        """Rows of D, flat as the gradients are; updates the states in place, and adds 1 to each of `batch.ages`."""

    @abstractmethod
    def transform(self, gram: Tensor) -> Tensor:
        """DᵀD -> P, both [..., d, d] in fp64: of any number of matrices at once."""

    @abstractmethod
    def size(self, shape: Sequence[int]) -> float:
        """The factor of the whole matrix's update."""
