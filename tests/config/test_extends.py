"""A configuration that shows only what differs from another one."""

from __future__ import annotations

import pytest

from megatron_tf.config.load import dump_config, load_config
from megatron_tf.config.stages import load_stages
from megatron_tf.config.yaml_core import dump_yaml
from megatron_tf.errors import ConfigError
from megatron_tf.shipped import configurations

OWN_RUN = {"dir": "runs/own"}


@pytest.fixture
def write(small_path):
    """write("a.yml", extends="small.yml", ...) puts a file next to small.yml; its path."""

    def write(name, **values):
        path = small_path.parent / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(dump_yaml(values))
        return path

    return write


def test_only_what_differs_is_written(write, small):
    path = write(
        "own.yml",
        extends="small.yml",
        run=OWN_RUN,
        model={"parameter_tokens": {"ffn": 200}},
        optimizer={"betas": [0.8, 0.9]},
    )
    expected = small("run.dir=runs/own", "model.parameter_tokens.ffn=200", "optimizer.betas=[0.8, 0.9]")
    assert load_config(path) == expected
    assert load_config(path, ["training.train_steps=7"]).training.train_steps == 7
    resolved = dump_config(load_config(path))
    assert "extends" not in resolved
    path.write_text(resolved)
    assert load_config(path) == expected


def test_files_extend_one_another_over_several_steps(write):
    write("folder/middle.yml", extends="../small.yml", run={"dir": "runs/m", "seed": 5}, growth={"from": "runs/a"})
    last = write("last.yml", extends="folder/middle.yml", run=OWN_RUN, training={"train_steps": 9}, growth=None)
    config = load_config(last)
    assert (config.run.seed, config.training.train_steps, config.growth) == (5, 9, None)


def test_null_gives_a_section_the_defaults_that_the_other_file_has_changed(write, small):
    middle = write(
        "middle.yml",
        extends="small.yml",
        run={"dir": "runs/m"},
        parallel={"tensor": 2},
        optimizer={"schedule": {"type": "constant"}},
        growth={"from": "runs/a", "lr_multipliers": {"new_tokens": 2.0}},
    )
    last = write(
        "last.yml",
        extends="middle.yml",
        run=OWN_RUN,
        parallel=None,
        optimizer={"schedule": None},
        growth={"lr_multipliers": None},
    )
    changed, config, usual = load_config(middle), load_config(last), small("growth.from=runs/a")
    assert changed.parallel.tensor == 2 and changed.growth.lr_multipliers.new_tokens == 2
    assert (config.parallel, config.growth, config.optimizer) == (usual.parallel, usual.growth, usual.optimizer)
    assert changed.optimizer != usual.optimizer


def test_lists_are_replaced_and_the_paths_in_a_file_keep_their_meaning(write):
    path = write("own.yml", extends="small.yml", run=OWN_RUN, data={"validation": []})
    data = load_config(path).data
    assert (data.train[0].path, data.validation) == ("data/train", ())


def test_a_run_has_a_folder_and_a_name_of_its_own(write):
    write("named.yml", extends="small.yml", run={"name": "named", "dir": "runs/named"})
    path = write("own.yml", extends="named.yml")
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    (problem,) = raised.value.problems
    assert problem.startswith("run.dir: missing, and it has no default. Give it a value. Folder of everything that ")
    assert load_config(path, ["run.dir=runs/other"]).run.name == "tokenformer"


def test_a_shipped_configuration_is_extended_by_name_unless_a_file_has_it(write, small):
    shipped = load_config(configurations()["tiny"])
    for name in ("tiny", "tiny.yml"):
        assert load_config(write("own.yml", extends=name, run=OWN_RUN)).model == shipped.model
    write("tiny.yml", extends="small.yml", run={"dir": "runs/tiny"})
    assert load_config(write("own.yml", extends="tiny.yml", run=OWN_RUN)).model == small().model


