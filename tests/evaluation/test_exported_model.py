"""The zero-shot tasks on an exported model, through the harness's own class, score as they do on the live one."""

from __future__ import annotations

import pytest
from harness_data import tokenizer_for_tests
from tooling import tool

from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.step_zero import write_step_zero
from megatron_tf.config.topology import Topology
from megatron_tf.data.tokenizer import load_tokenizer
from megatron_tf.evaluation.lm_harness import run_tasks
from megatron_tf.evaluation.paper import TASKS
from megatron_tf.evaluation.scoring import Scorer
from megatron_tf.inference.sharded import load_stage
from megatron_tf.model.layers import TensorParallel
from megatron_tf.state.sources import InitialSource, StepZero


@pytest.mark.slow
def test_six_tasks_score_alike(tmp_path, model, eval_folder, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = model.model_copy(update={"vocab_size": 320, "seq_length": 48})
    tokenizer_for_tests().save(str(tmp_path / "tokenizer.json"))
    start = StepZero(InitialSource(model, 3), 0, 0, ())
    checkpoint = write_step_zero(tmp_path / "run" / "checkpoints", model, start, {}, lambda done, text: None)
    stage = load_stage(open_checkpoint(checkpoint), model, Topology(), 0, TensorParallel())
    scorer = Scorer(stage, max_length=48, batch_size=8, data_rank=0, data_size=1, is_reporter=True)
    tasks = eval_folder / "tasks"
    found = run_tasks(scorer, load_tokenizer(tmp_path / "tokenizer.json"), 48, TASKS, tasks, None)["results"]

    done = tool("convert_checkpoint", "to-hf", checkpoint, "--to", tmp_path / "hf", "--tokenizer",
                tmp_path / "tokenizer.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    reference = simple_evaluate(
        "hf", model_args={"pretrained": str(tmp_path / "hf"), "trust_remote_code": True, "dtype": "float32"},
        tasks=list(TASKS), device="cpu", log_samples=False, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )["results"]  # fmt: skip
    for task in TASKS:
        figures = {
            key: value for key, value in reference[task].items() if key.endswith(",none") and "stderr" not in key
        }
        assert figures and {key: found[task][key] for key in figures} == pytest.approx(figures, rel=1e-5)
