"""The value that a sweep chooses: that with the lowest validation loss; and whether it is at an end of the values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_tf.study.file import Sweep


@dataclass(frozen=True)
class Choice:
    """`values`: all that are tried, ascending.  `losses`: of those that have ended.

    `value`: the chosen one; None while a loss is missing.  `at_end`: whether it is the least or the greatest, so that a
    better one may lie beyond.
    """

    values: tuple[float, ...]
    losses: Mapping[float, float]
    value: float | None = None
    at_end: bool = False


def choose(
    sweep: Sweep, loss_of: Callable[[float], float | None], is_possible: Callable[[float], bool] = lambda value: True
) -> Choice:
    """The choice among the values of `sweep`. `loss_of`: the last loss of a value's trial; None: it has not ended. NaN
    counts as the worst.

    While the best value is at an end, the next one beyond it, by the ratio of the last two, is tried as well, up to
    `sweep.extend` times, as long as it `is_possible` for the key.
    """
    values = sorted(sweep.values)
    for left in range(sweep.extend, -1, -1):
        found = {value: loss_of(value) for value in values}
        losses = {value: math.inf if math.isnan(loss) else loss for value, loss in found.items() if loss is not None}
        if len(losses) < len(values):
            break
        best = min(values, key=losses.__getitem__)
        at_end = best in (values[0], values[-1])
        beyond = best * best / (values[-2] if best == values[-1] else values[1])
        if not at_end or left == 0 or not is_possible(beyond):
            return Choice(tuple(values), losses, best, at_end)
        values = sorted([*values, beyond])
    return Choice(tuple(values), losses)
