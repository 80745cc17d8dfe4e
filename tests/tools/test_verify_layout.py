"""tools/verify_layout.py, and what it refuses."""

from __future__ import annotations

import sys

import pytest
from launching import PROJECT, run

from megatron_tf.commands import verify_layout
from megatron_tf.errors import run_command

TOOL = PROJECT / "tools" / "verify_layout.py"
CONFIG = """
run: {dir: unused}
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  seq_length: 16
  vocab_size: 99
  parameter_tokens: {qkv: 13, proj: 11, ffn: 37}
training: {train_steps: 6, global_batch_size: 8, micro_batch_size: 2}
optimizer: {lr: 1e-2}
data: {train: [{path: unused}]}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text(CONFIG)
    return path


def test_the_configured_layout(config):
    result = run([sys.executable, TOOL, config, "parallel.tensor=2", "--steps", "2", f"run.seed={2**63 - 1}"])
    assert result.returncode == 0, result.stdout
    assert "TP2×PP1×DP1" in result.stdout and "agrees" in result.stdout


def test_a_limit_that_knows_the_model(config, here):
    """With softmax gradients of queries are what is left of a sum of terms a million times as large."""
    result = here("verify_layout", config, "model.activation=softmax", "parallel.tensor=2", "--steps", 2)
    assert result.returncode == 0, result.stdout
    _, _, of_losses, _, _, error, limit, *_ = result.stdout.splitlines()[-1].split()
    # how large the errors are depends on the processor
    assert float(error) < float(limit) < 0.1 and float(limit) > 2 * float(of_losses)


def test_a_tolerance_that_nothing_meets(config, here):
    result = here("verify_layout", config, "--steps", 1, "--tolerance", "1e-30")
    assert result.returncode == 1 and "DIFFERS" in result.stdout, result.stdout
    assert "run.seed" not in result.stdout


def test_a_difference_with_candidates_may_be_a_choice(config, here):
    sparse = ("model.parameter_tokens.ffn=32", "model.sparse={ffn: {group_size: 16, candidates: 2}}")
    result = here("verify_layout", config, *sparse, "--steps", 1, "--tolerance", "1e-30")
    assert result.returncode == 1 and result.stdout.endswith(f"{verify_layout.OF_CANDIDATES}\n"), result.stdout


CASES = {
    "no steps": (["--steps", "0"], ["--steps", "'0'", "from 1"]),
    "steps that are no number": (["--steps", "many"], ["--steps", "'many'"]),
    "no ranks": (["--ranks", "0"], ["--ranks", "'0'", "from 1"]),
    "ranks of a cluster": (["--ranks", "1000"], ["--ranks", "1000", "256"]),
    "ranks that fit nothing": (["--all", "--ranks", "1"], ["--ranks", "2 to 1"]),
    "tolerance nan": (["--tolerance", "nan"], ["--tolerance", "'nan'"]),
    "tolerance inf": (["--tolerance", "inf"], ["--tolerance", "'inf'"]),
    "tolerance below 0": (["--tolerance=-1"], ["--tolerance", "'-1'"]),
    "seed": ([f"run.seed={2**63}"], ["run.seed", str(2**63)]),
    "a model beyond memory": (["model.vocab_size=2000000000"], ["model: a rank needs about", "GiB"]),
}


def refusal(monkeypatch, capsys, *arguments) -> str:
    """What the tool says, in this process, when it refuses `arguments`."""
    monkeypatch.setattr(sys, "argv", [TOOL.name, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_command(verify_layout.main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("error:") == 1, said
    return said


@pytest.mark.parametrize("name", CASES)
def test_refused(config, name, monkeypatch, capsys):
    arguments, fragments = CASES[name]
    said = refusal(monkeypatch, capsys, config, *arguments)
    assert [fragment for fragment in fragments if fragment not in said] == [], said


def test_no_such_file(tmp_path, monkeypatch, capsys):
    assert "none.yml: there is no such file" in refusal(monkeypatch, capsys, tmp_path / "none.yml")


def test_no_file_at_all(monkeypatch, capsys):
    assert refusal(monkeypatch, capsys).endswith("required: config\n")


def test_an_engine_that_is_not_installed(config, monkeypatch, capsys):
    monkeypatch.setattr("megatron_tf.engine.device.find_spec", lambda name: None)
    said = refusal(monkeypatch, capsys, config, "parallel.engine=deepspeed")
    assert "parallel.engine: deepspeed is not installed here. Set it to torch" in said


def test_accelerator_that_does_not_exist(config, monkeypatch, capsys):
    monkeypatch.setenv("DS_ACCELERATOR", "gpu")
    assert "DS_ACCELERATOR=gpu, but PyTorch's device here is" in refusal(monkeypatch, capsys, config)
