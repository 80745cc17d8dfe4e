from __future__ import annotations

import pytest

from megatron_tf.checkpoint.architecture import check_evaluable, check_same_architecture, stored_model, token_counts
from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model, ParameterTokens
from megatron_tf.errors import CheckpointError, ConfigError
from megatron_tf.growth import grow
from megatron_tf.growth.rules import growth_problems
from megatron_tf.state.parameters import initial_scales, parameter_table


def check_growable(index, model):
    grow.check_growable(index, model, Growth.model_validate({"from": "unused"}))


def model(qkv=6, proj=6, ffn=24, **changes) -> Model:
    fields = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16, "vocab_size": 32}
    tokens = ParameterTokens(qkv=qkv, proj=proj, ffn=ffn)
    return Model.model_validate({**fields, **changes, "parameter_tokens": tokens})


def transformer(**changes) -> Model:
    return Model.model_validate(
        {**model().model_dump(), "architecture": "transformer", "parameter_tokens": None, **changes}
    )


BANKS = {"ffn": {"group_size": 16, "candidates": 2, "dense": 0}}


def index(of: Model, **changes) -> CheckpointIndex:
    shapes = {name: spec.shape for name, spec in parameter_table(of).items()}
    values = {"model": of.model_dump(), "tensors": expected_tensors(shapes), **changes}
    values = {"scales": initial_scales(of), **values}
    return CheckpointIndex(step=1, samples=1, tokens=1, adam_steps={}, **values)


def test_the_same_architecture_fits():
    check_same_architecture(index(model()), model())


def test_every_differing_key_is_named_with_both_values():
    other = model(num_layers=3, hidden_size=16, activation="softmax")
    with pytest.raises(CheckpointError) as caught:
        check_same_architecture(index(model()), other)
    for text in (
        "model.num_layers: checkpoint 2, configuration 3",
        "model.hidden_size: checkpoint 8, configuration 16",
        "model.activation: checkpoint l2_norm_gelu, configuration softmax",
    ):
        assert text in str(caught.value)
    assert "growth" not in str(caught.value)


@pytest.mark.parametrize(
    ("of", "sparse", "message"),
    [
        (model(ffn=32), {"from": None, "to": BANKS}, "sparse.to has .*'candidates': 2.*, the model then had None"),
        (model(ffn=32, sparse=BANKS), {"from": {"ffn": {"group_size": 64, "candidates": 2, "dense": 0}}, "to": BANKS},
         "sparse.from: model.parameter_tokens.ffn: 32, of which .* no whole slots"),
        (model(ffn=32, sparse=BANKS), {"from": {"qkv": {}}, "to": BANKS}, "which is no section model.sparse"),
        (model(ffn=32), {"from": {"ffn": {"group_size": "x"}}, "to": None},
         "growth_history.0.sparse.from.ffn.group_size"),
        (transformer(), {"from": None, "to": None}, "sparse has candidates, a transformer none"),
    ],
)  # fmt: skip
def test_a_history_of_other_candidates_contradicts_the_model(of, sparse, message):
    counts = architecture_of(of).token_counts(of)
    entry = {"method": "split", "moments": "keep", "source": "x", "step": 1, "samples": 1, "tokens": 1, "from": counts,
             "to": counts, "loss_before": 1.0, "loss_after": 1.0, "sparse": sparse}  # fmt: skip
    with pytest.raises(CheckpointError, match=message):
        stored_model(index(of, growth_history=(entry,)))


def test_differing_token_counts_lead_to_growth():
    with pytest.raises(CheckpointError) as caught:
        check_same_architecture(index(model()), model(qkv=7, ffn=30))
    assert "model.parameter_tokens.qkv: checkpoint 6, configuration 7" in str(caught.value)
    assert "model.parameter_tokens.ffn: checkpoint 24, configuration 30" in str(caught.value)
    assert "growth.from" in str(caught.value)


