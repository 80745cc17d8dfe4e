"""launch/evaluate.py the way users start it: at other layouts than the run's, and with mistakes."""

from __future__ import annotations

import json
import math

import pytest
from launching import evaluate, train

from megatron_tf.checkpoint.step_zero import write_step_zero
from megatron_tf.config.load import load_config
from megatron_tf.state.sources import InitialSource, StepZero


def results(folder, done, name="step_00000000_perplexity.json"):
    assert done.returncode == 0, done.stdout
    return json.loads((folder / "run" / "evaluation" / name).read_text())


@pytest.mark.slow
@pytest.mark.scale
def test_one_process_then_other_layouts(started):
    data = started / "held_out"
    done = evaluate(started, "--stride", 6, "training.micro_batch_size=3")
    alone = results(started, done)
    assert f"{alone['all']['loss']:.4f}" in done.stdout and "bits/byte" in done.stdout
    assert (alone["window"], alone["stride"], alone["all"]["tokens"]) == (16, 6, 3899)
    assert alone["all"]["perplexity"] == pytest.approx(math.exp(alone["all"]["loss"]))
    assert alone["all"]["bits_per_byte"] is None  # neither summary nor tokenizer
    for ranks, launcher, *overrides in (
        (2, "torchrun", "parallel.tensor=2", "parallel.sequence=true"),
        (2, "deepspeed", "parallel.pipeline=2"),
        (3, "torchrun", "training.global_batch_size=7"),  # batches that no training could use
    ):
        output = started / "other"
        done = evaluate(started, "--stride", 6, "--data", data, "--data", data, "--output", output, *overrides,
                        ranks=ranks, launcher=launcher)  # fmt: skip
        assert done.returncode == 0, done.stdout
        found = json.loads((output / "step_00000000_perplexity.json").read_text())
        for score in (*found["data"], found["all"]):
            assert score["loss"] == pytest.approx(alone["all"]["loss"], rel=1e-6), (overrides, done.stdout)
        assert found["all"]["tokens"] == 2 * 3899


@pytest.mark.slow
def test_agrees_with_the_evaluation_in_training(started):
    """On whole windows, all of them, side by side, both see the same samples."""
    samples = 243  # of 16 tokens: an epoch of the 3,900 tokens
    tokenizer = ("data.tokenizer=bytes", "model.vocab_size=257")
    done = train(started, f"run.dir={started}/trained", f"evaluation.samples={samples}",
                 "training.train_steps=1", "training.global_batch_size=3", "training.micro_batch_size=3",
                 "optimizer.schedule.warmup_steps=0", *tokenizer)  # fmt: skip
    assert done.returncode == 0, done.stdout
    *_, last = map(json.loads, (started / "trained" / "metrics.jsonl").read_text().splitlines())
    done = evaluate(started, f"run.dir={started}/trained", "--max-tokens", samples * 16 + 1, *tokenizer)
    assert done.returncode == 0, done.stdout
    found = json.loads((started / "trained" / "evaluation" / "step_00000001_perplexity.json").read_text())
    assert found["all"]["loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
    assert found["all"]["text_bytes"] is not None


def test_another_evaluation_is_kept_and_the_same_replaced(started):
    short = ("--max-tokens", 40)
    first = results(started, evaluate(started, *short))
    done = evaluate(started, *short, "--stride", 6)
    assert results(started, done, "step_00000000_perplexity-2.json")["stride"] == 6
    results(started, evaluate(started, *short))
    folder = started / "run" / "evaluation"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_00000000_perplexity-2.json", "step_00000000_perplexity.json",
    ]  # fmt: skip
    assert json.loads((folder / "step_00000000_perplexity.json").read_text()) == first and first["max_tokens"] == 40


def test_copying_is_the_same_at_every_layout(started):
    alone = results(started, evaluate(started, "--copying"), "step_00000000_copying.json")["copying"]
    assert (alone["samples"], alone["tokens"]) == (64, 8) and alone["first"] != alone["again"]
    done = evaluate(started, "--copying", "parallel.tensor=2", "parallel.sequence=true", ranks=2)
    assert f"{alone['again']:.4f}" in done.stdout
    found = results(started, done, "step_00000000_copying.json")["copying"]
    assert found["first"] == pytest.approx(alone["first"], rel=1e-6)
    assert found["again"] == pytest.approx(alone["again"], rel=1e-6)


