"""Greedy text from sharded models: what one process writes, at every layout."""

from __future__ import annotations

import pytest
import torch
from distributed import spawn
from tiny import run_config

from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.step_zero import write_step_zero
from megatron_tf.config.topology import Topology
from megatron_tf.inference.greedy import continue_greedily
from megatron_tf.inference.load import load_model
from megatron_tf.inference.sharded import load_stage
from megatron_tf.model.layers import TensorParallel
from megatron_tf.parallel.groups import make_group
from megatron_tf.state.sources import InitialSource, StepZero

MODEL = run_config().model  # reads 16 tokens; its vocabulary of 99 divides by nothing
PROMPTS = ([5, 17, 60], [98], list(range(20)))
LAYOUTS = {
    1: [(Topology(), False)],
    2: [
        (Topology(tensor=2), False),
        (Topology(tensor=2), True),
        (Topology(pipeline=2), False),
        (Topology(data=2), False),
        (Topology(context=2), False),
    ],
    4: [(Topology(2, 2, 1), True)],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights large enough that the likeliest token is not always the last one."""
    root = tmp_path_factory.mktemp("greedy") / "checkpoints"
    start = StepZero(Louder(MODEL, 3), 0, 0, ())
    return write_step_zero(root, MODEL, start, {}, lambda done, text: None)


class Louder(InitialSource):
    def read(self, name, state, start, stop):
        return super().read(name, state, start, stop) * (40 if "value" in name else 1)


@torch.no_grad()
def plainly(model, prompt, end, num_tokens=9, vocab_size=90):
    ids = list(prompt)
    for _ in range(num_tokens):
        logits = model(torch.tensor([ids[-MODEL.seq_length :]]))[0, -1, :vocab_size]
        if int(logits.argmax()) == end:
            break
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_writes_what_one_process_writes(checkpoint, ranks):
    plain = load_model(checkpoint, torch.float64)
    expected = [plainly(plain, prompt, -1) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) > 3
    end = expected[0][2]
    until = plainly(plain, PROMPTS[0], end)
    assert until == expected[0][:2]
    spawn(_write, ranks, str(checkpoint), expected, end, until)


def _write(group, checkpoint, expected, end, until):
    for topology, sequence in LAYOUTS[group.size]:
        context = make_group(topology, "context", 60.0)
        tensor = TensorParallel(make_group(topology, "tensor", 60.0), sequence, context)
        stage = load_stage(open_checkpoint(checkpoint), MODEL, topology, group.rank, tensor, torch.float64)
        last = topology.peers("pipeline", 0)[-1]

        def write(prompt, end, stage=stage, last=last):
            return continue_greedily(
                stage, prompt, num_tokens=9, context=MODEL.seq_length, vocab_size=90, end=end, last_rank=last
            )

        assert [write(prompt, -1) for prompt in PROMPTS] == expected, topology
        assert write(PROMPTS[0], end) == until
