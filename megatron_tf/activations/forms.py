"""Which form a projection takes: arithmetic without torch, for the model and for the plan alike."""

from __future__ import annotations

from typing import Literal

from megatron_tf.activations.base import Activation

Norm = Literal["direct", "gram"]
# Tokens for each channel from which the passes over scores that the Gram form saves take longer than making xKᵀK: by
# the estimate of a step, on an A100, H100 or H200 with micro batches of 8,192 positions.
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
    """How a projection of `tokens` tokens of `width` channels, on all `ranks` tensor ranks, finds the norm of its
    scores on a `device` type.

    `wanted`: "auto", "direct" or "gram".  `own_rows`: whether under sequence parallelism a rank makes the norms of its
    own rows alone.  `compiled`: whether KᵀK is made for each micro batch, not once a step.

    An activation without the Gram form is direct. Of auto, the Gram form is taken on GPUs by two ranks or more with
    TOKENS_A_CHANNEL or more, counted on a rank where it makes the norms of all rows; three times as many when
    compiled. On one rank norm and weights are one pass, and on a CPU a pass over the scores costs less than a product
    of d channels with d.
    """
    if activation.gram_saves is None:
        return "direct"
    if wanted == "gram":
        return "gram"
    least = TOKENS_A_CHANNEL * width * (1 if own_rows else ranks) * (3 if compiled else 1)
    pays = device == GPU and ranks > 1 and tokens >= least
    return "gram" if wanted == "auto" and pays else "direct"
