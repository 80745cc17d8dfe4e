"""Sparse Pattention against the plain formula over the chosen tokens, and against the dense layer."""

from __future__ import annotations

import pytest
import torch
from distributed import spawn_each
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.model import sparse_function
from megatron_tf.model.grouped import assign
from megatron_tf.model.pattention import pattention
from megatron_tf.model.projection import Pattention
from megatron_tf.model.routing import balance_loss, choose, relative_load, straight_through
from megatron_tf.model.sparse_function import ChosenTokens, sparse_pattention
from megatron_tf.model.sparse_pattention import SparsePattention, sparse_outputs
from megatron_tf.parallel.collectives import all_reduce, copy_to
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.state.parameters import shard_range

ROWS, WIDTH, SIZE, SLOTS, CANDIDATES = 37, 24, 16, 4, 3
ACTIVATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")


def layer(dense: int = 0, candidates: int = CANDIDATES, group=SINGLE, **more) -> SparsePattention:
    torch.manual_seed(0)
    return SparsePattention(
        SLOTS * SIZE + dense, WIDTH, WIDTH, group_size=SIZE, candidates=candidates, dense=dense, group=group, **more
    ).double()


def inputs() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain(x: Tensor, own: SparsePattention) -> Tensor:
    """Row by row, with the tokens that each one chooses."""
    logits = own.bank.logits(x)
    chosen = choose(logits, own.bank.slot_balance())
    gate = straight_through(logits, chosen)
    keys, values = (
        tokens.view(SLOTS, -1, SIZE, WIDTH) for tokens in (own.bank.key_tokens, own.bank.value_tokens)
    )  # fmt: skip
    outputs = []
    for row, choice, factors in zip(x, chosen, gate):
        slots = range(SLOTS)
        k = [keys[slot, choice[slot]] for slot in slots]
        v = [values[slot, choice[slot]] * factors[slot] for slot in slots]
        if own.key_tokens is not None:
            k, v = [*k, own.key_tokens], [*v, own.value_tokens]
        outputs.append(pattention(row, torch.cat(k), torch.cat(v), scale=own.scale, activation=own.activation))
    return torch.stack(outputs)


