"""In which parts work goes over its rows: of sharded work, so that the products of one part hide the exchange of
another; of scores that are not kept, so that few are there at once."""

from __future__ import annotations

LEAST_ROWS = 2048  # of a part: with fewer, a product no longer fills a GPU
ROWS_AT_ONCE = 4096  # whose scores are there at once where they are not kept, and no row waits for an exchange


def row_parts(rows: int, reductions: int, compiled: bool) -> tuple[int, ...]:
    """Rows of each part, one or two, that sum to `rows`.

    Nothing is hidden where a statistic is exchanged in several `reductions`, of which each needs the result of the one
    before, nor in a compiled graph, which has only exchanges that wait.
    """
    if compiled or reductions > 1 or rows < 2 * LEAST_ROWS:
        return (rows,)
    return rows - rows // 2, rows // 2


def row_chunks(rows: int) -> tuple[int, ...]:
    """Rows of each chunk of at most ROWS_AT_ONCE, nearly equal, that sum to `rows`."""
    count = max(1, -(-rows // ROWS_AT_ONCE))
    return tuple(rows * (chunk + 1) // count - rows * chunk // count for chunk in range(count))
