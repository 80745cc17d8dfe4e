"""The interface of an optimizer to the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_tf.config.sections.optimizer import Optimizer

WEIGHT = "weight"  # the state that every parameter has: its fp32 master


@dataclass(frozen=True)
class OptimizerState:
    """One fp32 number that an optimizer keeps for each element of a parameter, in addition to its weight.

    `name`: in checkpoints. Optimizers may share a name only if they mean the same by it.
    `gradient_power`: the state is proportional to this power of the gradient. It decides how a rescaled parameter
        rescales the state: weights times f have gradients times 1/f.
    `initial`: the value for an element that was never updated, such as one of a token that growth has just added.
    """

    name: str
    gradient_power: int
    initial: float = 0.0
    bytes: ClassVar[int] = 4  # of an element, in memory and in a checkpoint

    def factor(self, weight_factor: float) -> float:
        """The factor of the state when the weight is multiplied by `weight_factor`."""
        return 1 / weight_factor**self.gradient_power


@dataclass(frozen=True)
class UpdateBatch:
    """Elements with the same learning rate and weight decay, as lists of flat fp32 tensors: one for each segment.

    `states`: by name, each in the order of `weights`.  `ages`: the updates so far, a tensor [] for each segment.
    """

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    states: Mapping[str, Sequence[Tensor]]
    ages: Sequence[Tensor]


class UpdateRule(ABC):
    """An optimizer that works element by element. torch is imported only when `update` or `reference` is called.

    `section`: the class of its `optimizer:` section.
    `states`: those in addition to the weight. Checkpoints, growth, estimates, plans and checks read them.
    `candidate_lr_factor`, `router_lr_factor`: for the keys of `optimizer` of this name, where they are not given.
    `why_not_elsewhere`: the reason, as a clause for messages, why keys of other optimizers have no meaning here.
    """

    section: ClassVar[type[Optimizer]]
    states: ClassVar[tuple[OptimizerState, ...]]
    candidate_lr_factor: ClassVar[float] = 1.0
    router_lr_factor: ClassVar[float] = 1.0
    why_not_elsewhere: ClassVar[str] = "another optimizer has this key"

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of all states of a parameter, the weight first."""
        return (WEIGHT, *(state.name for state in self.states))

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of an element, without its weight."""
        return sum(state.bytes for state in self.states)

    @abstractmethod
    def update(self, optimizer: Optimizer, batch: UpdateBatch, lr: float, weight_decay: float) -> None:
        """One step, in place. Adds 1 to each of `batch.ages`.

        `lr`, `weight_decay`: of these elements at this step; a weight decay of 0 for elements that are not decayed.
        """

    @abstractmethod
    def reference(self, optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """An independent implementation of the same optimizer, for checks.

        Each of `groups` has a weight_decay, and what `state.parameters.matrix_rows` gives for its parameters.
        """


class MatrixRule(ABC):
    """The additional interface of an optimizer that updates whole matrices of blocks: W ← W − lr (size · D·P + λW).

    D [n, d] is the direction of a matrix, of which each rank has some rows. P [d, d] is a polynomial p of DᵀD, so ranks
    exchange only the sum of DᵀD over their rows.

    A parameter with `ParameterSpec.matrix_rows` is a stack of matrices, each with a P of its own. Of these, and of
    matrices with fewer rows than columns, a rank updates whole ones.
    """

    @abstractmethod
    def directions(self, optimizer: Optimizer, batch: UpdateBatch) -> list[Tensor]:
        """This rank's rows of D, flat as the gradients are. Updates the states in place and adds 1 to `batch.ages`."""

    @abstractmethod
    def transform(self, gram: Tensor) -> Tensor:
        """DᵀD -> P, both fp64 [d, d], for any number of matrices at once."""

    @abstractmethod
    def update_whole(self, matrices: Tensor, add_products: Callable[..., Tensor]) -> Tensor:
        """D [m, n, d] -> D·P [m, n, d] for each of m matrices, in fp32, or in the type of D if that is fp64.

        `add_products`: that of `model.products`, for products of stacks.
        """

    @abstractmethod
    def size(self, shape: Sequence[int]) -> float:
        """The factor `size` of the update of a matrix of this shape."""
