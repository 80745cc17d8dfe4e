from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

import pytest
from live import PATIENCE_SECONDS

from megatron_tf import durable
from megatron_tf.durable import write_atomically
from megatron_tf.evaluation import loaded
from megatron_tf.evaluation.loaded import write_result
from megatron_tf.evaluation.result_files import perplexity_identity, result_file, tasks_identity

PERPLEXITY = {
    "checkpoint": "run/step_1",
    "layout": "TP1",
    "precision": "fp32",
    "window": 16,
    "stride": 16,
    "max_tokens": None,
    "reset_at_eod": False,
    "mask_eod_loss": False,
    "pad_id": None,
    "data": [{"path": "a", "loss": 1.0}],
}
TASKS = {"megatron_tf": {**PERPLEXITY, "tasks": ["piqa"], "limit": None, "tokenizer": "t.json"}, "results": {}}


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": "other/step_1"},
        {"precision": "bf16"},
        {"window": 8},
        {"stride": 8},
        {"max_tokens": 9},
        {"reset_at_eod": True},
        {"mask_eod_loss": True},
        {"pad_id": 0},
        {"data": []},
        {"data": [{"path": "b"}]},
    ],
)
def test_other_settings_get_another_name(tmp_path, change):
    path = tmp_path / "step_1_perplexity.json"
    path.write_text(json.dumps(PERPLEXITY))
    other = result_file(path, {**PERPLEXITY, **change}, perplexity_identity)
    assert other == tmp_path / "step_1_perplexity-2.json"
    other.write_text(json.dumps({**PERPLEXITY, **change}))
    assert result_file(path, {**PERPLEXITY, **change}, perplexity_identity) == other
    assert result_file(path, {**PERPLEXITY, "stride": 3}, perplexity_identity).name == "step_1_perplexity-3.json"


def test_the_same_settings_replace_whatever_the_layout_and_the_result(tmp_path):
    path = tmp_path / "step_1_perplexity.json"
    path.write_text(json.dumps(PERPLEXITY))
    again = {**PERPLEXITY, "layout": "TP2", "data": [{"path": "a", "loss": 2.0}]}
    assert result_file(path, again, perplexity_identity) == path


@pytest.mark.parametrize(
    "change",
    [{"tasks": ["arc_easy"]}, {"limit": 3}, {"precision": "bf16"}, {"tokenizer": "u.json"}, {"reset_at_eod": True}],
)
def test_other_tasks_get_another_name(tmp_path, change):
    path = tmp_path / "step_1_tasks.json"
    path.write_text(json.dumps(TASKS))
    assert result_file(path, TASKS, tasks_identity) == path
    other = {"megatron_tf": {**TASKS["megatron_tf"], **change}, "results": {}}
    assert result_file(path, other, tasks_identity) == tmp_path / "step_1_tasks-2.json"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"data": 3}', "\xff"])
def test_what_is_no_evaluation_is_left_alone(tmp_path, content):
    path = tmp_path / "step_1_perplexity.json"
    path.write_text(content, encoding="latin-1")
    assert result_file(path, PERPLEXITY, perplexity_identity).name == "step_1_perplexity-2.json"


def test_two_evaluations_that_end_at_once_have_files_of_their_own(tmp_path, monkeypatch):
    """The second one looks for a free name when the first has found it and not yet written its file."""
    path, waits_or_is_done, sleep = tmp_path / "step_1_perplexity.json", threading.Event(), time.sleep
    other = {**PERPLEXITY, "window": 8}

    def write_other():
        try:
            write_result(path, other, perplexity_identity)
        finally:
            waits_or_is_done.set()

    def then_written(*arguments):
        for _ in once:
            thread.start()
            assert waits_or_is_done.wait(PATIENCE_SECONDS)
        write_atomically(*arguments)

    thread, once = threading.Thread(target=write_other), iter([None])
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda pause: (waits_or_is_done.set(), sleep(pause)))
    monkeypatch.setattr(durable, "time", clock)
    monkeypatch.setattr(loaded, "write_atomically", then_written)
    assert write_result(path, PERPLEXITY, perplexity_identity) == path
    thread.join(PATIENCE_SECONDS)
    assert json.loads(path.read_text()) == PERPLEXITY
    assert json.loads((tmp_path / "step_1_perplexity-2.json").read_text()) == other
    assert len(list(tmp_path.iterdir())) == 2
