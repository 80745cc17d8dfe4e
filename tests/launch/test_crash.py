"""Runs that are killed, that find a full disk or a damaged checkpoint: they go on, and end where they would have."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launching import PROJECT, TRAIN, at_work, environment, train, warm
from live import PATIENCE_SECONDS

from megatron_tf.checkpoint import load_logical
from megatron_tf.checkpoint.format import INDEX_NAME, MANIFEST_NAME, CheckpointIndex, expected_tensors, shard_name
from megatron_tf.checkpoint.manager import STEP_PREFIX, UNFINISHED_PREFIX
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.writer import FAILED_PREFIX, Piece, save_checkpoint
from megatron_tf.config.load import load_config
from megatron_tf.errors import CheckpointError, ConfigError
from megatron_tf.state.optimizer_states import STATES
from megatron_tf.training.start import choose

STEPS = 30
PLAN = (f"training.train_steps={STEPS}", "checkpoint.interval_steps=2", "checkpoint.keep_last=2")


def metrics(run: Path) -> list[tuple[int, str, float]]:
    """(step, kind, loss) of every record, in the order of the file."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], kind, record[kind]) for record in records for kind in record if kind.endswith("/loss")]


def state(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Weights and Adam moments."""
    reader = open_checkpoint(checkpoint)
    return {(name, kind): reader.read(name, kind, 0, tensor.numel)
            for name, tensor in reader.index.tensors.items() for kind in STATES}  # fmt: skip


def assert_equal_runs(one: Path, other: Path) -> None:
    first, second = load_logical(one), load_logical(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    newest = f"checkpoints/{STEP_PREFIX}{STEPS:08d}"
    first, second = state(one / newest), state(other / newest)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert metrics(one) == metrics(other)


@dataclass
class Tally:
    """What the kills hit."""

    kills: int = 0
    in_a_save: int = 0
    in_a_deletion: int = 0
    before_any_step: int = 0
    ended: int = 0


class Killer:
    """Starts a run again and again, and kills it at a random moment each time."""

    def __init__(self, folder: Path, run: Path, rng: random.Random, tally: Tally):
        self.command = warm([sys.executable, TRAIN, folder / "config.yml", f"run.dir={run}", *PLAN])
        self.output, self.checkpoints, self.log = folder / "output", run / "checkpoints", run / "train.log"
        self.rng, self.tally = rng, tally

    def until_it_ends(self, kills: int) -> str:
        """Kills at most `kills` times; then, or when the run was faster, its end: what the last start printed."""
        while True:
            with open(self.output, "w") as output:
                process = subprocess.Popen(
                    self.command, env=environment(), cwd=PROJECT, stdout=output, stderr=subprocess.STDOUT
                )
                try:
                    if kills > 0:
                        self._wait_for_the_moment(process)
                        self._kill(process)
                    code = process.wait(PATIENCE_SECONDS)
                finally:
                    process.kill()
                    process.wait()
            if code != -signal.SIGKILL:
                assert code == 0, self.output.read_text()
                return self.output.read_text()
            kills -= 1
            self.tally.kills += 1
            started = self._unfinished() - self.before
            self.tally.in_a_save += any(not name.endswith("-deleted") for name in started)
            self.tally.in_a_deletion += any(name.endswith("-deleted") for name in started)
            self.tally.before_any_step += self._steps() == self.steps_before

    def _wait_for_the_moment(self, process: subprocess.Popen) -> None:
        """Until something has happened, by turns any of three things, and a random moment longer."""
        self.before, self.steps_before, published = self._unfinished(), self._steps(), self._published()
        turn = self.tally.kills % 6
        happened = {
            0: lambda: self._unfinished() - self.before,  # a save has begun, or a deletion
            1: lambda: self._steps() > self.steps_before,
            2: lambda: self._published() > published,  # a checkpoint more, so that the run makes progress
            3: lambda: self._unfinished() - self.before,
            4: lambda: True,  # within the start
            5: lambda: self._published() > published and self._unfinished() - self.before,
        }[turn]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while process.poll() is None and not happened():
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.001)
        time.sleep({4: self.rng.uniform(0, 2), 1: self.rng.uniform(0, 0.3), 2: self.rng.uniform(0, 0.3)}.get(
            turn, self.rng.choice([0.0, self.rng.uniform(0, 0.02)])
        ))  # fmt: skip

    def _kill(self, process: subprocess.Popen) -> None:
        """Kills the process that trains, at once, if it has not ended."""
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(at_work(process.pid), signal.SIGKILL)

    def _names(self, prefix: str) -> set[str]:
        try:
            return {name for name in os.listdir(self.checkpoints) if name.startswith(prefix)}
        except FileNotFoundError:
            return set()

    def _unfinished(self) -> set[str]:
        return self._names(UNFINISHED_PREFIX)

    def _published(self) -> str:
        """Name of the newest checkpoint."""
        return max(self._names(STEP_PREFIX), default="")

    def _steps(self) -> int:
        return self.log.read_text(errors="replace").count("  loss ") if self.log.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("engine", "kills"),
    [
        ("deepspeed", 6),
        pytest.param("deepspeed", 50, marks=pytest.mark.scale),
        pytest.param("torch", 50, marks=pytest.mark.scale),
    ],
)
def test_killed_at_random_moments(folder, kills):
    """A run that ends before all kills are spent is compared, and the next one bears the rest of them."""
    result = train(folder, f"run.dir={folder}/whole", *PLAN)
    assert result.returncode == 0, result.stdout
    rng, tally, began = random.Random(3), Tally(), time.monotonic()
    in_saves = max(kills // 10, 1)
    # A killer that waits for a loaded machine itself comes too late to most saves: it tries again.
    while tally.kills < kills or (tally.in_a_save < in_saves and tally.kills < 5 * kills):
        run = folder / f"run{tally.ended}"
        output = Killer(folder, run, rng, tally).until_it_ends(max(kills - tally.kills, 6))
        tally.ended += 1
        assert_equal_runs(run, folder / "whole")
        left = os.listdir(run / "checkpoints")
        assert all(name.startswith(STEP_PREFIX) for name in left), "what killed saves leave is tidied up"
        if "the run is complete" not in output:  # else the last save was killed in its tidying, and no other followed
            assert sorted(left) == [f"{STEP_PREFIX}{STEPS - 2:08d}", f"{STEP_PREFIX}{STEPS:08d}"]
        assert not [name for name in os.listdir(run) if name.endswith(".partial")]
    print(f"{tally}, {time.monotonic() - began:.0f} s")
    assert tally.kills >= kills and tally.in_a_save >= in_saves, tally


@pytest.fixture
def small_disk(folder):
    """A file system of 400 KiB for the run's folder, of which a checkpoint takes about 180, and a way to enlarge it."""
    place = folder / "run"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs, which needs root: {mounted.stderr.strip()}")

    def enlarge():
        subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)

    yield enlarge
    subprocess.run(["umount", place], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "torch"])
