"""A study from its file to its report, with real runs."""

from __future__ import annotations

import json
import sys

import pytest
from images import made_up, write_images
from launching import start_warm
from prepared import write_tokens
from study_names import result_of
from tooling import assert_refused, tool

from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.commands.study import main
from megatron_tf.errors import ConfigError, UserError

STUDY = """
name: test
dir: {folder}/study
seeds: [1]
common:
  model: {{num_layers: 1, hidden_size: 8, num_attention_heads: 2, seq_length: 16, vocab_size: 99, rotary_fraction: 0.5,
    parameter_tokens: {{qkv: 8, proj: 8, ffn: 16}}}}
  training: {{train_steps: 10, global_batch_size: 4, micro_batch_size: 4, precision: fp32}}
  optimizer: {{lr: 1e-2, schedule: {{warmup_steps: 2}}}}
  data: {{train: {folder}/text, validation: {folder}/text}}
arms:
  - {{name: small, flops: 2e7, decay: 0.2, comparable: false}}
  - {{name: grown, parent: small, flops: 4e7, decay: 0.2, overrides: {{growth: {{method: gram}},
     model: {{parameter_tokens: {{qkv: 16, proj: 16, ffn: 32}}}}, optimizer: {{schedule: {{warmup_steps: 0}}}}}}}}
"""


@pytest.fixture
def file(tmp_path):
    write_tokens(tmp_path / "text")
    path = tmp_path / "study.yml"
    path.write_text(STUDY.format(folder=tmp_path))
    return path


@pytest.fixture
def study(monkeypatch, capsys):
    """What the command prints; in this process, so that only the runs have to start, and they start warm."""
    start_warm(monkeypatch)
    # a run then has one thread, as the warm processes have
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})

    def printed(*words):
        monkeypatch.setattr("sys.argv", ["study", *map(str, words)])
        main()
        return capsys.readouterr().out

    return printed


