"""The declarations of a parameter, and of a projection whose parameter tokens can grow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_tf.config.sections.model import Model

# Of the embedding and of key tokens. The norm cancels the size of keys: it only decides how far the first steps of Adam
# turn them, and makes no difference after some thousand steps (docs/performance.md).
INITIAL_STD = 0.02


def input_std(model: Model) -> float:
    """The std of a Transformer's matrices that read normed hidden states: their outputs have unit variance at every
    width. It is 0.036 at width 768 and 0.022 at 2048; the usual 0.02 is too small for narrower models."""
    return 1 / math.sqrt(model.hidden_size)


def output_std(model: Model) -> float:
    """The std of tensors whose products a block adds to the hidden states: small enough that the sum over all blocks is
    small as well (from GPT-NeoX)."""
    return 2 / (model.num_layers * math.sqrt(model.hidden_size))


@dataclass(frozen=True)
class ParameterSpec:
    """One logical parameter.

    `shape`: logical shape.  `sharded`: split along dim 0 over the tensor group, else replicated.
    `growable`: dim 0 counts parameter tokens or candidates.  `decayed`: weight decay applies.
    `std`, `mean`: of the normal initialiser; with std 0 all elements are `mean`.
    `output`: the block adds to the hidden states a sum of products with such tensors; if all are 0 it adds nothing.
    `one_in`: a position uses one in this many elements; 1: it uses all of them.
    `matrix_rows`: a stack of matrices of this many rows, for an optimizer of matrices; 0: it is one.
    `ends`: the pipeline stages that hold it, the first, the last, or both (tied); (): a parameter of a block.
    `official_name`, `huggingface_name`: its name in these formats; "" where a format has no such parameter.
    `transposed`: its Hugging Face tensor is [columns, rows].
    """

    name: str
    shape: tuple[int, ...]
    sharded: bool
    growable: bool
    decayed: bool
    std: float
    mean: float
    output: bool = False
    one_in: int = 1
    matrix_rows: int = 0
    ends: tuple[Literal["first", "last"], ...] = ()
    official_name: str = ""
    huggingface_name: str = ""
    transposed: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_used(self) -> int:
        """Elements that a position uses."""
        return self.numel // self.one_in

    @property
    def width(self) -> int:
        """Elements of one row (1 for a vector)."""
        return math.prod(self.shape[1:])

    @property
    def tied(self) -> bool:
        """Whether the first and the last pipeline stage hold a copy each. The first stage owns it."""
        return len(self.ends) > 1


@dataclass(frozen=True)
class BankSpec:
    """Tokens in slots. Each slot has `candidates` groups of `group_size` tokens, and a position uses one of them."""

    slots: int
    candidates: int
    group_size: int

    @property
    def used_tokens(self) -> int:
        """How many of its tokens a position uses."""
        return self.slots * self.group_size

    def __str__(self) -> str:
        slots = "1 slot" if self.slots == 1 else f"each of {self.slots} slots"
        return f"{self.candidates} candidates in {slots} of {self.group_size}"


@dataclass(frozen=True)
class ProjectionSpec:
    """One Pattention of a model, as growth, pruning and measurements need it.

    `name`: of its module, such as "blocks.0.attention.query".
    `kind`: the field of `model.parameter_tokens` that counts its tokens.
    `tokens`: the number that a position uses: all tokens, unless the projection has a `bank`.
    `keys`, `values`: names of its tensors below `name`, rows in the order of the tokens. With an activation that
        ignores zeros, a token whose keys are all 0 adds nothing to the output, whatever its values are.
    """

    name: str
    kind: str
    tokens: int
    activation: str
    keys: tuple[str, ...] = ("key_tokens",)
    values: tuple[str, ...] = ("value_tokens",)
    bank: BankSpec | None = None


def shard_range(rows: int, num_shards: int, shard: int) -> tuple[int, int]:
    """Rows [start, stop) of dim 0 that `shard` of `num_shards` holds.

    When `rows` is not a multiple of `num_shards`, shards differ by one row. There is no padding, so no row has to be
    kept out of τ, weight decay or checkpoints.
    """
    return rows * shard // num_shards, rows * (shard + 1) // num_shards
