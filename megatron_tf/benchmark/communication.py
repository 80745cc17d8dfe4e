"""Collectives of a block and of the model's two ends, counted in ranks that run here, compared with the formula."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tf.activations.forms import GPU
from megatron_tf.architectures.work import Collective, Collectives, Kind
from megatron_tf.benchmark.counting import Counting
from megatron_tf.benchmark.report import Row
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.schema import RunConfig
from megatron_tf.costs.communication import block_collectives, ends_collectives
from megatron_tf.errors import exit_now
from megatron_tf.model.layers import FinalNorm, TensorParallel, build_block
from megatron_tf.model.precision import DTYPES
from megatron_tf.model.projection import choose_forms
from megatron_tf.parallel.groups import Group
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.runtime.network import stay_on_this_machine
from megatron_tf.state.parameters import initial_scales
from megatron_tf.tasks.classes import cross_entropy
from megatron_tf.tasks.language_model.layers import Embedding

TIMEOUT = timedelta(minutes=5)
ONCE = "block, once a step"  # whatever the micro batches of the step
Sent = Counter[tuple[Kind, int]]  # (kind, bytes of the whole tensor) -> calls


def rows(configs: Sequence[RunConfig]) -> Iterator[Row]:
    """A row for each layout, part of the model, direction and kind of collective; each config is one layout.

    `bytes` of a call are those of the whole tensor, `sent` those that a rank sends in all calls, by the ring.
    """
    for config in configs:
        ranks = config.parallel.tensor
        forms = architecture_of(config.model).norm_forms(config, GPU).values()
        for (part, direction), (expected, counted) in _count(config).items():
            for kind in sorted({kind for kind, _ in (*expected, *counted)}):
                yield {
                    "layout": f"TP{ranks}{' +sequence' if config.parallel.sequence else ''}",
                    "norms": " and ".join(sorted({*forms})),
                    "part": part,
                    "direction": direction,
                    "collective": kind,
                    "calls": _calls(counted, kind),
                    "formula calls": _calls(expected, kind),
                    "sent": _sent(counted, kind, ranks),
                    "formula sent": _sent(expected, kind, ranks),
                    "equal": _of_kind(counted, kind) == _of_kind(expected, kind),
                }


def _count(config: RunConfig) -> dict[tuple[str, str], tuple[Sent, Sent]]:
    """(expected, counted) by part and direction. Each rank counts; they must agree."""
    ranks = config.parallel.tensor
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(_rank, ranks, ranks, folder, config)
        texts = {(Path(folder) / f"{rank}.json").read_text(encoding="utf-8") for rank in range(ranks)}
    assert len(texts) == 1, "ranks of one tensor group send alike"
    counted = {
        (part, direction): Counter({(kind, size): calls for kind, size, calls in sent})
        for part, direction, sent in json.loads(texts.pop())
    }
    return {key: (expected, counted[key]) for key, expected in _formula(config).items()}


def _formula(config: RunConfig) -> dict[tuple[str, str], Sent]:
    parts = dict(zip(("embedding", "head and loss"), ends_collectives(config)), block=block_collectives(config))
    parts[ONCE] = architecture_of(config.model).step_collectives(config)
    return {
        (part, direction): _as_sent(collectives)
        for part, passes in parts.items()
        for direction, collectives in zip(("forward", "backward"), passes)
    }


def _as_sent(collectives: Collectives) -> Sent:
    sent: Sent = Counter()
    for collective in collectives:
        sent[collective.kind, collective.bytes] += collective.count
    return sent


def _rank(rank: int, ranks: int, folder: str, config: RunConfig) -> None:
    """One rank in a process of its own, with gloo and one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    stay_on_this_machine(os.environ)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    try:
        counted = count_layers(config, Group(ranks, rank, dist.group.WORLD))
        entries = [[part, name, sorted([*key, calls] for key, calls in sent.items())] for part, name, sent in counted]
        (Path(folder) / f"{rank}.json").write_text(json.dumps(entries), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    exit_now()


def count_layers(config: RunConfig, group: Group) -> list[tuple[str, str, Sent]]:
    """Forward and backward of each part on this rank: (part, direction, what was sent)."""
    model, tensor = config.model, TensorParallel(group, config.parallel.sequence)
    dtype = DTYPES[config.training.compute_type]
    embedding, norm = Embedding(model, tensor).to(dtype), FinalNorm(model, tensor).to(dtype)
    torch.nn.init.normal_(embedding.weight, std=0.02)
    block = build_block(model, 0, initial_scales(model), tensor).to(dtype)
    of_steps = choose_forms(block, config.training, GPU)
    ids = torch.zeros(config.training.micro_batch_size, model.seq_length, dtype=torch.int64)

    counted: list[tuple[str, str, Sent]] = []

    def both_passes(part: str, call: Callable[[], Tensor]) -> Tensor:
        with Counting() as forward:
            out = call()
        with Counting() as backward:
            out.backward(torch.ones_like(out))
        counted.extend([(part, "forward", forward.sent), (part, "backward", backward.sent)])
        return out.detach().requires_grad_()

    hidden = both_passes("embedding", lambda: embedding(ids))
    for matrices in of_steps:
        matrices.begin(2)
    counted += count_block(block, hidden)
    both_passes(
        "head and loss",
        lambda: cross_entropy(embedding.logits(norm(hidden)), ids.mT, embedding.start, group).mean(),
    )
    return counted


def count_block(block: nn.Module, hidden: Tensor) -> list[tuple[str, str, Sent]]:
    """As `count_layers`, for a step of two micro batches. The first sends more in its forward pass and the last in its
    backward pass than the other one: the difference is sent once for each step."""
    outs, forward, backward = [], [], []
    for _ in range(2):
        with Counting() as counted:
            outs.append(block(hidden))
        forward.append(counted.sent)
    for out in outs:
        with Counting() as counted:
            out.backward(torch.ones_like(out))
        backward.append(counted.sent)
    return [
        ("block", "forward", forward[1]),
        ("block", "backward", backward[0]),
        (ONCE, "forward", forward[0] - forward[1]),
        (ONCE, "backward", backward[1] - backward[0]),
    ]


def _of_kind(sent: Sent, kind: Kind) -> Sent:
    return Counter({key: calls for key, calls in sent.items() if key[0] == kind})


def _calls(sent: Sent, kind: Kind) -> int:
    return sum(_of_kind(sent, kind).values())


def _sent(sent: Sent, kind: Kind, ranks: int) -> int:
    return round(sum(Collective(kind, size, n).sent_bytes(ranks) for (k, size), n in sent.items() if k == kind))
