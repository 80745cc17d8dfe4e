"""In which parts sharded work goes over its rows, so that the products of one part hide the exchange of another."""

from __future__ import annotations

LEAST_ROWS = 2048  # of a part: with fewer, a product no longer fills a GPU


def row_parts(rows: int, reductions: int, compiled: bool) -> tuple[int, ...]:
    """Rows of each part, one or two, that sum to `rows`.

    Nothing is hidden where a statistic is exchanged in several `reductions`, of which each needs the result of the one
    before, nor in a compiled graph, which has only exchanges that wait.
    """
    if compiled or reductions > 1 or rows < 2 * LEAST_ROWS:
        return (rows,)
    return rows - rows // 2, rows // 2
