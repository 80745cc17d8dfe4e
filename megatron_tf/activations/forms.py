"""The choice of the form that computes a projection. No torch: the model and the plan of a run both use it."""

from __future__ import annotations

from typing import Literal

from megatron_tf.activations.base import Activation

Norm = Literal["direct", "gram"]
# From this many tokens per channel on, the passes over scores that the Gram form saves cost more time than computing
# xKᵀK: by the estimate of a step on an A100, H100 or H200 with micro batches of 8,192 positions.
TOKENS_A_CHANNEL = 5
GPU = "cuda"  # the device type that plans are made for


def norm_form(
    wanted: str,
    activation: Activation,
    tokens: int,
    width: int,
    ranks: int,
    device: str,
    *,
    own_rows: bool = False,
    compiled: bool = False,
) -> Norm:
    """How a projection finds the norm of its scores on a `device` type.

    `wanted`: "auto", "direct" or "gram".  `tokens`: of the projection, over all `ranks` tensor ranks.  `width`: its
    channels.  `own_rows`: under sequence parallelism, each rank computes the norms of its own rows only.  `compiled`:
    KᵀK is computed for each micro batch instead of once a step.

    An activation without a Gram form is always direct. "auto" takes the Gram form on GPUs with two or more ranks and at
    least TOKENS_A_CHANNEL tokens per channel, three times as many when compiled. The tokens of one rank count, or those
    of all ranks with `own_rows`. It never pays on one rank, where norm and weights are a single pass, nor on a CPU,
    where a pass over the scores costs less than a product with a d × d matrix.
    """
    if activation.gram_saves is None:
        return "direct"
    if wanted == "gram":
        return "gram"
    least = TOKENS_A_CHANNEL * width * (1 if own_rows else ranks) * (3 if compiled else 1)
    pays = device == GPU and ranks > 1 and tokens >= least
    return "gram" if wanted == "auto" and pays else "direct"
