from __future__ import annotations

import sys

import pytest
from launching import PROJECT, run

from megatron_tf.commands import verify_resume
from megatron_tf.errors import ConfigError

TOOL = PROJECT / "tools" / "verify_resume.py"
SMALL = ("model.seq_length=16", "model.hidden_size=32", "model.vocab_size=99", "model.num_layers=2",
         "model.parameter_tokens={qkv: 13, proj: 11, ffn: 37}")  # fmt: skip


TINY = PROJECT / "configs" / "tiny.yml"


def test_one_rank(here):
    done = here("verify_resume", TINY, *SMALL, "--ranks", 1, "--steps", 2)
    assert done.returncode == 0, done.stdout
    assert "3 layouts, 3 changes of layout" in done.stdout
    assert "3 changes: 3 bit-equal, worst loss" in done.stdout


@pytest.mark.parametrize("engines", ["both", "deepspeed"])
def test_an_engine_that_is_not_installed(engines, monkeypatch):
    monkeypatch.setattr("megatron_tf.engine.device.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["verify_resume", str(TINY), *SMALL, "--engines", engines])
    with pytest.raises(ConfigError, match="--engines: deepspeed is not installed here. Set it to torch, or"):
        verify_resume.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", 0], "--ranks: is 0, must be at least 1"),
        (["model.hidden_sise=3"], "model.hidden_sise"),
        (
            ["--ranks", 1, "parallel.tensor=3", "training.micro_batch_size=3"],
            "training.global_batch_size: 8 is not a multiple of 3",
        ),
    ],
)
def test_bad_arguments_are_one_message(arguments, message):
    done = run([sys.executable, TOOL, TINY, *SMALL, *arguments])
    assert done.returncode == 2
    assert done.stdout.startswith("error: ") and message in done.stdout and "Traceback" not in done.stdout
