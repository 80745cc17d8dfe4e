"""The opening of a run in a folder that another run works in at that moment."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from saving import saver_of

from megatron_tf.errors import ConfigError
from megatron_tf.runtime.environment import detect
from megatron_tf.runtime.run_folder import run_folder_lock
from megatron_tf.training import opening
from megatron_tf.training.opening import open_run
from megatron_tf.training.start import Progress


@pytest.fixture(autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def meanwhile(monkeypatch):
    """Calls a function when the run has chosen its start, and not again."""

    def set_up(work):
        def chosen(*arguments):
            found = choose(*arguments)
            for _ in once:
                work()
            return found

        choose, once = opening.choose, iter([None])
        monkeypatch.setattr(opening, "choose", chosen)

    return set_up


def opened(config, closing):
    return open_run(config, detect({}), torch.device("cpu"), {}, closing)


def test_another_run_that_has_begun_and_ended_meanwhile_is_not_written_over(config, tmp_path, meanwhile):
    own = config(run={"dir": str(tmp_path / "run")})

    def other_run():
        saver, *_ = saver_of(config, tmp_path / "run", asynchronous=False)
        saver.save(Progress(3, 24, 384), {})

    meanwhile(other_run)
    with contextlib.ExitStack() as closing, pytest.raises(ConfigError, match="another run has begun in .*/run while"):
        opened(own, closing)
    with contextlib.ExitStack() as closing:
        assert opened(own, closing).start.progress.step == 3


def test_the_configuration_of_another_run_that_has_begun_meanwhile_stays(config, tmp_path, meanwhile, monkeypatch):
    """Of two runs that start at once in one new folder, one is refused, and leaves nothing there."""
    monkeypatch.setattr(opening, "PATIENCE_SECONDS", 0.0)
    with contextlib.ExitStack() as closing, contextlib.ExitStack() as others:
        other = config(run={"dir": str(tmp_path / "run"), "seed": 5})
        meanwhile(lambda: opened(other, others))
        with pytest.raises(ConfigError, match="/run is in use by process"):
            opened(config(run={"dir": str(tmp_path / "run")}), closing)
        kept = sorted(path.name for path in (tmp_path / "run").glob("config*.yml"))
        assert kept == ["config.yml"] and "seed: 5" in (tmp_path / "run" / "config.yml").read_text()


def test_the_lock_is_taken_before_the_start_is_chosen(config, tmp_path, meanwhile):
    (tmp_path / "run").mkdir()

    def other_run():
        with pytest.raises(ConfigError, match="is in use"), run_folder_lock(tmp_path / "run", 0.0):
            pass

    meanwhile(other_run)
    with contextlib.ExitStack() as closing:
        opened(config(run={"dir": str(tmp_path / "run")}), closing)
