"""The states of every parameter in training, by name: its fp32 master weight, and those that an optimizer declares.

Checkpoints, growth, sources and checks take the names from here. Only the class of an optimizer defines them.
"""

from __future__ import annotations

from megatron_tf.config.optimizers import DEFAULT, OPTIMIZERS
from megatron_tf.optimizers.base import WEIGHT, OptimizerState

__all__ = ["STATES", "WEIGHT", "OptimizerState", "declared_states", "initial_value"]
STATES = OPTIMIZERS[DEFAULT].state_names  # of the default optimizer


def declared_states() -> dict[str, OptimizerState]:
    """The states of all optimizers by name. ValueError when two optimizers declare different states with one name."""
    found: dict[str, OptimizerState] = {}
    for name in OPTIMIZERS.names():
        for state in OPTIMIZERS[name].states:
            if found.setdefault(state.name, state) != state:
                raise ValueError(
                    f"{name} declares {state}, and another optimizer {found[state.name]}. Choose another name for one."
                )
    return found


def initial_value(state: str) -> float:
    """The value of a state, other than the weight, for elements that were never updated."""
    return declared_states()[state].initial
