"""What the composition root says of what it opens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from tiny import run_config

from megatron_tf.training import run as composition
from megatron_tf.training.start import Start


def test_the_log_says_where_the_run_is_found_at_its_trackers(monkeypatch, tmp_path):
    lines: list[str] = []
    console = SimpleNamespace(info=lines.append, warning=lines.append)
    config = run_config(logging={"trackers": ("tensorboard",)})
    run = SimpleNamespace(config=config, folder=Path(tmp_path), is_main=True, console=console)
    monkeypatch.setattr(composition, "together", lambda work: work())
    composition._trackers(run, Start(source=None, description="")).close()
    assert lines == [f"tracker tensorboard --logdir {tmp_path}/tensorboard"]
