"""Where a run begins, and what it knows of the stages before it, from its growth history."""

from __future__ import annotations

import shutil

import pytest
import torch.distributed as dist
from saving import saver_of

from megatron_tf.costs.estimate import flops_per_token
from megatron_tf.errors import CheckpointError, ConfigError, UnreadableError
from megatron_tf.training.start import Progress, Start, begin, choose


@pytest.fixture
def start(config):
    model = config(model={"parameter_tokens": {"qkv": 30, "proj": 20, "ffn": 90}}).model
    history = (
        {"tokens": 1000, "from": {"qkv": 13, "proj": 11, "ffn": 37}, "to": {"qkv": 20, "proj": 20, "ffn": 60}},
        {"tokens": 1500, "from": {"qkv": 20, "proj": 20, "ffn": 60}, "to": {"qkv": 30, "proj": 20, "ffn": 90}},
    )
    return model, Start(None, "", Progress(step=3, samples=9, tokens=1700), history)


def test_tokens_and_flops_of_earlier_stages(start):
    model, grown = start
    assert (grown.earlier_tokens, grown.run_tokens) == (1500, 200)
    sizes = [
        model.model_copy(update={"parameter_tokens": model.parameter_tokens.model_copy(update=counts)})
        for counts in ({"qkv": 13, "proj": 11, "ffn": 37}, {"qkv": 20, "proj": 20, "ffn": 60})
    ]
    expected = 1000 * flops_per_token(sizes[0]) + 500 * flops_per_token(sizes[1])
    assert grown.earlier_flops(model) == expected


def test_new_tokens_are_those_of_the_last_growth(start):
    model, grown = start
    first = grown.first_new(model)
    assert first["blocks.0.ffn.key_tokens"] == 60 * model.hidden_size
    assert first["blocks.1.attention.query.value_tokens"] == 20 * model.hidden_size
    assert first["blocks.0.attention.proj.key_tokens"] == 20 * model.hidden_size  # all of them: none is new
    assert "embedding.weight" not in first


def test_depth_of_earlier_stages(config):
    """Tokens, then layers, then tokens again: what each model cost, and what the last growth but one added."""
    few, many = {"qkv": 13, "proj": 11, "ffn": 37}, {"qkv": 20, "proj": 20, "ffn": 60}
    layers = {"method": "identity", "from": 2, "to": 5, "old_at": [0, 3]}
    history = (
        {"tokens": 1000, "from": few, "to": many, "method": "zero_key"},
        {"tokens": 1500, "from": many, "to": many, "method": {}, "layers": layers},
        {"tokens": 1900, "from": many, "to": {**many, "ffn": 90}, "method": "gram"},
    )

    def model(layers: int, tokens: dict[str, int]):
        return config(model={"num_layers": layers, "parameter_tokens": tokens}).model

    grown, last = Start(None, "", growth_history=history), model(5, {**many, "ffn": 90})
    costs = [flops_per_token(of) for of in (model(2, few), model(2, many), model(5, many))]
    assert grown.earlier_flops(last) == 1000 * costs[0] + 500 * costs[1] + 400 * costs[2]
    assert grown.new_layers(last) == frozenset()
    assert grown.first_new(last)["blocks.4.ffn.key_tokens"] == 60 * last.hidden_size
    deeper = Start(None, "", growth_history=history[:2])
    assert deeper.new_layers(model(5, many)) == {1, 2, 4}
    assert deeper.first_new(model(5, many))["blocks.3.ffn.key_tokens"] == 60 * last.hidden_size


def test_candidates_of_earlier_stages(config):
    """A split, which an earlier version recorded without its candidates, and one of what it had made."""
    tokens = {"qkv": 13, "proj": 11, "ffn": 64}

    def model(candidates: int | None):
        bank = {"group_size": 16, "candidates": candidates}
        return config(model={"parameter_tokens": tokens, "sparse": candidates and {"ffn": bank}}).model

    sections = [model(candidates).sparse.model_dump() for candidates in (3, 6)]
    split = {"tokens": 1000, "from": tokens, "to": tokens, "method": "split"}
    again = {**split, "tokens": 1500, "sparse": dict(zip(("from", "to"), sections))}
    grown, last = Start(None, "", growth_history=(split, again)), model(6)
    assert grown.earlier_flops(last) == 1000 * flops_per_token(model(None)) + 500 * flops_per_token(model(3))
    for start, of in ((grown, last), (Start(None, "", growth_history=(split,)), model(3))):
        first = start.first_new(of)
        assert first["blocks.0.ffn.bank.key_tokens"] == first["blocks.0.ffn.bank.router"] == 0
        assert first["blocks.0.attention.proj.key_tokens"] == 11 * of.hidden_size
    bank = {"group_size": 16, "candidates": 3, "dense": 32}
    of = config(model={"parameter_tokens": tokens, "sparse": {"ffn": bank}}).model
    first = Start(None, "", growth_history=(split,)).first_new(of)  # what is in no slot is old
    assert first["blocks.0.ffn.key_tokens"] >= 32 * of.hidden_size and not first["blocks.0.ffn.bank.key_tokens"]
    entry = {**split, "method": "bank", "from": {**tokens, "ffn": 32}, "sparse": {"from": None, "to": {"ffn": bank}}}
    first = Start(None, "", growth_history=(entry,)).first_new(of)
    assert (first["blocks.0.ffn.key_tokens"], first["blocks.0.ffn.bank.key_tokens"]) == (32 * of.hidden_size, 0)


def test_a_run_that_did_not_grow(start):
    model, _ = start
    fresh = Start(None, "", Progress(3, 9, 300))
    assert (fresh.earlier_tokens, fresh.run_tokens, fresh.earlier_flops(model), fresh.first_new(model)) == (
        0,
        300,
        0,
        {},
    )


