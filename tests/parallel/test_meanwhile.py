"""Gradients of keys hide the exchange of the input's gradient, and are what they are without that."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from distributed import spawn, spawn_each

from megatron_tf.config.sections.model import Model
from megatron_tf.config.sections.training import Training
from megatron_tf.model import projection
from megatron_tf.model.layers import TensorParallel, build_block
from megatron_tf.model.projection import choose_forms, entered
from megatron_tf.parallel import collectives
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.parallel.meanwhile import Meanwhile, postponed
from megatron_tf.state.parameters import initial_scales

MODEL = Model.model_validate(
    {
        "num_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "seq_length": 8,
        "vocab_size": 32,
        "parameter_tokens": {"qkv": 13, "proj": 11, "ffn": 30},
    }
)


def make_block(group, sequence=False, **forms):
    torch.manual_seed(0)
    block = build_block(MODEL, 0, initial_scales(MODEL), TensorParallel(group, sequence))
    choose_forms(block, Training(global_batch_size=2, micro_batch_size=2, **forms), "cpu")
    return block


def make_hidden(group, sequence):
    return torch.randn(8 // (group.size if sequence else 1), 2, 16).requires_grad_()


def order_of_events(group, sequence, norm):
    """ffn, proj, and q, k, v together: the exchange begins, the product is computed, and then the exchange is waited
    for."""
    events = []

    def sending(begin):
        def begun(*arguments):
            finish = begin(*arguments)
            events.append("sent")
            return lambda: (events.append("waited"), finish())[1]

        return begun

    leave = Meanwhile.leave

    with pytest.MonkeyPatch.context() as patch:
        for name in ("begin_all_reduce", "begin_reduce_scatter"):
            patch.setattr(collectives, name, sending(getattr(collectives, name)))
        logged = lambda self, work: leave(self, lambda: (events.append("computed"), work())[1])  # noqa: E731
        patch.setattr(Meanwhile, "leave", logged)
        block = make_block(group, sequence, norm=norm)
        out = block(make_hidden(group, sequence))
        events.clear()
        out.sum().backward()
    exchanges = [events[i : i + 3] for i in range(len(events)) if events[i : i + 2] == ["sent", "computed"]]
    assert exchanges == [["sent", "computed", "waited"]] * 3, events
    assert events.count("computed") == 3


def test_the_product_is_computed_while_the_exchange_is_on_its_way():
    spawn_each(order_of_events, 2, [(s, norm) for s in (False, True) for norm in ("direct", "gram")])


def gradients(group, sequence, case):
    block = make_block(group, sequence, norm="gram" if case == "gram" else "direct")
    hidden = make_hidden(group, sequence)
    block.recompute = case == "recompute"
    if case == "frozen key":
        block.attention.query.key_tokens.requires_grad_(False)
    if case == "frozen input":
        hidden.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        out = block(hidden)
    for _ in range(2):  # the same graph twice: nothing is left over from the first pass
        out.square().sum().backward(retain_graph=case != "recompute")
        if case == "recompute":
            break
    tensors = {"hidden": hidden, **dict(block.named_parameters())}
    return {name: t.grad for name, t in tensors.items()}


def same_gradients(group, sequence, case):
    found = gradients(group, sequence, case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "postponed", lambda weights, group: (weights, None))
        expected = gradients(group, sequence, case)
    for name, grad in expected.items():
        assert (found[name] is None and grad is None) or torch.equal(found[name], grad), f"{case}, {name}"


CASES = ["direct", "gram", "recompute", "autocast", "frozen key", "frozen input"]


def test_the_gradients_are_those_without_it():
    spawn_each(same_gradients, 2, [(sequence, case) for sequence in (False, True) for case in CASES])


def freed(group):
    """Without the garbage collector: a circle would keep the memory of every step for a while."""
    block, hidden = make_block(group), make_hidden(group, False)
    gc.collect()
    gc.disable()
    try:
        own = entered([block.ffn], hidden, block.tensor)
        assert own.meanwhile is not None
        kept = weakref.ref(own.x), weakref.ref(own.keys[0]), weakref.ref(own.meanwhile)
        del own
        assert [ref() for ref in kept] == [None, None, None]
    finally:
        gc.enable()


def test_what_is_no_longer_used_is_freed_at_once():
    spawn(freed, 2)


def test_one_process_has_nothing_to_hide():
    weights = [torch.randn(3, 4, requires_grad=True)]
    assert postponed(weights, SINGLE) == (weights, None)
