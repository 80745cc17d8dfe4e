"""Layouts against one process, for tests of engines."""

from __future__ import annotations

from megatron_tf.config.schema import RunConfig
from megatron_tf.verification.layout import Layout, compare, reference, run_layouts

TOLERANCE = 1e-5
# Boundaries of documents wherever the configuration can have them.
BOUNDARIES = {"train": ({"path": "unused"},), "reset_at_eod": True, "mask_eod_loss": True, "pad_id": 1}


def check_layouts(config: RunConfig, *chosen: Layout, steps: int = 3) -> None:
    """Losses, norms and gradients of each layout are those of one process."""
    expected = reference(config, steps)
    for layout, trace in zip(chosen, run_layouts(config, chosen, steps)):
        difference = compare(trace, expected)
        assert difference.agrees(TOLERANCE), f"{layout}: {difference}"
