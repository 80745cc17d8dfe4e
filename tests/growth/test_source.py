from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm

from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import ConfigError
from megatron_tf.growth.rules import scales_after_growth
from megatron_tf.growth.source import GrownSource, growth_entry, growth_seed
from megatron_tf.model import build_model
from megatron_tf.state.parameters import initial_scales, parameter_table, projections

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
        self.scales = initial_scales(of)

    def read(self, name, state, start, stop):
        if state == "weight" and name in self.weights:
            return self.weights[name].reshape(-1)[start:stop]
        seed = self.seed * 1000 + list(self.table).index(name) * 10 + STATES.index(state)
        return torch.randn(self.table[name].numel, generator=torch.Generator().manual_seed(seed))[start:stop]

    def read_into(self, name, state, start, target):
        target.copy_(self.read(name, state, start, start + target.numel()))

    def adam_steps(self, name, start, stop):
        return [(start, stop, self.age)]


def grow(old, new_model=LARGE, old_model=SMALL, seed=1, **growth) -> GrownSource:
    fresh, growth = Tensors(new_model, seed=seed), Growth(source="runs/small", **growth)
    return GrownSource(old, fresh, old_model=old_model, new_model=new_model, growth=growth, seed=seed)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    swapped = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    return torch.cat([turned * cos + swapped * sin, rest], -1)


def logits(source, of: Model, ids: Tensor, stored=torch.float64) -> Tensor:
    """TokenFormer written down a second time, fp64, from the facts in the golden files' description.

    `stored`: type that the weights are rounded to.
    """
    table = parameter_table(of)

    def weight(name: str) -> Tensor:
        target = torch.empty(table[name].numel, dtype=stored)
        source.read_into(name, "weight", 0, target)
        return target.reshape(table[name].shape).double()

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
    return {name: golden[f"{prefix}/{spec.official_name}"].clone() for name, spec in parameter_table(of).items()}


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


def saved_in_fp64(source: GrownSource, of: Model) -> Tensors:
    """The whole state, as a source of its own: as if checkpoints were fp64."""
    weights = {}
    for name, spec in parameter_table(of).items():
        source.read_into(name, "weight", 0, target := torch.empty(spec.numel, dtype=torch.float64))
        weights[name] = target
    saved = Tensors(of, weights)
    saved.scales = dict(source.scales)
    return saved


