"""The dynamic loss scale of fp16, which keeps small gradients from becoming 0.

The rule, the settings and the state are those of DeepSpeed, so a run can resume with either engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_tf.config.sections.deepspeed import DeepSpeedFp16


@dataclass
class _State:
    cur_scale: float
    cur_hysteresis: int
    cur_iter: int = 0
    last_overflow_iter: int = -1


class LossScale:
    """It halves after overflows, and doubles after a window of steps without one."""

    def __init__(self, settings: DeepSpeedFp16):
        self._settings = settings
        self._state = _State(2.0**settings.initial_scale_power, settings.hysteresis)

    @property
    def value(self) -> float:
        return self._state.cur_scale

    @property
    def can_fall(self) -> bool:
        return self._state.cur_scale > self._settings.min_loss_scale

    def update(self, overflow: bool) -> None:
        """After each step. `overflow`: a gradient was not finite."""
        state, settings = self._state, self._settings
        if overflow:
            if 1 in (settings.hysteresis, state.cur_hysteresis):
                state.cur_scale = max(state.cur_scale / 2, float(settings.min_loss_scale))
            else:
                state.cur_hysteresis -= 1
            state.last_overflow_iter = state.cur_iter
        else:
            stable = state.cur_iter - state.last_overflow_iter - 1
            grows = stable > 0 and stable % settings.loss_scale_window == 0
            if grows or settings.consecutive_hysteresis:
                state.cur_hysteresis = settings.hysteresis
            if grows:
                state.cur_scale *= 2
        state.cur_iter += 1

    def state(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self._state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores an earlier `state`. Missing keys keep their values, and unknown ones are ignored."""
        for key in asdict(self._state).keys() & state.keys():
            setattr(self._state, key, state[key])
