"""Training from Python: the notebook as it stands there, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment, warm
from live import PATIENCE_SECONDS

from megatron_tf import train
from megatron_tf.errors import ConfigError, LaunchError

PROJECT = Path(__file__).parents[2]
NOTEBOOK = PROJECT / "examples" / "train_from_python.ipynb"
# What a notebook's own handler must be again, and how the runs must have ended.
CHECKS = """
import json, signal
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.getsignal(signal.SIGTERM)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
kept = {name: tensor.numel() for name, tensor in grown.model.named_parameters()}
again = train(grown.config, ["training.train_steps=60"])
print(json.dumps({
    "small": [record.get("train/loss") for record in small.metrics],
    "eval": [validation_losses(small)[-1], *validation_losses(grown)],
    "checkpoints": [str(run.checkpoint) for run in (small, grown)],
    "parameters": sum(kept.values()),
    "again": again.config == grown.config and again.metrics == grown.metrics,
}))
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """What CHECKS print after the cells of the notebook ran one after another in an empty folder, and all output."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    script = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "script.py").write_text(script + CHECKS)
    done = subprocess.run(
        warm([sys.executable, folder / "script.py"]), cwd=folder, capture_output=True, text=True,
        env=environment(PYTHONPATH=str(PROJECT)), timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_the_notebook_trains_and_grows(notebook):
    found, output = notebook
    losses = [loss for loss in found["small"] if loss is not None]
    assert losses[-1] < losses[0] - 1
    end_of_small, start_of_grown, *_, end_of_grown = found["eval"]
    assert start_of_grown == pytest.approx(end_of_small, abs=1e-5)
    assert end_of_grown < start_of_grown
    assert "growth: held batch: loss" in output


def test_metrics_and_model_are_the_runs(notebook):
    found, output = notebook
    assert found["checkpoints"] == [f"runs/{name}/checkpoints/step_00000060" for name in ("small", "grown")]
    assert f"{found['parameters']:,} parameters" in output


def test_a_complete_run_is_only_read(notebook):
    assert notebook[0]["again"]


def test_the_notebook_holds_no_output():
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def test_one_of_several_processes_is_refused(monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        LaunchError, match="this is one of 2. Start several with `torchrun -m megatron_tf train CONFIG`"
    ):
        train("tiny")


def test_mistakes_are_exceptions_and_handlers_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConfigError, match="training.train_stepps: unknown key"):
        train("tiny", ["training.train_stepps=3"])
    with pytest.raises(ConfigError, match="no_such.yml: there is no such file"):
        train(tmp_path / "no_such.yml")
    with pytest.raises(ConfigError, match="parallel: tensor 2 × pipeline 1 needs a multiple of 2 ranks"):
        train("tiny", ["parallel.tensor=2"])
    with pytest.raises(ConfigError, match=r"overrides: 'run.dir=x' is text. Give a list: \['run.dir=x'\]"):
        train("tiny", "run.dir=x")
    with pytest.raises(ConfigError, match="config: 3 is a int"):
        train(3)
    assert signal.getsignal(signal.SIGTERM) is before
    assert list(tmp_path.iterdir()) == []
