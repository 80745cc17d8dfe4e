from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_models import with_bank

from megatron_tf.checkpoint.architecture import check_same_architecture
from megatron_tf.checkpoint.load import load_logical
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.step_zero import target_folder, write_step_zero
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import ParameterTokens
from megatron_tf.convert.official import load_official_state_dict
from megatron_tf.convert.official_checkpoint import (
    check_export_target,
    compare_logits,
    exportable_model,
    import_folder,
    matching_model,
    official_settings,
    write_imported,
    write_official,
)
from megatron_tf.convert.official_files import OfficialWeights, open_official
from megatron_tf.errors import CheckpointError, UserError
from megatron_tf.growth.grow import grow
from megatron_tf.model import build_model
from megatron_tf.state.parameters import parameter_table

GOLDEN = Path(__file__).parents[1] / "golden"


def silent(done: int, tensor: str) -> None:
    pass


def imported(folder, model, weights):
    path = write_imported(import_folder(folder), model, OfficialWeights(weights, (), ""), silent)
    return open_checkpoint(path)


@pytest.fixture
def golden_model(model):
    tokens = ParameterTokens(qkv=48, proj=48, ffn=160)
    sizes = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "vocab_size": 128}
    return model.model_copy(update={**sizes, "parameter_tokens": tokens})


def test_in_and_out_again_to_the_last_bit(tmp_path, model, weights):
    first = weights["sequential.0.word_embeddings.weight"].view(-1)
    first[:4] = torch.tensor([-0.0, 1e-42, 3.4e38, 1 / 3])
    reader = imported(tmp_path / "run", model, weights)
    reader.verify()
    size = write_official(tmp_path / "out.bin", exportable_model(reader), reader)
    assert size == (tmp_path / "out.bin").stat().st_size
    back = open_official(tmp_path / "out.bin").tensors
    assert list(back) == list(weights)
    assert all(back[name].numpy().tobytes() == tensor.numpy().tobytes() for name, tensor in weights.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "run"]


def test_what_is_written_is_step_0_of_a_run(tmp_path, model, weights):
    reader = imported(tmp_path / "run", model, {name: tensor.half() for name, tensor in weights.items()})
    check_same_architecture(reader.index, model)
    assert reader.path == tmp_path / "run" / "checkpoints" / "step_00000000"
    assert (reader.index.step, reader.index.samples, reader.index.tokens, reader.index.data) == (0, 0, 0, {})
    assert reader.index.scales["blocks.1.ffn"] == 7**0.5
    logical = load_logical(tmp_path / "run")
    for name, spec in parameter_table(model).items():
        assert torch.equal(logical[name], weights[spec.official_name].half().float())
        assert reader.index.adam_steps[name] == ((0, spec.numel, 0),)
        for state in ("exp_avg", "exp_avg_sq"):
            assert not reader.read(name, state, 0, spec.numel).any()


@pytest.mark.parametrize("method, exportable", [("zero_key", False), ("gram", True)])
def test_a_grown_model_goes_out_if_its_scale_is_the_official_one(tmp_path, model, weights, method, exportable):
    bigger = model.model_copy(update={"parameter_tokens": ParameterTokens(qkv=13, proj=11, ffn=7)})
    start = grow(
        imported(tmp_path / "run", model, weights), bigger, Growth(source="x", method=method), seed=1, data=None
    )
    reader = open_checkpoint(write_step_zero(target_folder(tmp_path / "grown"), bigger, start, {}, silent))
    if not exportable:
        with pytest.raises(CheckpointError) as caught:
            exportable_model(reader)
        message = str(caught.value)
        assert "blocks.0.attention.query: τ 2.23607, the official code takes 3.60555" in message
        assert "and 3 more" in message and "ffn" not in message and "by gram" in message
        return
    write_official(tmp_path / "grown.bin", exportable_model(reader), reader)
    small, large = build_model(model), build_model(bigger)  # τ = √n in both, as in the official code
    load_official_state_dict(weights, small)
    load_official_state_dict(open_official(tmp_path / "grown.bin").tensors, large)
    ids = torch.arange(8).view(2, 4)
    # the growth keeps the function to the rounding of its fp32 weights
    torch.testing.assert_close(large(ids), small(ids), rtol=0, atol=1e-4)


