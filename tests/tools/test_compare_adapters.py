from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tooling import assert_refused, tool

from megatron_tf.benchmark import adapters
from megatron_tf.commands.compare_adapters import FORMS
from megatron_tf.errors import ConfigError, UserError
from megatron_tf.finetuning import comparison
from megatron_tf.finetuning.comparison import (
    _COLUMNS,
    Plan,
    _best_rate,
    _keep_setting,
    _results,
    _second_results,
    _table,
    check_setting,
    compare_adapters,
    missing,
    read_trials,
)
from megatron_tf.finetuning.trial import BASE, Outcome, Setting, Trial
from megatron_tf.runtime.run_folder import run_folder_lock

sys.path.insert(0, str(Path(__file__).parents[1] / "finetuning"))
from bases import decoder, questions, tokenformer, write_base, write_lines  # noqa: E402

SETTING = Setting(Path("base"), "fp32", 8, 10, 4, 2, 32, 16)
BASE_FACTS = {"model_type": "llama", "hidden_size": 32, "num_layers": 2, "vectors": "d" * 32, "matrices": "e" * 32}
PLAN = Plan(SETTING, "a", "b", None, ("lora", "modules"), (0.1, 0.2, 0.4), seeds=3, rounds=0)


def test_the_command_knows_all_forms_without_torch():
    assert tuple(adapters.FORMS) == FORMS


def test_rates_are_tried_with_one_seed_and_seeds_with_the_best_rate():
    done = {}
    losses = {"none": 3.0, "lora": {0.1: 2.0, 0.2: 1.5, 0.4: None}, "modules": {0.1: 1.9, 0.2: 1.8, 0.4: 1.7}}
    asked = []
    for trial in missing(PLAN, done):
        asked.append(trial)
        loss = losses[trial.form] if trial.form == BASE else losses[trial.form][trial.rate]
        held = None if loss is None else loss + 0.1 * trial.seed
        done[trial] = Outcome(0 if trial.form == BASE else 64, held, held and held + 1.0, 100.0)
    assert len(asked) == 1 + 2 * 3 + 2 * 2 and list(missing(PLAN, done)) == []
    assert _best_rate(PLAN, done, "lora") == 0.2 and _best_rate(PLAN, done, "modules") == 0.4
    base, lora, modules = _results(PLAN, done, {})
    assert (base["held"], base["keep"]) == (3.0, 4.0)
    assert (lora["held"], lora["held_spread"], lora["seeds"]) == (pytest.approx(1.6), pytest.approx(0.2), 3)
    assert lora["learnt"] == pytest.approx(1.4) and lora["forgotten"] == pytest.approx(-1.4)
    assert not lora["rate_at_end"] and modules["rate_at_end"]
    assert "| 0.4* | 3 | 1.8000 | 0.2000 |" in _table(_COLUMNS, [base, lora, modules])


def test_a_form_that_always_diverges_is_in_the_table():
    done = {Trial(BASE, 0.0, 0): Outcome(0, 3.0, 4.0)}
    done |= {Trial(form, rate, 0): Outcome(64, None, None) for form in PLAN.forms for rate in PLAN.rates}
    assert list(missing(PLAN, done)) == []
    assert "| LoRA | 64 | – | 0 | – |" in _table(_COLUMNS, _results(PLAN, done, {}))


def test_ways_to_a_second_text_are_tried_at_the_best_rate_of_the_first():
    plan = replace(PLAN, then="c", forms=("modules",), rates=(0.1,), seeds=2)
    done = {}
    for trial in missing(plan, done):
        is_second = trial.form.startswith("modules-")
        done[trial] = Outcome(64, 2.0 + trial.seed, 4.0, 100.0, None, 2.5 + trial.seed if is_second else None)
    assert [trial.form for trial in done] == ["none", *["modules"] * 2, *["modules-on"] * 2, *["modules-grown"] * 2]
    found = _second_results(plan, done)
    assert [entry["adapter"] for entry in found] == [
        "Pattention, trained on",
        "Pattention, frozen, grown by as many tokens",
    ]
    assert (found[0]["held"], found[0]["first"], found[0]["first_forgotten"]) == (2.5, 3.0, 0.5)


