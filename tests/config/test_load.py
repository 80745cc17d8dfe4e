from __future__ import annotations

import pytest

from megatron_tf.config import load_config
from megatron_tf.config.load import dump_config, read_model
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.data import DataSource
from megatron_tf.config.yaml_core import dump_yaml, parse_yaml
from megatron_tf.errors import ConfigError


@pytest.fixture
def problems_of(tmp_path):
    """Problems that load_config reports for plain values and overrides."""

    def problems_of(values, *overrides):
        path = tmp_path / "bad.yml"
        path.write_text(dump_yaml(values))
        with pytest.raises(ConfigError) as error:
            load_config(path, overrides)
        return error.value.problems

    return problems_of


# ---- what is accepted ------------------------------------------------------------------------------------------------


def test_defaults_fill_what_the_file_leaves_out(small):
    config = small()
    assert config.parallel.tensor == 1
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.growth is None
    assert config.data.train == (DataSource(path="data/train"),)


def test_lists_become_tuples_and_whole_numbers_become_floats(small):
    config = small("optimizer.betas=[0, 0.5]", "optimizer.weight_decay=0", "logging.trackers=[wandb, tensorboard]")
    assert config.optimizer.betas == (0.0, 0.5)
    assert isinstance(config.optimizer.betas[0], float)
    assert isinstance(config.optimizer.weight_decay, float)
    assert config.logging.trackers == ("wandb", "tensorboard")


def test_numbers_in_scientific_notation_are_numbers(small_path):
    text = small_path.read_text().replace("0.0006", "6e-4\n  eps: 1e-5")
    small_path.write_text(text)
    config = load_config(small_path)
    assert (config.optimizer.lr, config.optimizer.eps) == (6e-4, 1e-5)


def test_config_is_frozen(small):
    with pytest.raises(Exception, match="frozen"):
        small().model.num_layers = 3


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("growth.from=runs/0o17", "run.name='1e3'", "optimizer.eps=1e-5"),
        ("deepspeed.zero_optimization.overlap_comm=true", "deepspeed.fp16={hysteresis: 4}", "run.name=é: b"),
        ("data.train=[{path: a, weight: 2}, {path: b}]", "training.train_steps=null", "training.train_tokens=5"),
        ("run.dir=~/$$HOME", "data.tokenizer=$HOME/t.json", "growth.from=a$$b"),
    ],
)
def test_dump_is_read_back_to_an_equal_config(small, tmp_path, overrides):
    overrides = [text if text != "run.name=é: b" else "run.name='é: b'" for text in overrides]
    config = small(*overrides)
    path = tmp_path / "resolved.yml"
    path.write_text(dump_config(config), encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert dump_config(again) == dump_config(config)


def test_home_and_variables_in_every_path(small, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SCRATCH", "/scratch")
    config = small("run.dir=~/x", "data.tokenizer=$SCRATCH/t.json", "data.train=[{path: '${SCRATCH}/a'}]",
                   "data.validation=[{path: ~/b}]", "growth.from=~/$SCRATCH")  # fmt: skip
    assert config.run.dir == "/home/ada/x" and config.data.tokenizer == "/scratch/t.json"
    assert (config.data.train[0].path, config.data.validation[0].path) == ("/scratch/a", "/home/ada/b")
    assert config.growth.source == "/home/ada//scratch"
    assert "dir: /home/ada/x\n" in dump_config(config)  # what the run used, whatever the variables are later


def test_unknown_variables_are_refused_by_name(small, monkeypatch):
    monkeypatch.delenv("NOPE", raising=False)
    with pytest.raises(ConfigError) as error:
        small("run.dir=$NOPE/x", "data.tokenizer=${NOPE}", "data.train=[{path: ~nobody-here/x}]")
    assert [problem.partition(":")[0] for problem in error.value.problems] == [
        "run.dir", "data.tokenizer", "data.train[0].path"
    ]  # fmt: skip
    assert error.value.problems[0].endswith("variable 'NOPE' is not set; set it, or write $$ for a dollar sign.")


def test_dump_spells_growth_from_by_its_key(small):
    text = dump_config(small("growth.from=runs/a"))
    assert "  from: runs/a\n" in text
    assert "source" not in text


def test_dump_holds_every_section(small):
    text = dump_config(small())
    assert all(f"{section}:" in text for section in RunConfig.model_fields)


# ---- the file itself -------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yml: there is no such file"):
        load_config(tmp_path / "absent.yml")


def test_a_link_to_a_file_and_to_nowhere(tmp_path, small_path):
    (tmp_path / "link.yml").symlink_to(small_path)
    assert load_config(tmp_path / "link.yml") == load_config(small_path)
    for target, problem in {"gone.yml": "and nothing is there", "broken.yml": "which cannot be followed"}.items():
        (tmp_path / "broken.yml").unlink(missing_ok=True)
        (tmp_path / "broken.yml").symlink_to(target)
        with pytest.raises(ConfigError, match=rf"broken\.yml: .*is a link to {target}, {problem}"):
            load_config(tmp_path / "broken.yml")


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)\. Give a readable YAML file"):
        load_config(tmp_path)
    (tmp_path / "config.yml").touch()
    with pytest.raises(ConfigError, match=rf"Give {tmp_path}/config\.yml, the run's own file"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_empty_file(tmp_path, text):
    path = tmp_path / "empty.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"the file is empty.*run, model, training, optimizer, data"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "given"), [("- a\n", "the list"), ("hello\n", "the text 'hello'"), ("3", "the number 3")]
)
def test_top_level_that_is_no_mapping(tmp_path, text, given):
    path = tmp_path / "list.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"the top level is {given}"):
        load_config(path)


def test_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin.yml"
    path.write_bytes(b"run: \xe9")
    with pytest.raises(ConfigError, match="byte 5 is not UTF-8"):
        load_config(path)


@pytest.mark.parametrize("encode", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_a_file_as_other_systems_write_it(small_path, encode):
    config = load_config(small_path)
    small_path.write_bytes(encode(small_path.read_text(encoding="utf-8")).encode())
    assert load_config(small_path) == config


def test_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / "a.yml").symlink_to("gone.yml")
    with pytest.raises(ConfigError, match=r"a\.yml: is a link to gone\.yml, and nothing is there"):
        load_config(tmp_path / "a.yml")


@pytest.mark.parametrize("key", ["train", "validation"])
@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("data/x", [("data/x", 1.0)]),
        ("[data/x]", [("data/x", 1.0)]),
        ("[data/x, {path: data/y, weight: 2}, ~/z]", [("data/x", 1.0), ("data/y", 2.0), ("/home/z", 1.0)]),
    ],
)
def test_the_prefix_of_a_source_stands_for_it(small, small_path, monkeypatch, key, text, sources):
    monkeypatch.setenv("HOME", "/home")
    config = small(f"data.{key}={text}")
    assert [(source.path, source.weight) for source in getattr(config.data, key)] == sources
    values = parse_yaml(small_path.read_text(), "")[0]
    values["data"][key] = parse_yaml(text, "")[0]
    small_path.write_text(dump_yaml(values))
    assert load_config(small_path) == config
    small_path.write_text(dump_config(config))
    assert load_config(small_path) == config


