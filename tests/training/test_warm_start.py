"""Which weights a new run can begin with, and that nothing else of them is taken."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from saving import saver_of

from megatron_tf.checkpoint.manager import ALONE
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.validate import validate
from megatron_tf.convert.huggingface.configuration import huggingface_config
from megatron_tf.errors import CheckpointError, ConfigError
from megatron_tf.state.optimizer_states import STATES
from megatron_tf.state.parameters import parameter_table
from megatron_tf.training.start import Progress, begin, choose
from megatron_tf.training.warm_start import find_weights, open_weights


@pytest.fixture
def trained(config, tmp_path):
    """A run's folder and its checkpoint of step 3, with moments and step counts."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    saver, engine, _ = saver_of(config, tmp_path / "trained", asynchronous=False)
    engine.update()
    saver.save(Progress(3, 24, 384), {"guard": {"lr_factor": 0.5}})
    dist.destroy_process_group()
    return tmp_path / "trained", tmp_path / "trained" / "checkpoints" / "step_00000003"


def run_from(config, tmp_path, source, **changes) -> RunConfig:
    training = {"init_from": str(source), **changes.pop("training", {})}
    return config(run={"dir": str(tmp_path / "new")}, training=training, **changes)


def test_weights_and_scales_alone_are_taken(config, tmp_path, trained):
    run, checkpoint = trained
    own = run_from(config, tmp_path, run, model={"seq_length": 64, "rotary_base": 5e5})
    path, passed_over = choose(own)
    start = begin(own, path, {"seed": 1, "sources": []})
    assert (path, passed_over, start.progress, start.growth_history) == (checkpoint, [], Progress(), ())
    assert not start.resumed and start.trackers == {}
    assert start.run_state == {
        "history": [{"event": "weights taken", "source": str(checkpoint), "step": 3, "tokens": 384}]
    }
    reader = open_checkpoint(checkpoint)
    assert start.source.scales == reader.index.scales
    for name, spec in parameter_table(own.model).items():
        assert start.source.adam_steps(name, 1, spec.numel) == [(1, spec.numel, 0)]
        for state in STATES:
            found, stored = start.source.read(name, state, 1, spec.numel), reader.read(name, state, 1, spec.numel)
            assert torch.equal(found, stored if state == "weight" else torch.zeros_like(stored))
            target = torch.full((3,), torch.nan)
            start.source.read_into(name, state, 0, target)
            assert torch.equal(target, start.source.read(name, state, 0, 3))


def test_an_export_is_a_source_as_well(config, tmp_path, trained):
    from json import dumps

    from safetensors.torch import save_file

    reader, model = open_checkpoint(trained[1]), config().model
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text(dumps(huggingface_config(model, reader.index.scales, None)))
    tensors = {}
    for name, spec in parameter_table(model).items():
        weight = reader.read(name, "weight", 0, spec.numel).view(spec.shape)
        tensors[spec.huggingface_name] = weight.mT.contiguous() if spec.transposed else weight
    save_file(tensors, export / "model.safetensors")
    own = run_from(config, tmp_path, export)
    start = begin(own, choose(own)[0], {})
    assert start.run_state["history"] == [{"event": "weights taken", "source": str(export), "step": 0, "tokens": 0}]
    assert start.source.scales == reader.index.scales
    for name, spec in parameter_table(model).items():
        assert torch.equal(start.source.read(name, "weight", 2, spec.numel), reader.read(name, "weight", 2, spec.numel))


