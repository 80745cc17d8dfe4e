"""Ending a run before its last step, by the validation loss.

All ranks see the same losses, so all of them make the same decision without communication.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from megatron_tf.config.sections.training import StopWhen
from megatron_tf.telemetry.text import count_of


class EarlyStop:
    """Follows the validation losses of a run. Without a configuration it follows them too, and never ends the run."""

    def __init__(self, config: StopWhen | None, state: Mapping[str, Any]):
        """`state`: the `state()` stored in the checkpoint; {} at the start of a run."""
        self._config = config
        self._best: float | None = state.get("best")
        self._newest: float | None = state.get("newest")
        self._waited = int(state.get("waited", 0))

    def state(self) -> dict[str, Any]:
        """For the checkpoint, so that a resumed run makes the same decisions."""
        return {"best": self._best, "newest": self._newest, "waited": self._waited}

    def watch(self, loss: float) -> None:
        """Notes the validation loss of an evaluation during training."""
        if not isfinite(loss):
            self._waited += 1
            return
        least = self._config.min_improvement if self._config else 0.0
        self._newest = loss
        if self._best is None or loss < self._best - least:
            self._best, self._waited = loss, 0
        else:
            self._waited += 1

    @property
    def reason(self) -> str | None:
        """Why the run ends here, as a clause; None: it goes on. It is evaluated anew after a resume, whose settings may
        differ."""
        if self._config is None or self._newest is None or self._best is None:
            return None
        below, patience = self._config.loss_below, self._config.patience
        if below is not None and self._newest < below:
            return f"the validation loss {self._newest:.4f} is below {below:g} (training.stop_when.loss_below)"
        if patience is not None and self._waited >= patience:
            return (
                f"{count_of(self._waited, 'evaluation')} in a row brought nothing better than {self._best:.4f} "
                f"(training.stop_when.patience {patience})"
            )
        return None