def test_duplicate_key_is_reported_with_the_other_problems(small_path):
    small_path.write_text(small_path.read_text().replace("num_layers: 4", "num_layers: 4\n  num_layers: 8\n  nope: 1"))
    with pytest.raises(ConfigError) as error:
        load_config(small_path)
    duplicate, unknown = error.value.problems
    assert duplicate.startswith("model.num_layers: given twice in")
    assert "in line 4 and in line 5" in duplicate
    assert unknown.startswith("model.nope: unknown key")


# ---- keys and values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        # unknown keys
        ("model.num_layer=3", "model.num_layer: unknown key. Did you mean model.num_layers?"),
        ("model.NUM_LAYERS=3", "model.NUM_LAYERS: unknown key. Did you mean model.num_layers?"),
        ("train_steps=3", "train_steps: unknown key. Did you mean training.train_steps?"),
        ("interval_steps=3", "interval_steps: unknown key. Did you mean checkpoint.interval_steps or "
         "evaluation.interval_steps or logging.interval_steps?"),
        ("zero.zzz=3", "zero.zzz: unknown key. The keys of zero are stage."),
        ("growth={from: a, source: b}", "growth.source: unknown key. The keys of growth are from, at, method, methods, "
         "depth_method, clone_noise, noise, routers, moments, moments_factor, "
         "lr_multipliers."),
        ("data.train=[{path: a, wieght: 2}]", "data.train[0].wieght: unknown key. Did you mean data.train[0].weight?"),
        # wrong types
        ("model.num_layers='12'", "model.num_layers: the text '12', but a whole number is expected. Write 12."),
        ("model.num_layers=1_000", "model.num_layers: the text '1_000', but a whole number is expected. Write 1000."),
        ("model.num_layers=many", "model.num_layers: the text 'many', but a whole number is expected."),
        ("model.num_layers=1.5", "model.num_layers: the number 1.5, but a whole number is expected."),
        ("model.num_layers=true", "model.num_layers: the truth value true, but a whole number is expected."),
        ("model.num_layers=null", "model.num_layers: nothing (null), but a whole number is expected."),
        ("training.train_steps=1e3", "training.train_steps: the number 1000.0, but a whole number is expected. "
         "Write 1000."),
        ("optimizer.lr='6e-4'", "optimizer.lr: the text '6e-4', but a number is expected. Write 0.0006."),
        ("optimizer.lr=[1]", "optimizer.lr: the list [1], but a number is expected."),
        ("training.compile=yes", "training.compile: the text 'yes', but true or false is expected. Write true."),
        ("training.compile=0", "training.compile: the number 0, but true or false is expected. Write false."),
        ("run.name=124", "run.name: the number 124, but text is expected. Write it in quotes: '124'."),
        ("run.dir={a: 1}", "run.dir: the mapping {\"a\": 1}, but text is expected."),
        ("data.train=5",
         "data.train: the number 5, but a list is expected. Write the prefix of one, or a list of prefixes "
         "or of items with the keys path, weight."),
        ("data.validation=[data/x, 5]",
         "data.validation[1]: the number 5, but a section with keys is expected. Its keys "
         "are path, weight."),
        ("data.train=''", "data.train[0].path: the text '' is not valid: must be a path: not empty, without NUL "
         "characters."),
        ("data=", "data: nothing (null), but a section with keys is expected. It needs train."),
        ("deepspeed=[1]", "deepspeed: the list [1], but a section with keys is expected. Its keys are fp16, "
         "zero_optimization."),
        ("training.precision=bf61", "training.precision: the text 'bf61', but one of bf16, fp16, fp32, fp8 is "
         "expected. Did you mean bf16?"),
        ("zero.stage=2", "zero.stage: the number 2, but one of 0, 1 is expected."),
        ("logging.trackers=[mlflow]", "logging.trackers[0]: the text 'mlflow', but one of wandb, tensorboard "
         "is expected."),
        # ranges and lengths
        ("model.num_layers=0", "model.num_layers: 0 is out of range. It must be at least 1."),
        ("deepspeed.zero_optimization.allgather_bucket_size=3",
         "deepspeed.zero_optimization.allgather_bucket_size: 3 is not a multiple of 2. Set it to 2 or 4."),
        ("deepspeed.zero_optimization.allgather_bucket_size=-1",
         "deepspeed.zero_optimization.allgather_bucket_size: -1 is not a multiple of 2. Set it to 2."),
        ("optimizer.lr=0", "optimizer.lr: 0 is out of range. It must be greater than 0."),
        ("optimizer.lr=.inf", "optimizer.lr: inf is out of range. It must be a finite number."),
        ("optimizer.lr=.nan", "optimizer.lr: nan is out of range. It must be a finite number."),
        ("model.rotary_fraction=1.5", "model.rotary_fraction: 1.5 is out of range. It must be at most 1."),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas[1]: 1 is out of range. It must be less than 1."),
        ("model.num_layers=10001", "model.num_layers: 10001 is out of range. It must be at most 10000."),
        (f"model.hidden_size={2**31}", "model.hidden_size: 2147483648 is out of range. It must be less than "
         "2147483648."),
        (f"training.train_steps={10**40}", f"training.train_steps: {10**40} is out of range. It must be less than "
         "2147483648."),
        ("model.rotary_base=1", "model.rotary_base: 1 is out of range. It must be greater than 1."),
        ("optimizer.lr=1e300", "optimizer.lr: 1e+300 is out of range. It must be at most 1e+30."),
        ("parallel.timeout_seconds=1e8", "parallel.timeout_seconds: 1e+08 is out of range. It must be at most "
         "1e+07."),
        ("parallel.timeout_seconds=1e-9", "parallel.timeout_seconds: 1e-09 is out of range. It must be at least 1."),
        ("run.seed=-1", "run.seed: -1 is out of range. It must be at least 0."),
        ("run.seed=9223372036854775808", "run.seed: 9223372036854775808 is out of range. It must be less than "
         "9223372036854775808."),
        ("checkpoint.keep_last=0", "checkpoint.keep_last: 0 is out of range. It must be at least 1."),
        ("optimizer.betas=[0.9]", "optimizer.betas: the list has 1 item, too few. Give all of them."),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "optimizer.betas: the list has 3 items. It holds 2."),
        ("data.train=[]", "data.train: the list has 0 items. It needs at least 1."),
        # missing keys
        (
            "model.sparse={ffn: {candidates: 4}}",
            "model.sparse.ffn.group_size: missing, and it has no default. Give it a value. Size of a candidate. "
            "parameter_tokens, less `dense`, is a multiple of it: that many slots.",
        ),
        ("growth.method=zero_key", "growth.from: missing, and it has no default. Give it a value. "
            "Run folder, checkpoints folder or checkpoint to grow from."),
        ("data.train=[{weight: 1}]", "data.train[0].path: missing, and it has no default. Give it a value. "
            "Prefix of a .bin/.idx pair."),
        ("model.parameter_tokens=null", "model.parameter_tokens: missing. Add this section; it needs qkv, proj, ffn."),
        # what belongs to the other architecture
        ("model.ffn_hidden_size=256",
         "model.ffn_hidden_size: a tokenformer has parameter tokens instead. Remove it, or "
         "set model.architecture to transformer."),
        ("model.architecture=transformer",
         "model.parameter_tokens: a transformer has no parameter tokens. Remove it, or "
         "set model.architecture to tokenformer."),
        ("model.architecture=gpt",
         "model.architecture: the text 'gpt', but one of tokenformer, transformer is expected."),
    ],
)  # fmt: skip
def test_problem_sentence(small, override, problem):
    with pytest.raises(ConfigError) as error:
        small(override)
    assert error.value.problems == [problem]