def test_what_makes_other_candidates_is_named():
    def sparse(**bank) -> Model:
        return model(ffn=64, sparse={"ffn": {"group_size": 16, "candidates": 4, **bank}})

    for old, new, remedy in (
        (
            model(ffn=64),
            sparse(),
            "set growth.from to this checkpoint, growth.method to split or bank, and use another",
        ),
        (sparse(), sparse(candidates=8), "set growth.from to this checkpoint, growth.method to split, and use another"),
        (sparse(), sparse(candidates=6), "Restore these keys. Other candidates are made by a growth by split"),
        (sparse(), sparse(candidates=2), "or by megatron_tf prune, which makes fewer;"),
        (sparse(), model(ffn=64), "or by megatron_tf prune, which makes fewer; with 1 a projection is dense."),
        (sparse(), sparse(group_size=32), "Restore these keys."),
    ):
        with pytest.raises(CheckpointError, match="is of another architecture:") as caught:
            check_same_architecture(index(old), new)
        assert remedy in str(caught.value).splitlines()[-1], caught.value


def test_a_weight_of_a_loss_may_change():
    banks = {"ffn": {"group_size": 16, "candidates": 4}}
    check_same_architecture(index(model(ffn=64, sparse=banks)), model(ffn=64, sparse={**banks, "z_loss": 1e-3}))
    check_evaluable(index(model(ffn=64, sparse=banks)), model(ffn=64, sparse={**banks, "z_loss": 1e-3}))


def test_two_architectures_are_never_mixed_up():
    check_same_architecture(index(transformer()), transformer())
    for one, other in ((model(), transformer(num_layers=3)), (transformer(num_layers=3), model())):
        with pytest.raises(CheckpointError) as caught:
            check_same_architecture(index(one), other)
        assert str(caught.value).splitlines() == [
            "the checkpoint is of another architecture:",
            f"  - model.architecture: checkpoint {one.architecture}, configuration {other.architecture}",
            f"  - model.num_layers: checkpoint {one.num_layers}, configuration {other.num_layers}",
            "Restore these keys, or start in another run.dir.",
        ]
        problem = f"model.architecture: {one.architecture} before, {other.architecture} after. Growth keeps the"
        assert growth_problems(one, other)[0].startswith(problem)


def test_a_transformer_has_a_width_and_no_tokens():
    with pytest.raises(CheckpointError, match="model.ffn_hidden_size: checkpoint 32, configuration 40"):
        check_same_architecture(index(transformer()), transformer(ffn_hidden_size=40))
    with pytest.raises(
        ConfigError,
        match="model.ffn_hidden_size: 32 before, 40 after. Cloning repeats what there is: set it to 32, or 64",
    ):
        check_growable(index(transformer()), transformer(ffn_hidden_size=40))
    assert token_counts(model(), "pruned") == {"qkv": 6, "proj": 6, "ffn": 24}
    with pytest.raises(CheckpointError, match="a transformer cannot be pruned, because it has no parameter tokens"):
        token_counts(transformer(), "pruned")


def test_a_checkpoint_from_before_there_were_two():
    stored = model().model_dump()
    del stored["architecture"]
    assert stored_model(index(model(), model=stored)) == model()


def test_checkpoints_from_when_one_section_had_the_keys_of_all_architectures():
    """They say null, or the default, for the keys of the other one."""
    stored = {**model().model_dump(), "ffn_hidden_size": None}
    assert stored_model(index(model(), model=stored)) == model()
    stored = {**transformer().model_dump(), "parameter_tokens": None, "activation": "l2_norm_gelu"}
    del stored["num_key_value_heads"]
    assert stored_model(index(transformer(), model=stored)) == transformer()


def test_tensors_that_contradict_the_stored_architecture_are_named():
    with pytest.raises(CheckpointError, match=r"final_norm.weight: checkpoint \[9\], architecture \[8\]"):
        broken = expected_tensors(
            {**{n: s.shape for n, s in parameter_table(model()).items()}, "final_norm.weight": (9,)}
        )
        check_same_architecture(index(model(), tensors=broken), model())
    with pytest.raises(CheckpointError, match=r"ghost: checkpoint \[1\], architecture nothing"):
        broken = {**index(model()).tensors, **expected_tensors({"ghost": (1,)})}
        check_same_architecture(index(model(), tensors=broken), model())


def weights_only(of: Model, *names: str):
    """The model's tensors, those called `names` (all by default) without moments."""
    tensors = index(of).tensors
    shapes = {name: tensors[name].shape for name in names or tensors}
    return {**tensors, **expected_tensors(shapes, ["weight"])}