@pytest.fixture
def saved(config, tmp_path):
    """A run's configuration and its checkpoint of step 3."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    saver, *_ = saver_of(config, tmp_path / "run", asynchronous=False)
    saver.save(Progress(3, 24, 384), {})
    dist.destroy_process_group()
    return config(run={"dir": str(tmp_path / "run")}), tmp_path / "run" / "checkpoints" / "step_00000003"


def data_of(**changes):
    source = {"name": "text", "weight": 1.0, "tokens": 9, "bin_bytes": 18, "idx_bytes": 54, "ends_sha256": "a" * 64}
    return {"seed": 1, "sources": [{**source, **changes}]}


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        (data_of(), data_of(samples_sha256="b" * 64)),  # of a checkpoint of before samples were kept
        (data_of(samples_sha256="b" * 64), data_of(samples_sha256="b" * 64)),
        (data_of(samples_sha256="b" * 64), data_of(samples_sha256="c" * 64)),
    ],
)
def test_data_are_compared_by_all_that_a_checkpoint_knows(config, tmp_path, stored, now):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    saver, *_ = saver_of(config, tmp_path / "run", asynchronous=False)
    saver._data = stored
    saver.save(Progress(3, 24, 384), {})
    dist.destroy_process_group()
    run = config(run={"dir": str(tmp_path / "run")})
    path, _ = choose(run)
    more_tokens = {"parameter_tokens": {"qkv": 30, "proj": 20, "ffn": 90}}
    grown = config(run={"dir": str(tmp_path / "grown")}, model=more_tokens, growth={"from": str(tmp_path / "run")})
    samples = begin(grown, choose(grown)[0], now).progress.samples
    if "samples_sha256" not in stored["sources"][0] or stored == now:
        assert begin(run, path, now).changes == {} and samples == 24, "a growth reads on"
        return
    assert samples == 0, "a growth begins with other data at their beginning"
    with pytest.raises(CheckpointError, match=r"trained on text \(9 tokens, weight 1, bbbbbbbb\); now .*cccccccc"):
        begin(run, path, now)
    allowing = config(run={"dir": str(tmp_path / "run")}, checkpoint={"allow_data_change": True})
    assert "data.train (content)" in begin(allowing, path, now).changes


@pytest.mark.parametrize("linked", ["step_00000003", "checkpoints", "."])
def test_a_run_resumes_from_what_a_link_leads_to(saved, tmp_path, linked):
    config, checkpoint = saved
    place = (checkpoint.parents[1] / linked) if linked != "step_00000003" else checkpoint
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    path, passed_over = choose(config)
    start = begin(config, path, {})
    assert (path, passed_over) == (checkpoint, [])
    assert start.progress == Progress(3, 24, 384) and start.description == f"resumed from {checkpoint} at step 3"


def test_a_copied_run_begins_a_run_of_its_own_at_the_tracker(config, tmp_path):
    """Two runs that log into one, under the id in the checkpoint that both have, spoil it for both."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    (tmp_path / "run").mkdir()
    saver, *_ = saver_of(config, tmp_path / "run", asynchronous=False, ids={"wandb": "1a2b"})
    saver.save(Progress(3, 24, 384), {})
    dist.destroy_process_group()

    def resumed(name):
        own = config(run={"dir": str(tmp_path / name)})
        start = begin(own, choose(own)[0], {})
        return start.trackers, start.description.partition("; ")[2]

    assert resumed("run") == ({"wandb": "1a2b"}, "")
    shutil.copytree(tmp_path / "run", tmp_path / "fork")
    ids, note = resumed("fork")
    assert ids == {} and note.startswith(
        f"this is a copy of {tmp_path}/run, which keeps its run at the tracker (wandb 1a2b)"
    )
    (tmp_path / "run").rename(tmp_path / "moved")
    assert resumed("moved") == ({"wandb": "1a2b"}, "")
    shutil.copytree(tmp_path / "fork", tmp_path / "run")  # as from a backup
    assert resumed("run") == ({"wandb": "1a2b"}, "")


def test_a_run_never_starts_over_because_a_link_leads_nowhere(saved, tmp_path):
    config, checkpoint = saved
    checkpoint.rename(tmp_path / "elsewhere")
    for place in (checkpoint, checkpoint.parent, checkpoint.parents[1]):
        if place.exists():
            place.rename(tmp_path / f"away-{place.name}")
        place.symlink_to(tmp_path / "unmounted")
        with pytest.raises(UnreadableError, match=f"{place}: is a link|because {place} is a link"):
            choose(config)
        place.unlink()


def test_a_run_does_not_grow_from_its_own_folder_under_another_name(saved, config, tmp_path):
    from megatron_tf.config.validate import validate

    (tmp_path / "other").symlink_to(tmp_path / "run")
    own = config(run={"dir": str(tmp_path / "run")}, growth={"from": str(tmp_path / "other")})
    with pytest.raises(ConfigError, match="growth.from: .*other is this run's own folder"):
        validate(own, 1)


@pytest.mark.parametrize("key", ["growth", "branch"])
def test_a_newer_checkpoint_that_a_growth_passes_over_is_told(saved, config, tmp_path, key):
    _, checkpoint = saved
    newer = checkpoint.with_name("step_00000009")
    newer.mkdir()
    run = config(run={"dir": str(tmp_path / "next")}, **{key: {"from": str(tmp_path / "run")}})
    found, unused = choose(run)
    assert found == checkpoint
    assert len(unused) == 1 and unused[0].startswith(f"{key}.from: not used: {newer}: has no manifest")
