"""The native products of a candidate with its rows, and of stacks of matrices, against fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_tf.model import grouped, products
from megatron_tf.model.grouped import Assignment, CandidatePiece, NativePiece, assign, pieces
from megatron_tf.model.kernels import native_grouped, onednn
from megatron_tf.model.sparse_pattention import SparsePattention

# rows, tokens, width: whole tiles and chunks, and what no tile divides
SHAPES = [(33, 16, 24), (300, 80, 100), (513, 37, 9), (96, 64, 32)]


def matrices(*shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def close(actual: Tensor, exact: Tensor) -> None:
    assert ((actual - exact).norm() / exact.norm()).item() < 2e-6


def candidate(rows: Tensor) -> native_grouped.Rows:
    return native_grouped.Rows(rows, torch.tensor([len(rows)], dtype=torch.int32), 0)


@pytest.mark.parametrize(("count", "tokens", "width"), SHAPES)
def test_products_agree_with_fp64(count, tokens, width):
    x, own, weights, total = matrices((2 * count, width), (tokens, width), (count, tokens), (2 * count, width))
    assert native_grouped.usable(own), "these tests want a C compiler, and a processor with AVX2"
    chosen = torch.randperm(len(x), dtype=torch.int32, generator=torch.Generator().manual_seed(1))[:count]
    rows = candidate(chosen)
    # columns of a wider matrix, as the memory of scores may be
    scores = torch.full((count, tokens + 3), 7.0)
    native_grouped.scores(x, rows, own[None], scores[:, :tokens])
    close(scores[:, :tokens], x.double()[chosen] @ own.double().mT)
    assert (scores[:, tokens:] == 7).all()
    gradient = torch.full((1, tokens, width), torch.nan)
    native_grouped.gradients(weights, rows, x, gradient)
    close(gradient[0], weights.double().mT @ x.double()[chosen])
    expected = total.double().index_add(0, chosen, weights.double() @ own.double())
    native_grouped.add_outputs(weights, rows, own[None], total)
    close(total, expected)


def test_products_of_several_candidates_are_those_of_each():
    """Candidates 1 to 4 of six, the third of which has no rows; a row is in two of them."""
    ends, (begin, end) = torch.tensor([3, 40, 45, 45, 81, 90], dtype=torch.int32), (3, 81)
    places = torch.cat([torch.randperm(60, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    rows = places[begin:end].to(torch.int32)
    x, tokens, weights, total = matrices((60, 24), (4 * 16, 24), (end - begin, 16), (60, 24))
    tokens, several = tokens.view(4, 16, 24), native_grouped.Rows(rows, ends[1:5], begin)
    scores, gradient = torch.full((end - begin, 16), torch.nan), torch.full_like(tokens, 7.0)
    added, expected = total.clone(), total.clone()
    native_grouped.scores(x, several, tokens, scores)
    native_grouped.add_outputs(weights, several, tokens, added)
    native_grouped.gradients(weights, several, x, gradient)
    for place, (first, last) in enumerate([(0, 37), (37, 42), (42, 42), (42, 78)]):
        if first == last:
            assert (gradient[place] == 7).all()
            continue
        one, own, out = candidate(rows[first:last]), tokens[place : place + 1], torch.empty(1, 16, 24)
        found = torch.empty(last - first, 16)
        native_grouped.scores(x, one, own, found)
        assert torch.equal(scores[first:last], found)
        native_grouped.gradients(weights[first:last], one, x, out)
        assert torch.equal(gradient[place], out[0])
        native_grouped.add_outputs(weights[first:last], one, own, expected)
    assert torch.equal(added, expected)


def test_what_is_not_finite_stays_in_its_row_and_is_not_lost():
    x, own, total = matrices((40, 24), (16, 24), (40, 24))
    rows, scores = candidate(torch.arange(40, dtype=torch.int32)), torch.zeros(40, 16)
    x[5, 2] = math.inf
    native_grouped.scores(x, rows, own[None], scores)
    assert not scores[5].isfinite().any() and scores[[4, 6]].isfinite().all()
    native_grouped.add_outputs(scores, rows, own[None], total)
    assert not total[5].isfinite().any() and total[[4, 6]].isfinite().all()


def test_results_do_not_depend_on_threads():
    x, own, weights = matrices((600, 100), (80, 100), (300, 80))
    rows, threads, results = candidate(torch.arange(0, 600, 2, dtype=torch.int32)), torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        scores, gradient, total = torch.zeros(300, 80), torch.empty(1, 80, 100), torch.zeros(600, 100)
        native_grouped.scores(x, rows, own[None], scores)
        native_grouped.gradients(weights, rows, x, gradient)
        native_grouped.add_outputs(weights, rows, own[None], total)
        results.append((scores, gradient, total))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def stack_products(x: Tensor, weights: Tensor, total: Tensor, own=native_grouped.add_products) -> list[Tensor]:
    """x xᵀ, then with it one that is symmetric, too; and two that are not, in the memory of what is added and not."""
    square = torch.full((len(x), x.shape[1], x.shape[1]), torch.nan)
    own(square, x, x.mT, beta=0, symmetric=True, out=square)
    polynomial, outputs = torch.full_like(square, torch.nan), total.clone()
    own(square, square, square, alpha=2, beta=-3, symmetric=True, out=polynomial)
    own(outputs, weights, x, alpha=0.5, out=outputs)
    own(x, polynomial, x, beta=0.25, out=(other := torch.full_like(x, torch.nan)))
    return [square, polynomial, outputs, other]


@pytest.mark.parametrize("shape", [(3, 64, 96), (2, 37, 50), (1, 5, 7), (2, 130, 33)])
def test_products_of_stacks_agree_with_fp64(shape):
    stack, rows, width = shape
    x, weights, total = (each.view(stack, -1, each.shape[-1]) for each in matrices(
        (stack * rows, width), (stack * 12, rows), (stack * 12, width)
    ))  # fmt: skip
    exact = x.double() @ x.double().mT
    polynomial = 2 * exact @ exact - 3 * exact
    outputs = total.double() + weights.double() @ x.double() / 2
    expected = exact, polynomial, outputs, x.double() / 4 + polynomial @ x.double()
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(stack_products(x, weights, total))
    torch.set_num_threads(threads)
    for found, again, reference in zip(*results, expected, strict=True):
        close(found, reference)
        assert torch.equal(found, again), "they depend on threads"
    assert all(torch.equal(found, found.mT) for found in results[0][:2])


@pytest.mark.parametrize("native", ["0", "1"])
def test_stacks_are_multiplied_alike_by_pytorch(monkeypatch, native):
    monkeypatch.setenv("MEGATRON_TF_NATIVE", native)
    monkeypatch.setattr(products, "is_amd", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    called = []
    kernel = native_grouped.add_products
    monkeypatch.setattr(native_grouped, "add_products", lambda *a, **b: called.append(0) or kernel(*a, **b))
    for rows in (40, 20):
        x, weights, total = (
            each.view(2, rows, -1) for each in matrices((2 * rows, 50), (2 * rows, rows), (2 * rows, 50))
        )
        found = stack_products(x, weights, total, products.add_products)
        for own, reference in zip(found, stack_products(x, weights, total, kernel), strict=True):
            close(own, reference)
    assert len(called) == (4 if native == "1" else 0), "small matrices are PyTorch's"


@pytest.mark.parametrize("slow_mkl", [False, True])
def test_they_are_for_enough_rows_and_where_mkl_is_fast_for_groups_that_fit_into_the_cache(monkeypatch, slow_mkl):
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: slow_mkl)
    monkeypatch.setattr(native_grouped, "SMALL_GROUP", 1)
    chosen = assign(torch.tensor([[0]] * 33 + [[1]] * 7), 2)
    tokens = torch.zeros(1, 2, 16, 8)
    assert [type(piece) for piece in pieces(chosen, tokens)] == [NativePiece, CandidatePiece]
    assert not any(isinstance(piece, NativePiece) for piece in pieces(chosen, tokens.double()))
    assert [piece.pairs for piece in pieces(chosen, tokens)] == [slice(0, 33), slice(33, 40)]
    large = torch.zeros(1, 2, 512, 768)
    assert any(isinstance(piece, NativePiece) for piece in pieces(chosen, large)) == slow_mkl


def test_a_native_piece_is_as_many_candidates_as_fit_into_the_cache(monkeypatch):
    # 40, 0, 33 and 5 rows; then 200, 0, 1 and 80 of the second slot
    counts = [40, 0, 33, 5, 200, 0, 1, 80]
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).view(2, 4)
    pairs = sum(counts)
    chosen = Assignment(torch.empty(0), torch.zeros(pairs, dtype=torch.int32), torch.empty(0), ends)
    tokens = torch.zeros(2, 4, 16, 8)
    assert [(piece.pairs, type(piece)) for piece in pieces(chosen, tokens)] == [(slice(0, pairs), NativePiece)]
    monkeypatch.setattr(native_grouped, "SMALL_GROUP", 16 * 8 - 1)

    def parts():
        found = list(pieces(chosen, tokens))
        assert [pair for piece in found for pair in range(pairs)[piece.pairs]] == list(range(pairs))
        return [(type(piece), piece.pairs.stop - piece.pairs.start) for piece in found]

    one, few = NativePiece, CandidatePiece
    assert parts() == [(one, 73), (few, 5), (one, 200), (few, 1), (one, 80)]
    monkeypatch.setattr(grouped, "SCORES_AT_ONCE", 16 * 72)
    assert parts() == [(one, 40), (one, 33), (few, 5), (one, 200), (few, 1), (one, 80)]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_layer_with_and_without_them_agrees_with_fp64(monkeypatch, wanted):
    if not wanted:
        monkeypatch.setattr(native_grouped, "usable", lambda tokens: False)
    torch.manual_seed(0)
    layer = SparsePattention(70, 24, 24, group_size=32, candidates=3, dense=6)
    exact = SparsePattention(70, 24, 24, group_size=32, candidates=3, dense=6).double()
    exact.load_state_dict({name: tensor.double() for name, tensor in layer.state_dict().items()})
    # the same choice for both: of scores as close as rounding, another one might win
    (x,) = matrices((150, 24))
    for own in (layer, exact):
        own.choose = lambda logits, _: torch.arange(len(logits)).remainder(3)[:, None].expand(-1, 2)
    results = []
    for own, rows in ((layer, x), (exact, x.double())):
        rows = rows.detach().requires_grad_()
        out = own.partial(rows)
        learning = [parameter for name, parameter in own.named_parameters() if name != "bank.balance"]
        results.append([out, *torch.autograd.grad(out.square().sum(), [rows, *learning])])
    for actual, expected in zip(*results):
        close(actual.double(), expected)