@pytest.mark.parametrize("check", [check_same_architecture, check_growable])
def test_an_index_that_lacks_something_is_one_message(check):
    scales = initial_scales(model())
    del scales["blocks.0.ffn"], scales["blocks.1.attention.key"]
    tensors = weights_only(model(), "embedding.weight")
    del tensors["final_norm.bias"]
    with pytest.raises(CheckpointError) as caught:
        check(index(model(), scales={**scales, "ghost": 1.0}, tensors=tensors), model(ffn=30))
    assert str(caught.value).splitlines() == [
        "the checkpoint contradicts its own model section:",
        "  - final_norm.bias: checkpoint nothing, architecture [8]",
        "  - blocks.0.ffn: no scale",
        "  - blocks.1.attention.key: no scale",
        "  - ghost: a scale, but no such projection",
        "  - embedding.weight: no exp_avg, unlike other tensors",
        "  - embedding.weight: no exp_avg_sq, unlike other tensors",
    ]


def test_weights_alone_can_be_grown_from_and_not_resumed():
    alone = index(model(), tensors=weights_only(model()))
    check_growable(alone, model(ffn=30))
    with pytest.raises(
        CheckpointError, match="adamw keeps exp_avg and exp_avg_sq .* has weights alone.*training.init_from"
    ):
        check_same_architecture(alone, model())


def test_a_stored_model_section_that_is_none_is_named():
    with pytest.raises(CheckpointError, match=r"model\.hidden_size"):
        stored_model(index(model(), model={**model().model_dump(), "hidden_size": "wide"}))


def test_the_model_section_survives_json():
    import json

    content = json.loads(json.dumps(model(rotary_fraction=1.0).model_dump()))
    assert stored_model(index(model(), model=content)) == model(rotary_fraction=1.0)


@pytest.mark.parametrize("bigger", [model(qkv=7), model(proj=7), model(ffn=25), model(7, 7, 25)])
def test_more_tokens_can_be_grown_into(bigger):
    check_growable(index(model()), bigger)


def test_fewer_tokens_cannot():
    with pytest.raises(ConfigError, match="parameter_tokens.qkv: 6 before, 5 after") as caught:
        check_growable(index(model()), model(qkv=5, ffn=30))
    assert len(caught.value.problems) == 1 and "Pile" not in str(caught.value)


def test_everything_else_must_be_equal_and_the_pile_models_are_mentioned():
    other = model(qkv=7, hidden_size=16, num_layers=4, vocab_size=64)
    with pytest.raises(ConfigError) as caught:
        check_growable(index(model()), other)
    assert [problem.split(".")[1].split(":")[0] for problem in caught.value.problems] == [
        "hidden_size",
        "vocab_size",
    ]
    assert "8 before, 16 after" in str(caught.value)
    assert "Pile models 150M, 450M, 900M and 1.5B" in str(caught.value)


def test_nothing_to_grow_is_said():
    with pytest.raises(ConfigError, match=r"growth: the smaller model has model.parameter_tokens .* already"):
        check_growable(index(model()), model())


@pytest.mark.parametrize(
    ("width", "reason"),
    [
        ({"from": {"hidden_size": 4}, "to": {"hidden_size": 16}}, "width.to.hidden_size is 16, the model then had 8"),
        ({"from": {"hidden_size": 4}, "to": {"depth": 16}}, "width.to.depth is 16, the model then had None"),
        ({"from": 4, "to": {}}, "width.from"),
    ],
)
def test_a_width_that_does_not_lead_to_the_model_is_refused(width, reason):
    entry = {"method": {}, "moments": "keep", "source": "x", "step": 1, "samples": 1, "tokens": 1, "from": {}, "to": {},
             "loss_before": None, "loss_after": None}  # fmt: skip
    right = {"from": {"hidden_size": 4}, "to": {"hidden_size": 8}, "clone_noise": 0.1}
    assert stored_model(index(transformer(), growth_history=({**entry, "width": right},))) == transformer()
    with pytest.raises(CheckpointError, match=reason):
        stored_model(index(transformer(), growth_history=({**entry, "width": width},)))
