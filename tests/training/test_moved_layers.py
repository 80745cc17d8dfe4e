from __future__ import annotations

from types import SimpleNamespace

from distributed import spawn_each
from tiny import run_config

from megatron_tf.config.topology import Topology
from megatron_tf.training.moved_layers import of_all_stages
from megatron_tf.training.start import Start


def known(group, layers):
    """What two stages know together; `layers` is the record of a growth in depth, None without one."""
    config = run_config(model={"num_layers": 2 if layers is None else layers["to"]})
    run = SimpleNamespace(config=config, plan=SimpleNamespace(topology=Topology(1, 2, 1)))
    start = Start(None, "", growth_history=({"tokens": 9, "layers": layers},))
    own = {f"blocks.{group.rank}.ffn": group.rank}
    everywhere = {"blocks.0.ffn": 0, "blocks.1.ffn": 1}
    assert of_all_stages(run, start, own) == (own if layers is None else everywhere)


def test_stages_share_what_they_know_when_layers_may_have_moved():
    deeper = {"method": "stack", "from": 2, "to": 4, "old_at": [0, 1]}
    spawn_each(known, 2, [(None,), (deeper,)])
