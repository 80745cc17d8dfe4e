from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from megatron_tf.config.schema import Model
from megatron_tf.errors import ConfigError
from megatron_tf.growth.source import GrownSource, growth_entry, growth_seed
from megatron_tf.params import default_scale, parameter_table, projection_tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "incremental.safetensors"
STATES = ("weight", "exp_avg", "exp_avg_sq")


def model(qkv=48, proj=48, ffn=160, **changes) -> Model:
    sizes = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "vocab_size": 128}
    return Model.model_validate({**sizes, "parameter_tokens": {"qkv": qkv, "proj": proj, "ffn": ffn}, **changes})


SMALL, LARGE = model(), model(112, 112, 368)


class Tensors:
    """A source over flat tensors in memory; what is not given is drawn from a seed."""

    def __init__(self, of: Model, weights: dict[str, Tensor] | None = None, seed: int = 0, age: int = 7):
        self.table, self.seed, self.age, self.weights = parameter_table(of), seed, age, weights or {}
        self.scales = {name: default_scale(n, of.activation) for name, n in projection_tokens(of).items()}

    def read(self, name, state, start, stop):
        if state == "weight" and name in self.weights:
            return self.weights[name].reshape(-1)[start:stop]
        seed = self.seed * 1000 + list(self.table).index(name) * 10 + STATES.index(state)
        return torch.randn(self.table[name].numel, generator=torch.Generator().manual_seed(seed))[start:stop]

    def adam_steps(self, name, start, stop):
        return [(start, stop, self.age)]


def grow(old, new_model=LARGE, old_model=SMALL, method="zero_key", moments="keep", seed=1) -> GrownSource:
    fresh = Tensors(new_model, seed=seed)
    return GrownSource(old, fresh, old_model=old_model, new_model=new_model, method=method, moments=moments)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    swapped = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    return torch.cat([turned * cos + swapped * sin, rest], -1)


