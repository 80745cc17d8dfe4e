"""The zero-shot tasks on a live model: equal to the harness's own class for Hugging Face models, and at every
layout."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest
from distributed import spawn
from harness_data import tokenizer_for_tests

from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.step_zero import write_step_zero
from megatron_tf.config.topology import Topology
from megatron_tf.data.tokenizer import load_tokenizer
from megatron_tf.errors import UserError
from megatron_tf.evaluation import lm_harness
from megatron_tf.evaluation.eval_data import harness_tasks
from megatron_tf.evaluation.lm_harness import live_model, run_tasks
from megatron_tf.evaluation.paper import ACCURACY_METRICS, TASKS
from megatron_tf.evaluation.report import tasks_table
from megatron_tf.evaluation.scoring import Scorer
from megatron_tf.inference.load import load_model
from megatron_tf.inference.sharded import load_stage
from megatron_tf.model.layers import TensorParallel
from megatron_tf.parallel.groups import make_group
from megatron_tf.state.sources import InitialSource, StepZero

LENGTH = 48


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, and no cache of other runs. The libraries read these when they are loaded, which is once."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
        os.environ[name] = "1"
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@functools.cache
def stock_index():
    """Of the harness's thousands of task files, which take ten seconds to read."""
    from lm_eval.tasks._index import TaskIndex

    return TaskIndex.build([harness_tasks()])


@pytest.fixture
def stock_tasks_are_read_once(monkeypatch):
    from lm_eval.tasks._index import TaskIndex

    stock, build = stock_index(), TaskIndex.build

    def known(folders):
        indices = [stock if folder == harness_tasks() else build([folder]) for folder in folders]
        return {name: entry for index in indices for name, entry in index.items()}

    monkeypatch.setattr(TaskIndex, "build", staticmethod(known))


@pytest.fixture
def text_model(model):
    return model.model_copy(update={"vocab_size": 320, "seq_length": LENGTH})


@pytest.fixture
def text_checkpoint(tmp_path, text_model):
    start = StepZero(InitialSource(text_model, 3), 0, 0, ())
    return write_step_zero(tmp_path / "text" / "checkpoints", text_model, start, {}, lambda done, text: None)


@pytest.fixture
def tokenizer_file(tmp_path):
    tokenizer_for_tests().save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def scorer(rank, checkpoint, model, topology):
    tensor = TensorParallel(make_group(topology, "tensor", 60.0))
    stage = load_stage(open_checkpoint(checkpoint), model, topology, rank, tensor)
    return Scorer(
        stage, max_length=LENGTH, batch_size=8, data_rank=topology.coordinate("data", rank), data_size=topology.data,
        is_reporter=stage.following is None and tensor.group.rank == 0,
    )  # fmt: skip


def run(rank, checkpoint, model, tokenizer_file, folder, topology=None, tasks=TASKS, limit=None):
    ask = scorer(rank, checkpoint, model, topology or Topology())
    return run_tasks(ask, load_tokenizer(tokenizer_file), LENGTH, tasks, Path(folder) / "tasks", limit)


def same(found, expected):
    """Accuracies exactly; LAMBADA's perplexity, of which fp32 rounds the logarithm, to six digits."""
    assert found.keys() == expected.keys()
    for task in expected:
        figures = {
            key: value for key, value in expected[task].items() if "stderr" not in key and isinstance(value, float)
        }
        for key, value in figures.items():
            assert found[task][key] == pytest.approx(value, rel=1e-5), (task, key)


