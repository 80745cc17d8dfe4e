"""Grouped products of gathered rows against fp64: PyTorch's, and the GPU's in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_tf.model.grouped import Assignment, assign
from megatron_tf.model.kernels import gathered_products

ON_GPU = torch.cuda.is_available()
# Of rounding once to the type. Triton's interpreter has no products of bf16, and GPUs none of fp32 that are exact.
TOLERANCE = {torch.float16: 2**-11, torch.bfloat16: 2**-8} if ON_GPU else {torch.float16: 2**-11, torch.float32: 1e-6}
SLOTS, CANDIDATES = 3, 4


def tensors(dtype: torch.dtype, size: int, width: int, rows: int) -> tuple[Assignment, Tensor, Tensor, Tensor]:
    """Of `rows` and groups of `size` tokens: no row chooses the last candidate. x has columns of a wider matrix."""
    device = "cuda" if ON_GPU else "cpu"
    generator = torch.Generator().manual_seed(0)
    assignment = assign(torch.randint(0, CANDIDATES - 1, (rows, SLOTS), generator=generator), CANDIDATES)
    wide = torch.full((rows, width + 8), torch.nan)
    wide[:, :width] = torch.randn(rows, width, generator=generator)
    tokens = torch.randn(SLOTS * CANDIDATES, size, width, generator=generator)
    scores = torch.randn(rows * SLOTS, size, generator=generator)
    own = Assignment(*(tensor.to(device) for tensor in assignment))
    return own, wide.to(device, dtype)[:, :width], tokens.to(device, dtype), scores.to(device, dtype)


def of_groups(assignment: Assignment) -> list[slice]:
    ends = [0, *assignment.ends.view(-1).tolist()]
    return [slice(*pair) for pair in zip(ends, ends[1:])]


def exact_scores(assignment: Assignment, x: Tensor, tokens: Tensor) -> Tensor:
    by_pair = x.double()[assignment.rows.long()]
    return torch.cat([by_pair[pairs] @ own.double().mT for pairs, own in zip(of_groups(assignment), tokens)])


def exact_gradients(assignment: Assignment, scores: Tensor, x: Tensor) -> Tensor:
    by_pair = x.double()[assignment.rows.long()]
    return torch.stack([scores[pairs].double().mT @ by_pair[pairs] for pairs in of_groups(assignment)])


def check(found: Tensor, exact: Tensor) -> None:
    largest = exact.abs().max().item() if exact.numel() else 0.0
    atol = TOLERANCE.get(found.dtype, 2**-8) * largest
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=atol)


# Parts of a tile; several of tokens, channels and pairs; no pair at all.
@pytest.mark.parametrize(("size", "width", "rows"), [(16, 24, 50), (24, 200, 150), (272, 136, 300), (16, 64, 0)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kernels_agree_with_fp64(dtype, size, width, rows):
    kernels = pytest.importorskip("megatron_tf.model.kernels.triton_gathered_products")
    assignment, x, tokens, scores = tensors(dtype, size, width, rows)
    ends = assignment.ends.view(-1)
    made = scores.new_full((rows * SLOTS, size + 8), torch.nan)[:, :size]
    kernels.scores(x, assignment.rows, tokens, ends, made)
    check(made, exact_scores(assignment, x, tokens))
    gradients = torch.full_like(tokens, torch.nan)
    kernels.gradients(scores, assignment.rows, x, ends, gradients)
    check(gradients, exact_gradients(assignment, scores, x))
    assert not gradients[CANDIDATES - 1 :: CANDIDATES].any()


def test_the_operators_agree_with_fp64_and_with_their_shapes():
    assignment, x, tokens, scores = tensors(torch.bfloat16, 16, 24, 50)
    x, ends = x.contiguous(), assignment.ends.view(-1)
    for operator, empty, exact, arguments in (
        ("gathered_scores", "_empty_scores", exact_scores(assignment, x, tokens), (x, assignment.rows, tokens, ends)),
        (
            "gathered_gradients", "_empty_gradients", exact_gradients(assignment, scores, x),
            (scores, assignment.rows, x, ends),
        ),
    ):  # fmt: skip
        found = getattr(gathered_products, operator)(*arguments)
        check(found, exact)
        expected = getattr(gathered_products, empty)(*arguments)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
