"""Opening a corpus costs the same whatever its size."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_tf.data.indexed import IndexedDataset, IndexedWriter
from megatron_tf.data.opening import VOCAB_SIZE, measure_opening, write_sparse_pair


def test_sparse_files_are_what_the_writer_leaves_but_for_the_holes(tmp_path):
    write_sparse_pair(tmp_path / "sparse", 50, 30)
    with IndexedWriter(tmp_path / "x", VOCAB_SIZE) as writer:
        for _ in range(50):
            writer.add_document(np.zeros(30, dtype=int))
    for suffix in (".bin", ".idx"):
        sparse, written = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("sparse", "x"))
        assert len(sparse) == len(written)
        assert all(byte in (0, other) for byte, other in zip(sparse, written, strict=True))
    dataset = IndexedDataset(tmp_path / "sparse")
    assert (dataset.num_documents, dataset.num_tokens) == (50, 1500)
    assert (tmp_path / "sparse.idx").read_bytes()[-8:] == (tmp_path / "x.idx").read_bytes()[-8:]


def test_memory_is_bounded_whatever_the_size(tmp_path):
    """A ten times larger corpus takes no more; an index in memory would take 20 MB and 200 MB, a shuffle as much."""
    costs = [measure_opening(documents, 300, 2048, tmp_path) for documents in (10**6, 10**7)]
    assert [cost.tokens for cost in costs] == [3 * 10**8, 3 * 10**9]
    assert costs[1].index_bytes > 200e6
    for cost in costs:
        assert cost.open_bytes < 4e6, cost
        # 200 samples may map 200 pages, read ahead up to some dozens each
        assert cost.sampled_bytes < 60e6, cost
    assert costs[1].sampled_bytes - costs[0].sampled_bytes < 20e6, costs
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_billion_documents(tmp_path):
    """20 GB of index and 600 GB of tokens, in holes."""
    cost = measure_opening(10**9, 300, 2048, tmp_path)
    assert cost.index_bytes > 20e9 and cost.tokens == 3 * 10**11
    assert cost.open_bytes < 4e6 and cost.sampled_bytes < 60e6, cost


@pytest.mark.timing
def test_time_does_not_grow_with_the_size(tmp_path):
    small, large = (
        min(measure_opening(documents, 300, 2048, tmp_path).open_seconds for _ in range(3))
        for documents in (10**6, 10**9)
    )
    assert large < 3 * small + 1e-3, (small, large)
