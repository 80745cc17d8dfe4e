"""A TokenFormer with more parameter tokens than a position uses, in every layout."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from distributed import spawn_each
from layout_checks import BOUNDARIES, check_layouts
from sparse_models import with_bank, with_banks, without_banks
from tiny import run_config
from torch import nn
from torch.nn import functional as F

from megatron_tf.architectures.tokenformer.forms import norm_forms
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.config.topology import Topology
from megatron_tf.costs.estimate import flops_per_token, num_parameters
from megatron_tf.costs.plan import describe
from megatron_tf.inference.cache import CachedModel
from megatron_tf.inference.sampling import generate
from megatron_tf.model import build_model, sparse_function
from megatron_tf.model.context import BlockContext
from megatron_tf.model.layers import FinalNorm, TensorParallel, build_block
from megatron_tf.model.projection import choose_forms
from megatron_tf.model.routing import choose
from megatron_tf.parallel.groups import Group
from megatron_tf.state.parameters import initial_scales, parameter_table, shard_range
from megatron_tf.tasks.classes import cross_entropy
from megatron_tf.tasks.language_model.layers import Embedding
from megatron_tf.verification.layout import Layout, compare, reference, run_layouts
from megatron_tf.verification.resume import Setting, check_resumes


def test_attention_chooses_too():
    """Parameters and FLOPs are counted, and what blocks report is of all their projections."""
    model = with_banks().model
    small = run_config(model={"parameter_tokens": {"qkv": 67, "proj": 64, "ffn": 69}}).model
    assert num_parameters(model) == sum(p.numel() for p in build_model(model).parameters())
    groups, layers, width = 3 * 8 + 12 + 12, 2, 32
    assert flops_per_token(model) - flops_per_token(small) == 6 * layers * groups * (width + 1)
    assert "qkv 67 of 131 (2 candidates in each of 4 slots of 16)" in describe(with_banks(), 1)
    context, network = BlockContext(), build_model(model)
    network(torch.randint(0, 99, (2, 16)), context=context)
    assert layers < context.metrics["load_max"] < 3 * layers
    context.losses["balance"].backward()
    of_balance = {name: p.grad for name, p in network.named_parameters() if name.endswith("bank.balance")}
    assert len(of_balance) == 5 * layers and all(grad.abs().sum() > 0 for grad in of_balance.values())
    network.blocks[0].compile_for("cpu", torch.float32)
    assert network.blocks[0].attention._compiled_call_impl is None


def only_proj() -> RunConfig:
    """Query, key and value are dense, and find their norms from KᵀK."""
    bank = {"proj": {"group_size": 16, "candidates": 3}}
    return run_config(
        model={"parameter_tokens": {"qkv": 64, "proj": 64, "ffn": 69}, "sparse": bank}, training={"norm": "gram"}
    )


def whole_model(group, sequence, run):
    """Loss and every gradient over a tensor group, in fp64."""
    model: Model = run.model
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, 99, (2, 2, 16), generator=generator)
    one, context = build_model(model, dtype=torch.float64), BlockContext()
    (
        F.cross_entropy(one(ids, context=context).flatten(0, 1), labels.flatten()) + sum(context.losses.values())
    ).backward()

    tensor = TensorParallel(group, sequence)
    layers = nn.ModuleDict({"embedding": Embedding(model, tensor), "final_norm": FinalNorm(model, tensor)})
    layers["blocks"] = nn.ModuleList(build_block(model, i, initial_scales(model), tensor) for i in range(2))
    layers = layers.double()
    choose_forms(layers, run.training, "cpu")
    table, whole = parameter_table(model), dict(one.named_parameters())

    def local(name: str, full: torch.Tensor) -> torch.Tensor:
        return full[slice(*shard_range(len(full), group.size, group.rank))] if table[name].sharded else full

    with torch.no_grad():
        for name, parameter in layers.named_parameters():
            parameter.copy_(local(name, whole[name]))
    hidden, own_context = layers["embedding"](ids), BlockContext(loss_weight=1.0)
    for block in layers["blocks"]:
        hidden = block(hidden, own_context)
    logits = layers["embedding"].logits(layers["final_norm"](hidden))
    cross_entropy(logits, labels.mT, layers["embedding"].start, group).mean().backward()
    for name, parameter in layers.named_parameters():
        expected = local(name, whole[name].grad)
        assert (parameter.grad - expected).norm() < 1e-11 * whole[name].grad.norm(), name


def test_a_z_loss_is_that_of_the_router_scores_and_makes_them_smaller():
    model = build_model(with_bank(z_loss=0.5).model, dtype=torch.float64)
    scores = []
    for block in model.blocks:
        block.ffn.choose = lambda z, b: scores.append(z) or choose(z, b)
    context = BlockContext()
    model(torch.arange(32).view(2, 16), context=context)
    expected = sum(0.5 * z.exp().sum(-1).log().square().mean() for z in scores)
    torch.testing.assert_close(context.losses["z_loss"], expected)
    context.losses["z_loss"].backward()
    router = model.blocks[1].ffn.bank.router
    assert router.grad.any() and "z_loss" not in architecture_of(without_banks().model).losses(with_bank().model)


def test_over_a_tensor_group_in_fp64():
    runs = with_banks(z_loss=0.5), only_proj()
    spawn_each(whole_model, 2, [(sequence, run) for run in runs for sequence in (False, True)])


def test_the_engine_has_the_forms_of_the_plan():
    run = only_proj()
    run = run.model_copy(update={"parallel": run.parallel.model_copy(update={"tensor": 2, "sequence": True})})
    with torch.device("meta"):
        block = build_block(run.model, 0, initial_scales(run.model), TensorParallel(Group(2, 0), True))
    choose_forms(block, run.training, "cuda")
    planned = norm_forms(run.model, run, "cuda")
    assert planned["qkv"] == block.attention.query.form.norm == "gram" and planned["ffn"] == block.ffn.form.norm
    assert all(part.own_rows for part in (block.attention.query, block.attention.value, block.ffn))


def test_the_reference_reports_the_load():
    trace = reference(with_bank(), 3)  # warm-up begins at a learning rate of 0
    loss, load = trace.reports[4:]
    assert len(trace.reports) == 6 and loss != 0 and 1 < load < 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpointing", "chosen"),
    [
        (False, [Layout(Topology(2, 1, 2)), Layout(Topology(4, 1, 1), True)]),
        (True, [Layout(Topology(2, 2, 1), True), Layout(Topology(1, 2, 2))]),
    ],
)
def test_layouts_are_one_process(checkpointing, chosen):
    """Every choice is the same: in so few steps no two candidates come as close as rounding."""
    run = with_banks(z_loss=0.01) if checkpointing else with_bank(z_loss=0.01)
    run = run.model_copy(
        update={"training": run.training.model_copy(update={"activation_checkpointing": checkpointing})}
    )
    expected = reference(run, 3)
    for layout, trace in zip(chosen, run_layouts(run, chosen, 3)):
        assert len(trace.reports) == len(expected.reports) == 9
        difference = compare(trace, expected)
        assert difference.agrees(1e-5), f"{layout}: {difference}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({"zero": {"stage": 0}}, [Topology(data=2)]),
        ({"zero": {"stage": 1}}, [Topology(data=2), Topology(pipeline=2)]),
        ({"parallel": {"engine": "torch", "shard": "gradients"}}, [Topology(data=2), Topology(pipeline=2)]),
        ({"parallel": {"engine": "torch", "shard": "parameters"}}, [Topology(data=2), Topology(pipeline=2, data=2)]),
    ],
)
def test_documents_and_every_kind_of_sharded_state(changes, chosen):
    """A step has several micro batches, whose ranks have different numbers of labels that count."""
    check_layouts(with_banks(0.01, data=BOUNDARIES, **changes), *map(Layout, chosen), steps=2)


@pytest.mark.slow
def test_it_resumes_at_another_layout():
    first, second = Setting(Layout(Topology(2, 2, 1), True)), Setting(Layout(Topology(1, 1, 2)))
    for result in check_resumes(with_bank(), [(first, second)], 3):
        assert result.agrees(1e-5), result


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_attention_alone_is_compiled_where_sizes_depend_on_the_choices(device, dtype):
    block = build_model(with_bank().model).blocks[0]
    block.compile_for(device, dtype)
    assert block._compiled_call_impl is None and block.attention._compiled_call_impl is not None


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_compiled_as_for_a_gpu_is_the_block(monkeypatch, recompute):
    """Without a graph break; losses and metrics of the blocks are added up."""
    monkeypatch.setattr(sparse_function, "has_grouped_products", lambda device, dtype: True)
    model = with_bank().model.model_copy(update={"num_layers": 3})
    network, compiled = (build_model(model, dtype=torch.bfloat16) for _ in range(2))
    for block in (*network.blocks, *compiled.blocks):
        block.recompute = recompute
    for block in compiled.blocks:
        monkeypatch.setattr(block, "compile", partial(nn.Module.compile, block, fullgraph=True, backend="aot_eager"))
        block.compile_for("cuda", torch.bfloat16)
        assert block._compiled_call_impl is not None and block.attention._compiled_call_impl is None
    ids = torch.randint(0, 99, (2, 16), generator=torch.Generator().manual_seed(0))
    results = []
    for own in (network, compiled):
        context = BlockContext(loss_weight=torch.tensor(0.5))
        out = own(ids, context=context)
        out.float().square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in own.named_parameters()}
        results.append({"out": out.detach(), **context.losses, **context.metrics, **gradients})
    assert {"balance", "load_max", "blocks.2.ffn.bank.balance"} <= results[0].keys()
    torch.testing.assert_close(*results)


def compiled_block(group, sequence):
    """The same of a rank's block, with the exchanges in the graph."""
    tensor, model = TensorParallel(group, sequence), with_banks().model
    generator = torch.Generator().manual_seed(1 + group.rank)
    block, compiled = (build_block(model, 0, initial_scales(model), tensor).bfloat16() for _ in range(2))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    compiled.load_state_dict(block.state_dict())
    hidden = torch.randn(8 // (group.size if sequence else 1), 2, 32, dtype=torch.bfloat16)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_function, "has_grouped_products", lambda device, dtype: True)
        compiled.compile(fullgraph=True, backend="aot_eager")
        for own in (block, compiled):
            context, x = BlockContext(loss_weight=torch.tensor(0.5)), hidden.clone().requires_grad_()
            out = own(x, context)
            out.float().square().mean().backward()
            gradients = {name: parameter.grad for name, parameter in own.named_parameters()}
            results.append({"out": out.detach(), "x": x.grad, **context.losses, **context.metrics, **gradients})
    torch.testing.assert_close(*results)


@pytest.mark.slow
def test_a_compiled_block_over_tensor_ranks_is_the_block():
    spawn_each(compiled_block, 2, [(False,), (True,)])


def test_generation_with_a_cache_is_the_model_itself():
    model = build_model(with_banks().model, dtype=torch.float64)
    ids = torch.randint(0, 99, (1, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for (token,) in generate(CachedModel(model), ids.tolist(), num_tokens=6, context=16):
            assert model(ids)[0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
