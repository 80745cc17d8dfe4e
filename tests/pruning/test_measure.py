from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, layer_norm

from megatron_tf.config.load import dump_config
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.data.documents import Boundaries
from megatron_tf.data.indexed import IndexedWriter
from megatron_tf.errors import ArgumentError, CheckpointError
from megatron_tf.model import build_model
from megatron_tf.model.attention import document_starts
from megatron_tf.pruning.measure import (
    DataSample,
    boundaries_of_run,
    drop_tokens,
    fit_scales,
    mean_loss,
    select_tokens,
    visit_projections,
)
from megatron_tf.state.parameters import initial_scales
from megatron_tf.tasks.classes import IGNORED

SMALL = {"qkv": 9, "proj": 7, "ffn": 20}
LARGE = {"qkv": 14, "proj": 7, "ffn": 33}


def config(tokens: dict[str, int], **changes) -> Model:
    return Model.model_validate(
        {"num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 12, "vocab_size": 23,
         "parameter_tokens": tokens, **changes}
    )  # fmt: skip


def batches(count: int = 2, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rows = torch.randint(0, 23, (count, 2, 13), generator=torch.Generator().manual_seed(seed))
    return [(row[:, :-1], row[:, 1:]) for row in rows]


@torch.no_grad()
def grown(**changes):
    """A small model, and the same one with new tokens of zero key and the old τ."""
    small = build_model(config(SMALL, **changes))
    large = build_model(config(LARGE, **changes), scales=initial_scales(small.config))
    for name, parameter in large.named_parameters():
        before = small.get_parameter(name)
        if "key_tokens" in name:
            parameter.zero_()
        parameter[: len(before)] = before
    return small, large


@torch.no_grad()
def test_the_inputs_are_those_of_the_model():
    model, (ids, _) = build_model(config(SMALL)), batches()[0]
    seen = {}
    for layer, block in enumerate(model.blocks):
        block.attention.register_forward_pre_hook(
            lambda module, inputs, layer=layer: seen.__setitem__(f"blocks.{layer}.attention.query", inputs[0])
        )
        block.register_forward_hook(lambda module, inputs, out, layer=layer: seen.__setitem__(f"after {layer}", out))
    model(ids)
    inputs = {}
    visit_projections(model, ids, model.scales, lambda name, _, x: inputs.__setitem__(name, x))
    assert set(inputs) == set(model.scales)
    for name in (name for name in seen if "query" in name):
        assert torch.equal(inputs[name], seen[name].flatten(0, 1))
        assert torch.equal(inputs[name], inputs[name.replace("query", "value")])
    for layer in (0, 1):  # with what ffn and proj see the block's output comes out
        after = layer_norm(seen[f"after {layer}"], (16,), eps=1e-5).flatten(0, 1)
        assert torch.equal(inputs[f"blocks.{layer + 1}.attention.key"], after)
        assert inputs[f"blocks.{layer}.attention.proj"].shape == inputs[f"blocks.{layer}.ffn"].shape == after.shape


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_a_grown_model_is_pruned_back_to_the_last_bit(activation):
    small, large = grown(activation=activation)
    selection = select_tokens(large, batches(), SMALL)
    assert {name.split(".")[-1] for name in selection.kept} == {"query", "key", "value", "ffn"}
    assert all(rows.tolist() == [*range(len(rows))] for rows in selection.kept.values())
    assert set(selection.dropped_share.values()) == {0.0}
    scales = fit_scales(large, batches(), selection.kept)
    drop_tokens(large, selection.kept, scales)
    assert large.scales == small.scales
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, large.get_parameter(name))
    assert mean_loss(large, batches(seed=1)) == mean_loss(small, batches(seed=1))


def test_every_layer_selects_for_itself_and_order_stays():
    model = build_model(config(LARGE))
    with torch.no_grad():
        model.blocks[0].ffn.value_tokens[:13] *= 1e-3
        model.blocks[2].ffn.value_tokens[20:] *= 1e-3
    kept = select_tokens(model, batches(), SMALL).kept
    assert kept["blocks.0.ffn"].tolist() == [*range(13, 33)] and kept["blocks.2.ffn"].tolist() == [*range(20)]
    before = model.blocks[0].ffn.key_tokens.detach().clone()
    scales = fit_scales(model, batches(), kept)
    drop_tokens(model, kept, scales)
    assert torch.equal(model.blocks[0].ffn.key_tokens, before[13:])
    assert model.blocks[0].ffn.scale == scales["blocks.0.ffn"] != scales["blocks.2.ffn"]


