"""A TokenFormer with more parameter tokens than a position uses: its section, its costs, and every layout of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from distributed import spawn_each
from layout_checks import BOUNDARIES, check_layouts
from tiny import run_config
from torch import nn
from torch.nn import functional as F

from megatron_tf.checkpoint.architecture import check_format, check_prunable
from megatron_tf.config import load_config
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.load import dump_config
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.costs.communication import sent_bytes_per_step
from megatron_tf.costs.estimate import flops_per_token, num_parameters
from megatron_tf.costs.hardware import GPUS, Assumptions
from megatron_tf.costs.plan import describe
from megatron_tf.costs.work import block_seconds
from megatron_tf.errors import CheckpointError, ConfigError
from megatron_tf.growth.rules import growth_problems, scales_after_growth
from megatron_tf.inference.cache import CachedModel
from megatron_tf.inference.sampling import generate
from megatron_tf.model import build_model, sparse_function
from megatron_tf.model.context import BlockContext
from megatron_tf.model.layers import FinalNorm, TensorParallel, build_block
from megatron_tf.model.routing import choose
from megatron_tf.state.parameters import initial_scales, parameter_table, shard_range
from megatron_tf.tasks.classes import cross_entropy
from megatron_tf.tasks.language_model.layers import Embedding
from megatron_tf.verification.layout import Layout, compare, reference, run_layouts
from megatron_tf.verification.resume import Setting, check_resumes

TOKENS = {"qkv": 13, "proj": 11, "ffn": 69}


def config(
    ffn: int = 69, bank: dict | None = None, tensor: int = 1, z_loss: float = 0.0, **training: object
) -> RunConfig:
    """Four slots of three candidates, and five tokens that every position uses."""
    bank = {"group_size": 16, "candidates": 3, "dense": 5} if bank is None else bank
    return run_config(
        model={"parameter_tokens": {**TOKENS, "ffn": ffn}, "sparse": {"ffn": bank, "z_loss": z_loss}},
        parallel={"tensor": tensor},
        training=training,
    )


def everywhere(z_loss: float = 0.0, **changes: dict) -> RunConfig:
    """Every projection has four slots, and candidates of its own."""
    banks = {"qkv": {"group_size": 16, "candidates": 2, "dense": 3}, "proj": {"group_size": 16, "candidates": 3}}
    return run_config(
        model={
            "parameter_tokens": {"qkv": 67, "proj": 64, "ffn": 69},
            "sparse": {**banks, "ffn": {"group_size": 16, "candidates": 3, "dense": 5}, "z_loss": z_loss},
        },
        **changes,
    )


def dense() -> RunConfig:
    return run_config(model={"parameter_tokens": TOKENS})


def test_the_section_is_read_and_written(tmp_path: Path):
    file = tmp_path / "run.yml"
    file.write_text(dump_config(config()))
    assert load_config(file) == config()
    with pytest.raises(ConfigError, match="model.sparse.ffn.group_size: .*multiple of 16"):
        load_config(file, ["model.sparse.ffn.group_size=24"])
    with pytest.raises(ConfigError, match="model.sparse.ffn.candidates: .*at least 1"):
        load_config(file, ["model.sparse.ffn.candidates=0"])
    with pytest.raises(ConfigError, match="model.sparse.mlp: unknown key. The keys of model.sparse are"):
        load_config(file, ["model.sparse.mlp=null"])
    with pytest.raises(ConfigError, match="model.sparse.ffn.group_size: missing"):
        load_config(file, ["model.sparse.ffn={candidates: 4}"])
    file.write_text(dump_config(everywhere()))
    assert load_config(file) == everywhere()


def test_with_one_candidate_a_projection_is_dense(tmp_path: Path):
    file = tmp_path / "run.yml"
    file.write_text(dump_config(config()))
    assert load_config(file, ["model.sparse.ffn.candidates=1"]) == dense()
    file.write_text(dump_config(everywhere()))
    model = load_config(file, ["model.sparse.ffn.candidates=1"]).model
    assert architecture_of(model).sparse_sections(model).keys() == {"qkv", "proj"}
    assert not any("ffn.bank" in name for name in parameter_table(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ffn": 70},
            r"model.parameter_tokens.ffn: 70, of which model.sparse.ffn.dense 5 are used by every position; the other "
            r"65 are no whole slots of model.sparse.ffn.group_size 16 tokens. Set it to 69 or 85.",
        ),
        (
            {"ffn": 5},
            "model.sparse.ffn.dense: 5 tokens are used by every position, which leaves none of "
            "model.parameter_tokens.ffn 5 for slots. Set model.parameter_tokens.ffn to 21.",
        ),
        (
            {"ffn": 48, "bank": {"group_size": 16, "candidates": 3, "dense": 64}},
            "model.sparse.ffn.dense: 64 tokens .* none of model.parameter_tokens.ffn 48 for slots. Set "
            "model.sparse.ffn.dense to 32, or model.parameter_tokens.ffn to 80.",
        ),
        (
            {"ffn": 101, "tensor": 4},
            r"parallel.tensor: 4 does not divide the 6 slots of model.sparse.ffn \(96 tokens in groups of 16\), and a "
            r"rank holds whole slots. Set parallel.tensor to 2, or model.parameter_tokens.ffn to 69 or 133.",
        ),
        (
            {"ffn": 5, "tensor": 2},
            "^model.sparse.ffn.dense: 5 tokens are used by every position, which leaves none .* to 21.$",
        ),
        (
            {"ffn": 133, "tensor": 8, "bank": {"group_size": 32, "candidates": 3, "dense": 5}},
            r"parallel.tensor: 8 does not divide the 4 slots .* Set parallel.tensor to 4, or "
            r"model.sparse.ffn.group_size to 16, or model.parameter_tokens.ffn to 261.",
        ),
    ],
)
def test_what_does_not_divide(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(config(**changes), changes.get("tensor", 1))


def test_sizes_of_the_tensor_group_divide_heads_and_slots():
    """Each message names sizes that the other rules allow as well."""
    for tensor, message in (
        (6, "parallel.tensor: 6 does not divide the 9 slots .* Set parallel.tensor to 3, or model.sparse.ffn"),
        (9, "parallel.tensor: 9 does not divide model.num_attention_heads 12. Set it to 3.$"),
    ):
        sizes = {"hidden_size": 96, "num_attention_heads": 12, "parameter_tokens": {**TOKENS, "ffn": 288}}
        bank = {"ffn": {"group_size": 32, "candidates": 3}}
        own = run_config(model={**sizes, "sparse": bank}, parallel={"tensor": tensor})
        with pytest.raises(ConfigError, match=message):
            validate(own, tensor)


def test_a_section_without_a_bank_and_slots_of_each_projection():
    empty = run_config(model={"parameter_tokens": TOKENS, "sparse": {}})
    remedy = r"Set model.sparse.ffn to {group_size: 32, candidates: 4, dense: 5}, or model.sparse to null."
    with pytest.raises(ConfigError, match=f"model.sparse: names none of the projections qkv, proj, ffn. {remedy}"):
        validate(empty, 1)
    bank = {"group_size": 16, "candidates": 2}
    for kind in ("qkv", "proj"):
        wrong = run_config(model={"parameter_tokens": {**TOKENS, kind: 24}, "sparse": {kind: bank}})
        with pytest.raises(ConfigError, match=rf"model.parameter_tokens.{kind}: 24, of which .* Set it to 16 or 32"):
            validate(wrong, 1)


def test_attention_chooses_too():
    """Parameters and FLOPs are counted, and what blocks report is of all their projections."""
    model = everywhere().model
    small = run_config(model={"parameter_tokens": {"qkv": 67, "proj": 64, "ffn": 69}}).model
    assert num_parameters(model) == sum(p.numel() for p in build_model(model).parameters())
    groups, layers, width = 3 * 8 + 12 + 12, 2, 32
    assert flops_per_token(model) - flops_per_token(small) == 6 * layers * groups * (width + 1)
    assert "qkv 67 of 131 (2 candidates in each of 4 slots of 16)" in describe(everywhere(), 1)
    context, network = BlockContext(), build_model(model)
    network(torch.randint(0, 99, (2, 16)), context=context)
    assert layers < context.metrics["load_max"] < 3 * layers
    context.losses["balance"].backward()
    of_balance = {name: p.grad for name, p in network.named_parameters() if name.endswith("bank.balance")}
    assert len(of_balance) == 5 * layers and all(grad.abs().sum() > 0 for grad in of_balance.values())
    network.blocks[0].compile_for("cpu", torch.float32)
    assert network.blocks[0].attention._compiled_call_impl is None


def test_costs_are_those_of_the_used_tokens_and_the_router():
    sparse, small = config().model, dense().model
    assert num_parameters(sparse) == sum(p.numel() for p in build_model(sparse).parameters())
    groups, layers, width = 12, 2, 32
    assert num_parameters(sparse) - num_parameters(small) == layers * (2 * 8 * 16 * width + groups * (width + 1))
    assert flops_per_token(sparse) - flops_per_token(small) == 6 * layers * groups * (width + 1)
    assert "ffn 69 of 197 (3 candidates in each of 4 slots of 16)" in describe(config(), 1)
    assert initial_scales(sparse) == initial_scales(small)


def test_the_official_format_refuses():
    check_format(dense().model, "official", "converted")
    check_format(config().model, "huggingface", "exported")
    with pytest.raises(
        CheckpointError,
        match="cannot be converted: the official format has no place for model.sparse.*Export it by to-hf",
    ):
        check_format(config().model, "official", "converted")


def whole_model(group, sequence):
    """Loss and every gradient over a tensor group, in fp64."""
    model: Model = everywhere(z_loss=0.5).model
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
    model = build_model(config(z_loss=0.5).model, dtype=torch.float64)
    scores = []
    for block in model.blocks:
        block.ffn.choose = lambda z, b: scores.append(z) or choose(z, b)
    context = BlockContext()
    model(torch.arange(32).view(2, 16), context=context)
    expected = sum(0.5 * z.exp().sum(-1).log().square().mean() for z in scores)
    torch.testing.assert_close(context.losses["z_loss"], expected)
    context.losses["z_loss"].backward()
    router = model.blocks[1].ffn.bank.router
    assert router.grad.any() and "z_loss" not in architecture_of(dense().model).losses(config().model)


def test_over_a_tensor_group_in_fp64():
    spawn_each(whole_model, 2, [(False,), (True,)])


def test_the_reference_reports_the_load():
    trace = reference(config(), 3)  # warm-up begins at a learning rate of 0
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
    run = everywhere(z_loss=0.01) if checkpointing else config(z_loss=0.01)
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
    check_layouts(everywhere(0.01, data=BOUNDARIES, **changes), *map(Layout, chosen), steps=2)


@pytest.mark.slow
def test_it_resumes_at_another_layout():
    first, second = Setting(Layout(Topology(2, 2, 1), True)), Setting(Layout(Topology(1, 1, 2)))
    for result in check_resumes(config(), [(first, second)], 3):
        assert result.agrees(1e-5), result


def test_what_knows_dense_projections_only_refuses():
    check_prunable(dense().model, {**TOKENS, "ffn": 9})
    check_prunable(config().model, {**TOKENS, "qkv": 9})
    message = (
        "^model.sparse.ffn: the ffn projections cannot lose some of their 69 tokens, because positions choose 64 of "
        "them among 3 "
        "candidates in each of 4 slots of 16 tokens. Give --candidates ffn=1, which makes the projection dense, and "
        "prune that model$"
    )
    with pytest.raises(CheckpointError, match=message):
        check_prunable(config().model, {**TOKENS, "ffn": 9})
    with pytest.raises(
        CheckpointError, match="(?s)qkv.*proj.*ffn.* Give --candidates qkv=1,proj=1,ffn=1, which makes"
    ) as refused:
        check_prunable(everywhere().model, {"qkv": 8, "proj": 8, "ffn": 8})
    assert str(refused.value).count("Give") == 1
    with pytest.raises(ConfigError) as caught:
        larger = config(ffn=101)
        growth = Growth(source="x", method="gram")
        scales_after_growth(config().model, larger.model, growth, initial_scales(config().model))
    assert caught.value.problems == [
        "growth.method: gram grows projections of one key and one value tensor, and model.sparse.ffn has candidates. "
        "Set the method to zero_key."
    ]
    assert growth_problems(config().model, config(bank={"group_size": 16, "candidates": 4, "dense": 5}).model)
    assert growth_problems(dense().model, config().model)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_attention_alone_is_compiled_where_sizes_depend_on_the_choices(device, dtype):
    block = build_model(config().model).blocks[0]
    block.compile_for(device, dtype)
    assert block._compiled_call_impl is None and block.attention._compiled_call_impl is not None


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_compiled_as_for_a_gpu_is_the_block(monkeypatch, recompute):
    """Without a graph break; losses and metrics of the blocks are added up."""
    monkeypatch.setattr(sparse_function, "has_grouped_products", lambda device, dtype: True)
    model = config().model.model_copy(update={"num_layers": 3})
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
    tensor, model = TensorParallel(group, sequence), everywhere().model
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
    model = build_model(everywhere().model, dtype=torch.float64)
    ids = torch.randint(0, 99, (1, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for (token,) in generate(CachedModel(model), ids.tolist(), num_tokens=6, context=16):
            assert model(ids)[0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_the_planner_sees_gathers_and_all_gradients():
    """A step takes longer than a dense one of as many used tokens: rows are gathered, and more gradients reduced."""
    gpu = GPUS["h100"]
    sparse, small = config(), dense()
    assert block_seconds(sparse, gpu, Assumptions()).backward > block_seconds(small, gpu, Assumptions()).backward
    assert sent_bytes_per_step(sparse, 2)["data"] > 1.5 * sent_bytes_per_step(small, 2)["data"]
