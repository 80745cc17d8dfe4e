"""Width by cloning: that it keeps the function, that clones do not stay alike, and the state by any range."""

from __future__ import annotations

import pytest
import torch
from deepening import IDS, Trained, built, grown, model
from torch.nn import functional as F

from megatron_tf.config.sections.growth import Growth
from megatron_tf.growth.rules import growth_problems
from megatron_tf.growth.width import before_cloning
from megatron_tf.state.parameters import parameter_table
from megatron_tf.training.start import Start

PLAIN = {"architecture": "transformer", "parameter_tokens": None, "ffn_hidden_size": 37}
GROUPED = {**PLAIN, "num_key_value_heads": 2}


def wider(times, ffn=None, layers=2, **kind):
    sizes = {**PLAIN, **kind, "hidden_size": 32 * times, "num_attention_heads": 4 * times}
    sizes["ffn_hidden_size"] = 37 * (ffn or times)
    if "num_key_value_heads" in kind:
        sizes["num_key_value_heads"] = kind["num_key_value_heads"] * times
    return model(layers, **sizes)


CASES = {
    "twice": (PLAIN, wider(2)),
    "three times, with a wider MLP": (PLAIN, wider(3, ffn=4)),
    "the MLP alone": (PLAIN, wider(1, ffn=2)),
    "grouped heads": (GROUPED, wider(2, num_key_value_heads=2)),
    "with new layers": (PLAIN, wider(2, layers=3)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("clone_noise", [0.0, 0.1, 1.0])
def test_the_function_stays(case, clone_noise):
    kind, large = CASES[case]
    small = model(2, **kind)
    source = grown(small, large, clone_noise=clone_noise)
    assert source.preserves
    before, after = built(Trained(small, 0), small), built(source, large)
    torch.testing.assert_close(after(IDS), before(IDS), rtol=0, atol=1e-11)


def test_clones_come_apart_with_noise_alone():
    """Their gradients differ then; without it they are alike, and would stay so."""
    small, large = model(2, **PLAIN), wider(2)
    for clone_noise, alike in ((0.0, True), (0.1, False)):
        network = built(grown(small, large, clone_noise=clone_noise), large)
        F.cross_entropy(network(IDS).flatten(0, 1), IDS.roll(-1, 1).flatten()).backward()
        weights = dict(network.named_parameters())
        outputs = weights["blocks.1.ffn.up.weight"].grad.view(2, 37 * 64)
        channels = weights["blocks.0.ffn.down.weight"].grad.view(74, 2, 32)
        assert torch.allclose(outputs[0], outputs[1], rtol=1e-6, atol=0) == alike
        assert torch.allclose(channels[:, 0], channels[:, 1], rtol=1e-6, atol=0) == alike
        assert all(parameter.grad.abs().sum() > 0 for parameter in weights.values())


@pytest.mark.parametrize("name", ["embedding.weight", "final_norm.bias", "blocks.0.attention.qkv.weight",
                                  "blocks.1.attention.proj.weight", "blocks.1.ffn.up.weight",
                                  "blocks.0.ffn.down.weight"])  # fmt: skip
def test_any_range_is_that_of_the_whole(name):
    small, large = model(2, **GROUPED), wider(3, num_key_value_heads=2)
    source, numel = grown(small, large), parameter_table(large)[name].numel
    whole = source.read(name, "weight", 0, numel)
    assert whole.any() and len(whole) == numel
    for start, stop in ((0, 5), (numel // 3 - 7, numel // 3 + 90), (numel - 50, numel), (9, 9)):
        stop = min(stop, numel)
        assert torch.equal(source.read(name, "weight", start, stop), whole[start:stop])
        assert not source.read(name, "exp_avg", start, stop).any()
    assert source.adam_steps(name, 3, 50) == [(3, 50, 0)] and source.adam_steps(name, 3, 3) == []


def test_the_history_leads_back_to_the_smaller_model():
    small, large = model(2, **GROUPED), wider(2, ffn=3, num_key_value_heads=2)
    entry = {**grown(small, large, clone_noise=0.3).record, "from": {}, "to": {}, "tokens": 7}
    assert entry["width"]["clone_noise"] == 0.3 and before_cloning(large, entry) == small
    start = Start(None, "", growth_history=(entry,))
    assert start.earlier_flops(large) == Start(None, "", growth_history=({**entry, "width": None},)).earlier_flops(
        small
    )


def problems(small, large, **growth):
    return growth_problems(small, large, Growth(source="x", **growth))


def test_what_cannot_be_cloned_is_refused():
    small = model(2, **PLAIN)
    assert problems(small, model(2, **{**PLAIN, "hidden_size": 48, "num_attention_heads": 4})) == [
        "model.hidden_size: 32 before, 48 after. Cloning repeats what there is: set it to 32, or 64."
    ]
    assert problems(small, model(2, **{**PLAIN, "hidden_size": 64, "num_key_value_heads": 4})) == [
        "model.num_attention_heads: 4 before, 4 after, but model.hidden_size is 2 times what it was, and heads keep "
        "their size. Set it to 8.",
        "model.num_key_value_heads: 4 before, 4 after, but model.hidden_size is 2 times what it was, and heads keep "
        "their size. Set it to 8.",
    ]
    assert problems(small, model(3, **PLAIN), clone_noise=0.2) == [
        "growth.clone_noise: 0.2 sets clones apart, but model.hidden_size is 32 before and after. Remove "
        "growth.clone_noise."
    ]
    assert problems(model(2), model(3), clone_noise=0.2) == [
        "growth.clone_noise: 0.2 sets clones apart, but a tokenformer grows by new tokens and layers, without clones. "
        "Remove growth.clone_noise."
    ]
    assert problems(small, wider(2), moments_factor=0.5) == [
        "growth.moments_factor: 0.5 is of moments that are kept, and a growth of the width keeps none. Set it to 1."
    ]
    (refused,) = problems(model(2), model(2, hidden_size=64))
    assert refused.startswith(
        "model.hidden_size: 32 before, 64 after. Growth changes token counts, candidates and model"
    )
