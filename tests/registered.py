"""What all that a test registers has to show: every layout computes what one process does, and a run can change its
layout."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.topology import Topology
from megatron_tf.verification.layout import Layout, compare, reference, run_layouts
from megatron_tf.verification.resume import Setting, check_resumes

LAYOUTS = (Layout(Topology(2, 1, 1)), Layout(Topology(1, 2, 1)), Layout(Topology(2, 2, 1), True))


def check_layouts(config: RunConfig, layouts: Sequence[Layout] = LAYOUTS) -> None:
    """Loss, norm and gradients of two steps, and an evaluation after them, at each of `layouts`."""
    expected = reference(config, 2)
    for layout, trace in zip(layouts, run_layouts(config, list(layouts), 2)):
        difference = compare(trace, expected)
        assert difference.agrees(1e-5), f"{layout}: {difference}"


def check_both_ways(config: RunConfig, first: Layout) -> None:
    """From `first` to two data-parallel ranks, and back."""
    here, there = Setting(first), Setting(Layout(Topology(1, 1, 2)))
    for result in check_resumes(config, [(here, there), (there, here)], 2):
        assert result.agrees(1e-5), result