REFUSED = {
    "a stride that leaves gaps": (["--stride", 17], ["--stride: 17", "seq_length 16"]),
    "nothing to score": (["--max-tokens", 1], ["--max-tokens", "2 or more"]),
    "no data": (["--data", "nowhere"], ["nowhere.bin: no such file"]),
    "data not named": (["data.validation=[]"], ["data.validation: is empty", "--data"]),
    "copying and data": (["--copying", "--data", "held_out"], ["--copying: reads random tokens alone", "--data"]),
    "copying with a stride": (
        ["--copying", "--stride", 3],
        ["--copying: reads random tokens alone", "--stride is"],
    ),
    "copying of some tokens": (["--copying", "--max-tokens", 5], ["--copying: reads random", "--max-tokens is given"]),
    "documents of no task": (["--limit", 5], ["--limit: 5 is for tasks", "--max-tokens instead"]),
    "tokens of tasks": (
        ["data.tokenizer=bytes", "--tasks", "piqa", "--max-tokens", 5],
        ["--max-tokens: 5 is for"],
    ),
    "a stride of tasks": (["data.tokenizer=bytes", "--tasks", "piqa", "--stride", 5], ["--stride: 5 is for data"]),
    "copying in three tokens": (["--copying", "model.seq_length=3"], ["--copying: model.seq_length is 3"]),
    "no checkpoint": (["--checkpoint", "nowhere"], ["nowhere: there is no such folder"]),
    "another model": (["model.num_layers=1"], ["model.num_layers: checkpoint 2, configuration 1", "config.yml"]),
    "heads over tensor ranks": (["parallel.tensor=3"], ["num_attention_heads", "multiple of 3"]),
    "an output that is a file": (["--output", "README.md"], ["README.md: ", "Choose another folder"]),
    "a number that is none": (["--stride", "many"], ["'many' is not a whole number"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_one_message(started, name):
    arguments, fragments = REFUSED[name]
    done = evaluate(started, *arguments)
    assert done.returncode == 2, done.stdout
    assert done.stdout.count("error:") == 1 and "Traceback" not in done.stdout, done.stdout
    for fragment in fragments:
        assert fragment in done.stdout, done.stdout
    assert not (started / "run" / "evaluation" / "step_00000000_perplexity.json").exists()


def test_a_mistake_that_one_rank_meets_ends_all(started):
    """Data without a summary tell of a foreign id only when it is read, here by the second data-parallel rank."""
    from megatron_tf.data.indexed import IndexedWriter

    with IndexedWriter(started / "wide", vocab_size=200) as writer:
        writer.add_document([1] * 40 + [150] + [1] * 7)
    done = evaluate(started, "--data", started / "wide", ranks=2)
    assert done.returncode != 0
    assert done.stdout.count("error: ") == 1 and "token id 150 is beyond the vocabulary" in done.stdout, done.stdout


TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["red", "green"]
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def with_tasks(folder):
    """A run whose tokens are bytes, and a task of nine questions."""
    overrides = ["model.vocab_size=257", "data.tokenizer=bytes"]
    model = load_config(folder / "config.yml", overrides).model
    start = StepZero(InitialSource(model, 3), 0, 0, ())
    write_step_zero(folder / "run" / "checkpoints", model, start, {}, lambda done, text: None)
    rows = [json.dumps({"question": f"What colour has thing {n}?", "gold": n % 2}) for n in range(9)]
    (folder / "colours.jsonl").write_text("\n".join(rows))
    (folder / "tasks").mkdir()
    task = TASK.format(data=folder / "colours.jsonl")
    (folder / "tasks" / "colours.yaml").write_text(task)
    writing = task.replace("task: colours", "task: writing").replace("multiple_choice", "generate_until")
    (folder / "tasks" / "writing.yaml").write_text(writing.replace("acc", "exact_match"))
    return folder, [*overrides, "--task-folder", folder / "tasks"]


@pytest.mark.slow
def test_tasks_on_two_layouts(with_tasks):
    folder, arguments = with_tasks
    accuracies = []
    for ranks, *overrides in ((0,), (2, "parallel.tensor=2")):
        done = evaluate(folder, *arguments, "--tasks", "colours", *overrides, ranks=ranks)
        found = results(folder, done, "step_00000000_tasks.json")
        accuracies.append(found["results"]["colours"]["acc,none"])
        assert found["n-samples"]["colours"]["effective"] == 9 and "colours" in done.stdout
        assert "perplexity" not in done.stdout  # validation data are for when no task is named
    assert accuracies[0] == accuracies[1]


TASK_MISTAKES = {
    "unknown": (["--tasks", "coluors"], ["unknown: coluors (did you mean colours"]),
    "no tokenizer": (["--tasks", "colours", "data.tokenizer=null"], ["data.tokenizer: is not given"]),
    "none": (["--tasks", ","], ["',' names no task"]),
    "text": (
        ["--tasks", "colours,writing", "--data", "{folder}/tokens"],
        ["one of them wants text generated", "writing"],
    ),
}


# For an unknown task the harness reads thousands of files; tests/evaluation/test_lm_harness.py does so in one process.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["no tokenizer", "none", "text", pytest.param("unknown", marks=pytest.mark.scale)])
def test_mistakes_about_tasks_end_every_rank(with_tasks, name):
    folder, arguments = with_tasks
    own, fragments = TASK_MISTAKES[name]
    own = [str(argument).format(folder=folder) for argument in own]
    done = evaluate(folder, *arguments, *own, ranks=2)
    assert done.returncode != 0 and "bits/byte" not in done.stdout  # nothing is scored before
    for fragment in fragments:
        assert fragment in done.stdout, done.stdout
