"""The cost of a Transformer's block.

`Passes` and numbers of kernels were counted in the running model; tests count them again.
"""

from __future__ import annotations

from megatron_tf.architectures.transformer.parameters import qkv_rows
from megatron_tf.architectures.transformer.section import TransformerModel
from megatron_tf.architectures.work import (
    BlockWork,
    Collective,
    Collectives,
    Kind,
    Passes,
    Product,
    hidden_bytes,
    positions_of,
)
from megatron_tf.config.schema import RunConfig

MLP_PASSES = Passes(2, 3)
HEAD_PASSES = Passes(12, 12)
KERNELS = Passes(28, 36)


def block_work(model: TransformerModel, config: RunConfig) -> BlockWork:
    """The work of one block. It keeps, per position and in the compute type:

    | kept                                                        | elements      |
    |-------------------------------------------------------------|---------------|
    | columns of the MLP before and after GELU                    | 2 · f/T       |
    | product of qkv, of which the value is a part                | (h + 2g)·c/T  |
    | rotated query and key, and the output of attention          | (2h + g)·c/T  |

    (h, g, c, f: see `block_parameters`.) The backward pass of the MLP holds the gradients of GELU's output and input,
    but no longer GELU's output.
    """
    tensor, hidden, positions = config.parallel.tensor, model.hidden_size, positions_of(config)
    own, qkv, mlp = hidden // tensor, qkv_rows(model) // tensor, -(-model.ffn_hidden_size // tensor)
    key = (qkv - own) // 2
    shapes = ((hidden, qkv), (own, hidden), (hidden, mlp), (mlp, hidden))
    products = tuple(Product(positions, *shape) for shape in shapes)
    return BlockWork(
        products=products,
        weights=products,
        inner_width=mlp,
        inner_passes=MLP_PASSES,
        head_passes=HEAD_PASSES,
        kernels=KERNELS,
        kept=2 * mlp + qkv + 2 * own + key,
        kept_statistics=0,
        backward_peak=mlp,
    )


def block_collectives(config: RunConfig) -> tuple[Collectives, Collectives]:
    """(forward, backward): forward an all-reduce after attention and after the MLP, backward one of dX for each.

    Under sequence parallelism each is an all-gather on one side and a reduce-scatter on the other.
    """
    kinds: tuple[Kind, ...] = ("all_gather", "reduce_scatter") if config.parallel.sequence else ("all_reduce",)
    both = tuple(Collective(kind, hidden_bytes(config), 2) for kind in kinds)
    return both, both