@pytest.mark.slow
def test_plan_run_and_report(study, file, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    planned = study("plan", file, "--flops-per-second", 1e6)
    assert "2 runs, 2 of them left" in planned and "time: about" in planned
    assert "data: at most 0.7" in planned
    done = study("run", file, "--workers", 1, "--task", 5)
    assert done.count("task 5: OMP_NUM_THREADS: 77 has no effect: each process gets its share of the cores") == 1
    assert "task 5: grown/seed1: loss" in done and "2 of 2 runs have ended" in done
    found = json.loads((tmp_path / "study" / "results.json").read_text())
    small, grown = found["arms"]
    # The product counts what was planned, and what they have in common is there once.
    by_name = {run["name"]: run for run in found["all_runs"]}
    for arm in found["arms"]:
        run = by_name[f"{arm['name']}/seed1"]
        assert (run["flops"], run["tokens"], run["own_flops"]) == (arm["flops"], arm["tokens"], arm["own_flops"])
    assert found["flops_spent"] == sum(arm["own_flops"] for arm in found["arms"]) < small["flops"] + 4e7
    newest = max((tmp_path / "study" / "runs" / "grown" / "seed1" / "checkpoints").glob("step_*"))
    index = open_checkpoint(newest).index
    assert index.tokens == grown["tokens"] and index.growth_history[-1]["source"].endswith("/step_00000023")
    assert small["state_bytes"] < grown["state_bytes"]
    again = study("plan", file)
    assert again.count("has ended") == 2 and "2 runs, 0 of them left" in again


IMAGES = """
name: images
dir: {folder}/study
seeds: [1]
common:
  model: {{task: image_classification, num_layers: 1, hidden_size: 8, num_attention_heads: 2,
    image: {{size: 6, patch: 3, channels: 1, classes: 5, pooling: mean, crop: 1}},
    parameter_tokens: {{qkv: 8, proj: 8, ffn: 16}}}}
  training: {{train_steps: 6, global_batch_size: 4, micro_batch_size: 4, precision: fp32}}
  optimizer: {{lr: 1e-2, schedule: {{warmup_steps: 2}}}}
  data: {{train: {folder}/train, validation: {folder}/test}}
arms:
  - {{name: tokens}}
  - {{name: matrices, overrides: {{model: {{architecture: transformer, parameter_tokens: null, ffn_hidden_size: 32}}}}}}
"""


@pytest.mark.slow
def test_images_have_their_accuracy_in_the_report(study, tmp_path):
    classes = tuple("abcde")
    write_images(tmp_path / "train", *made_up(20), classes)
    write_images(tmp_path / "test", *made_up(13), classes)
    (tmp_path / "study.yml").write_text(IMAGES.format(folder=tmp_path))
    study("run", tmp_path / "study.yml", "--workers", 1)
    found = json.loads((tmp_path / "study" / "results.json").read_text())
    text = (tmp_path / "study" / "table.txt").read_text()
    rows = [line.split() for line in text.splitlines()]
    assert rows[0][:3] == ["parameters", "images", "FLOPs"] and rows[1][2] == str(6 * 4) and found["unit"] == "images"
    head = next(line.split() for line in text.splitlines() if line.lstrip().startswith("top1"))
    assert head == [
        "top1",
        "95",
        "%",
        "against",
        "tokens",
        "95",
        "%",
        "top5",
        "95",
        "%",
        "against",
        "tokens",
        "95",
        "%",
    ]
    tokens, matrices = found["arms"]
    for arm in (tokens, matrices):
        folder = tmp_path / "study" / "runs" / arm["name"] / "seed1"
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert arm["metrics"]["top1"]["by_seed"] == {"1": last["eval/top1"]} and last["epoch"] == 6 * 4 / 20
        assert (arm["flops"], arm["tokens"]) == (last["flops"], last["tokens"])
    difference = matrices["metrics"]["top1"]["mean"] - tokens["metrics"]["top1"]["mean"]
    assert matrices["metrics"]["top1"]["difference"]["mean"] == pytest.approx(difference)
    assert tokens["metrics"]["top1"]["difference"] is None
    assert {"loss.png", "top1.png", "top5.png"} <= {path.name for path in (tmp_path / "study").iterdir()}


def test_what_is_refused_before_a_run_starts(file, tmp_path):
    assert_refused(tool("study", "run", file, "ranks=3"), "arm small: training.global_batch_size: 4 is not a multiple")
    assert_refused(tool("study", "report", file), "no run has ended yet")
    apart = tmp_path / "apart.yml"
    apart.write_text(file.read_text() + "  - {name: longer, parent: small, by: branch, flops: 9e7}\n")
    for mode in ("plan", "report"):
        assert_refused(tool("study", mode, apart), "flops: longer takes", "Give them the same flops")
    assert_refused(
        tool("study", "run", tmp_path / "no.yml"),
        "no.yml: there is no such file. Give the path of a study's YAML file, or one of growth_",
    )
    assert_refused(tool("study", "run", file, "--probe"), "--probe is for plan and report, not for run")
    (tmp_path / "text.bin").unlink()
    assert_refused(tool("study", "run", file), "data.train[0].path: ")
    assert not (tmp_path / "study").exists()


def test_a_folder_that_is_a_file_is_one_message(file):
    assert_refused(tool("study", "run", file, f"dir={file}"), f"dir: {file} cannot be made: {file} is a file. Choose")


def test_when_a_run_fails_the_table_of_the_others_comes_before_the_error(study, file, capsys, monkeypatch):
    def measured(node):
        node.folder.mkdir(parents=True)
        return result_of(node, 2.5)

    monkeypatch.setattr("megatron_tf.study.queue.measure", measured)
    command = [sys.executable, "-c", "import sys; sys.exit('grown' in sys.argv[1])"]
    monkeypatch.setattr("megatron_tf.study.queue.command", lambda config, ranks: [*command, config])
    with pytest.raises(UserError, match="1 of the runs failed"):
        study("run", file)
    table = capsys.readouterr().out.partition("failed with exit code 1")[2]
    assert "small" in table and "2.5" in table and "results.json" in table


@pytest.mark.parametrize("mode", ["plan", "run"])
def test_data_that_do_not_fit_an_arm_are_refused_before_a_run_starts(study, tmp_path, mode):
    write_images(tmp_path / "train", *made_up(20), tuple("abcde"))
    write_images(tmp_path / "test", *made_up(13), tuple("abcde"))
    more = "  - {name: fewer, comparable: false, overrides: {model: {image: {classes: 4}}}}\n"
    (tmp_path / "study.yml").write_text(IMAGES.format(folder=tmp_path) + more)
    with pytest.raises(ConfigError) as refusal:
        study(mode, tmp_path / "study.yml")
    assert refusal.value.problems == [
        f"arm fewer: {tmp_path}/{name}.json: 5 classes (beyond: 'e'), model.image.classes is 4. Set it to 5, or "
        "prepare other images."
        for name in ("train", "test")
    ]
    assert not (tmp_path / "study").exists()


def test_arms_whose_data_have_one_problem_are_named_together(study, file):
    with pytest.raises(ConfigError, match="^arms small, grown: data.mask_eod_loss: the token that ends a document"):
        study("plan", file, "common.data.mask_eod_loss=true")