def compare(folder, forms=PLAN.forms, **sizes) -> None:
    texts = {name: write_lines(folder / f"{name}.jsonl", questions(8)) for name in ("learn", "keep")}
    plan = replace(PLAN, forms=forms, setting=replace(SETTING, base=folder / "base", **sizes), **texts)
    compare_adapters(plan, folder / "out", torch.device("cpu"), print)


def test_sizes_that_cannot_be_are_refused_before_anything_is_written(tmp_path):
    write_base(tmp_path / "base")
    with pytest.raises(
        ConfigError, match="--seq-length: 100, and the base's context is 64 tokens. Set it to at most 64"
    ):
        compare(tmp_path, seq_length=100)
    with pytest.raises(
        ConfigError, match="--batch: 3 is not a multiple of --micro-batch 2. Set it to a multiple of 2, or"
    ):
        compare(tmp_path, batch=3)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_which_another_process_works_is_refused(tmp_path, monkeypatch):
    """Both would run the same trials, and one would cut off a line that the other is writing."""
    write_base(tmp_path / "base")
    tried = []

    def trial(*arguments):
        tried.append(arguments)
        with pytest.raises(ConfigError, match="--to: .*/out is in use by process .* Stop that run, or choose another"):
            compare(tmp_path)
        return Outcome(64, 2.0, 4.0, 100.0)

    monkeypatch.setattr(comparison, "run_folder_lock", partial(run_folder_lock, patience_seconds=0.0))
    monkeypatch.setattr(comparison, "run_trial", trial)
    compare(tmp_path, forms=("modules",))
    assert len(tried) == len(read_trials(tmp_path / "out")) == 1 + 3 + 2


def test_appended_tokens_are_a_form_of_tokenformers_alone(tmp_path):
    assert set(FORMS) - set(adapters.forms_of(decoder())) == {"appended"}
    assert adapters.forms_of(tokenformer()) == FORMS and adapters.forms_of(tokenformer("softmax")) == FORMS[:-1]
    sizes = {}
    for form in ("lora", "appended"):
        model = adapters.with_adapter(tokenformer(), form, 4)
        sizes[form] = sum(parameter.numel() for parameter in adapters.trained_parameters(model))
    assert abs(sizes["appended"] / sizes["lora"] - 1) < 0.1
    write_base(tmp_path / "base")
    with pytest.raises(ConfigError, match="--forms: appended is for exported TokenFormers .* is none. Leave it out"):
        compare(tmp_path, forms=("appended",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 4}, "with rank 8, and this one has 4. Give another folder with --to."),
        ({"keep": "c" * 64}, "with another text: the file of --keep was not what it is now. Give another folder"),
        (
            {"base": BASE_FACTS | {"num_layers": 3}},
            "a llama of 2 layers × 32, and this one is a llama of 3 layers × 32. G",
        ),
        (
            {"base": BASE_FACTS | {"matrices": "f" * 32}},
            "× 32, and this one is one of the same shape with other weights. G",
        ),
    ],
)
def test_a_folder_of_another_comparison_says_in_words_what_differs(change, message, tmp_path):
    setting = {"rank": 8, "learn": "a" * 64, "keep": "b" * 64, "base": BASE_FACTS}
    assert check_setting(tmp_path, setting) == {}
    _keep_setting(tmp_path, setting)
    assert check_setting(tmp_path, setting) == setting
    with pytest.raises(UserError) as refused:
        check_setting(tmp_path, setting | change)
    assert message in str(refused.value)
    assert json.loads((tmp_path / "comparison.json").read_text()) == setting


@pytest.mark.parametrize("text", ["{", "{}", "[1]", "[" * 100_000], ids=lambda text: text[:9])
def test_a_damaged_setting_is_refused(text, tmp_path):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(UserError, match=r"comparison\.json: is damaged, .* Give another folder with --to"):
        check_setting(tmp_path, {"rank": 8})


def test_a_file_where_the_folder_belongs_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: is a file\. Give another folder"):
        check_setting(tmp_path / "file", {"rank": 8})