def test_weights_of_another_model_are_refused(model, weights):
    recorded = {"num_attention_heads": 4}
    with pytest.raises(CheckpointError, match="num_attention_heads is 1, and was 4"):
        matching_model(OfficialWeights(weights, (), "", recorded), model)
    weights["sequential.5.norm.bias"][3] = float("nan")
    with pytest.raises(CheckpointError, match="sequential.5.norm.bias: holds values that are infinite or no numbers"):
        matching_model(OfficialWeights(weights, (), ""), model)


def test_a_model_with_candidates_is_refused_with_a_way_to_it(weights):
    message = (
        "^model.sparse: has ffn 3 candidates a slot, and official weights have 1. Give a configuration without "
        "model.sparse; then grow its run into this model, with growth.method split$"
    )
    with pytest.raises(CheckpointError, match=message):
        matching_model(OfficialWeights(weights, (), ""), with_bank().model)


def test_logits_of_the_official_code_are_met(golden_model):
    weights = open_official(GOLDEN / "tiny_pytorch_model.bin")
    assert matching_model(weights, golden_model) == (golden_model, "as configured")
    agreement = compare_logits(weights, golden_model, GOLDEN / "tiny_lm.safetensors")
    assert agreement.error < 5e-5 and 6 < agreement.largest < 7


@pytest.mark.parametrize("change", [{"num_attention_heads": 8}, {"activation": "gelu_l2_norm"},
                                    {"rotary_fraction": 0.5}, {"rotary_base": 500.0}])  # fmt: skip
def test_logits_tell_what_shapes_do_not(golden_model, change):
    weights = open_official(GOLDEN / "tiny_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="its logits are other ones"):
        compare_logits(weights, golden_model.model_copy(update=change), GOLDEN / "tiny_lm.safetensors")


def test_a_reference_that_is_none(tmp_path, golden_model):
    weights = open_official(GOLDEN / "tiny_pytorch_model.bin")
    whole = {name: load_file(GOLDEN / "tiny_lm.safetensors")[name] for name in ("input_ids", "logits_fp32")}
    cases = {
        "holds input_ids and one of": {"input_ids": whole["input_ids"]},
        "are not \\[b, s\\] and \\[b, s, 128\\]": {**whole, "logits_fp32": whole["logits_fp32"][:, :-1].contiguous()},
        "input_ids go to 200": {**whole, "input_ids": whole["input_ids"] * 0 + 200},
    }
    for message, content in cases.items():
        save_file(content, tmp_path / "reference")
        with pytest.raises(CheckpointError, match=message):
            compare_logits(weights, golden_model, tmp_path / "reference")
    (tmp_path / "reference").write_text("text")
    with pytest.raises(
        CheckpointError, match="is no safetensors file, or a damaged one.*Give a file of input_ids and logits"
    ):
        compare_logits(weights, golden_model, tmp_path / "reference")
    with pytest.raises(CheckpointError, match="No such file"):
        compare_logits(weights, golden_model, tmp_path / "nothing")


def test_nothing_is_overwritten(tmp_path, model, weights):
    imported(tmp_path / "run", model, weights)
    with pytest.raises(CheckpointError, match="holds step_00000000 already"):
        import_folder(tmp_path / "run")
    with pytest.raises(CheckpointError, match="is the name of one checkpoint"):
        import_folder(tmp_path / "step_00000003")
    (tmp_path / "out.bin").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        check_export_target(tmp_path / "out.bin")
    (tmp_path / "link.bin").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="link.bin: exists already"):
        check_export_target(tmp_path / "link.bin")
    with pytest.raises(CheckpointError, match="is a folder. Name the file"):
        check_export_target(tmp_path)
    with pytest.raises(UserError):
        check_export_target(tmp_path / "out.bin" / "inner.bin")


def test_the_official_configuration_is_spelled_out(model):
    settings = official_settings(model)
    assert settings["qkv_slot_num"] == 5 and settings["ffn_slot_num"] == 7 and settings["rotary_pct"] == 0.25