def as_hugging_face(model, tokenizer_file):
    """The model behind the harness's own HFLM."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
    from transformers.modeling_outputs import CausalLMOutput

    class Wrapped(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self):
            super().__init__(PretrainedConfig(max_position_embeddings=LENGTH))
            self.inner = model

        def forward(self, input_ids, **kwargs):
            return CausalLMOutput(logits=self.inner(input_ids))

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token="<|endoftext|>")
    return HFLM(pretrained=Wrapped(), tokenizer=tokenizer, max_length=LENGTH, batch_size=3, device="cpu")


def test_six_tasks_score_as_in_the_harness_itself(text_checkpoint, text_model, tokenizer_file, eval_folder):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = run(0, text_checkpoint, text_model, tokenizer_file, eval_folder)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    reference = simple_evaluate(
        as_hugging_face(load_model(text_checkpoint), tokenizer_file), tasks=list(TASKS), log_samples=False,
        task_manager=TaskManager(include_path=str(eval_folder / "tasks"), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    same(found["results"], reference["results"])
    assert all(f"{metric},none" in found["results"][task] for task, metric in ACCURACY_METRICS.items())
    assert all(count["effective"] == 7 for count in found["n-samples"].values())
    table = tasks_table(found["results"])
    assert "average" in table and "59.3" in table and "16.38" in table


def test_limit(text_checkpoint, text_model, tokenizer_file, eval_folder):
    found = run(0, text_checkpoint, text_model, tokenizer_file, eval_folder, tasks=["piqa"], limit=3)
    assert found["n-samples"]["piqa"]["effective"] == 3
    assert "average" not in tasks_table(found["results"])


def test_what_the_tokenizer_loses_of_requests_is_counted(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2, "</s>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    model = live_model(never, load_tokenizer(tmp_path / "words.json"), LENGTH)
    assert model.tok_encode("the cat") == [1, 2] and not model.lost
    assert model.tok_encode("the dog and the cat") == [1, 0, 0, 1, 2]
    assert str(model.lost) == "6 characters ('dog' 1, 'and' 1)"


def test_whole_texts(text_checkpoint, text_model, tokenizer_file):
    from lm_eval.api.instance import Instance

    texts = ["The cup is near the river. " * 20, "x", "Question: what holds the stone?"]
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    ours = live_model(scorer(0, text_checkpoint, text_model, Topology()), load_tokenizer(tokenizer_file), LENGTH)
    theirs = as_hugging_face(load_model(text_checkpoint), tokenizer_file)
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_equal_at_every_layout(text_checkpoint, text_model, tokenizer_file, eval_folder, tmp_path):
    expected = run(0, text_checkpoint, text_model, tokenizer_file, eval_folder)
    spawn(_rank, 2, str(text_checkpoint), text_model, tokenizer_file, str(eval_folder), str(tmp_path))
    for topology in LAYOUTS:
        same(json.loads((tmp_path / f"{topology}.json").read_text()), expected["results"])


LAYOUTS = [Topology(tensor=2), Topology(pipeline=2), Topology(data=2)]


def _rank(group, checkpoint, model, tokenizer_file, folder, out):
    """All layouts one after the other: the harness takes longer to import than to score."""
    for topology in LAYOUTS:
        ask = scorer(group.rank, checkpoint, model, topology)
        if group.rank > 0:
            ask.follow()
            continue
        found = run_tasks(ask, load_tokenizer(tokenizer_file), LENGTH, TASKS, Path(folder) / "tasks", None)
        ask.release()
        (Path(out) / f"{topology}.json").write_text(json.dumps(found["results"]))


def never(requests):
    raise AssertionError("nothing should be asked")


@pytest.mark.parametrize(
    ("tasks", "folder", "fragments"),
    [
        (["hellaswagg"], "tasks", ["unknown: hellaswagg (did you mean hellaswag",
                                   "arc_challenge, arc_easy, gsm8k_local, hellaswag"]),
        (["piqa", "no_such_task_at_all"], "data/eval/tasks", ["unknown: no_such_task_at_all", "fetch_eval_data.py"]),
        (["piqa"], "elsewhere", ["elsewhere: there is no such folder", "fetch_eval_data.py"]),
        (["boolq"], "tasks", ["--tasks boolq: the data cannot be loaded", "fetch_eval_data.py"]),
        (["gsm8k_local"], "tasks", ["one of them wants text generated"]),
    ],
)  # fmt: skip
def test_mistakes(tokenizer_file, eval_folder, monkeypatch, stock_tasks_are_read_once, tasks, folder, fragments):
    monkeypatch.chdir(eval_folder)
    (eval_folder / "generate.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    (eval_folder / "tasks" / "gsm8k_local.yaml").write_text(
        f"task: gsm8k_local\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: "
        f"{eval_folder}/generate.jsonl}}}}\ntest_split: test\noutput_type: generate_until\ndoc_to_text: "
        f"'{{{{question}}}}'\ndoc_to_target: '{{{{answer}}}}'\nmetric_list: [{{metric: exact_match}}]\n"
    )
    with pytest.raises(UserError) as error:
        run_tasks(never, load_tokenizer(tokenizer_file), LENGTH, tasks, Path(folder), None)
    for fragment in fragments:
        assert fragment in str(error.value), error.value


class Asked:
    """A request of the harness."""

    def __init__(self, *args):
        self.args = args


def test_every_answer_has_tokens_and_something_before_them(tokenizer_file):
    """BPE joins "a" and "b" here; the tokens of a context are then no beginning of the whole's."""
    end = {"id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
           "normalized": False, "special": True}  # fmt: skip
    joined = {"version": "1.0", "added_tokens": [end], "model": {
        "type": "BPE", "vocab": {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "\n": 4, "x": 5}, "merges": [["a", "b"]],
    }}  # fmt: skip
    Path(tokenizer_file).write_text(json.dumps(joined))
    asked = []

    def ask(requests):
        asked.extend(requests)
        return [(-1.0, False)] * len(requests)

    model = live_model(ask, load_tokenizer(tokenizer_file), LENGTH)
    pairs = {
        ("\n", "x"): ([0], [4, 5]), ("", "x"): ([0], [5]), ("a", "x"): ([1], [5]), ("a\n", "x"): ([1], [4, 5]),
        ("a", "b"): ([1], [2]), ("", "<|endoftext|>"): ([0], [0]), ("", "<|endoftext|>x"): ([0], [5]),
    }  # fmt: skip
    assert model.loglikelihood([Asked(*pair) for pair in pairs]) == [(-1.0, False)] * len(pairs)
    assert asked == list(pairs.values())
    for nothing in ("", "?"):  # of the second the tokenizer knows no character
        with pytest.raises(
            UserError, match=rf"no token stands for the answer '\{nothing}'" if nothing else "answer ''"
        ):
            model.loglikelihood([Asked("a", nothing)])


