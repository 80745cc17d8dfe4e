"""What tests of studies share: a growth, losses of runs, a queue, and what a study is refused for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_tf.errors import ConfigError
from megatron_tf.study.plan import Node
from megatron_tf.study.queue import Queue
from megatron_tf.study.result import Result, write_result

BIGGER = {"model": {"parameter_tokens": {"qkv": 16, "proj": 16, "ffn": 32}}, "growth": {"method": "gram"}}
# of runs that `started` of tests/study/conftest.py has in place of real ones; others end at 2.0 and more
LOSSES = {"small/lr=0.01/seed1": 3.0, "small/lr=0.04/seed1": 4.0}


def queue(study, workers=2, say=lambda line: None):
    return Queue(study, workers=workers, threads=1, say=say)


def problems_of(work: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        work()
    return error.value.problems


def end(node: Node, loss: float) -> None:
    """Writes that a run has ended with `loss`."""
    node.folder.mkdir(parents=True, exist_ok=True)
    write_result(node, result_of(node, loss))


def result_of(node: Node, loss: float) -> Result:
    return Result(
        node.name, node.arm.name, node.seed, node.value, loss, node.end.tokens, node.end.flops, node.own_tokens,
        node.own_flops, 1.0, 1.0, node.parameters, 1000, (),
    )  # fmt: skip
