"""A rank that is stopped or killed in any phase of training and evaluation: the others name it and end, soon."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from launching import EVALUATE, TRAIN, free_port
from live import PATIENCE_SECONDS

from megatron_tf.errors import LOST_EXIT_CODE
from megatron_tf.runtime import watchdog
from megatron_tf.runtime.local_ranks import IMPORTS
from megatron_tf.telemetry.console import quiet_libraries

HANG_SECONDS = 2
BUSY = 0  # instead of a signal: the rank is busy for longer than that
GROWN = ["run.dir={folder}/grown", "growth.from={folder}/run", "model.parameter_tokens.ffn=40"]


def _rank(rank: int, command: list[str], port: int, output: str, victim: int, places: set[str], number: int) -> None:
    """Is the rank of a launcher; the `victim` sends itself the signal `number` when it begins any of `places`."""
    file = os.open(f"{output}{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update(
        {name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1"
    )
    watchdog.LEAST_PATIENCE = 3.0
    if rank == victim:
        move = watchdog.Watchdog._move

        def fall(self, *arguments):
            move(self, *arguments)
            if self._place in places:
                said = self._rounds + 2
                time.sleep(1)  # so that the others come as far
                while self._rounds < said:  # so that this rank's watchdog says where it is
                    time.sleep(0.05)
                os.kill(os.getpid(), number) if number else time.sleep(3 * HANG_SECONDS)

        watchdog.Watchdog._move = fall
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def fall_in(
    folder: Path, entry: str, overrides: list[str], victim: int, places: set[str], number: int
) -> tuple[int, str]:
    """Exit code and output of the rank that is left. Ranks are forked from a process that has imported for them."""
    multiprocessing.set_forkserver_preload(IMPORTS)
    quiet_libraries()
    context = multiprocessing.get_context("forkserver")
    command = [entry, str(folder / "config.yml"), f"run.hang_seconds={HANG_SECONDS}", *overrides]
    arguments = (command, free_port(), f"{folder}/output", victim, places, number)
    ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    left = ranks[1 - victim]
    left.join(PATIENCE_SECONDS)
    code = left.exitcode
    for process in ranks:
        process.kill()
        process.join()
    return code, (folder / f"output{1 - victim}").read_text()


def assert_named(code: int | None, output: str, victim: int, place: str) -> None:
    assert code == LOST_EXIT_CODE, output
    assert f"rank {victim} on {socket.gethostname()} is silent, or has ended, and was last heard in" in output, output
    assert place in output and "Traceback" not in output, output


STOP = signal.SIGSTOP
KILL = signal.SIGKILL
SYNCHRONOUS = ["checkpoint.asynchronous=false"]


def cases(fast: list[tuple], rest: list[tuple]) -> list:
    return [*fast, *(pytest.param(*case, marks=(pytest.mark.slow, pytest.mark.scale)) for case in rest)]


@pytest.mark.parametrize(
    ("place", "victim", "number", "overrides"),
    cases(
        [("choosing a checkpoint", 1, KILL, []), ("step 0 (loading the weights)", 0, STOP, [])],
        [
            ("opening the data", 0, KILL, []),
            ("opening the data", 1, STOP, []),
            ("step 0 (proving the growth, with the smaller model)", 1, STOP, GROWN),
            ("step 0 (proving the growth, with the grown model)", 0, KILL, GROWN),
            ("step 0 (evaluating)", 0, KILL, []),
            ("step 0 (evaluating)", 1, STOP, []),
            ("step 0 (training)", 0, STOP, []),
            ("step 3 (saving)", 1, STOP, SYNCHRONOUS),
            ("step 3 (saving)", 0, KILL, SYNCHRONOUS),
            ("step 6 (ending)", 0, STOP, []),
        ],
    ),
)
def test_in_training(started, place, victim, number, overrides):
    overrides = [override.format(folder=started) for override in overrides]
    code, output = fall_in(started, TRAIN, overrides, victim, {place}, number)
    assert_named(code, output, victim, place)


@pytest.mark.parametrize(
    ("place", "victim", "number"),
    cases(
        [("evaluating", 1, KILL)],
        [("verifying the checkpoint", 0, STOP), ("loading the weights", 1, STOP), ("evaluating", 0, KILL)],
    ),
)
def test_in_an_evaluation(started, place, victim, number):
    code, output = fall_in(started, EVALUATE, [], victim, {place}, number)
    assert_named(code, output, victim, place)


def test_a_rank_that_is_busy_for_long_is_waited_for(started):
    """As it may be with a large checkpoint or a long evaluation."""
    code, output = fall_in(started, EVALUATE, [], 1, {"loading the weights"}, BUSY)
    assert code == 0 and "hangs" not in output, output


@pytest.mark.slow
def test_a_step_that_takes_too_long(started):
    """Unlike the first one, which may compile."""
    overrides = ["training.train_steps=12", "evaluation.interval_steps=12"]
    code, output = fall_in(started, TRAIN, overrides, 1, {"step 0 (training)", "step 8 (training)"}, BUSY)
    assert code == LOST_EXIT_CODE, output
    host = socket.gethostname()
    behind = f"all ranks are alive; those that have come to step 8 (training) only: rank 0 on {host}, 1 on {host}"
    assert "no step ended for 2 s (run.hang_seconds) since step 8" in output and behind in output, output