def write_task(folder, name, rows, **values):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{folder}/{name}.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}",
        "doc_to_target": "a", "metric_list": [{"metric": "acc"}], "metadata": {"version": 1},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps({**task, **values}))


GOOD = {"q": "The sky is", "c": [" blue", " green"], "a": 0}
CANNOT_BE_SCORED = {
    "an empty answer": ([GOOD, {**GOOD, "c": ["", " green"]}], {"target_delimiter": ""},
                        "bad cannot be scored: no token stands for the answer ''"),
    "a document without a field": ([GOOD, {"q": "The sky is"}], {}, r"bad cannot be scored \(\w+: "),
    "a metric of which nothing is left": (
        [GOOD], {"metric_list": [{"metric": "bypass"}]}, r"bad cannot be scored \(ValueError: log_samples must"
    ),
    "code that would be run": ([GOOD], {"unsafe_code": True}, r"bad cannot be scored \(ValueError: .*marked as unsafe"),
    "text": (
        [GOOD], {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]},
        "one of them wants text generated.*: bad. Export"
    ),
    "no kind of task": ([GOOD], {"output_type": "guess"}, r"--tasks bad: cannot be loaded \(ValueError: Got invalid"),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT_BE_SCORED)
def test_what_cannot_be_scored_is_known_before_the_first_request(tokenizer_file, tmp_path, case):
    rows, values, message = CANNOT_BE_SCORED[case]
    folder = tmp_path / "tasks"
    folder.mkdir()
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_target": "{{q}}", "doc_to_text": "",
               "metric_list": [{"metric": "bits_per_byte"}]}  # fmt: skip
    write_task(folder, "texts", [GOOD], **rolling)
    write_task(folder, "good", [GOOD])
    write_task(folder, "bad", rows, **values)
    with pytest.raises(UserError, match=message):
        run_tasks(never, load_tokenizer(tokenizer_file), LENGTH, ["texts", "good", "bad"], folder, None)

    def ask(requests):
        return [(-1.0, False)] * len(requests)

    with pytest.raises(UserError, match="good is named twice, the second time by good"):
        run_tasks(never, load_tokenizer(tokenizer_file), LENGTH, ["good", "texts", "good"], folder, None)
    found = run_tasks(ask, load_tokenizer(tokenizer_file), LENGTH, ["texts", "good"], folder, None)
    assert set(found["results"]) == {"texts", "good"}


def test_harness_not_installed(monkeypatch):
    monkeypatch.setattr(lm_harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs lm_eval.*\[eval\]"):
        lm_harness.check_installed()


def test_files_that_the_task_files_name_are_gone(tokenizer_file, eval_folder):
    (eval_folder / "piqa.jsonl").unlink()
    with pytest.raises(UserError, match="--tasks piqa: the data cannot be loaded.*fetch_eval_data.py"):
        run_tasks(never, load_tokenizer(tokenizer_file), LENGTH, ["piqa"], eval_folder / "tasks", None)
    task = eval_folder / "tasks" / "arc_easy.yaml"
    task.write_text(task.read_text().replace(str(harness_tasks()), "/nowhere"))  # the harness has moved
    with pytest.raises(UserError, match="arc_easy.yaml: cannot be used: .*fetch_eval_data.py"):
        run_tasks(never, load_tokenizer(tokenizer_file), LENGTH, ["arc_easy"], eval_folder / "tasks", None)
