from __future__ import annotations

import itertools

import pytest

from megatron_tf.config.topology import Topology, stage_layers

AXES = ("pipeline", "data", "context", "tensor")
TOPOLOGIES = [Topology(*sizes) for sizes in itertools.product((1, 2, 3), (1, 2, 4), (1, 3), (1, 2))]


def test_ranks_are_ordered_pipeline_data_context_tensor():
    topology = Topology(tensor=2, pipeline=3, data=2, context=2)
    assert topology.world_size == 24 and str(topology) == "TP2×PP3×DP2×CP2"
    order = [tuple(topology.coordinate(axis, rank) for axis in AXES) for rank in range(24)]
    assert order == list(itertools.product(range(3), range(2), range(2), range(2)))


def test_replicas_are_data_and_context_together():
    topology = Topology(tensor=2, pipeline=1, data=2, context=2)
    assert topology.groups("replicas") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [topology.coordinate("replicas", rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_tensor_peers_are_neighbours():
    assert Topology(tensor=4, pipeline=2, data=2).groups("tensor") == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
    ]
    assert Topology(tensor=2, pipeline=2, data=2).peers("pipeline", 5) == [1, 5]
    assert Topology(tensor=2, pipeline=2, data=2).peers("data", 5) == [5, 7]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_groups_partition_the_world_and_differ_along_one_axis(topology, axis):
    groups = topology.groups(axis)
    assert sorted(itertools.chain(*groups)) == list(range(topology.world_size))
    for group in groups:
        assert [topology.coordinate(axis, rank) for rank in group] == list(range(getattr(topology, axis)))
        for other in set(AXES) - {axis}:
            assert len({topology.coordinate(other, rank) for rank in group}) == 1
        assert all(topology.peers(axis, rank) == group for rank in group)


def test_a_rank_outside_is_a_bug():
    with pytest.raises(AssertionError):
        Topology(tensor=2).coordinate("tensor", 2)


@pytest.mark.parametrize(("num_layers", "num_stages"), [(n, p) for n in range(1, 25) for p in range(1, n + 1)])
def test_stages_cover_the_layers_in_order_and_evenly(num_layers, num_stages):
    stages = [stage_layers(num_layers, num_stages, stage) for stage in range(num_stages)]
    assert list(itertools.chain(*stages)) == list(range(num_layers))
    sizes = [len(stage) for stage in stages]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes) and sizes[0] == max(sizes)  # the last stage also has the output head