def test_a_link_extends_what_its_target_extends(write, tmp_path):
    path = write("own.yml", extends="small.yml", run=OWN_RUN)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.yml"
    link.symlink_to(path)
    assert load_config(link) == load_config(path)


def test_variables_in_the_path_are_replaced(write, monkeypatch, tmp_path):
    monkeypatch.setenv("BASES", str(tmp_path))
    assert load_config(write("own.yml", extends="$BASES/small.yml", run=OWN_RUN)).run.dir == "runs/own"


def test_a_chain_of_stages_extends_a_run(write):
    stages = [{"name": "a"}, {"name": "b", "model": {"parameter_tokens": {"ffn": 380}}}]
    first, second = load_stages(write("chain.yml", extends="small.yml", run=OWN_RUN, stages=stages))
    assert (first.model.parameter_tokens.ffn, second.model.parameter_tokens.ffn) == (190, 380)
    assert second.growth.source == "runs/own/a"


def problems_of(path, *overrides) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides)
    return raised.value.problems


def test_a_missing_file_is_named_with_those_that_lead_to_it(write, tmp_path):
    write("middle.yml", extends="absent.yml")
    (problem,) = problems_of(write("own.yml", extends="middle.yml"))
    own, middle, absent = (tmp_path / name for name in ("own.yml", "middle.yml", "absent.yml"))
    assert problem.startswith(f"{own}: extends: {middle}: extends: {absent}: there is no such file. Give the path")


def test_a_circle_is_named_file_by_file(write, tmp_path):
    write("b.yml", extends="c.yml")
    write("c.yml", extends="a.yml")
    a, b, c = (tmp_path / f"{name}.yml" for name in "abc")
    assert problems_of(write("a.yml", extends="b.yml")) == [
        f"{a}: extends: {b}: extends: {c}: extends: {a} is a circle of files. Remove extends from one of them."
    ]
    assert "is a circle" in problems_of(write("self.yml", extends="self.yml"))[0]


@pytest.mark.parametrize("given", [None, 3, ["small.yml"], ""])
def test_anything_but_a_path_is_refused(write, given):
    (problem,) = problems_of(write("own.yml", extends=given))
    shown = "null" if given is None else repr(given)
    assert f"extends: {shown}, but the path of one configuration is expected" in problem


def test_an_unset_variable_is_refused(write):
    assert "'BASES_OF_NOBODY' is not set" in problems_of(write("own.yml", extends="$BASES_OF_NOBODY/a.yml"))[0]


def test_what_is_wrong_in_the_other_file_is_reported_too(write, small_path):
    small_path.write_text(small_path.read_text() + "logging: {}\nlogging: {}\n")
    problems = problems_of(write("own.yml", extends="small.yml", run=OWN_RUN, optimizer={"lr": 0}))
    assert any("logging: given twice" in problem and str(small_path) in problem for problem in problems)
    assert "optimizer.lr: 0 is out of range. It must be greater than 0." in problems


def test_an_unknown_key_is_named_with_its_file(write, small_path):
    """Keys of another architecture than that of the file may be what the extending file means."""
    base = write("base.yml", extends="small.yml", model={"hiden_size": 64, "num_key_value_heads": 2}, trainig={})
    transformer = {"architecture": "transformer", "ffn_hidden_size": 8, "parameter_tokens": None}
    problems = problems_of(write("own.yml", extends="base.yml", run=OWN_RUN, model=transformer, trainin=1))
    assert [problem for problem in problems if "unknown key" in problem] == [
        f"{base}: model.hiden_size: unknown key. Did you mean model.hidden_size?",
        f"{base}: trainig: unknown key. Did you mean training?",
        "trainin: unknown key. Did you mean training?",
    ]


def test_an_override_cannot_extend(small_path):
    (problem,) = problems_of(small_path, "extends=124M.yml")
    assert problem.startswith("override 'extends=124M.yml': only a file extends another.")
