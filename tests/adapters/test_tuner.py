from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decoders import decoder, fill, token_ids
from distributed import spawn
from live import PATIENCE_SECONDS
from peft import PeftModel, get_peft_model
from peft.utils import PeftType
from torch.nn import functional as F

from megatron_tf.adapters import PattentionConfig
from megatron_tf.errors import ArgumentError

FRESH = """
import sys, torch
sys.path[:0] = sys.argv[3:]
from decoders import decoder, token_ids
from peft import PeftModel
from megatron_tf.adapters import PattentionConfig
with torch.no_grad():
    torch.save(PeftModel.from_pretrained(decoder(), sys.argv[1])(token_ids()).logits, sys.argv[2])
"""


def adapted(num_tokens: int = 4, seed: int = 2, **options: object) -> PeftModel:
    model = get_peft_model(decoder(), PattentionConfig(num_tokens=num_tokens, task_type="CAUSAL_LM", **options))
    fill(model, seed)
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(token_ids()).logits


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(token_ids(), labels=token_ids()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_output_and_gradients_are_those_of_the_formula():
    model = get_peft_model(decoder().double(), PattentionConfig(num_tokens=4, modules="mlp"))
    fill(model)
    branch = model.base_model.model.model.layers[1].mlp.pattention_branch
    assert branch.key_tokens["default"].dtype == torch.float64
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    keys, values = branch.tokens("default")
    scores = x @ keys.mT
    expected = F.gelu(2.0 * scores / scores.norm(dim=-1, keepdim=True)) @ values
    inputs = (x, keys, values)
    weight = torch.randn_like(expected)
    found = branch(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for one, other in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected))):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


@pytest.mark.slow
def test_an_adapter_comes_back_to_the_last_bit_in_another_process(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    command = [sys.executable, "-W", "ignore", "-c", FRESH, tmp_path / "adapter", tmp_path / "logits.pt", *tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))
    assert not list((tmp_path / "adapter").glob("*.partial"))


def test_several_adapters_are_switched_combined_switched_off_and_taken_out(tmp_path):
    adapted(4, seed=2).save_pretrained(tmp_path / "a")
    adapted(6, seed=3, modules="mlp").save_pretrained(tmp_path / "b")
    base, plain = decoder(), logits(decoder())
    names = [name for name, _ in base.named_parameters()]
    alone = {name: logits(PeftModel.from_pretrained(decoder(), tmp_path / name)) for name in "ab"}
    model = PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    assert torch.equal(logits(model), alone["a"])
    model.set_adapter("b")
    assert torch.equal(logits(model), alone["b"])
    model.base_model.set_adapter(["a", "b"])
    both = logits(model)
    assert not any(torch.equal(both, other) for other in (*alone.values(), plain))
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(copy.deepcopy(model)), both)
    model.set_adapter("a")
    model.delete_adapter("b")
    assert torch.equal(logits(model), alone["a"])
    with pytest.raises(ArgumentError, match="no linear function of its input.*export-adapter"):
        model.merge_and_unload()
    assert torch.equal(logits(model.unload()), plain)
    assert [name for name, _ in base.named_parameters()] == names
    again = get_peft_model(base, PattentionConfig(num_tokens=2))
    assert torch.equal(logits(again), plain)


def test_a_second_adapter_is_trained_on_the_first_which_stays_as_it_is(tmp_path):
    adapted(4).save_pretrained(tmp_path / "a")
    model = PeftModel.from_pretrained(decoder(), tmp_path / "a", adapter_name="a")
    before = logits(model)
    model.add_adapter("b", PattentionConfig(num_tokens=3))
    model.base_model.set_adapter(["a", "b"])
    model.set_requires_grad("a", False)
    assert torch.equal(logits(model), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(logits(model), before)
    model.set_adapter("a")
    assert torch.equal(logits(model), before)


def test_frozen_tokens_are_not_trained_and_are_saved(tmp_path):
    model = adapted(6, frozen_tokens=4)
    frozen = {name: p.clone() for name, p in model.named_parameters() if "frozen_" in name}
    assert len(frozen) == 8 and all(tokens.shape == (4, 32) for tokens in frozen.values())
    assert not any("frozen_" in name for name in gradients(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    optimizer.step()
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], tokens) for name, tokens in frozen.items())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(decoder(), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    assert not any("frozen_" in name for name in gradients(loaded))


def test_a_base_of_16_bits_keeps_its_type_and_the_tokens_are_fp32():
    base = decoder().bfloat16()
    model = get_peft_model(base, PattentionConfig(num_tokens=4))
    fill(model)
    assert logits(model).dtype == torch.bfloat16
    found = gradients(model)
    assert found and all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in found.values())
    torch.testing.assert_close(logits(model).float(), logits(adapted()), rtol=0, atol=0.05)


