"""Growth in depth: which layers come from which, that identity keeps the function, and the state by any range."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import get_args

import pytest
import torch
from deepening import IDS, Trained, built, grown, model
from tiny import run_config
from torch.nn import functional as F

from megatron_tf.architectures.transformer.architecture import TransformerArchitecture
from megatron_tf.checkpoint.compare import compare
from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.source import CheckpointSource
from megatron_tf.checkpoint.step_zero import write_step_zero
from megatron_tf.checkpoint.writer import Piece, save_checkpoint
from megatron_tf.config.architectures import ARCHITECTURES
from megatron_tf.config.sections.growth import DepthMethod, Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import CheckpointError, ConfigError
from megatron_tf.growth.grow import grow, grown_source
from megatron_tf.growth.layers import DEPTH_METHODS, PRESERVING_DEPTH
from megatron_tf.growth.rules import chain_problems, growth_problems, scales_after_growth
from megatron_tf.growth.source import GrownSource
from megatron_tf.state.optimizer_states import STATES
from megatron_tf.state.parameters import initial_scales, parameter_table
from megatron_tf.state.sources import InitialSource

TOKENS = {"qkv": 13, "proj": 11, "ffn": 37}
MORE_TOKENS = {"qkv": 45, "proj": 43, "ffn": 70}
TRANSFORMER = {"architecture": "transformer", "parameter_tokens": None, "ffn_hidden_size": 37}
BANK = {"ffn": {"group_size": 16, "candidates": 3, "dense": 5}}
KINDS = {
    "l2_norm_gelu": {},
    "gelu_l2_norm": {"activation": "gelu_l2_norm"},
    "softmax": {"activation": "softmax"},
    "sparse": {"sparse": BANK, "parameter_tokens": {**TOKENS, "ffn": 37}},
    "transformer": TRANSFORMER,
    "grouped": {**TRANSFORMER, "num_key_value_heads": 2},
}


@pytest.mark.parametrize(
    ("method", "sizes", "taken", "old_at"),
    [
        ("identity", (2, 4), (0, None, 1, None), (0, 2)),
        ("identity", (3, 4), (0, None, 1, 2), (0, 2, 3)),
        ("identity", (1, 3), (0, None, None), (0,)),
        ("stack", (2, 6), (0, 1, 0, 1, 0, 1), (0, 1)),
        ("interleave", (2, 6), (0, 0, 0, 1, 1, 1), (0, 3)),
        ("interleave", (3, 4), (0, 0, 1, 2), (0, 2, 3)),
    ],
)
def test_where_layers_come_from(method, sizes, taken, old_at):
    found = DEPTH_METHODS[method](*sizes)
    assert (found.taken, found.old_at) == (taken, old_at)


def test_the_configuration_knows_the_methods():
    assert get_args(DepthMethod) == tuple(DEPTH_METHODS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [3, 6])
def test_identity_keeps_the_function_exactly_and_all_of_it_learns(kind, layers):
    small, large = model(2, **KINDS[kind]), model(layers, **KINDS[kind])
    source = grown(small, large)
    assert source.preserves
    before, after = built(Trained(small, 0), small), built(source, large)
    torch.testing.assert_close(after(IDS), before(IDS), rtol=0, atol=1e-12)
    new = {name for name, _ in after.named_parameters() if name.startswith("blocks.1.")}
    assert new
    optimizer = torch.optim.AdamW(after.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(after(IDS).flatten(0, 1), IDS.roll(-1, 1).flatten()).backward()
        optimizer.step()
    without = [name for name, p in after.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in without if "bank" not in name] == []


@pytest.mark.parametrize("method", ["zero_key", "gram"])
@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_tokens_and_layers_at_once(method, activation):
    small = model(2, activation=activation)
    large = model(5, parameter_tokens=MORE_TOKENS, activation=activation)
    source = grown(small, large, method=method)
    assert source.preserves and source.record["method"] == method
    assert source.record["layers"] == {"method": "identity", "from": 2, "to": 5, "old_at": [0, 3]}
    before, after = built(Trained(small, 0), small), built(source, large)
    torch.testing.assert_close(after(IDS), before(IDS), rtol=0, atol=1e-12)
    # a new layer is one of the grown model: all of its keys are drawn, its τ is that of its own number of tokens
    keys = source.read("blocks.1.ffn.key_tokens", "weight", 0, 70 * 32)
    assert keys.all() and torch.equal(
        keys, InitialSource(large, 3).read("blocks.1.ffn.key_tokens", "weight", 0, 70 * 32)
    )
    assert source.scales["blocks.1.ffn"] == initial_scales(large)["blocks.1.ffn"]
    held = Trained(small, 0).scales["blocks.1.ffn"]
    assert (source.scales["blocks.3.ffn"] == held) == (method == "zero_key")


def test_candidates_and_layers_at_once():
    small, large = model(2), model(3, sparse=BANK)
    source = grown(small, large, method="split")
    assert source.preserves and source.record["method"] == "split" and source.record["layers"]["old_at"] == [0, 2]
    before, after = built(Trained(small, 0), small), built(source, large)
    torch.testing.assert_close(after(IDS), before(IDS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["stack", "interleave"])
@pytest.mark.parametrize("kind", ["l2_norm_gelu", "transformer"])
def test_copies_change_the_function_and_say_so(method, kind):
    small, large = model(2, **KINDS[kind]), model(4, **KINDS[kind])
    source = grown(small, large, depth_method=method)
    assert not source.preserves
    before, after = built(Trained(small, 0), small), built(source, large)
    assert (after(IDS) - before(IDS)).abs().max() > 1e-3
    weights = dict(after.named_parameters())
    pairs = {"stack": [(0, 2), (1, 3)], "interleave": [(0, 1), (2, 3)]}[method]
    for name in before.blocks[0].state_dict():
        for old, (one, other) in enumerate(pairs):
            expected = dict(before.named_parameters())[f"blocks.{old}.{name}"]
            assert torch.equal(weights[f"blocks.{one}.{name}"], expected)
            assert torch.equal(weights[f"blocks.{other}.{name}"], expected)


@pytest.mark.parametrize("method", DEPTH_METHODS)
@pytest.mark.parametrize("kind", ["l2_norm_gelu", "transformer"])
def test_old_layers_keep_their_states_and_new_ones_begin_afresh(method, kind):
    small, large = model(2, **KINDS[kind]), model(4, **KINDS[kind])
    source, reset = (grown(small, large, depth_method=method, moments=moments) for moments in ("keep", "reset"))
    trained, old_at = Trained(small, 0), source.record["layers"]["old_at"]
    for name, spec in parameter_table(large).items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        is_old = layer is None or layer in old_at
        before = name if layer is None or not is_old else name.replace(f".{layer}.", f".{old_at.index(layer)}.", 1)
        for state in STATES[1:]:
            read = source.read(name, state, 0, spec.numel)
            assert torch.equal(read, trained.read(before, state, 0, spec.numel)) if is_old else not read.any()
            assert not reset.read(name, state, 0, spec.numel).any()
        assert source.adam_steps(name, 0, spec.numel) == [(0, spec.numel, 7 if is_old else 0)]
        assert reset.adam_steps(name, 0, spec.numel) == [(0, spec.numel, 0)]
        assert torch.equal(reset.read(name, "weight", 0, 5), source.read(name, "weight", 0, 5))


@pytest.mark.parametrize("method", DEPTH_METHODS)
def test_any_range_is_a_part_of_the_whole(method):
    source = grown(model(2), model(4, parameter_tokens=MORE_TOKENS), depth_method=method)
    for name, spec in parameter_table(model(4, parameter_tokens=MORE_TOKENS)).items():
        for state in STATES:
            whole = source.read(name, state, 0, spec.numel)
            middle = spec.numel // 3 + 1
            parts = [source.read(name, state, 0, middle), source.read(name, state, middle, spec.numel)]
            assert torch.equal(torch.cat(parts), whole)


class Closed(TransformerArchitecture):
    """An architecture that does not say what its blocks add to the hidden states."""

    def block_parameters(self, model, layer):
        for spec in super().block_parameters(model, layer):
            changed = copy.copy(spec)
            object.__setattr__(changed, "output", False)
            yield changed


def test_what_cannot_grow_is_one_message(monkeypatch):
    def problems(old: Model, new: Model, **growth) -> list[str]:
        return growth_problems(old, new, Growth(source="x", **growth))

    assert problems(model(4), model(2)) == [
        "model.num_layers: 4 before, 2 after. Growth cannot take layers away: set it to 4."
    ]
    assert problems(model(4), model(6), depth_method="stack") == [
        "growth.depth_method: stack repeats all 4 layers, and model.num_layers 6 is no multiple of 4. Set "
        "model.num_layers to 8, or growth.depth_method to interleave or identity."
    ]
    assert problems(model(2), model(4), noise=0.1) == [
        "growth.noise: 0.1 changes the old tokens of projections that grow, and 0 of them do. Set it to 0, or raise "
        "model.parameter_tokens."
    ]
    assert problems(model(2), model(2, parameter_tokens=MORE_TOKENS), depth_method="stack") == [
        "growth.depth_method: stack makes new layers, and model.num_layers is 2 before and after. Raise "
        "model.num_layers, or remove growth.depth_method."
    ]
    assert problems(model(2), model(4), methods={"ffn": "gram"}) == [
        "growth.methods.ffn: gram makes new tokens, and model.parameter_tokens.ffn is 37 before and after. Raise "
        "model.parameter_tokens.ffn, or remove growth.methods.ffn."
    ]
    transformers = [model(layers, **TRANSFORMER) for layers in (2, 4)]
    assert problems(*transformers) == []
    assert problems(*transformers, methods={"qkv": "gram"}) == [
        "growth.methods.qkv: gram, but a transformer has no qkv tokens that could grow. Remove it."
    ]
    assert problems(model(2), model(2, activation="softmax"))[0] == (
        "model.activation: l2_norm_gelu before, softmax after. Growth changes token counts, candidates and "
        "model.num_layers only: set it to l2_norm_gelu, or train the new model from scratch, without growth."
    )
    monkeypatch.setitem(ARCHITECTURES._objects, "transformer", Closed())
    assert problems(*transformers) == [
        "growth.depth_method: identity sets to 0 what a block adds to the hidden states, and 0 of the 4 tensors of a "
        "transformer's block are known to be that. Set growth.depth_method to stack or interleave, which change the "
        "function."
    ]
    assert problems(*transformers, depth_method="stack") == []
    with pytest.raises(ConfigError, match="no multiple of 4"):
        grown(model(4), model(6), depth_method="stack")


def test_a_chain_of_tokens_depth_and_tokens_is_checked_before_it_begins():
    def stage(name: str, **changes):
        return run_config(run={"name": name}, growth={"source": "x", **changes.pop("growth", {})}, model=changes)

    tokens = {"qkv": 20, "proj": 11, "ffn": 51}
    stages = [
        stage("a"), stage("b", parameter_tokens=tokens), stage("c", parameter_tokens=tokens, num_layers=4),
        stage("d", parameter_tokens=MORE_TOKENS, num_layers=4, growth={"methods": {"ffn": "gram"}}),
    ]  # fmt: skip
    # of the layers of the first two stages τ is held, and of those of the third it is their own
    assert chain_problems(stages) == [
        "stage d: growth.methods.ffn: gram needs at least 32 new ffn tokens, the lesser of the 51 old ones and "
        "model.hidden_size 32; from 51 to 70 they are 19. Set model.parameter_tokens.ffn to at least 83, or the method "
        "to zero_key."
    ]
    scales = initial_scales(stages[0].model)
    for before, after in zip(stages, stages[1:3]):
        scales = scales_after_growth(before.model, after.model, after.growth, scales)
    assert (scales["blocks.0.ffn"], scales["blocks.2.ffn"]) == (37**0.5, 37**0.5)
    assert scales["blocks.1.ffn"] == scales["blocks.3.ffn"] == 51**0.5


@pytest.fixture
def small(tmp_path):
    """A checkpoint of two layers at step 7."""
    of = model(2)
    table, state = parameter_table(of), Trained(of, 0)
    pieces = [Piece(name, kind, 0, spec.numel, state.read(name, kind, 0, spec.numel)) for name, spec in table.items()
              for kind in STATES]  # fmt: skip
    index = CheckpointIndex(
        7, 56, 896, of.model_dump(), state.scales,
        expected_tensors({name: spec.shape for name, spec in table.items()}),
        {name: ((0, spec.numel, 7),) for name, spec in table.items()},
    )  # fmt: skip
    return open_checkpoint(save_checkpoint(tmp_path / "small", pieces, index, rank=0, world_size=1, token="t"))


def written(root: Path, reader, new: Model, **growth):
    start = grow(reader, new, Growth(source="x", **growth), seed=5, data=None)
    return open_checkpoint(write_step_zero(root, new, start, {}, lambda done, name: None))


@pytest.mark.parametrize("method", DEPTH_METHODS)
def test_what_is_written_is_what_the_trainer_begins_with(small, tmp_path, method):
    large = model(4, parameter_tokens=MORE_TOKENS)
    reader = written(tmp_path / "large", small, large, depth_method=method)
    reader.verify()
    source = grown_source(small, large, Growth(source="x", depth_method=method), 5)
    for name, spec in parameter_table(large).items():
        for state in STATES:
            assert torch.equal(reader.read(name, state, 0, spec.numel), source.read(name, state, 0, spec.numel))
        assert reader.index.adam_steps[name] == tuple(source.adam_steps(name, 0, spec.numel))
    assert reader.index.scales == source.scales
    (entry,) = reader.index.growth_history
    assert entry["preserves"] == (method in PRESERVING_DEPTH)
    assert (entry["layers"]["from"], entry["layers"]["to"], entry["layers"]["method"]) == (2, 4, method)


def test_old_layers_are_compared_with_what_they_were(small, tmp_path):
    reader = written(tmp_path / "large", small, model(4))
    for one, other, side in ((small, reader, 0), (reader, small, 1)):
        different = [d for d in compare(one, other) if not d.equal]
        assert {d.name.split(".")[1] for d in different} == {"1", "3"}
        assert all(d.shapes[side] is None for d in different)
    new = written(tmp_path / "again", reader, model(4, parameter_tokens=MORE_TOKENS))
    assert all(d.unequal == 0 and d.shapes[0] is not None for d in compare(reader, new))
    assert [entry.get("layers") is not None for entry in new.index.growth_history] == [True, False]


def test_a_history_that_does_not_lead_to_the_model_is_refused(small, tmp_path):
    reader = written(tmp_path / "large", small, model(4))
    (entry,) = reader.index.growth_history
    for layers, reason in (
        ({**entry["layers"], "to": 3, "old_at": [0, 1]}, "layers.to is 3, the model then had 4 layers"),
        ({**entry["layers"], "old_at": [0, 4]}, "old_at is not 2 ascending numbers below 4"),
        ({**entry["layers"], "old_at": [2]}, "old_at is not 2 ascending numbers below 4"),
    ):
        object.__setattr__(reader.index, "growth_history", ({**entry, "layers": layers},))
        with pytest.raises(CheckpointError, match=reason):
            grown_source(reader, model(8), Growth(source="x"), 5)


def test_a_state_without_moments_grows_as_well(small, tmp_path):
    large = model(4)
    source = GrownSource(
        CheckpointSource(small), InitialSource(large, 5), old_model=model(2), new_model=large,
        growth=Growth(source="x"), seed=5,
    )  # fmt: skip
    assert source.read("blocks.1.ffn.value_tokens", "exp_avg_sq", 0, 9).eq(0).all()