def test_missing_section_and_key_are_named(values, problems_of):
    del values["model"], values["optimizer"]["lr"]
    assert problems_of(values) == [
        "model: missing. Add this section; it needs num_layers, hidden_size, num_attention_heads, seq_length, "
        "vocab_size.",
        "optimizer.lr: missing, and it has no default. Give it a value. Largest learning rate of the schedule.",
    ]


TRANSFORMER = ("model.architecture=transformer", "model.parameter_tokens=null")


def test_a_transformer_and_its_default_width(small, tmp_path):
    config = small(*TRANSFORMER)
    assert config.model.ffn_hidden_size == 4 * 64
    assert small(*TRANSFORMER, "model.ffn_hidden_size=100").model.ffn_hidden_size == 100
    (tmp_path / "config.yml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yml") == config
    with pytest.raises(ConfigError, match="model.activation: a transformer has no parameter tokens"):
        small(*TRANSFORMER, "model.activation=softmax")


def test_unknown_section_lists_the_sections(values, problems_of):
    values["qqqq"] = 1
    (problem,) = problems_of(values)
    assert problem.startswith("qqqq: unknown key. The sections are run, model, parallel,")


def test_all_problems_come_at_once(values, problems_of):
    values["model"]["num_layers"] = "four"
    values["training"]["precison"] = "bf16"
    values["data"]["train"][0]["weight"] = 0
    del values["run"]["dir"]
    problems = problems_of(values, "nonsense", "optimizer.lr=fast")
    assert [problem.split(":")[0] for problem in problems] == [
        "override 'nonsense'",
        "run.dir",
        "model.num_layers",
        "training.precison",
        "optimizer.lr",
        "data.train[0].weight",
    ]


