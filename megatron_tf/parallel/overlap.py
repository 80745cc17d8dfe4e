"""In which parts sharded work goes over its rows, so that the products of one part hide the exchange of another."""

from __future__ import annotations

from megatron_tf.config.schema import Activation

LEAST_ROWS = 2048  # of a part: with fewer, a product no longer fills a GPU


def row_parts(rows: int, activation: Activation, compiled: bool) -> tuple[int, ...]:
    """Rows of each part, one or two, that sum to `rows`.

    Softmax exchanges its statistic in two steps of which the second needs the first's result, and a compiled graph has
    only exchanges that wait: nothing is hidden there.
    """
    if compiled or activation == "softmax" or rows < 2 * LEAST_ROWS:
        return (rows,)
    return rows - rows // 2, rows // 2
