"""Tensor-parallel layers against the same layers on one process: outputs, every gradient, and every byte sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed import spawn, spawn_each

from megatron_tf.activations.overlap import LEAST_ROWS
from megatron_tf.config.sections.model import Model
from megatron_tf.config.sections.training import Training
from megatron_tf.model.layers import FinalNorm, TensorParallel, build_block
from megatron_tf.model.pattention import DIRECT, Form, partial_pattention
from megatron_tf.model.projection import Pattention, choose_forms
from megatron_tf.model.tokenformer import build_model
from megatron_tf.parallel import collectives
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.state.parameters import initial_scales, parameter_table, shard_range
from megatron_tf.tasks.classes import cross_entropy
from megatron_tf.tasks.language_model.layers import Embedding

SEQUENCE, BATCH, WIDTH = 8, 2, 16


def model_config(**changes) -> Model:
    sizes = {"num_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 4, "seq_length": SEQUENCE, "vocab_size": 37}
    tokens = {"qkv": 13, "proj": 11, "ffn": 30}  # none divides by 2 or 4
    return Model.model_validate({**sizes, "rotary_fraction": 0.5, "parameter_tokens": tokens, **changes})


def transformer(**changes) -> Model:
    changes = {"architecture": "transformer", "parameter_tokens": None, "ffn_hidden_size": 30, **changes}
    return model_config(**changes)  # 30 does not divide by 4


def local(name, tensor, config, group):
    spec = parameter_table(config)[name]
    return tensor[slice(*shard_range(spec.shape[0], group.size, group.rank))] if spec.sharded else tensor


def whole_model(group, config, sequence, **forms):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 37, (BATCH, SEQUENCE), generator=generator)
    labels = torch.randint(0, 37, (BATCH, SEQUENCE), generator=generator)
    one = build_model(config, dtype=torch.float64)
    training = Training(global_batch_size=BATCH, micro_batch_size=BATCH, **forms)
    if training.precision == "fp8":
        choose_forms(one, training, "cpu")
    expected = torch.nn.functional.cross_entropy(one(ids).flatten(0, 1), labels.flatten())
    expected.backward()

    tensor = TensorParallel(group, sequence)
    layers = torch.nn.ModuleDict({"embedding": Embedding(config, tensor), "final_norm": FinalNorm(config, tensor)})
    layers["blocks"] = torch.nn.ModuleList(build_block(config, i, initial_scales(config), tensor) for i in range(2))
    layers = layers.double()
    choose_forms(layers, training, "cpu")
    with torch.no_grad():
        for (name, parameter), full in (
            (item, dict(one.named_parameters())[item[0]]) for item in layers.named_parameters()
        ):
            parameter.copy_(local(name, full, config, group))
    hidden = layers["embedding"](ids)
    assert hidden.shape == (SEQUENCE // (group.size if sequence else 1), BATCH, WIDTH)
    for block in layers["blocks"]:
        hidden = block(hidden)
    logits = layers["embedding"].logits(layers["final_norm"](hidden))
    loss = cross_entropy(logits, labels.mT, layers["embedding"].start, group).mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=0)
    for name, parameter in layers.named_parameters():
        full = dict(one.named_parameters())[name].grad
        difference = (parameter.grad - local(name, full, config, group)).norm() / full.norm()
        assert difference < 1e-11, f"{name}: {difference:.2e}"


@pytest.mark.parametrize("world_size", [2, 4])
def test_whole_models_in_fp64(world_size):
    configs = model_config(), transformer()
    spawn_each(whole_model, world_size, [(config, sequence) for config in configs for sequence in (False, True)])


def whole_model_in_gram_form(group, config):
    for sequence, scores in ((False, "recompute"), (True, "keep")):
        whole_model(group, config, sequence, norm="gram", scores=scores)


def test_the_gram_form_in_fp64():
    spawn(whole_model_in_gram_form, 2, model_config())


def whole_model_with_products_in_fp8(group, config):
    for sequence, scores in ((False, "keep"), (True, "recompute")):
        whole_model(group, config, sequence, precision="fp8", scores=scores)


def test_products_in_fp8_are_those_of_one_process():
    spawn(whole_model_with_products_in_fp8, 2, model_config())


def test_other_activations():
    spawn_each(whole_model, 2, [(model_config(activation=name), True) for name in ("gelu_l2_norm", "softmax")])


def single_layer(group):
    full = Pattention(11, 6, 5).double()
    for parameter in full.parameters():
        dist.broadcast(parameter.data, 0)
    shard = Pattention(11, 6, 5, group=group).double()
    rows = slice(*shard_range(11, group.size, group.rank))
    shard.load_state_dict({name: p[rows] for name, p in full.state_dict().items()})
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    xs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [full(xs[0]), shard(xs[1])]
    for out in outs:
        out.square().sum().backward()
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(xs[1].grad, xs[0].grad)
    torch.testing.assert_close(shard.key_tokens.grad, full.key_tokens.grad[rows])
    torch.testing.assert_close(shard.value_tokens.grad, full.value_tokens.grad[rows])


def test_pattention_module_is_sharded_as_it_is():
    spawn(single_layer, 2)


def in_parts(group, activation, sent):
    """Two projections of one x, of more rows than go in one part."""
    generator = torch.Generator().manual_seed(0)
    rows = 2 * LEAST_ROWS + 1
    x = torch.randn(rows, 5, dtype=torch.float64, generator=generator)
    tokens = [torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (6, 9, 6, 9)]
    grads = [torch.randn(rows, 5, dtype=torch.float64, generator=generator) for _ in range(2)]

    def both_passes(own_tokens, group, form=DIRECT):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *own_tokens)]
        outs = partial_pattention(leaves[0], leaves[1:3], leaves[3:], (2.0, 3.0), activation, group, form)
        d_x, *others = torch.autograd.grad(outs, leaves, grads)
        return torch.stack([*outs, d_x]).detach(), others

    expected, token_grads = both_passes(tokens, SINGLE)
    own = [slice(*shard_range(len(t), group.size, group.rank)) for t in tokens]
    counter = Counter()
    for form in (DIRECT, Form(keep_scores=False)):
        counter.take()
        partial, own_grads = both_passes([t[rows] for t, rows in zip(tokens, own)], group, form)
        assert counter.take() == sorted(("all_reduce", 2 * rows) for rows in sent)
        torch.testing.assert_close(all_reduce(partial, group), expected, rtol=1e-11, atol=1e-11)
        for own_grad, grad, rows in zip(own_grads, token_grads, own):
            torch.testing.assert_close(own_grad, grad[rows], rtol=1e-11, atol=1e-10)


IN_PARTS = [
    ("l2_norm_gelu", [LEAST_ROWS + 1, LEAST_ROWS, 2 * LEAST_ROWS + 1]),
    ("gelu_l2_norm", [LEAST_ROWS + 1, LEAST_ROWS, 2 * LEAST_ROWS + 1]),
    ("softmax", [2 * LEAST_ROWS + 1] * 3),
]


def test_many_rows_go_in_two_parts():
    spawn_each(in_parts, 2, IN_PARTS)


class Counter:
    """Counts calls and elements handed to each collective."""

    def __init__(self):
        self.sent = []
        self._originals = dist.all_reduce, collectives._all_gather, collectives._reduce_scatter
        dist.all_reduce = self._wrap("all_reduce", self._originals[0], 0)
        collectives._all_gather = self._wrap("all_gather", self._originals[1], 0)
        collectives._reduce_scatter = self._wrap("reduce_scatter", self._originals[2], 1)

    def _wrap(self, name, original, argument):
        def counted(*args, **kwargs):
            self.sent.append((name, args[argument].numel()))
            return original(*args, **kwargs)

        return counted

    def take(self):
        taken, self.sent = sorted(self.sent), []
        return taken


def communication(config, group, sequence):
    """What a block sends, forward and backward."""
    block = build_block(config, 0, initial_scales(config), TensorParallel(group, sequence)).double()
    hidden = torch.randn(SEQUENCE // (group.size if sequence else 1), BATCH, WIDTH, dtype=torch.float64)
    hidden.requires_grad_()
    counter = Counter()
    out = block(hidden)
    forward = counter.take()
    out.sum().backward()
    return forward, counter.take()


def count(group, sequence):
    rows, whole = SEQUENCE * BATCH, SEQUENCE * BATCH * WIDTH
    norms = [("all_reduce", 3 * rows), ("all_reduce", rows), ("all_reduce", rows)]
    if sequence:
        forward = [("all_gather", whole)] * 3 + [("reduce_scatter", 3 * whole)] + [("reduce_scatter", whole)] * 2
        backward = [("all_gather", whole)] * 2 + [("all_gather", 3 * whole)] + [("reduce_scatter", whole)] * 3
    else:
        forward = [("all_gather", whole), ("reduce_scatter", 3 * whole)] + [("all_reduce", whole)] * 2
        backward = [("all_gather", 3 * whole), ("reduce_scatter", whole)] + [("all_reduce", whole)] * 2
    assert communication(model_config(), group, sequence) == (sorted(forward + norms), sorted(backward + norms))
    both = [("all_gather", whole)] * 2 + [("reduce_scatter", whole)] * 2 if sequence else [("all_reduce", whole)] * 2
    assert communication(transformer(), group, sequence) == (both, both)


def test_communication_of_a_block():
    spawn_each(count, 2, [(False,), (True,)])