def logits(source, of: Model, ids: Tensor) -> Tensor:
    """TokenFormer written down a second time, fp64, from the facts in the golden files' description."""
    table = parameter_table(of)

    def weight(name: str) -> Tensor:
        spec = table[name]
        return source.read(name, "weight", 0, spec.numel).reshape(spec.shape).double()

    def pattention(x: Tensor, name: str) -> Tensor:
        scores, scale = x @ weight(f"{name}.key_tokens").T, source.scales[name]
        if of.activation == "l2_norm_gelu":
            scores = gelu(scale * scores / scores.norm(dim=-1, keepdim=True))
        else:
            scores = scale * gelu(scores) / gelu(scores).norm(dim=-1, keepdim=True)
        return scores @ weight(f"{name}.value_tokens")

    batch, length = ids.shape
    d, heads = of.hidden_size, of.num_attention_heads
    turned = int(d // heads * of.rotary_fraction)
    frequency = 1 / 10000 ** (torch.arange(0, turned, 2).float() / turned)
    angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)
    cos, sin = angle.cos().double(), angle.sin().double()

    def split(x: Tensor) -> Tensor:
        return x.view(batch, length, heads, d // heads).transpose(1, 2)

    x = weight("embedding.weight")[ids]
    mask = torch.full((length, length), -math.inf).triu(1).double()
    for layer in range(of.num_layers):
        block = f"blocks.{layer}"
        u = layer_norm(x, (d,))
        q, k, v = (split(pattention(u, f"{block}.attention.{part}")) for part in ("query", "key", "value"))
        scores = rotate(q, cos, sin) @ rotate(k, cos, sin).mT / math.sqrt(d // heads)
        heads_out = ((scores + mask).softmax(-1) @ v).transpose(1, 2).reshape(batch, length, d)
        x = x + pattention(heads_out, f"{block}.attention.proj")
        x = x + pattention(layer_norm(x, (d,)), f"{block}.ffn")
    return layer_norm(x, (d,), weight("final_norm.weight"), weight("final_norm.bias")) @ weight("embedding.weight").T


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


def official(golden: dict[str, Tensor], prefix: str, of: Model) -> dict[str, Tensor]:
    return {name: golden[f"{prefix}/{spec.official_name}"] for name, spec in parameter_table(of).items()}


def test_growing_the_official_model_keeps_its_logits(golden):
    source = Tensors(SMALL, official(golden, "src", SMALL))
    ids = golden["input_ids"]
    before = logits(source, SMALL, ids)
    assert (before - golden["logits_src_fp64"]).abs().max() < 1e-10
    after = logits(grow(source), LARGE, ids)
    assert (after - before).abs().max() < 1e-12
    assert (after - golden["logits_zero_new_keys_tau_held_sqrt_n_old_fp64"]).abs().max() < 1e-10


def test_without_the_held_scale_the_logits_are_the_official_wrong_ones(golden):
    """The official new values under τ = √n_new: the reference here reproduces the official result, which differs."""
    grown = official(golden, "grown", LARGE)
    for name, tensor in grown.items():
        if name.endswith("key_tokens"):
            tensor[parameter_table(SMALL)[name].shape[0] :] = 0
    moved = logits(Tensors(LARGE, grown), LARGE, golden["input_ids"])
    assert (moved - golden["logits_zero_new_keys_tau_sqrt_n_new_fp64"]).abs().max() < 1e-10
    assert (moved - golden["logits_src_fp64"]).abs().max() > 1


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_three_growths_on_top_of_each_other_keep_the_logits(activation, golden):
    models = [
        model(qkv, proj, ffn, activation=activation)
        for qkv, proj, ffn in [(48, 48, 160), (49, 48, 160), (49, 77, 161), (101, 78, 400)]
    ]
    source = Tensors(models[0], official(golden, "src", models[0]))
    before = logits(source, models[0], golden["input_ids"])
    for number, (old, new) in enumerate(zip(models, models[1:], strict=False), 1):
        source = grow(source, new, old, seed=number)
        assert (logits(source, new, golden["input_ids"]) - before).abs().max() < 1e-12
    assert source.scales["blocks.2.ffn"] == math.sqrt(160), "held from the first"


def test_softmax_is_refused():
    small, large = model(activation="softmax"), model(112, activation="softmax")
    with pytest.raises(ConfigError, match="softmax"):
        grow(Tensors(small), large, small)


def whole(source, name: str, state: str) -> Tensor:
    return source.read(name, state, 0, parameter_table(LARGE)[name].numel)


@pytest.mark.parametrize("state", STATES)
def test_old_elements_are_untouched_to_the_last_bit(state):
    old = Tensors(SMALL)
    source = grow(old)
    for name, spec in parameter_table(SMALL).items():
        assert torch.equal(whole(source, name, state)[: spec.numel], old.read(name, state, 0, spec.numel))


def test_new_elements():
    source, fresh = grow(Tensors(SMALL), seed=4), Tensors(LARGE, seed=4)
    boundary = 160 * 64
    assert not whole(source, "blocks.1.ffn.key_tokens", "weight")[boundary:].any()
    expected = fresh.read("blocks.1.ffn.value_tokens", "weight", boundary, 368 * 64)
    assert torch.equal(whole(source, "blocks.1.ffn.value_tokens", "weight")[boundary:], expected)
    for name in ("blocks.1.ffn.key_tokens", "blocks.1.ffn.value_tokens"):
        assert not whole(source, name, "exp_avg")[boundary:].any()
        assert not whole(source, name, "exp_avg_sq")[boundary:].any()


def test_reset_starts_all_moments_and_step_counts_at_zero_and_keeps_the_weights():
    kept, reset = grow(Tensors(SMALL)), grow(Tensors(SMALL), moments="reset")
    for name, spec in parameter_table(LARGE).items():
        assert torch.equal(whole(reset, name, "weight"), whole(kept, name, "weight"))
        assert not whole(reset, name, "exp_avg").any() and not whole(reset, name, "exp_avg_sq").any()
        assert reset.adam_steps(name, 0, spec.numel) == [(0, spec.numel, 0)]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["blocks.0.ffn.value_tokens", "blocks.2.attention.key.key_tokens", "embedding.weight"])
def test_any_range_is_that_part_of_the_whole(name, state):
    source = grow(Tensors(SMALL))
    complete = whole(source, name, state)
    generator = torch.Generator().manual_seed(3)
    ranges = torch.randint(0, len(complete) + 1, (30, 2), generator=generator).sort().values.tolist()
    old = min(parameter_table(SMALL)[name].numel, len(complete))
    for start, stop in [*ranges, (0, old), (old, len(complete)), (old, old), (old - 1, min(old + 1, len(complete)))]:
        assert torch.equal(source.read(name, state, start, stop), complete[start:stop])


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 368 * 64, [(0, 10240, 7), (10240, 368 * 64, 0)]),
        (5, 100, [(5, 100, 7)]),
        (10240, 10250, [(10240, 10250, 0)]),
        (10239, 10241, [(10239, 10240, 7), (10240, 10241, 0)]),
        (9, 9, []),
    ],
)
def test_new_rows_are_younger(start, stop, expected):
    assert grow(Tensors(SMALL)).adam_steps("blocks.0.ffn.key_tokens", start, stop) == expected


def test_rows_of_equal_age_are_one_range():
    assert grow(Tensors(SMALL, age=0)).adam_steps("blocks.0.ffn.key_tokens", 9, 10250) == [(9, 10250, 0)]


def test_what_does_not_grow_is_the_old_source():
    old = Tensors(SMALL)
    source = grow(old, model(ffn=200))
    assert source.scales == old.scales
    assert source.adam_steps("blocks.0.attention.query.key_tokens", 0, 48 * 64) == [(0, 48 * 64, 7)]


def test_each_growth_has_its_own_seed():
    seeds = {growth_seed(seed, number) for seed in (0, 1, 2**63 - 1) for number in (1, 2, 3)}
    assert len(seeds) == 9 and all(0 <= seed < 2**63 for seed in seeds)
    assert growth_seed(1234, 1) == growth_seed(1234, 1)


def test_the_history_entry_is_plain_json():
    import json

    entry = growth_entry(
        method="zero_key",
        moments="keep",
        source="runs/a",
        step=3,
        samples=6,
        tokens=96,
        old_model=SMALL,
        new_model=LARGE,
    )
    assert json.loads(json.dumps(entry)) == entry
    assert entry["from"] == {"qkv": 48, "proj": 48, "ffn": 160} and entry["to"]["ffn"] == 368
    assert entry["loss_before"] is None and entry["loss_after"] is None