def gradients(output: Tensor, x: Tensor, own: SparsePattention) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    learning = [parameter for name, parameter in own.named_parameters() if name != "bank.balance"]
    return list(torch.autograd.grad((output * weights).sum(), [x, *learning]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dense", [0, 5])
def test_the_plain_formula_over_the_chosen_tokens(activation, dense):
    own, x = layer(dense, activation=activation), inputs().requires_grad_()
    expected, output = plain(x, own), own.partial(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(output, x, own), gradients(expected, x, own), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dense", [0, 5])
def test_products_of_all_candidates_at_once(activation, dense, monkeypatch):
    """As on a GPU; in fp32, since grouped products have no fp64."""
    own, x = layer(dense, activation=activation), inputs().requires_grad_()
    expected = [tensor.float() for tensor in (own.partial(x), *gradients(own.partial(x), x, own))]
    own, x = own.float(), x.detach().float().requires_grad_()
    monkeypatch.setattr(sparse_function, "has_grouped_products", lambda device, dtype: True)
    output = own.partial(x)
    for found, exact in zip([output, *gradients(output, x, own)], expected, strict=True):
        assert (found - exact).norm() <= 3e-6 * exact.norm()
    assert own.partial(x[:0]).shape == (0, WIDTH)


def is_the_dense_layer(own: SparsePattention) -> None:
    """Compares the output, and the gradients of x and of all tokens. The candidates of a slot are copies, whose
    gradients add up.

    A dense layer has no router, so x gets no gradient here from the scores by which it chooses.
    """
    scores = own.bank.logits
    own.bank.logits = lambda rows: scores(rows.detach())

    def by_slot(bank: Tensor) -> Tensor:
        return bank.unflatten(0, own.bank.shape)

    def joined(slots: Tensor, common: Tensor | None) -> Tensor:
        return torch.cat([slots.flatten(0, 1), *([] if common is None else [common])])

    kinds = ("key_tokens", "value_tokens")
    keys, values = (joined(by_slot(getattr(own.bank, kind))[:, 0], getattr(own, kind)).detach() for kind in kinds)
    dense = Pattention(len(keys), WIDTH, WIDTH, activation=own.activation).double()
    dense.key_tokens.data, dense.value_tokens.data = keys, values
    assert own.scale == dense.scale
    x = inputs().requires_grad_()
    output, expected = own.partial(x), dense.partial(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    names = [name for name, _ in own.named_parameters() if name != "bank.balance"]
    x_grad, *found = gradients(output, x, own)
    of = dict(zip(names, found, strict=True))
    token_grads = [joined(by_slot(of[f"bank.{kind}"]).sum(1), of.get(kind)) for kind in kinds]
    torch.testing.assert_close([x_grad, *token_grads], gradients(expected, x, dense), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dense", [0, 5])
def test_one_candidate_a_slot_is_the_dense_layer(activation, dense):
    is_the_dense_layer(layer(dense, candidates=1, activation=activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dense", [0, 5])
def test_equal_candidates_are_the_dense_layer_whatever_is_chosen(activation, dense):
    own = layer(dense, activation=activation)
    with torch.no_grad():
        for tokens in (own.bank.key_tokens, own.bank.value_tokens):
            by_slot = tokens.view(SLOTS, CANDIDATES, SIZE, WIDTH)
            by_slot.copy_(by_slot[:, :1].clone().expand_as(by_slot))
    is_the_dense_layer(own)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    torch.manual_seed(3)
    chosen = assign(torch.randint(0, CANDIDATES, (5, SLOTS)), CANDIDATES)
    groups = SLOTS * CANDIDATES * 2
    tensors = [torch.randn(size, 3, dtype=torch.float64, requires_grad=True) for size in (5, groups, groups, 3, 3)]

    def function(*tensors: Tensor) -> Tensor:
        x, *tokens = tensors
        return sparse_pattention(
            x, [ChosenTokens(chosen, 2.5, *tokens, torch.zeros(5, SLOTS, CANDIDATES))], activation, SINGLE
        )[0]

    assert torch.autograd.gradcheck(function, tensors)


def several(dense: int, activation: str, group=SINGLE) -> list[SparsePattention]:
    """Three projections with tokens of their own."""
    made = [layer(dense, activation=activation, group=group) for _ in range(3)]
    for number, own in enumerate(made):
        generator = torch.Generator().manual_seed(number)
        for parameter in own.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return made


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_projections_that_share_x_are_each_of_them(activation):
    made, x = several(5, activation), inputs().requires_grad_()
    losses, metrics = {}, {}
    outputs = sparse_outputs(made, x, losses, metrics)
    expected = [plain(x, own) for own in made]
    torch.testing.assert_close(list(outputs), expected, rtol=1e-12, atol=1e-12)
    learning = [parameter for own in made for name, parameter in own.named_parameters() if name != "bank.balance"]
    found, exact = (
        torch.autograd.grad(sum(out.square().sum() for out in outs), [x, *learning]) for outs in (outputs, expected)
    )  # fmt: skip
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-9)
    alone = [({}, {}) for _ in made]
    for own, reports in zip(made, alone):
        own.partial(x, *reports)
    assert losses["balance"] == sum(own["balance"] for own, _ in alone)
    assert metrics["load_max"] == sum(own["load_max"] for _, own in alone)


def test_ties_nan_and_candidates_without_rows():
    logits = torch.tensor([[[1.0, 1.0, 0.0]], [[0.0, 2.0, 2.0]], [[1.0, torch.nan, 9.0]]])
    assert choose(logits, torch.zeros(1, 3)).tolist() == [[0], [1], [1]]
    assert choose(logits[:1], torch.tensor([[0.0, 0.0, 0.15]])).tolist() == [[2]]
    own, x = layer(), inputs().requires_grad_()
    with torch.no_grad():
        own.bank.balance.view(SLOTS, CANDIDATES)[:, 1] = 100.0
    own.partial(x).sum().backward()
    by_candidate = own.bank.key_tokens.grad.view(SLOTS, CANDIDATES, SIZE, WIDTH).abs().amax((0, 2, 3))
    assert by_candidate[1] > 0 and not by_candidate[[0, 2]].any()


def test_a_row_of_zeros_is_zero_and_no_rows_are_none():
    own, x = layer(5), inputs()
    x[3] = 0
    x.requires_grad_()
    own.partial(x).square().sum().backward()
    assert not own.partial(x)[3].any() and all(
        p.grad.isfinite().all() for n, p in own.named_parameters() if n != "bank.balance"
    )
    assert own.partial(x[:0]).shape == (0, WIDTH)


def test_the_gate_is_one_and_the_router_learns():
    own, x = layer(), inputs()
    logits = own.bank.logits(x)
    gate = straight_through(logits, choose(logits, own.bank.slot_balance()))
    assert (gate == 1).all()
    own.partial(x).square().sum().backward()
    assert own.bank.router.grad.abs().sum() > 0 and own.bank.balance.grad is None


def test_the_gradient_of_the_balance_is_the_imbalance():
    own, losses, metrics = layer(), {}, {}
    own.partial(inputs(), losses, metrics)
    losses["balance"].backward()
    logits = own.bank.logits(inputs())
    chosen = choose(logits, own.bank.slot_balance())
    load = F.one_hot(chosen, CANDIDATES).double().mean(0) * CANDIDATES
    torch.testing.assert_close(own.bank.balance.grad, 1e-4 * (load - 1).flatten(), rtol=1e-5, atol=1e-9)
    assert own.bank.router.grad is None
    torch.testing.assert_close(metrics["load_max"].double(), load.amax(1).mean(), rtol=1e-6, atol=0)


def test_the_balance_evens_out_the_load():
    """From a router that sends nearly everything to one candidate."""
    torch.manual_seed(4)
    logits = torch.randn(512, 2, 4)
    logits[..., 0] += 3
    balance = torch.zeros(2, 4, requires_grad=True)
    adam = torch.optim.Adam([balance], lr=0.005)

    def load() -> Tensor:
        return relative_load(assign(choose(logits, balance), 4).ends)

    assert load().max() > 3
    for _ in range(200):
        adam.zero_grad()
        balance_loss(balance, load()).backward()
        adam.step()
    assert load().max() < 1.2


def sharded(group, activation, dense):
    whole, x = layer(dense, activation=activation), inputs().requires_grad_()
    expected = whole.partial(x)
    expected_grads = gradients(expected, x, whole)
    own, own_x = layer(dense, activation=activation, group=group), inputs().requires_grad_()
    names = [name for name, _ in own.named_parameters() if name != "bank.balance"]
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            full = dict(whole.named_parameters())[name]
            parameter.copy_(full[slice(*shard_range(len(full), group.size, group.rank))])
    entered = copy_to(own_x, group)
    partial = own.partial(entered)
    torch.testing.assert_close(all_reduce(partial.detach(), group), expected, rtol=1e-12, atol=1e-12)
    x_grad, *found = gradients(partial, own_x, own)
    torch.testing.assert_close(x_grad, expected_grads[0], rtol=1e-12, atol=1e-11)
    for name, gradient, full in zip(names, found, expected_grads[1:]):
        local = full[slice(*shard_range(len(full), group.size, group.rank))]
        torch.testing.assert_close(gradient, local, rtol=1e-12, atol=1e-11, msg=name)


def test_over_a_tensor_group():
    spawn_each(sharded, 2, [(ACTIVATIONS[0], 5), *((activation, 0) for activation in ACTIVATIONS)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slots_add_up_in_fp32(dtype):
    """In 16 bits many slots are as far from fp64 as a dense layer, which rounds its output once."""
    slots, own = 144, SparsePattention(144 * 16, 64, 64, group_size=16, candidates=2).to(dtype)
    with torch.no_grad():
        own.bank.router.zero_()
        for tokens in (own.bank.key_tokens, own.bank.value_tokens):
            by_slot = tokens.view(slots, 2, 16, 64)
            by_slot[:, 1] = by_slot[:, 0]
    tokens = [
        t.detach().view(slots, 2, 16, 64)[:, 0].flatten(0, 1) for t in (own.bank.key_tokens, own.bank.value_tokens)
    ]
    x, weight = torch.randn(2, 128, 64, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()

    def outcome(layer, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        out = layer(x)
        (out * weight.to(x.dtype)).sum().backward()
        return [out.detach(), x.grad]

    exact = outcome(lambda x: pattention(x, *(t.double() for t in tokens)), x.double())
    dense = outcome(lambda x: pattention(x, *tokens), x)
    for found, once, true in zip(outcome(own.partial, x), dense, exact):
        assert (found.double() - true).norm() < 1.3 * (once.double() - true).norm()
