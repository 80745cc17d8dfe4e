"""The opening of a run in a folder that another run works in at that moment."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from saving import saver_of

from megatron_tf.checkpoint.format import INDEX_NAME
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.step_zero import write_step_zero
from megatron_tf.errors import ConfigError
from megatron_tf.growth.grow import grow
from megatron_tf.runtime.environment import detect
from megatron_tf.runtime.run_folder import run_folder_lock
from megatron_tf.state.sources import InitialSource, StepZero
from megatron_tf.training import opening
from megatron_tf.training.announcement import lines_about
from megatron_tf.training.opening import open_run, without_source
from megatron_tf.training.start import Progress, begin, choose


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


@pytest.fixture
def split_by_a_tool(config, tmp_path):
    """The configuration of a run that begins with a split that was done as a file operation."""
    bank = {"group_size": 16, "candidates": 3, "dense": 5}
    small = config().model
    small_checkpoint = write_step_zero(
        tmp_path / "small" / "checkpoints", small, StepZero(InitialSource(small, 1), 0, 0, ()), {}, lambda *_: None
    )
    run = config(
        run={"dir": str(tmp_path / "run")},
        model={**small.model_dump(mode="json"), "sparse": {"ffn": bank}},
        growth={"from": str(small_checkpoint), "method": "split"},
    )
    grown = grow(open_checkpoint(small_checkpoint), run.model, run.growth, seed=1, data=None)
    write_step_zero(tmp_path / "run" / "checkpoints", run.model, grown, {}, lambda *_: None)
    return run


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


def test_a_growth_by_a_tool_whose_smaller_model_is_gone(split_by_a_tool, tmp_path):
    """Its routers cannot be fitted; without that wish the run says that nothing was proved."""
    with contextlib.ExitStack() as closing:
        start = opened(split_by_a_tool, closing).start
        assert start.grown_from is not None and not start.missing_source
    (tmp_path / "small").rename(tmp_path / "moved")
    message = (
        "growth.routers: clusters fits .*, and the smaller model's checkpoint .*/small/.*step_00000000 is not there. "
        "Restore it at that path, or set growth.routers to random"
    )
    with contextlib.ExitStack() as closing, pytest.raises(ConfigError, match=message):
        opened(split_by_a_tool, closing)
    why = "the smaller model's checkpoint x/small/checkpoints/step_00000000 is not there"
    with pytest.raises(ConfigError, match=message):
        without_source(split_by_a_tool, begin(split_by_a_tool, choose(split_by_a_tool)[0], {}), why)
    growth = split_by_a_tool.growth.model_copy(update={"routers": "random"})
    with contextlib.ExitStack() as closing:
        found = opened(split_by_a_tool.model_copy(update={"growth": growth}), closing)
        data = SimpleNamespace(outlook=lambda samples: ("", []))
        lines = list(lines_about(found.run.plan, found.start, found.told, [], data, "cpu"))
    assert found.start.grown_from is None
    warnings = [line.text for line in lines if line.is_warning]
    assert any(
        "growth: is not proved, because the smaller model's checkpoint " in text
        and "/small/" in text
        and "is not there. Restore it at that path before the first step" in text
        for text in warnings
    ), warnings


def test_a_growth_by_a_tool_whose_smaller_model_is_damaged(split_by_a_tool, tmp_path):
    (tmp_path / "small" / "checkpoints" / "step_00000000" / INDEX_NAME).unlink()
    message = (
        r"and the smaller model's checkpoint cannot be read \(.*step_00000000: .* is missing\). Restore it at that path"
    )
    with contextlib.ExitStack() as closing, pytest.raises(ConfigError, match=message):
        opened(split_by_a_tool, closing)


def test_the_lock_is_taken_before_the_start_is_chosen(config, tmp_path, meanwhile):
    (tmp_path / "run").mkdir()

    def other_run():
        with pytest.raises(ConfigError, match="is in use"), run_folder_lock(tmp_path / "run", 0.0):
            pass

    meanwhile(other_run)
    with contextlib.ExitStack() as closing:
        opened(config(run={"dir": str(tmp_path / "run")}), closing)
