"""What is kept of every parameter while it is trained, by name: its fp32 master weight, and what an optimizer declares.

Checkpoints, growth, sources and checks ask here; no name stands anywhere else but in the class of its optimizer.
"""

from __future__ import annotations

from megatron_tf.config.optimizers import DEFAULT, OPTIMIZERS
from megatron_tf.optimizers.base import WEIGHT, OptimizerState

__all__ = ["STATES", "WEIGHT", "OptimizerState", "declared_states", "initial_value"]
STATES = OPTIMIZERS[DEFAULT].state_names  # unless a configuration names another optimizer


def declared_states() -> dict[str, OptimizerState]:
    """The states of all optimizers by name. ValueError when two of them mean different things by one name."""
    found: dict[str, OptimizerState] = {}
    for name in OPTIMIZERS.names():
        for state in OPTIMIZERS[name].states:
            if found.setdefault(state.name, state) != state:
                raise ValueError(
                    f"{name} declares {state}, and another optimizer {found[state.name]}. Choose another name for one."
                )
    return found


def initial_value(state: str) -> float:
    """The value of a state, other than the weight, of elements that were never updated."""
    return declared_states()[state].initial
