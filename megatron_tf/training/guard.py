"""The handling of bad losses and gradients: steps that are not finite, and loss spikes.

The numbers are the same on all ranks, so all of them make the same decision without communication.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_tf.config.sections.training import Guard
from megatron_tf.errors import DivergedError, TrainingError
from megatron_tf.telemetry.text import count_of

_MEMORY = 0.98  # decay rate of the running mean, which covers about 50 steps
WARMUP = 20  # losses before the running mean means anything
_REMEDY = "Look at the data there, or resume from an earlier checkpoint with a lower optimizer.lr."


class LossGuard:
    """Counts skipped steps and spikes. `lr_factor`: of the learning rate, 1 until a spike lowers it."""

    def __init__(self, config: Guard, state: Mapping[str, Any]):
        """`state`: the `state()` stored in the checkpoint; {} at the start of a run."""
        self._config = config
        self.lr_factor = float(state.get("lr_factor", 1.0))
        self._mean = float(state.get("mean_loss", 0.0))
        self._lowest = float(state.get("lowest_mean_loss", 0.0))
        self._seen = int(state.get("losses_seen", 0))
        self._spikes = int(state.get("spikes_in_a_row", 0))
        self._skipped = 0
        self._overflowed = int(state.get("overflows_in_a_row", 0))

    def state(self) -> dict[str, Any]:
        """For the checkpoint, so that a resumed run makes the same decisions."""
        return {
            "lr_factor": self.lr_factor,
            "mean_loss": self._mean,
            "lowest_mean_loss": self._lowest,
            "losses_seen": self._seen,
            "spikes_in_a_row": self._spikes,
            "overflows_in_a_row": self._overflowed,
        }

    @property
    def is_skipping(self) -> bool:
        """Whether the newest step was skipped. The state is then suspect and should not be saved."""
        return self._skipped > 0

    def overflowed(self) -> None:
        """Notes a step that fp16 skipped while the loss scale falls. That is how the scale is found, so it is an error
        only if it happens in every step."""
        self._overflowed += 1

    def skipped(self, step: int, reason: str, least_scale: float | None = None) -> str:
        """Notes that step `step` (1-based) was skipped for `reason`; returns the warning. DivergedError when the run
        must stop.

        `least_scale`: in fp16 the loss scale, which cannot fall any further.
        """
        self._skipped += 1
        text, remedy = f"step {step:,}: {reason}; the step is skipped and changes nothing", _REMEDY
        if least_scale is not None:
            remedy += (
                f" The loss scale {least_scale:g} is the least (deepspeed.fp16.min_loss_scale): training.precision "
                "bf16 needs none."
            )
        if self._config.nonfinite == "stop":
            raise DivergedError(f"{text}. The run stops, because guard.nonfinite is stop.")
        if self._skipped >= self._config.nonfinite_patience:
            raise DivergedError(
                f"{text}. That was {self._skipped} in a row, as many as guard.nonfinite_patience allows: the run "
                f"stops. {remedy}"
            )
        return f"{text} ({self._skipped} in a row; the run stops at {self._config.nonfinite_patience})"

    def check_end(self, step: int, loss_scale: float | None = None) -> None:
        """DivergedError when the last step, and possibly others before it, were skipped.

        In fp16 a few steps are skipped whenever the loss scale has been raised too far. That is a TrainingError only if
        all steps of the run were skipped, or guard.nonfinite_patience of them.
        """
        if self._skipped:
            raise DivergedError(
                f"the run reached its last step {step:,}, but {_last(self._skipped)} skipped, because "
                f"of gradients that were not finite. That state is not saved. {_REMEDY}"
            )
        if loss_scale is not None and self._overflowed >= min(step, self._config.nonfinite_patience):
            lower = max(0, math.ceil(math.log2(loss_scale)) - 1)
            raise TrainingError(
                f"the run reached its last step {step:,}, but {_last(self._overflowed)} skipped, because "
                f"gradients overflowed fp16 while the loss scale fell, to {loss_scale:g}. That state is not "
                f"saved. In a new run.dir, as checkpoints keep the scale, set deepspeed.fp16.initial_scale_power to at "
                f"most {lower} (this scale overflowed, so that is an upper bound; the default is 16), or "
                "training.precision to bf16; or go on here for more steps."
            )

    def watch(self, step: int, loss: float) -> str | None:
        """Notes the loss of a good step; returns the warning if it completes a spike. DivergedError when the run must
        stop.

        A spike is relative to the lowest value of the running mean, so that an exploding loss does not raise its own
        threshold. The mean is kept even without spike_factor, which may be set later.
        """
        self._skipped = self._overflowed = 0
        factor = self._config.spike_factor
        if self._seen >= WARMUP and factor is not None and loss > factor * self._lowest:
            self._spikes += 1
            return self._spiked(step, loss, factor) if self._spikes >= self._config.spike_patience else None
        # a plain mean of the first losses, then an exponential one
        keep = min(_MEMORY, self._seen / (self._seen + 1))
        self._mean = keep * self._mean + (1 - keep) * loss
        self._lowest = min(self._lowest, self._mean) if self._seen else self._mean
        self._seen, self._spikes = self._seen + 1, 0
        return None

    def _spiked(self, step: int, loss: float, factor: float) -> str:
        text = (
            f"step {step:,}: loss {loss:.4f} is more than {factor:g} times its mean {self._lowest:.4f}, "
            f"{count_of(self._spikes, 'step')} in a row"
        )
        if self._config.spike_action == "stop":
            raise DivergedError(
                f"{text}: the run stops, because guard.spike_action is stop. Resume from an earlier checkpoint with a "
                "lower optimizer.lr, or set guard.spike_action=lower_lr."
            )
        self.lr_factor *= self._config.spike_lr_factor
        self._mean, self._seen, self._spikes = 0.0, 0, 0  # what is normal is learnt again
        return f"{text}: the learning rate is now {self.lr_factor:g} times the schedule's"


def _last(count: int) -> str:
    return "this step was" if count == 1 else f"the last {count:,} were"
