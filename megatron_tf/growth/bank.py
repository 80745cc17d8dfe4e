"""A bank next to the tokens of a dense projection: they stay in use at every position, and slots of candidates are
added.

| tensor of the bigger model | initial value |
|---|---|
| `bank.key_tokens` | 0 |
| `bank.value_tokens`, `bank.router` | random |
| `bank.balance` | 0 |
| all others, `key_tokens` and `value_tokens` among them | unchanged |

The keys of all candidates are 0, so the scores of a position with its chosen ones are 0. With an activation that
ignores zero scores, the statistic over the tokens in use does not change; with τ held every old term S_i v_i stays too,
and a new one is 0 · v = 0. So the function is kept exactly, for any router, with the gate at 1. A position uses one
more group of tokens for each slot, however many candidates there are.

In the first step the new keys of the chosen candidates have gradients, through their values. Values and routers have
them from the second step on, when S is no longer 0.
"""

from __future__ import annotations

from torch import Tensor

from megatron_tf.config.sections.model import Model
from megatron_tf.state.optimizer_states import WEIGHT
from megatron_tf.state.parameters import parameter_table
from megatron_tf.state.ranges import StepRange
from megatron_tf.state.sources import DerivedSource, StateSource


class BankSource(DerivedSource):
    """State of a model with banks, from `old` and with new values from `fresh` (of that model).

    `old_model`: without banks, but with as many tokens as positions of the new model use. A projection's first ones
    stay as its dense tokens; the others stand for the slots, and are not read.
    """

    def __init__(self, old: StateSource, fresh: StateSource, old_model: Model):
        super().__init__(old)
        self._fresh = fresh
        self._known = parameter_table(old_model)

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        if name in self._known:
            self._source.read_into(name, state, start, target)
        elif state == WEIGHT and name.endswith(".bank.key_tokens"):
            target.zero_()
        else:
            self._fresh.read_into(name, state, start, target)

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        if name in self._known:
            return self._source.adam_steps(name, start, stop)
        return [(start, stop, 0)] if start < stop else []
