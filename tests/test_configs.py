"""Every configuration that is shipped: loads, validates where it is meant to run, has exactly its size."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tf.config import load_config
from megatron_tf.config.load import dump_config
from megatron_tf.config.run_plan import plan_batches
from megatron_tf.config.stages import load_stages
from megatron_tf.config.validate import validate
from megatron_tf.costs.estimate import flops_per_token, memory_per_rank, num_parameters
from megatron_tf.costs.plan import describe
from megatron_tf.growth.rules import chain_problems, growth_problems
from megatron_tf.model import build_model
from megatron_tf.state.parameters import parameter_table

CONFIGS = Path(__file__).parents[1] / "configs"
# name -> (parameters, layers, hidden size, heads, qkv = proj tokens, ffn tokens)
TOKENFORMERS = {
    "124M": (123_569_664, 12, 768, 12, 576, 2304),
    "354M": (354_190_848, 12, 768, 12, 2140, 8560),
    "757M": (753_796_608, 12, 768, 12, 4850, 19400),
    "1.4B": (1_309_705_728, 12, 768, 12, 8620, 34480),
    "354M_openwebtext2": (353_503_232, 24, 1024, 16, 768, 3072),
    "757M_openwebtext2": (756_156_416, 24, 1024, 16, 1792, 7168),
    "pile_150M": (151_881_216, 12, 768, 12, 768, 3072),
    "pile_450M": (454_166_528, 24, 1024, 16, 1024, 4096),
    "pile_900M": (903_252_480, 32, 1280, 16, 1280, 5120),
    "pile_1.5B": (1_587_219_456, 40, 1536, 16, 1536, 6144),
    "tiny": (1_573_120, 4, 128, 4, 128, 512),
    "tiny_grow": (2_621_696, 4, 128, 4, 256, 1024),
    "sparse_124M_to_762M": (761_908_416, 12, 768, 12, 576, 2304),
    "tiny_split": (3_162_496, 4, 128, 4, 128, 512),
    "demo": (491_904, 2, 192, 6, 16, 64),
    "demo_grow": (1_180_032, 2, 192, 6, 128, 512),
}
# name -> (parameters, layers, hidden size, heads, width of the MLP)
TRANSFORMERS = {
    "transformer_124M": (123_569_664, 12, 768, 12, 3072),
    "transformer_354M": (353_503_232, 24, 1024, 16, 4096),
    "transformer_757M": (756_747_264, 24, 1536, 24, 6144),
    "transformer_1.4B": (1_310_986_240, 24, 2048, 32, 8192),
    "tiny_transformer": (1_573_120, 4, 128, 4, 768),
}
# Of images, in the same columns
VISION = {
    "vision_b16_86M": (86_447_848, 12, 768, 12, 576, 2304),
    "vision_b16_115M": (114_759_400, 12, 768, 12, 768, 3072),
    "vision_l16_304M": (304_007_144, 24, 1024, 16, 768, 3072),
    "vision_l16_405M": (404_670_440, 24, 1024, 16, 1024, 4096),
    "tiny_vision": (201_610, 4, 64, 4, 48, 192),
    "tiny_vision_grow": (398_218, 4, 64, 4, 96, 384),
}
VISION_TRANSFORMERS = {
    "vision_b16_vit": (86_447_848, 12, 768, 12, 3072),
    "tiny_vision_vit": (201_610, 4, 64, 4, 256),
}
SIZES = {**TOKENFORMERS, **TRANSFORMERS, **VISION, **VISION_TRANSFORMERS}
# TokenFormer -> the Transformer it is compared with
BASELINES = {
    **{size: f"transformer_{size}" for size in ("124M", "354M", "757M", "1.4B")},
    "tiny": "tiny_transformer",
    "tiny_vision": "tiny_vision_vit",
    "vision_b16_86M": "vision_b16_vit",
}
WORLD_SIZES = {
    "tiny": [1, 2],
    "tiny_grow": [2],
    "tiny_split": [2],
    "tiny_transformer": [1, 2],
    "demo": [1, 2],
    "demo_grow": [2],
    "tiny_vision": [1, 2],
    "tiny_vision_grow": [2],
    "tiny_vision_vit": [1, 2],
}
DEMO_FOLDERS = {"demo": "runs/demo/small", "demo_grow": "runs/demo/grown"}
FULL_SIZE = sorted({*TOKENFORMERS, *TRANSFORMERS} - set(WORLD_SIZES))
FULL_VISION = sorted({*VISION, *VISION_TRANSFORMERS} - set(WORLD_SIZES))
GROWS_FROM = {
    "354M": "124M",
    "757M": "354M",
    "1.4B": "757M",
    "757M_openwebtext2": "354M_openwebtext2",
    "tiny_grow": "tiny",
    "tiny_split": "tiny",
    "sparse_124M_to_762M": "124M",
    "demo_grow": "demo",
    "tiny_vision_grow": "tiny_vision",
    "vision_b16_115M": "vision_b16_86M",
    "vision_l16_405M": "vision_l16_304M",
}


CHAINS = {
    "chain_124M_to_1.4B": ["124M", "354M", "757M", "1.4B"],
    "chain_sparse": ["124M", "candidates4", "candidates16"],
    "chain_split_124M_to_1.4B": ["124M", "candidates16"],
    "tiny_chain": ["tokens128", "tokens192", "tokens256"],
}


def load(name):
    return load_config(CONFIGS / f"{name}.yml")


def test_this_list_is_complete():
    assert {path.stem for path in CONFIGS.glob("*.y*ml")} == {*SIZES, *CHAINS}


@pytest.mark.parametrize("name", SIZES)
def test_size(name):
    model = load(name).model
    found = num_parameters(model), model.num_layers, model.hidden_size, model.num_attention_heads
    if name in {**TRANSFORMERS, **VISION_TRANSFORMERS}:
        assert (*found, model.ffn_hidden_size) == SIZES[name]
        return
    tokens = model.parameter_tokens
    assert tokens.qkv == tokens.proj
    assert (*found, tokens.qkv, tokens.ffn) == SIZES[name]


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_has_as_many_parameters_and_is_trained_the_same_way(name):
    config, baseline = load(name), load(BASELINES[name])
    assert num_parameters(baseline.model) == pytest.approx(num_parameters(config.model), rel=0.01)
    own = {"architecture", "parameter_tokens", "activation", "sparse", "ffn_hidden_size", "num_key_value_heads"}
    if "vision" in name or name == "tiny":
        assert baseline.model.model_dump(exclude=own) == config.model.model_dump(exclude=own)
    assert (baseline.model.seq_length, baseline.model.task) == (config.model.seq_length, config.model.task)
    # the stages that grow have a shorter schedule of their own
    first = config if name == "tiny" or "vision" in name else load("124M")
    assert (baseline.optimizer, baseline.data) == (first.optimizer, first.data)
    same = {"micro_batch_size": first.training.micro_batch_size}  # as much as fits
    assert baseline.training.model_copy(update=same) == first.training
    head_dim = {m.hidden_size // m.num_attention_heads for m in (config.model, baseline.model)}
    assert len(head_dim) == 1 and baseline.growth is None


@pytest.mark.parametrize("name", SIZES)
def test_model_on_the_meta_device_has_the_parameters_of_the_table(name):
    config = load(name).model
    parameters = dict(build_model(config, device="meta").named_parameters())
    assert all(parameter.is_meta for parameter in parameters.values())
    assert sum(parameter.numel() for parameter in parameters.values()) == SIZES[name][0]
    shapes = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
    assert shapes == {key: spec.shape for key, spec in parameter_table(config).items()}


@pytest.mark.parametrize("name", SIZES)
def test_valid_where_it_is_meant_to_run(name):
    config = load(name)
    for world_size in WORLD_SIZES.get(name, [8, 16]):
        validate(config, world_size)
        assert describe(config, world_size)


@pytest.mark.parametrize("name", SIZES)
def test_header_gives_the_parameter_count_and_needs(name):
    text = (CONFIGS / f"{name}.yml").read_text(encoding="utf-8")
    header = text.partition("\n\n")[0]
    assert all(line.startswith("# ") for line in header.splitlines())
    assert f"{SIZES[name][0]:,} parameters" in header
    assert "Needs " in header


@pytest.mark.parametrize("name", SIZES)
def test_resolved_config_is_read_back_equal(name, tmp_path):
    config = load(name)
    (tmp_path / "config.yml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yml") == config


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_hyperparameters(name):
    config = load(name)
    optimizer, training = config.optimizer, config.training
    assert (optimizer.lr, optimizer.schedule.min_lr, optimizer.weight_decay) == (6e-4, 6e-5, 0.1)
    assert (optimizer.betas, optimizer.eps, training.gradient_clipping) == ((0.9, 0.95), 1e-8, 1.0)
    assert config.model.vocab_size == 50304
    assert config.model.seq_length == (2048 if name.startswith("pile") else 1024)
    assert training.precision == "bf16"
    steps = plan_batches(config, 8).train_steps
    assert 0.0099 <= optimizer.schedule.warmup_steps / steps <= 0.02


@pytest.mark.parametrize("name", FULL_VISION)
def test_the_recipe_of_the_papers_vision_models(name):
    """MAE's for supervised training from scratch; 1,281,167 images."""
    config = load(name)
    optimizer, training, augmentation = config.optimizer, config.training, config.data.augmentation
    assert (optimizer.type, optimizer.lr, optimizer.betas, optimizer.eps) == ("adamw_ema", 1.6e-3, (0.9, 0.95), 1e-8)
    assert (optimizer.weight_decay, optimizer.ema_decay, optimizer.schedule.min_lr) == (0.3, 0.9999, 0)
    assert (training.global_batch_size, training.gradient_clipping, training.label_smoothing) == (4096, 0, 0.1)
    assert (augmentation.crop_scale, augmentation.flip) == ((0.08, 1), 0.5)
    assert (augmentation.mixup, augmentation.cutmix) == (0.8, 1)
    assert config.model.image.model_dump(exclude={"mean", "std"}) == {
        "size": 224, "patch": 16, "channels": 3, "classes": 1000, "pooling": "class_token", "crop": 0.875,
    }  # fmt: skip
    assert augmentation.rand_augment.model_dump() == {"operations": 2, "magnitude": 9, "deviation": 0.5}
    assert training.drop_path == (0.2 if "_l16_" in name else 0.1)
    epochs = training.train_samples / 1_281_167
    expected = {"vision_l16_304M": 200, "vision_b16_115M": 60, "vision_l16_405M": 40}.get(name, 300)
    assert epochs == expected


