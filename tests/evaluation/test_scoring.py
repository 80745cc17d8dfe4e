from __future__ import annotations

import random

import pytest
import torch
from distributed import spawn
from torch.nn.functional import log_softmax

from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.config.topology import Topology
from megatron_tf.errors import ArgumentError
from megatron_tf.evaluation.scoring import Scorer, score_continuations
from megatron_tf.inference.load import load_model
from megatron_tf.inference.sharded import load_stage
from megatron_tf.model.layers import TensorParallel
from megatron_tf.parallel.groups import make_group


def requests():
    """Of many lengths, some longer than the 16 tokens that the model reads."""
    draw = random.Random(5)

    def ids(most):
        return [draw.randrange(99) for _ in range(draw.randint(1, most))]

    return [(ids(20), ids(5)) for _ in range(23)]


@torch.no_grad()
def one_by_one(model, requests, max_length):
    answers = []
    for context, continuation in requests:
        row = torch.tensor((context + continuation)[-(max_length + 1) :])
        predicted = log_softmax(model(row[None, :-1])[0], -1)[-len(continuation) :]
        target = row[-len(continuation) :]
        likelihood = float(predicted.gather(-1, target[:, None]).sum())
        answers.append((likelihood, bool((predicted.argmax(-1) == target).all())))
    return answers


def with_greedy_ones(model, asked):
    """Some continuations are what the model itself would say."""
    for at in range(0, len(asked), 4):
        context = asked[at][0]
        asked[at] = (context, [int(model(torch.tensor([context[-16:]]))[0, -1].argmax())])
    return asked


def scorer(rank, checkpoint, model, topology, sequence=False):
    tensor = TensorParallel(make_group(topology, "tensor", 60.0), sequence)
    stage = load_stage(open_checkpoint(checkpoint), model, topology, rank, tensor, torch.float64)
    return Scorer(
        stage, max_length=model.seq_length, batch_size=4, data_rank=topology.coordinate("data", rank),
        data_size=topology.data, is_reporter=stage.following is None and tensor.group.rank == 0,
    )  # fmt: skip


@pytest.mark.parametrize(("request_", "part"), [(([], [5]), "context"), (([5], []), "continuation")])
def test_nothing_is_certain_for_nothing(checkpoint, model, request_, part):
    with pytest.raises(ArgumentError, match=rf"requests\[1\]: its {part} is empty"):
        scorer(0, checkpoint, model, Topology())([([1], [2]), request_])


def agree(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for (likelihood, _), (reference, _) in zip(found, expected):
        assert likelihood == pytest.approx(reference, rel=1e-12)


def test_against_one_request_at_a_time(checkpoint, model):
    plain = load_model(checkpoint, torch.float64)
    asked = with_greedy_ones(plain, requests())
    expected = one_by_one(plain, asked, 16)
    assert 5 <= sum(greedy for _, greedy in expected) < len(asked)
    agree(scorer(0, checkpoint, model, Topology())(asked), expected)


@torch.no_grad()
def test_a_continuation_beyond_the_window(checkpoint, model):
    """Of 40 tokens the model sees 17 and predicts 16."""
    plain, long = load_model(checkpoint, torch.float64), list(range(40))
    row = torch.tensor(long[-17:])
    expected = log_softmax(plain(row[None, :-1])[0], -1).gather(-1, row[1:, None]).sum()
    stage = load_stage(open_checkpoint(checkpoint), model, Topology(), 0, TensorParallel(), torch.float64)
    found = score_continuations(stage, [([98], long)], 16)
    assert found is not None and float(found[0, 0]) == pytest.approx(float(expected), rel=1e-12)


LAYOUTS = {
    2: [(Topology(tensor=2), True), (Topology(pipeline=2), False), (Topology(data=2), False)],
    4: [(Topology(2, 2, 1), False), (Topology(2, 1, 2), True), (Topology(1, 2, 2), False)],
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_equal_at_every_layout(checkpoint, model, ranks):
    plain = load_model(checkpoint, torch.float64)
    asked = with_greedy_ones(plain, requests())
    spawn(_layouts, ranks, str(checkpoint), model, asked, one_by_one(plain, asked, 16))


def _layouts(group, checkpoint, model, asked, expected):
    for topology, sequence in LAYOUTS[group.size]:
        ask = scorer(group.rank, checkpoint, model, topology, sequence)
        if group.rank > 0:
            ask.follow()
            continue
        agree(ask(asked), expected)
        agree(ask(asked[:1]), expected[:1])  # fewer than there are ranks
        ask.release()
