"""How the rows of a Pattention are divided. Sharded work is done in parts, so that the products of one part hide the
exchange of another. Scores that are not kept are computed in chunks, so that only one chunk is in memory."""

from __future__ import annotations

LEAST_ROWS = 2048  # of a part: with fewer, a product no longer fills a GPU
ROWS_AT_ONCE = 4096  # the most in a chunk


def row_parts(rows: int, reductions: int, compiled: bool) -> tuple[int, ...]:
    """Rows of each part: one or two numbers that sum to `rows`.

    There is one part where nothing can be hidden: when a statistic takes several `reductions`, of which each needs the
    result of the one before, and in a compiled graph, whose collectives all wait.
    """
    if compiled or reductions > 1 or rows < 2 * LEAST_ROWS:
        return (rows,)
    return rows - rows // 2, rows // 2


def row_chunks(rows: int) -> tuple[int, ...]:
    """Rows of each chunk of at most ROWS_AT_ONCE, nearly equal, that sum to `rows`."""
    count = max(1, -(-rows // ROWS_AT_ONCE))
    return tuple(rows * (chunk + 1) // count - rows * chunk // count for chunk in range(count))