@pytest.mark.parametrize("name", [*FULL_SIZE, *FULL_VISION])
def test_full_size_fits_the_gpus_that_its_header_asks_for(name):
    # a quarter is left for fragmentation, buffers and workspaces, which the estimate does not count
    assert memory_per_rank(load(name), 8).total < 0.75 * 40e9


@pytest.mark.parametrize("name", SIZES)
def test_runs_write_apart_and_grow_from_the_size_before(name):
    config = load(name)
    assert (config.run.name, config.run.dir) == (name, DEMO_FOLDERS.get(name, f"runs/{name}"))
    if name not in GROWS_FROM:
        assert config.growth is None
        return
    assert config.growth is not None
    source = load(GROWS_FROM[name])
    assert config.growth.source == source.run.dir
    assert config.data == source.data
    assert growth_problems(source.model, config.model, config.growth) == []
    if config.model.sparse is not None:
        assert config.growth.method == "split"
        assert flops_per_token(config.model) < 1.01 * flops_per_token(source.model)
        return
    assert config.growth.method in ("gram", "zero_key")  # they keep the function
    old, new = source.model.parameter_tokens, config.model.parameter_tokens
    assert config.model.model_copy(update={"parameter_tokens": old}) == source.model
    assert new.qkv > old.qkv and new.proj > old.proj and new.ffn > old.ffn