CHAINS = {
    "zero_key": [{"method": "zero_key"}] * 3,
    "gram": [{"method": "gram"}] * 3,
    "mixed": [{"method": "zero_key"}, {"method": "gram"}, {"methods": {"ffn": "gram"}}],
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_three_growths_on_top_of_each_other_keep_the_logits(activation, chain, golden):
    models = [
        model(qkv, proj, ffn, activation=activation)
        for qkv, proj, ffn in [(48, 48, 160), (97, 97, 229), (97, 161, 293), (203, 225, 601)]
    ]
    source = Tensors(models[0], official(golden, "src", models[0]))
    before = logits(source, models[0], golden["input_ids"])
    for number, (old, new, growth) in enumerate(zip(models, models[1:], CHAINS[chain], strict=False), 1):
        source = grow(source, new, old, seed=number, **growth)
        assert source.preserves
        source = saved_in_fp64(source, new)
        assert (logits(source, new, golden["input_ids"]) - before).abs().max() < 1e-12
        rounded = logits(source, new, golden["input_ids"], torch.float32)
        assert (rounded - before).abs().max() <= 1e-5 * before.abs().max()
    expected = {"zero_key": math.sqrt(160), "gram": math.sqrt(601), "mixed": math.sqrt(601)}[chain]
    assert source.scales["blocks.2.ffn"] == expected
    assert source.scales["blocks.2.attention.query"] == math.sqrt({"zero_key": 48, "gram": 203, "mixed": 48}[chain])


@pytest.mark.parametrize(
    "growth", [{"method": "random"}, {"method": "matched"}, {"noise": 0.01}, {"methods": {"proj": "random"}}]
)
def test_what_changes_the_function_does_not_promise_otherwise(growth, golden):
    source = Tensors(SMALL, official(golden, "src", SMALL))
    grown = grow(source, **growth)
    assert not grown.preserves
    change = (logits(grown, LARGE, golden["input_ids"]) - golden["logits_src_fp64"]).abs().max()
    assert change > 1e-3


def test_random_with_the_official_draw_is_the_official_growth(golden):
    source, drawn = Tensors(SMALL, official(golden, "src", SMALL)), Tensors(LARGE, official(golden, "grown", LARGE))
    growth = Growth(source="x", method="random")
    grown = GrownSource(source, drawn, old_model=SMALL, new_model=LARGE, growth=growth, seed=0)
    assert (logits(grown, LARGE, golden["input_ids"]) - golden["logits_random_new_fp64"]).abs().max() < 1e-10


def test_noise_is_relative_of_old_tokens_only_and_drawn_by_row():
    old = Tensors(SMALL)
    noisy, plain = grow(old, noise=0.01), grow(old)
    for name in ("blocks.0.ffn.key_tokens", "blocks.2.attention.proj.value_tokens"):
        numel = parameter_table(SMALL)[name].numel
        before = old.read(name, "weight", 0, numel)
        relative = whole(noisy, name, "weight")[:numel] / before - 1
        assert relative.std().item() == pytest.approx(0.01, rel=0.05) and abs(relative.mean()) < 1e-3
        assert torch.equal(whole(noisy, name, "weight")[numel:], whole(plain, name, "weight")[numel:])
        assert torch.equal(whole(noisy, name, "exp_avg"), whole(plain, name, "exp_avg"))
    assert torch.equal(whole(noisy, "embedding.weight", "weight"), whole(plain, "embedding.weight", "weight"))
    name = "blocks.0.ffn.key_tokens"
    assert not torch.equal(whole(grow(old, noise=0.01, seed=2), name, "weight"), whole(noisy, name, "weight"))


def test_rescaled_values_take_their_moments_with_them():
    """gram under gelu_l2_norm: values times f have gradients times 1/f."""
    small, large = model(activation="gelu_l2_norm"), model(112, 112, 368, activation="gelu_l2_norm")
    old, numel = Tensors(small), 160 * 64
    source = GrownSource(
        old, Tensors(large, seed=1), old_model=small, new_model=large, growth=Growth(source="x", method="gram"), seed=1
    )
    factor = math.sqrt(160 / 368)
    for state, times in (("weight", factor), ("exp_avg", 1 / factor), ("exp_avg_sq", 1 / factor**2)):
        before = old.read("blocks.1.ffn.value_tokens", state, 0, numel)
        torch.testing.assert_close(source.read("blocks.1.ffn.value_tokens", state, 0, numel), before * times)
        keys = source.read("blocks.1.ffn.key_tokens", state, 0, numel)
        assert torch.equal(keys, old.read("blocks.1.ffn.key_tokens", state, 0, numel))


@pytest.mark.parametrize("method", ["zero_key", "gram"])
@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_every_new_token_learns_at_once(method, activation, golden):
    """Each has a gradient through its key or its value, and after one step of AdamW through both: none is dead."""
    small, large = model(activation=activation), model(112, 112, 368, activation=activation)
    source = grow(Tensors(small, official(golden, "src", small)), large, small, method=method)
    network = build_model(large, scales=source.scales, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            source.read_into(name, "weight", 0, parameter.view(-1))
    adam = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def gradients() -> dict[str, tuple[Tensor, Tensor]]:
        adam.zero_grad()
        out = network(golden["input_ids"])
        cross_entropy(out[:, :-1].flatten(0, 1), golden["input_ids"][:, 1:].flatten()).backward()
        tensors = dict(network.named_parameters())
        return {
            name: tuple(tensors[f"{name}.{kind}_tokens"].grad[old.tokens :].norm(dim=1) for kind in ("key", "value"))
            for name, old in projections(small).items()
        }

    for name, (keys, values) in gradients().items():
        assert (keys + values > 0).all(), name
    adam.step()
    for name, (keys, values) in gradients().items():
        assert (keys > 0).all() and (values > 0).all(), name


@pytest.mark.parametrize("method", ["zero_key", "gram"])
def test_softmax_is_refused_once_for_all_layers(method):
    small, large = model(activation="softmax"), model(112, activation="softmax")
    with pytest.raises(ConfigError, match="growth.method: .*softmax") as caught:
        grow(Tensors(small), large, small, method=method)
    assert len(caught.value.problems) == 1
    assert grow(Tensors(small), large, small, method="random").scales["blocks.0.attention.key"] == 112


def test_all_that_gram_cannot_do_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        scales_after_growth(SMALL, model(90, 96, 200), Growth(source="x", methods={"qkv": "gram", "ffn": "gram"}),
                            initial_scales(SMALL))  # fmt: skip
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["growth.methods.qkv", "growth.methods.ffn"]
    assert "needs at least 48 new qkv tokens" in str(caught.value) and "from 48 to 90 they are 42" in str(caught.value)
    assert "needs at least 64 new ffn tokens" in str(caught.value) and "to at least 224" in str(caught.value)


def test_scales_of_a_chain_are_known_before_it_starts():
    growth = Growth(source="x", methods={"ffn": "gram"})
    scales = scales_after_growth(SMALL, LARGE, growth, initial_scales(SMALL))
    assert scales == grow(Tensors(SMALL), methods={"ffn": "gram"}).scales
    assert (scales["blocks.0.ffn"], scales["blocks.0.attention.key"]) == (math.sqrt(368), math.sqrt(48))


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


@pytest.mark.parametrize(
    "growth", [{}, {"method": "gram", "noise": 0.1}, {"method": "matched"}, {"method": "gram", "activation": "gelu"}]
)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["blocks.0.ffn.value_tokens", "blocks.0.ffn.key_tokens", "embedding.weight"])
def test_any_range_is_that_part_of_the_whole(name, state, growth):
    growth = dict(growth)
    changes = {"activation": "gelu_l2_norm"} if growth.pop("activation", None) else {}
    source = grow(Tensors(SMALL), model(112, 112, 970, **changes), model(**changes), **growth)
    numel = parameter_table(model(112, 112, 970))[name].numel
    complete = source.read(name, state, 0, numel)
    generator = torch.Generator().manual_seed(3)
    ranges = torch.randint(0, len(complete) + 1, (30, 2), generator=generator).sort().values.tolist()
    old = min(parameter_table(SMALL)[name].numel, len(complete))
    for start, stop in [*ranges, (0, old), (old, len(complete)), (old, old), (old - 1, min(old + 1, len(complete)))]:
        again = grow(Tensors(SMALL), model(112, 112, 970, **changes), model(**changes), **growth)
        for reader in (source, again):
            assert torch.equal(reader.read(name, state, start, stop), complete[start:stop])


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


def test_models_that_cannot_grow_into_each_other_are_refused():
    with pytest.raises(ConfigError, match="model.hidden_size: 64 before, 128 after"):
        grow(Tensors(SMALL), model(hidden_size=128))
    with pytest.raises(ConfigError, match="model.parameter_tokens.ffn: 368 before, 160 after. Growth cannot take"):
        grow(Tensors(LARGE), SMALL, LARGE)
