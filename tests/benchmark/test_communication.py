from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tf.benchmark import communication
from megatron_tf.config import load_config

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yml"
SMALL = ("model.seq_length=16", "training.micro_batch_size=2", "training.global_batch_size=8", "model.vocab_size=64")


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("tensor", [2, 4])
def test_every_call_and_byte_is_the_analytic_minimum(tensor, sequence):
    layout = f"parallel.tensor={tensor}", f"parallel.sequence={str(sequence).lower()}"
    rows = list(communication.rows([load_config(CONFIG, [*SMALL, *layout, "training.precision=bf16"])]))
    assert all(row["equal"] for row in rows), rows
    assert {row["part"] for row in rows} == {"embedding", "block", "head and loss"}
    # design: per direction, 8 hidden states pass through a ring once under sequence parallelism; without it 4 do, and
    # 2 all-reduces are two passes each. Norms of 5 projections, 4 bytes a row and direction.
    positions, hidden, share = 16 * 2, 2 * 128, (tensor - 1) / tensor
    expected = round(8 * positions * hidden * share) + round(2 * 5 * 4 * positions * share)
    for direction in ("forward", "backward"):
        sent = sum(row["sent"] for row in rows if (row["part"], row["direction"]) == ("block", direction))
        assert sent == expected


def test_one_rank_sends_nothing():
    assert list(communication.rows([load_config(CONFIG, SMALL)])) == []