@pytest.mark.parametrize("name", CHAINS)
def test_chain(name):
    stages = load_stages(CONFIGS / f"{name}.yml")
    assert [Path(stage.run.dir).name for stage in stages] == CHAINS[name]
    for before, stage in zip(stages, stages[1:]):
        assert stage.growth is not None and stage.growth.source == before.run.dir
    for stage in stages:
        validate(stage, 8 if name.startswith("chain") else 2)


def test_the_sparse_chain_multiplies_parameters_at_the_cost_of_its_first_stage():
    stages = load_stages(CONFIGS / "chain_sparse.yml")
    assert chain_problems(stages) == []
    first, last = load("124M"), load("sparse_124M_to_762M")
    assert stages[0].model_copy(update={"run": first.run}) == first
    assert stages[2].model_copy(update={"run": last.run, "growth": last.growth}) == last
    header = (CONFIGS / "chain_sparse.yml").read_text(encoding="utf-8").partition("\n\n")[0]
    for stage, size in zip(stages, (123_569_664, 251_303_856, 761_908_416)):
        parameters = build_model(stage.model, device="meta").parameters()
        assert num_parameters(stage.model) == sum(parameter.numel() for parameter in parameters) == size
        assert f"{size:,}" in header
        assert flops_per_token(stage.model) < 1.01 * flops_per_token(first.model)


def test_the_chain_of_the_measured_recipe():
    """All projections split, by Muon, each stage with a decay of its own and the second from before the first's."""
    path = CONFIGS / "chain_split_124M_to_1.4B.yml"
    header = path.read_text(encoding="utf-8").partition("\n\n")[0]
    first, last = load_stages(path)
    assert chain_problems([first, last]) == []
    assert first.model == load("124M").model and last.growth.at == "before_decay"
    for stage, size in ((first, 123_569_664), (last, 1_404_233_664)):
        assert stage.optimizer.type == "muon" and stage.optimizer.schedule.type == "wsd"
        parameters = build_model(stage.model, device="meta").parameters()
        assert num_parameters(stage.model) == sum(parameter.numel() for parameter in parameters) == size
        assert f"{size:,}" in header
    ratio = flops_per_token(last.model) / flops_per_token(first.model)
    assert f"{ratio:.2f} times the FLOPs" in header


def test_the_papers_chain_is_its_four_configurations():
    for stage in load_stages(CONFIGS / "chain_124M_to_1.4B.yml"):
        single = load(Path(stage.run.dir).name)
        growth = stage.growth and stage.growth.model_copy(update={"source": single.growth.source})
        assert stage.model_copy(update={"run": single.run, "growth": growth}) == single
