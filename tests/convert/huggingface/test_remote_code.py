"""What users do with an export in transformers, and that nothing of this project is needed for it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from distributed import spawn
from live import PATIENCE_SECONDS
from safetensors.torch import save_file

from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.convert.huggingface.export import write_export

GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


def load(folder: Path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module")
def exported(folder):
    return load(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(5))


ALONE = """
import sys
class Away:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megatron_tf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Away())
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, reference = sys.argv[1:]
reference = load_file(reference)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(model(reference["ids"]).logits, reference["logits"], rtol=0, atol=2e-4)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
out = model.generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=4)
print("generated", out.shape[1] > 2)
"""


def test_without_this_project(folder, network, ids, tmp_path):
    with torch.no_grad():
        save_file({"ids": ids, "logits": network(ids).contiguous()}, tmp_path / "reference.safetensors")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, folder, tmp_path / "reference.safetensors"],
        cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0 and "generated True" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "gelu_l2_norm"},
        {"activation": "softmax"},
        {"rotary_fraction": 0.0, "norm_eps": 1e-3},
        {"rotary_fraction": 1.0, "rotary_base": 500.0},
        {"seq_length": 1},
        {"seq_length": 2},
        {"seq_length": 5},
    ],
    ids=str,
)
def test_every_kind_of_model(network_of, tmp_path, changes):
    """`write_export` compares logits."""
    assert all(
        agreement.largest > 1 for agreement in write_export(tmp_path / "out", network_of(**changes), None).values()
    )


def test_a_row_of_zero_scores_is_finite(exported):
    layer = exported.model.layers[0].mlp
    assert torch.equal(layer(torch.zeros(1, 3, 64)), torch.zeros(1, 3, 64))


def test_an_unknown_norm_is_refused(folder):
    with pytest.raises(ValueError, match="norm is 'grams', expected one of direct, gram"):
        load(folder, norm="grams")


def test_the_norm_from_keys_is_that_of_the_scores(folder, exported, ids, monkeypatch):
    model = load(folder, norm="gram")
    layer = model.model.layers[0].mlp
    code = sys.modules[type(layer).__module__]
    monkeypatch.setattr(code, "TOKENS_A_CHANNEL", 0)
    monkeypatch.setattr(code, "ROWS", 1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, exported(ids).logits, rtol=0, atol=2e-4)
        assert torch.equal(model.generate(ids, **GREEDY), exported.generate(ids, **GREEDY))
        assert layer.matrix is not None and not model.state_dict().keys() ^ exported.state_dict().keys()
        layer.keys.weight[::2] *= 3  # other keys, another KᵀK
        x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
        x[0, 0] = 0
        changed, layer.norm = layer(x), "direct"
        torch.testing.assert_close(changed, layer(x), rtol=0, atol=1e-5)


def test_rows_whose_norm_would_lose_digits_take_that_of_the_scores(folder, monkeypatch):
    layer = load(folder, norm="gram", dtype=torch.bfloat16).model.layers[0].mlp
    code = sys.modules[type(layer).__module__]
    monkeypatch.setattr(code, "TOKENS_A_CHANNEL", 0)
    monkeypatch.setattr(code, "ROWS", 1)
    with torch.no_grad():
        layer.keys.weight[:, -1] *= 1 / 16
        x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        assert layer.scaled(x) is not None
        x[1, 2, :-1] = 0
        assert layer.scaled(x) is None
        found, layer.norm = layer(x), "direct"
        assert torch.equal(found, layer(x))


def padded(ids: torch.Tensor, side: str, padding: int = 5) -> dict[str, torch.Tensor]:
    """A batch of ids [2, s] with `padding` more tokens in the first row, all labels but theirs."""
    whole, mask = torch.zeros(2, ids.shape[1] + padding, dtype=torch.long), torch.ones(2, ids.shape[1] + padding)
    at = slice(padding, None) if side == "left" else slice(None, ids.shape[1])
    mask[0], mask[0, at] = 0, 1
    whole[0, at], whole[1, :padding], whole[1, padding:] = ids[0], ids[1, :padding], ids[1]
    return {"input_ids": whole, "attention_mask": mask.long(), "labels": whole.masked_fill(mask == 0, -100)}


def loss_and_gradients(model, **batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_gradients_do_not_depend_on_padding(folder: Path, ids: torch.Tensor, attentions: tuple[str, ...]):
    text, other = padded(ids, "left")["input_ids"][1:], ids[:1]
    plain = load(folder, attn_implementation="eager")
    losses = [loss_and_gradients(plain, input_ids=one, labels=one) for one in (text, other)]
    counts = [one.shape[1] - 1 for one in (text, other)]
    expected = {name: sum(one[name] * count for one, count in zip(losses, counts)) / sum(counts) for name in losses[0]}
    for attention in attentions:
        model = load(folder, attn_implementation=attention)
        for side in ("left", "right"):
            found = loss_and_gradients(model, **padded(ids, side))
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=f"{attention}, {side}: {name}")


def test_gradients_do_not_depend_on_padding(folder, ids):
    """The reference are the texts alone. Under sdpa a row of padding sees nothing: all its scores are 0."""
    assert_gradients_do_not_depend_on_padding(folder, ids, ("eager", "sdpa"))


def test_it_has_the_activations_that_declare_it(exported):
    known = sys.modules[type(exported.config).__module__].ACTIVATIONS
    assert set(known) == {name for name in ACTIVATIONS.names() if "huggingface" in ACTIVATIONS[name].formats}


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_gradients_are_those_of_our_own_model(network_of, tmp_path, activation):
    """Also where a whole row of scores is 0, or its squares are: there both are 0, and never no number."""
    from megatron_tf.model.pattention import pattention

    network = network_of(activation=activation)
    write_export(tmp_path / "out", network, None)
    layer, scale = load(tmp_path / "out").model.layers[0].mlp, network.scales["blocks.0.ffn"]
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
    x[0, 1:3] = 0
    x[1, 2] *= 2.0**-80
    x.requires_grad_()
    direction = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((layer(x) * direction).sum(), (x, layer.keys.weight, layer.values.weight))
    keys, values = (network.blocks[0].ffn.key_tokens, network.blocks[0].ffn.value_tokens)
    out = pattention(x, keys, values, scale=scale, activation=activation)
    expected = torch.autograd.grad((out * direction).sum(), (x, keys, values))
    for one, other in zip(found, (*expected[:2], expected[2].mT)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        # outputs of a row whose squares overflow as well
        x[1, 4] *= 2.0**80
        own, ours = layer(x), pattention(x, keys, values, scale=scale, activation=activation)
    torch.testing.assert_close(own, ours, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert own[1, 4].isnan().all() == (activation != "softmax")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_and_padding(folder, network, tokenizer, ids, attention):
    model = load(folder, attn_implementation=attention)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, network(ids), rtol=0, atol=2e-4)
        batch = tokenizer(["the cat sat on the mat", "the"], return_tensors="pt", padding=True)
        assert batch["attention_mask"][1, 0] == 0  # padded on the left
        alone = model(**tokenizer("the", return_tensors="pt")).logits[0, -1]
        torch.testing.assert_close(model(**batch).logits[1, -1], alone, rtol=0, atol=2e-4)


@pytest.mark.slow  # the kernel is compiled
def test_flex_attention(folder, network, ids):
    with torch.no_grad():
        logits = load(folder, attn_implementation="flex_attention")(ids).logits
        torch.testing.assert_close(logits, network(ids), rtol=0, atol=2e-4)


def test_gradients_of_flex_attention(folder, ids, monkeypatch):
    """CPUs have no kernel for its derivative: here it is the function in PyTorch that the kernels are compiled from."""
    from torch.nn.attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_attention.flex_attention)
    assert_gradients_do_not_depend_on_padding(folder, ids, ("flex_attention",))


def test_generation_with_caches_and_beams(exported, network, tokenizer):
    batch = tokenizer(["the cat sat on the mat", "the"], return_tensors="pt", padding=True)
    plain = exported.generate(**batch, use_cache=False, **GREEDY)
    assert len(set(plain[:, -12:].flatten().tolist())) > 3  # else agreement would say little
    assert torch.equal(exported.generate(**batch, **GREEDY), plain)
    assert torch.equal(exported.generate(**batch, cache_implementation="static", **GREEDY), plain)
    beams = exported.generate(**batch, num_beams=3, **GREEDY)
    assert torch.equal(exported.generate(**batch, num_beams=3, use_cache=False, **GREEDY), beams)
    ids = batch["input_ids"][:1]
    for _ in range(12):
        ids = torch.cat((ids, network(ids)[:, -1:].argmax(-1)), 1)
    assert torch.equal(ids, plain[:1])


def test_the_cache_goes_by_either_name(exported, ids):
    from transformers import DynamicCache

    with torch.no_grad():
        whole = exported(ids).logits[:, -1]
        for model in (exported, exported.model):
            for name in ("cache", "past_key_values"):
                cache = DynamicCache(config=exported.config)
                model(ids[:, :-1], **{name: cache})
                last = model(ids[:, -1:], **{name: cache})
                assert cache.get_seq_length() == ids.shape[1] and any(value is cache for value in last.values())
                if model is exported:
                    torch.testing.assert_close(last.logits[:, -1], whole, rtol=0, atol=2e-4)
        with pytest.raises(ValueError, match="cache and past_key_values are two names of one thing"):
            exported(ids, cache=cache, past_key_values=DynamicCache(config=exported.config))


def test_no_cache_mask_or_position_is_swallowed(exported, ids):
    from transformers import DynamicCache

    positions = torch.arange(20).expand(2, -1)
    unknown = {
        "past": DynamicCache(config=exported.config), "kv": DynamicCache(config=exported.config),
        "layer_past": ((ids, ids),), "padding_mask": ids > 5, "attn_mask": ids > 5, "head_mask": torch.ones(2, 2),
        "pos_ids": positions, "cache_position": positions[0], "start_pos": 3, "offsets": positions, "past_length": 4,
        "states": [positions], "by_layer": {"full_attention": ids > 5},
    }  # fmt: skip
    for model in (exported, exported.model):
        for name, value in unknown.items():
            with pytest.raises(TypeError, match=f"knows no keyword '{name}', and its {type(value).__name__} would be"):
                model(ids, **{name: value})
        with pytest.raises(TypeError, match="the cache is a tuple. Give a Cache of transformers"):
            model(ids, past_key_values=((ids, ids),))
        with pytest.raises(ValueError, match="cu_seq_lens_q says where packed samples begin. Give position_ids too"):
            model(ids, cu_seq_lens_q=torch.tensor([0, 20]))
        model(ids, cu_seq_lens_q=torch.tensor([0, 20]), position_ids=positions, output_router_logits=False, mask=None)


def test_nothing_that_is_deprecated_is_used(exported, tokenizer, monkeypatch):
    batch = tokenizer(["the cat sat on the mat", "the"], return_tensors="pt", padding=True)
    said = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda logger, message, *rest: said.append(message))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        exported.generate(**batch, **GREEDY)
        exported.generate(**batch, cache_implementation="static", **GREEDY)
        exported(**batch, labels=batch["input_ids"])
    assert said == []


def test_continuous_batching(exported, ids):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    prompts = [ids[0, :5].tolist(), ids[1, :2].tolist()]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=320)
    sizes = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64, max_requests_per_batch=4)
    found = exported.generate_batch(
        prompts, generation_config=settings, continuous_batching_config=sizes, progress_bar=False, warmup=False
    )
    for prompt, out in zip(prompts, found.values()):
        expected = exported.generate(torch.tensor([prompt]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert out.generated_tokens == expected[0, len(prompt) :].tolist()


def test_what_is_asked_for_in_addition_to_logits(folder, ids):
    out = load(folder, attn_implementation="eager")(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(hidden.shape) for hidden in out.hidden_states] == [(2, 20, 64)] * 3
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 2, 20, 20)] * 2
    model = load(folder)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), logits_to_keep=1).logits
    torch.testing.assert_close(embedded, model(ids).logits[:, -1:])


def test_gradient_checkpointing(folder, ids):
    losses, grads = [], []
    for recompute in (False, True):
        model = load(folder).train()
        if recompute:
            model.gradient_checkpointing_enable()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss)
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert torch.equal(*losses) and all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)  # written a second time when layers are computed anew: not used
    torch.testing.assert_close(model(ids, labels=ids, past_key_values=cache).loss, losses[0])
    assert cache.get_seq_length() == 0
    logits = load(folder)(ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(losses[0], torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


def test_lora(folder, ids):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(folder), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 5 * 2 * 2  # layers × projections × keys and values × A and B
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = padded(ids, "left")
    for _ in range(2):
        before = model(**batch).loss
        before.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert model(**batch).loss < before
    merged = model.merge_and_unload()
    assert torch.isfinite(merged(ids).logits).all()


def tensor_parallel(group, folder, ids):
    os.environ |= {"RANK": str(group.rank), "LOCAL_RANK": str(group.rank), "WORLD_SIZE": str(group.size)}
    tensor_parallel_by_norm(folder, ids, "direct")
    tensor_parallel_by_norm(folder, ids, "gram")


def tensor_parallel_by_norm(folder, ids, norm):
    single, model = load(folder), load(folder, tp_plan="auto", norm=norm)
    plan = model.tp_plan["model.layers.*.mlp.values"]
    assert plan == ("rowwise" if norm == "gram" else "rowwise_split_input")
    assert model.model.layers[0].self_attn.q_proj.values.weight.to_local().shape == (32, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, single(ids).logits, rtol=0, atol=2e-4)
    assert torch.equal(model.generate(ids[:1], **GREEDY), single.generate(ids[:1], **GREEDY))
    single(ids, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in single.named_parameters()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_tensor_parallel_plan(folder, ids):
    spawn(tensor_parallel, 2, folder, ids)