def test_a_full_disk_does_not_end_the_run(folder, small_disk):
    """It says so at the end, and goes on from its newest good checkpoint when there is room again."""
    whole = train(folder, f"run.dir={folder}/whole", "checkpoint.interval_steps=1")
    result = train(folder, "checkpoint.interval_steps=1")
    assert result.returncode == 2, result.stdout
    assert "step 6/6" in result.stdout and "Traceback" not in result.stdout
    assert "the run ends after step 6, but that state is not saved" in result.stdout
    assert "checkpoint not saved" in result.stdout and "No space left on device" in result.stdout
    names = os.listdir(folder / "run" / "checkpoints")
    assert all(name.startswith((STEP_PREFIX, FAILED_PREFIX)) for name in names), "unfinished folders take up room"
    kept = max(name for name in names if name.startswith(STEP_PREFIX))
    assert kept < f"{STEP_PREFIX}{6:08d}"
    small_disk()
    again = train(folder, "checkpoint.interval_steps=1")
    assert again.returncode == whole.returncode == 0, again.stdout
    assert f"at step {int(kept.removeprefix(STEP_PREFIX))}" in again.stdout
    assert all(name.startswith(STEP_PREFIX) for name in os.listdir(folder / "run" / "checkpoints"))
    one, other = load_logical(folder / "run"), load_logical(folder / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped byte": (lambda path: flip(path / shard_name(0)), f"{shard_name(0)} is damaged: its checksum is"),
    "flipped byte of the index": (lambda path: flip(path / INDEX_NAME), f"{INDEX_NAME} is damaged: its checksum is"),
    "truncated file": (lambda path: os.truncate(path / shard_name(0), 100), "has 100 bytes, the manifest says"),
    "missing shard": (lambda path: (path / shard_name(0)).unlink(), f"{shard_name(0)} is missing"),
    "missing manifest": (lambda path: (path / MANIFEST_NAME).unlink(), f"has no {MANIFEST_NAME}"),
    "empty manifest": (lambda path: os.truncate(path / MANIFEST_NAME, 0), MANIFEST_NAME),
}


@pytest.fixture
def checkpoints(folder):
    """Three checkpoints of the configuration's run, without running it."""
    index = CheckpointIndex(0, 0, 0, {}, {}, expected_tensors({"a": (50,)}), {"a": ((0, 50, 1),)})
    paths = []
    for step in (10, 20, 30):
        pieces = [Piece("a", kind, 0, 50, torch.full((50,), float(step))) for kind in STATES]
        numbered = CheckpointIndex(**{**index.__dict__, "step": step})
        root = folder / "run" / "checkpoints"
        paths.append(save_checkpoint(root, pieces, numbered, rank=0, world_size=1, token=f"t{step}"))
    return paths


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_used(folder, checkpoints, kind):
    damage, reason = DAMAGES[kind]
    damage(checkpoints[2])
    chosen, passed_over = choose(load_config(folder / "config.yml"))
    assert chosen == checkpoints[1]
    assert len(passed_over) == 1 and f"{checkpoints[2]}: not used: " in passed_over[0] and reason in passed_over[0]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(folder, checkpoints):
    for path, (damage, _) in zip(checkpoints, DAMAGES.values()):
        damage(path)
    with pytest.raises(CheckpointError, match="none that can be used") as caught:
        choose(load_config(folder / "config.yml"))
    assert all(str(path) in str(caught.value) for path in checkpoints)
    with pytest.raises(ConfigError, match="checkpoint.resume: is never, but"):
        choose(load_config(folder / "config.yml", ["checkpoint.resume=never"]))


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_weights_are_not_given_out(checkpoints, kind):
    DAMAGES[kind][0](checkpoints[2])
    with pytest.raises(CheckpointError, match=checkpoints[2].name):
        load_logical(checkpoints[2])


@pytest.mark.slow
def test_a_run_goes_on_from_the_older_checkpoint(folder):
    assert train(folder).returncode == 0
    shutil.copytree(folder / "run", folder / "whole")
    newest = folder / "run" / "checkpoints" / f"{STEP_PREFIX}{6:08d}"
    flip(newest / shard_name(0))
    result = train(folder)
    assert result.returncode == 0, result.stdout
    assert f"WARNING: {newest}: not used" in result.stdout and "at step 3" in result.stdout
    one, other = load_logical(folder / "run"), load_logical(folder / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert metrics(folder / "run") == metrics(folder / "whole")
