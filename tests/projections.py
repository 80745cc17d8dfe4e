"""Projections of random numbers, forward and backward."""

from __future__ import annotations

import torch

from megatron_tf.model.pattention import partial_pattention
from megatron_tf.parallel.groups import SINGLE


def tensors(tokens=(40, 29), width=6, rows=(3, 2), dtype=torch.float64):
    """x, keys and values of projections, and gradients of their outputs."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    keys, values = ([random(n, width) for n in tokens] for _ in range(2))
    return random(*rows, width), keys, values, [random(*rows, width) for _ in tokens]


def both_passes(x, keys, values, grads, form, group=SINGLE, scales=(2.5, 3.0)):
    """(outputs and dx, gradients of the tokens)."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *keys, *values)]
    count = len(keys)
    outs = partial_pattention(
        leaves[0], leaves[1 : 1 + count], leaves[1 + count :], scales[:count], "l2_norm_gelu", group, form
    )
    d_x, *others = torch.autograd.grad(outs, leaves, grads)
    return [*(out.detach() for out in outs), d_x], others