def test_long_values_are_shortened(values, problems_of):
    values["model"]["num_layers"] = "x" * 500
    (problem,) = problems_of(values)
    assert len(problem) < 160


def test_a_second_file_among_the_overrides(small):
    with pytest.raises(ConfigError, match=r"^other\.yml: is a second configuration\. Give one; section\.field=value"):
        small("other.yml")


def test_a_model_section_alone_gets_the_sentences_of_a_file(values, small):
    assert read_model(values["model"]) == small().model
    spoilt = {**values["model"], "vocab_size": 0, "hiden_size": 64, "parameter_tokens": {"qkv": 1, "proj": 1}}
    with pytest.raises(ConfigError) as caught:
        read_model(spoilt)
    assert sorted(caught.value.problems) == [
        "model.hiden_size: unknown key. Did you mean model.hidden_size?",
        "model.parameter_tokens.ffn: missing, and it has no default. Give it a value. "
        "Parameter tokens of the feed-forward Pattention.",
        "model.vocab_size: 0 is out of range. It must be at least 1.",
    ]
    with pytest.raises(ConfigError, match="model.hidden_size: 64 is not a multiple of model.num_attention_heads 5"):
        read_model({**values["model"], "num_attention_heads": 5})


def test_extends_that_is_mistyped(tmp_path):
    """At the top level the nearest name is told; elsewhere, that only a file extends another."""
    path = tmp_path / "run.yml"
    for text, problem in {
        "extend: tiny": "extend: unknown key. Did you mean extends?",
        "stages_: []": "stages_: unknown key. Did you mean stages?",
        "model: {extends: tiny}": "model.extends: unknown key. A whole file extends another: write it at the top level",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError) as refused:
            load_config(path)
        assert any(told.startswith(problem) for told in refused.value.problems), refused.value.problems
        assert len(refused.value.problems) == 1 or not text.startswith("extend"), "the other file would have the rest"


def test_a_file_that_is_named_without_its_ending(tmp_path):
    (tmp_path / "run.yml").write_text("run: {}")
    with pytest.raises(ConfigError, match=r"there is no such file\. .* Did you mean .*/run\.yml\?"):
        load_config(tmp_path / "run")
