"""Runs that are asked to stop before their end: by the scheduler's signals, or by their own time budget."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from launching import PROJECT, TRAIN, at_work, environment, free_port, run, train, warm
from live import PATIENCE_SECONDS, last_step, until

from megatron_tf.checkpoint import load_logical

LONG = ["training.train_steps=4000", "checkpoint.interval_steps=3000", "evaluation.interval_steps=4000"]


def children(pid):
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in out.split()]


def started(folder, words, *overrides, **options):
    """A run that has done five steps."""
    process = subprocess.Popen(
        [*words, TRAIN, str(folder / "config.yml"), *LONG, *overrides], env=environment(), cwd=PROJECT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip
    until(lambda: last_step(folder / "run") >= 5, "five steps were done", process, pause=0.05)
    return process


def torchrun():
    return warm(["torchrun", "--nproc-per-node", "2", "--master-port", free_port()])


@pytest.mark.parametrize(
    "engine, ranks, number",
    [
        ("deepspeed", 1, signal.SIGTERM),
        ("deepspeed", 2, signal.SIGUSR1),
        pytest.param("torch", 2, signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_saves_and_stops_all(folder, ranks, number):
    process = started(folder, torchrun() if ranks > 1 else warm(["python"]))
    os.kill(children(at_work(process.pid))[-1] if ranks > 1 else process.pid, number)
    out, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert "a rank received " + number.name in out and out.count("stopped after step") >= 1
    assert process.returncode == (1 if ranks > 1 else 75)  # torchrun has an exit code of its own
    (checkpoint,) = (folder / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    assert 5 <= step < 4000 and last_step(folder / "run") == step
    resumed = train(folder, *LONG, f"training.train_steps={step + 2}")
    assert resumed.returncode == 0 and f"at step {step}" in resumed.stdout


@pytest.mark.parametrize(
    "engine, victim, number",
    [
        pytest.param("deepspeed", 1, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param("deepspeed", 0, signal.SIGSTOP, marks=pytest.mark.slow),
        ("deepspeed", 1, signal.SIGKILL),
        pytest.param("torch", 1, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param("torch", 1, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_or_dies_is_named_in_bounded_time(folder, victim, number):
    process = started(folder, torchrun(), "run.hang_seconds=4")
    rank = at_work(children(at_work(process.pid))[victim])
    began, out = time.monotonic(), ""
    os.kill(rank, number)
    for line in process.stdout:
        out += line
        if "the run hangs and ends" in line and number == signal.SIGSTOP:
            # torchrun itself would wait 30 seconds for it
            os.kill(rank, signal.SIGKILL)
    # the process group would wait for parallel.timeout_seconds, half an hour
    assert process.wait(timeout=PATIENCE_SECONDS) != 0 and time.monotonic() - began < PATIENCE_SECONDS
    if number == signal.SIGSTOP:
        assert "the run hangs and ends: no step ended for 4 s" in out
        silent = f"rank {victim} on {socket.gethostname()} is silent, or has ended, and was last heard in"
        assert silent in out, out[-3000:]
        stack = (folder / "run" / f"hang-rank{1 - victim}.txt").read_text()
        assert re.search("all_reduce|all_gather|reduce_scatter", stack), stack
    else:
        assert "rank 0 lost contact" in out


@pytest.mark.parametrize(
    "engine, launcher",
    [
        ("deepspeed", "python"),
        pytest.param("deepspeed", "torchrun", marks=pytest.mark.slow),
        pytest.param("deepspeed", "deepspeed", marks=(pytest.mark.slow, pytest.mark.scale)),
        pytest.param("torch", "torchrun", marks=(pytest.mark.slow, pytest.mark.scale)),
    ],
)
def test_control_c_at_a_terminal_saves(folder, launcher):
    """The terminal sends it to launcher and ranks; the launchers pass it on to ranks, or end them by SIGTERM."""
    if launcher == "deepspeed":
        # it starts another launcher, and warm ones would not share its terminal
        words = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
        process = started(folder, words, start_new_session=True)
        terminal = process.pid
    else:
        process = started(folder, torchrun() if launcher == "torchrun" else warm(["python"]))
        terminal = at_work(process.pid)
    os.killpg(terminal, signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert out.count("Ctrl-C: this step is finished and saved, then the run ends.") == 1, out
    assert "because Ctrl-C was pressed. That step is saved" in out, out
    assert process.returncode == 75 or launcher != "python"  # the others have exit codes of their own
    (checkpoint,) = (folder / "run" / "checkpoints").iterdir()
    assert last_step(folder / "run") == int(checkpoint.name.removeprefix("step_"))


@pytest.mark.slow
def test_a_time_budget_and_going_on_again_and_again(folder):
    """Each start does one step; what comes out is what an undisturbed run gives."""
    stops = 0
    length = "training.train_steps=3"
    while (result := train(folder, length, "run.max_hours=1e-9")).returncode == 75:
        assert "run.max_hours is over" in result.stdout and "Traceback" not in result.stdout
        stops += 1
    assert (result.returncode, stops) == (0, 2), result.stdout
    assert train(folder, length, f"run.dir={folder}/whole").returncode == 0
    one, other = load_logical(folder / "run"), load_logical(folder / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


AGAIN = """
import sys, threading
from megatron_tf.commands.train import main

config, *runs = sys.argv[1:]

def train(run):
    sys.argv = ["train", config, f"run.dir={run}"]
    main()

for run in runs[:2]:
    thread = threading.Thread(target=train, args=(run,))
    thread.start()
    thread.join()
train(runs[2])
"""


@pytest.mark.slow
def test_training_again_and_again_in_one_process_and_in_threads(folder):
    runs = [folder / "run1", folder / "run2", folder / "run3"]
    (folder / "script.py").write_text(AGAIN)
    done = run([sys.executable, folder / "script.py", folder / "config.yml", *runs])
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    first, *others = map(load_logical, runs)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