def test_trials_are_read_while_one_is_being_written(tmp_path):
    """As an outlook does of a comparison that goes on: the file is its writer's, and stays as it is."""
    trial, outcome = Trial("lora", 0.01, 0), Outcome(64, 2.0, 3.0)
    line = json.dumps({**asdict(trial), **asdict(outcome)}) + "\n"
    path = tmp_path / "trials.jsonl"
    for torn in ("", line[:1], line[:-1]):
        path.write_text(line + torn)
        before = path.stat()
        assert read_trials(tmp_path) == {trial: outcome}
        assert path.read_text() == line + torn and path.stat().st_ino == before.st_ino


@pytest.mark.parametrize("line", ['{"x', '{"a": 1}', "[]", "1", "é", "[" * 100_000], ids=lambda line: line[:9])
def test_a_damaged_line_of_trials_is_named(line, tmp_path):
    (tmp_path / "trials.jsonl").write_text(line + "\n", encoding="latin-1")
    with pytest.raises(UserError, match=r"trials\.jsonl: line 1 is no trial\. Remove the line"):
        read_trials(tmp_path)


@pytest.mark.slow
def test_forms_are_compared_and_a_comparison_goes_on(tmp_path):
    write_base(tmp_path / "base")
    learn, keep = (write_lines(tmp_path / f"{name}.jsonl", lines) for name, lines in
                   (("learn", questions(60)), ("keep", [{"text": "what was known before " * 3}] * 8)))  # fmt: skip
    sizes = ["--rank", 8, "--steps", 8, "--batch", 4, "--seq-length", 32, "--measured", 8, "--rates", 1e-3, 1e-2]
    arguments = ["--base", tmp_path / "base", "--learn", learn, "--keep", keep, "--to", tmp_path / "out", *sizes]
    done = tool("compare_adapters", *arguments, "--forms", "lora", "modules", "mixture", "--seeds", 1, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    none, lora, modules, mixture = found["forms"]
    assert modules["parameters"] == pytest.approx(lora["parameters"], rel=0.02) and len(found["trials"]) == 1 + 3 * 2
    assert lora["held"] < none["held"] - 0.05 and modules["held"] < none["held"] - 0.05
    assert mixture["kept_mib_above_base"] > modules["kept_mib_above_base"] > 0 and lora["training_of_lora"] == 1
    assert (tmp_path / "out" / "results.md").read_text().strip() in done.stdout

    lines = (tmp_path / "out" / "trials.jsonl").read_text()
    (tmp_path / "out" / "trials.jsonl").write_text(lines + '{"form": "lo')  # a kill tore it
    foreseen = tool("compare_adapters", *arguments, "--forms", "lora", "modules", "--seeds", 1, "--plan")
    assert "trials  0 of 7 left" in foreseen.stdout, foreseen.stderr
    assert (tmp_path / "out" / "trials.jsonl").read_text() == lines + '{"form": "lo'
    then = ("--then", write_lines(tmp_path / "then.jsonl", [{"text": "and then " * 5}] * 20))
    done = tool("compare_adapters", *arguments, *then, "--forms", "lora", "modules", "--seeds", 2, "--rounds", 0)
    assert done.returncode == 0, done.stderr
    ways = json.loads((tmp_path / "out" / "results.json").read_text())["second_text"]
    assert [way["seeds"] for way in ways] == [2, 2, 2, 2] and all(way["first"] and way["held"] for way in ways)
    assert ways[1]["parameters"] == lora["parameters"] and ways[3]["parameters"] == modules["parameters"]
    assert done.stdout.count(", seed 1: held-out loss") == 2 + 4 and done.stdout.count(", seed 0:") == 4
    assert (tmp_path / "out" / "trials.jsonl").read_text().startswith(lines)
    foreseen = tool("compare_adapters", *arguments, "--forms", "lora", "modules", "mlp", "--seeds", 2, "--plan")
    assert "trials  3 of 20 left\nwork    96 sequences to train on, " in foreseen.stdout, foreseen.stderr
    assert "core-minutes, by " in foreseen.stdout
    assert_refused(
        tool("compare_adapters", *arguments, "--rank", 4), "is of a comparison with rank 8, and this one has 4"
    )