def test_a_dead_projection_keeps_its_scale():
    model = build_model(config(LARGE))
    with torch.no_grad():
        model.blocks[1].ffn.value_tokens.zero_()
    selection = select_tokens(model, batches(), SMALL)
    assert selection.kept["blocks.1.ffn"].tolist() == [*range(20)]
    assert fit_scales(model, batches(), selection.kept)["blocks.1.ffn"] == model.scales["blocks.1.ffn"]


def test_the_loss_is_the_mean_of_all_tokens():
    model, data = build_model(config(SMALL)), batches(3)
    logits = torch.cat([model(ids) for ids, _ in data])
    expected = cross_entropy(logits.flatten(0, 1), torch.cat([labels for _, labels in data]).flatten())
    assert mean_loss(model, data) == pytest.approx(expected.item(), rel=1e-6)


def test_attention_begins_anew_where_documents_end():
    """As in training, in every pass; labels without a loss are left out of its mean."""
    model, (ids, labels) = build_model(config(LARGE)), batches(1)[0]
    starts, ends = document_starts(ids, (3, 5)), (3, 5)
    labels = labels.masked_fill(ids == 3, IGNORED)
    assert starts.any() and (labels == IGNORED).any()
    expected = cross_entropy(model(ids, starts).flatten(0, 1), labels.flatten())
    assert mean_loss(model, [(ids, labels)], ends) == pytest.approx(expected.item(), rel=1e-6)
    assert mean_loss(model, [(ids, labels)]) != pytest.approx(expected.item(), rel=1e-4)
    seen = {}
    model.blocks[2].ffn.observer = lambda x: seen.__setitem__("direct", x)
    model(ids, starts)
    model.blocks[2].ffn.observer = None
    visit_projections(model, ids, ["blocks.2.ffn"], lambda name, _, x: seen.__setitem__("visited", x), ends)
    assert torch.equal(seen["visited"], seen["direct"].flatten(0, -2))
    kept = {own: select_tokens(model, [(ids, labels)], SMALL, own).dropped_share for own in ((), ends)}
    assert kept[()]["blocks.2.ffn"] != kept[ends]["blocks.2.ffn"]


def test_documents_are_those_of_the_run(tmp_path):
    with IndexedWriter(tmp_path / "tokens", vocab_size=23) as writer:
        for length in range(2, 40):
            writer.add_document([*(number % 22 for number in range(length)), 22])
    model = config(LARGE)
    values = {
        "run": {"dir": str(tmp_path / "run")},
        "model": model.model_dump(mode="json"),
        "training": {"train_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        "optimizer": {"lr": 1e-3},
        "data": {"train": [{"path": str(tmp_path / "other")}], "eod_id": 22, "reset_at_eod": True,
                 "mask_eod_loss": True},
    }  # fmt: skip
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    prefix = str(tmp_path / "tokens")
    assert boundaries_of_run(checkpoint, prefix) == Boundaries()
    (tmp_path / "run" / "config.yml").write_text(dump_config(RunConfig.model_validate(values)))
    found = boundaries_of_run(checkpoint, prefix)
    sample = DataSample(prefix, model, 4, found)
    assert found.ends == sample.ends == (22,)
    for ids, labels in sample.measured:
        assert ((labels == IGNORED) == (ids == 22)).all() and (ids == 22).any()


def test_a_model_that_diverged_is_refused():
    model = build_model(config(LARGE))
    with torch.no_grad():
        model.blocks[1].ffn.value_tokens[3, 4] = torch.nan
    with pytest.raises(CheckpointError, match="diverged"):
        mean_loss(model, batches())
    with pytest.raises(CheckpointError, match=r"blocks.1.ffn.*diverged"):
        select_tokens(model, batches(), SMALL)


def test_more_tokens_than_there_are_cannot_stay():
    with pytest.raises(ArgumentError, match=f"counts.ffn: the number {LARGE['ffn'] + 1} is out of range"):
        select_tokens(build_model(config(LARGE)), batches(), {**LARGE, "ffn": LARGE["ffn"] + 1})