def test_autocast():
    model = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model)
    torch.testing.assert_close(found.float(), logits(model), rtol=0, atol=0.05)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_when_activations_are_computed_again(reentrant):
    model = adapted().train()
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_compiled_model_computes_the_same():
    model = adapted()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), logits(model), rtol=0, atol=1e-6)


def test_generation_with_a_cache_is_that_without():
    model = adapted()
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    ids = {"input_ids": token_ids(), "attention_mask": torch.ones_like(token_ids())}
    assert torch.equal(model.generate(**ids, **options), model.generate(**ids, **options, use_cache=False))


def test_weights_that_arrive_without_a_copy_are_the_same(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(decoder(), tmp_path, low_cpu_mem_usage=True)), logits(model))


def test_another_base_is_refused_and_the_same_in_another_type_is_not(tmp_path):
    adapted().save_pretrained(tmp_path)
    for base, message in (
        (decoder(seed=5), r"the matrices of this model are not those .*\(digest [0-9a-f]{32}, expected .*base=None"),
        (decoder(num_hidden_layers=3), "of 2 layers × 32, and this is a llama of 3 layers × 32"),
        (decoder("Mistral"), "trained on a llama .* a mistral"),
    ):
        with pytest.raises(ArgumentError, match=message):
            PeftModel.from_pretrained(base, tmp_path)
    PeftModel.from_pretrained(decoder().bfloat16(), tmp_path)
    config = PattentionConfig.from_pretrained(tmp_path)
    config.base = None
    PeftModel.from_pretrained(decoder(seed=5), tmp_path, config=config)


def test_a_quantised_base_is_known_by_what_is_not_quantised(tmp_path):
    def quantised(seed: int) -> torch.nn.Module:
        model = decoder(seed=seed)
        for layer in model.model.layers:
            layer.mlp.packed = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
            torch.nn.init.constant_(layer.input_layernorm.weight, seed + 1)
        return model

    get_peft_model(decoder(), PattentionConfig(num_tokens=2)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(quantised(0), tmp_path)
    with pytest.raises(ArgumentError, match="the vectors of this model"):
        PeftModel.from_pretrained(quantised(1), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens: the number 0 is out of range"),
        ({"num_tokens": 4, "frozen_tokens": 4}, "frozen_tokens: the number 4 is out of range"),
        ({"activation": "relu"}, "activation: the text 'relu'"),
        ({"modules": None}, "modules: None, but a name or a list of names is expected"),
        ({"target_modules": []}, r"target_modules: \[\], but a name or a list of names is expected"),
        ({"target_modules": [7]}, r"target_modules: \[7\], but a name"),
        ({"scale": -1.0}, "scale: the number -1.0"),
        ({"format_version": 3}, "format_version: the number 3 is out of range"),
        ({"num_tokens": 6, "candidates": 4, "group_size": 1}, "candidates: 4, and there are 6 tokens"),
        ({"num_tokens": 8, "candidates": 2}, r"group_size: nothing \(None\)"),
        ({"num_tokens": 8, "candidates": 2, "group_size": 4, "frozen_tokens": 1}, "1 of them frozen"),
        (
            {"num_tokens": 8, "candidates": 2, "group_size": 4, "modules": "pattention"},
            "candidates: 2, and positions use all",
        ),
    ],
)
def test_what_an_adapter_cannot_be_is_refused_at_once(options, message):
    with pytest.raises(ArgumentError, match=message):
        PattentionConfig(**options)


def test_peft_knows_the_method_by_its_own_list():
    assert PeftType("PATTENTION") is PeftType.PATTENTION and "PATTENTION" in list(PeftType)
    assert PattentionConfig(num_tokens=9).scale == 3.0
    assert PattentionConfig(target_modules="all-linear").modules == ["linear"]


def test_the_trainer_of_transformers_trains_saves_and_goes_on(tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in token_ids(length=8).repeat(4, 1)]

    def run(steps: int, resume: bool) -> PeftModel:
        model = get_peft_model(decoder(), PattentionConfig(num_tokens=4, task_type="CAUSAL_LM"))
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
            gradient_checkpointing=True, report_to=[], use_cpu=True, logging_steps=100, disable_tqdm=True,
            lr_scheduler_type="constant",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return model

    run(2, resume=False)
    model = run(4, resume=True)
    saved = PeftModel.from_pretrained(decoder(), tmp_path / "checkpoint-4")
    assert torch.equal(logits(saved), logits(model.eval()))
    assert not torch.equal(logits(saved), logits(decoder()))


def sharded(group):
    """FSDP2 over base and adapter, against one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def losses(model) -> list[float]:
        found = []
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(4):
            loss = model(token_ids(step), labels=token_ids(step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    torch.manual_seed(0)
    expected = losses(adapted())
    model = adapted()
    mesh = init_device_mesh("cpu", (group.size,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(losses(model), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_base_that_is_sharded_over_two_ranks_trains_as_on_one():
    spawn(sharded, 2)
