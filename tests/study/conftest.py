"""A study of small arms, as values of its file, and tiny programs in place of its runs."""

from __future__ import annotations

import copy
import math
import sys

import pytest
from prepared import write_tokens
from study_names import BIGGER, LOSSES

from megatron_tf.config.extends import merged
from megatron_tf.config.yaml_core import dump_yaml
from megatron_tf.study import queue as module
from megatron_tf.study.file import load_study
from megatron_tf.study.result import Result

SECTIONS = {
    "model": {
        "num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16, "vocab_size": 99,
        "rotary_fraction": 0.5,
        "parameter_tokens": {"qkv": 8, "proj": 8, "ffn": 16},
    },
    "training": {"train_steps": 10, "global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32"},
    "optimizer": {"lr": 1e-2, "schedule": {"warmup_steps": 2}},
    "evaluation": {"samples": 4},
}  # fmt: skip
ARMS = [
    {"name": "small", "tokens": 20 * 64, "decay": 0.2, "comparable": False,
     "sweep": {"key": "optimizer.lr", "values": [1e-2, 2e-2, 4e-2]}},
    {"name": "going_on", "parent": "small", "by": "branch", "flops": 2e7, "decay": 0.2},
    {"name": "grown", "parent": "small", "flops": 2e7, "decay": 0.2, "overrides": BIGGER},
]  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Writes a study's file with changes: of its top level, and `arms` (changes by name, None removes one)."""
    for name in ("text", "held_out"):
        write_tokens(tmp_path / name)
    data = {"train": str(tmp_path / "text"), "validation": str(tmp_path / "held_out")}
    plain = {"name": "test", "dir": str(tmp_path / "study"), "seeds": [1, 2], "common": {**SECTIONS, "data": data}}

    def write(arms=None, common=None, more=(), **changes):
        changed = [{**copy.deepcopy(arm), **((arms or {}).get(arm["name"]) or {})} for arm in ARMS]
        kept = [arm for arm in changed if (arms or {}).get(arm["name"], {}) is not None]
        values = {**plain, "common": merged(plain["common"], common or {}), "arms": [*kept, *more], **changes}
        (tmp_path / "study.yml").write_text(dump_yaml(values))
        return tmp_path / "study.yml"

    return write


@pytest.fixture
def study(write):
    return lambda **changes: load_study(write(**changes))


@pytest.fixture
def started(monkeypatch):
    """Names of the runs that were started, in order. Their program is `program`, which is given the name."""
    names: list[str] = []
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)

    def start(program="pass"):
        def measured(node):
            names.append(node.name)
            node.folder.mkdir(parents=True, exist_ok=True)
            loss = LOSSES.get(node.name, 2.0 + 0.1 * node.seed)
            return Result(
                node.name, node.arm.name, node.seed, node.value, loss, node.end.tokens, node.end.flops,
                node.own_tokens, node.own_flops, 9.0, 100.0, node.parameters, 1000,
                ((node.end.tokens, node.end.flops, loss),) if math.isfinite(loss) else (),
            )  # fmt: skip

        monkeypatch.setattr(module, "measure", measured)
        monkeypatch.setattr(module, "command", lambda config, ranks: [sys.executable, "-c", program, str(config)])
        return names

    return start