def test_another_model_is_refused_with_every_key_that_differs(config, tmp_path, trained):
    tokens = {"parameter_tokens": {"qkv": 14, "proj": 11, "ffn": 37}}
    wider = run_from(config, tmp_path, trained[0], model={"hidden_size": 64, **tokens, "seq_length": 8})
    larger = run_from(config, tmp_path, trained[0], model={**tokens, "seq_length": 8})
    texts = []
    for own in (wider, larger):
        with pytest.raises(CheckpointError) as caught:
            begin(own, choose(own)[0], {})
        texts.append(str(caught.value))
    for text in texts:
        assert text.startswith(f"training.init_from: {trained[1]} holds the weights of another model:")
        assert "model.parameter_tokens.qkv: there 13, in this run 14" in text and "seq_length: there" not in text
    assert "model.hidden_size: there 32, in this run 64" in texts[0] and "growth.from" not in texts[0]
    assert texts[1].endswith("set growth.from to this checkpoint and remove training.init_from.")


def test_candidates_that_the_weights_lack_come_by_growth(config, tmp_path, trained):
    bank = {"group_size": 16, "candidates": 2, "dense": 5}
    own = run_from(config, tmp_path, trained[0], model={"sparse": {"ffn": bank}})
    with pytest.raises(CheckpointError) as caught:
        begin(own, choose(own)[0], {})
    assert str(caught.value).splitlines()[1:] == [
        "  - model.sparse.ffn: there null, in this run {group_size: 16, candidates: 2, dense: 5}",
        "Give this run the same model; only model.seq_length and model.rotary_base may differ. Candidates come by "
        "growth only: set growth.from to this checkpoint, growth.method to split or bank, and remove "
        "training.init_from.",
    ]


def test_a_branch_of_another_model_is_refused_with_key_and_checkpoint(config, tmp_path, trained):
    own = config(run={"dir": str(tmp_path / "branch")}, branch={"from": str(trained[0])}, model={"num_layers": 3},
                 training={"train_steps": 99})  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        begin(own, choose(own)[0], {})
    assert str(caught.value).splitlines() == [
        f"branch.from: {trained[1]} is of another architecture:",
        "  - model.num_layers: checkpoint 2, configuration 3",
        "Restore these keys, or remove branch.from.",
    ]


def test_a_growth_from_an_export_names_the_way_to_a_checkpoint(config, tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")
    own = config(run={"dir": str(tmp_path / "grown")}, growth={"from": str(export)})
    with pytest.raises(CheckpointError, match=f"^growth.from: {export}: is an export, .*convert from-hf {export} --to"):
        choose(own)


def test_what_holds_no_weights_is_named(tmp_path, trained, flip_last):
    for given, problem in (
        (tmp_path / "nowhere", "there is no such folder"),
        (tmp_path, "holds no complete checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=f"^training.init_from: {given}: {problem}"):
            find_weights(str(given), ALONE)
    flip_last(trained[1] / "shard_00000.safetensors")
    with pytest.raises(CheckpointError, match=r"^training.init_from: .*shard_00000.safetensors is damaged"):
        find_weights(str(trained[0]), ALONE)


@pytest.fixture
def flip_last():
    def flip(path):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    return flip


def test_it_is_one_of_two_and_never_the_run_itself(config, tmp_path, trained):
    both = run_from(config, tmp_path, trained[0], growth={"from": "runs/small"})
    with pytest.raises(
        ConfigError, match=r"training.init_from: .* but the weights are grown from growth.from runs/small"
    ):
        validate(both, 1)
    with pytest.raises(ConfigError, match=r"training.init_from: .* is this run's own folder"):
        validate(run_from(config, tmp_path, tmp_path / "new"), 1)


def test_a_run_with_checkpoints_resumes_and_a_transformer_can_begin_so_too(config, tmp_path, trained):
    own = config(run={"dir": str(trained[0])}, training={"init_from": "runs/gone"})
    assert begin(own, choose(own)[0], {}).resumed
    model = {"architecture": "transformer", "parameter_tokens": None}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    saver, *_ = saver_of(config, tmp_path / "plain", model=model, asynchronous=False)
    saver.save(Progress(1, 8, 128), {})
    dist.destroy_process_group()
    other = run_from(config, tmp_path, tmp_path / "plain", model=model)
    source, _ = open_weights(choose(other)[0], other.model)
    assert source.read("embedding.weight", "weight", 0, 5).any()
