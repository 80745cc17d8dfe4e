"""Signals that ask a process to stop, sent to real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from launching import free_port
from live import PATIENCE_SECONDS

from megatron_tf.runtime.stop_signals import ECHO_SECONDS, TIME_IS_UP, StopSignals, describe_request

PROJECT = Path(__file__).parents[2]
HEAD = """
import sys, time
from megatron_tf.runtime.stop_signals import StopSignals, describe_request
def wait():
    while True:
        time.sleep(0.01)
stop = StopSignals()
"""
SAVING = """
with stop.saving(is_main=True):
    print("training", flush=True)
    WORK
"""


@pytest.fixture
def start():
    started = []

    def start(body: str) -> subprocess.Popen:
        """A process that has printed its first line."""
        process = subprocess.Popen([sys.executable, "-c", HEAD + body], cwd=PROJECT, text=True, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()


def test_the_second_control_c_ends_at_once(start):
    process = start(SAVING.replace("WORK", "wait()"))
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "finished and saved" in process.stderr.readline()
    time.sleep(ECHO_SECONDS + 0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_launcher_that_passes_it_on_is_no_second_one(start):
    # On a loaded machine the launcher's may come late.
    patient = "from megatron_tf.runtime import stop_signals\nstop_signals.ECHO_SECONDS = 1000.0"
    told = SAVING.replace("WORK", "sys.stdin.readline()") + "print(describe_request(stop.request(None)))"
    process = start(patient + told)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "finished and saved" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate("the end of the training\n", timeout=PATIENCE_SECONDS)
    assert (process.returncode, out, err) == (0, "Ctrl-C was pressed\n", "")


@pytest.mark.parametrize("before", ["", "with stop.saving(is_main=True):\n    pass\n"])
def test_before_and_after_training_it_is_what_it_was(start, before):
    process = start(before + "print('not training', flush=True)\nwait()")
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=PATIENCE_SECONDS)[1]


NOTHING = "\nCtrl-C: stopped before the first step; there is nothing to save.\n"
TRAINED = SAVING.replace("WORK", "pass")


@pytest.mark.parametrize(("before", "told"), [("", NOTHING), (TRAINED, ""), (TRAINED + "stop.begin_run()", NOTHING)])
def test_before_the_first_step_of_a_run_a_command_says_that_nothing_is_saved(start, before, told):
    command = """
import signal
from megatron_tf.interrupt import end_at_once
signal.signal(signal.SIGINT, end_at_once)
stop = StopSignals(tells=True)
"""
    process = start(f"{command}{before}\nprint('here', flush=True)\nwait()")
    if before:
        assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, err) == (130, told)


def test_one_that_is_ignored_stays_ignored():
    body = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + HEAD + "print(signal.getsignal(signal.SIGINT))"
    )
    done = subprocess.run(
        [sys.executable, "-c", body], cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.stdout == "1\n"  # SIG_IGN


def test_in_a_thread_only_the_time_budget_stops():
    """Python gives no signal to a thread."""
    found = []
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=lambda: found.append(StopSignals()))
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert found[0].request(None) == 0 and found[0].request(1e-9) == TIME_IS_UP
    with found[0].saving(is_main=True):
        pass


def test_requests_in_words():
    assert describe_request(signal.SIGTERM) == "a rank received SIGTERM"
    assert describe_request(TIME_IS_UP) == "run.max_hours is over"


def test_what_waits_for_rank_zero_is_ended_by_a_signal(tmp_path):
    """Nothing is begun that could be saved, and rank 0 may never come."""
    script = f"""
from megatron_tf.runtime import environment
from megatron_tf.runtime.stop_signals import StopSignals
StopSignals()
environment.NOTICE_SECONDS = 0.0
environment.wait_for_port("127.0.0.1", {free_port()}, 1000.0, notice=lambda text: print("waiting", flush=True))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=PROJECT)
    assert process.stdout.readline() == "waiting\n"
    process.terminate()
    assert process.wait(PATIENCE_SECONDS) == 75


def test_a_mistake_after_a_signal_ends_at_once(start):
    """The launcher has begun to end all ranks, and gives none a second signal; rank 0 is no longer there to be told."""
    process = start(f"""
import os, signal
from megatron_tf.errors import ConfigError
from megatron_tf.runtime.early_mistakes import told_to_all
from megatron_tf.runtime.environment import LaunchEnvironment
os.kill(os.getpid(), signal.SIGTERM)
print(describe_request(stop.request(None)), flush=True)
with told_to_all(LaunchEnvironment("torchrun", 1, 2, 1, 2, "127.0.0.1", {free_port()}), 600.0):
    raise ConfigError("wrong")
""")
    assert process.communicate(timeout=PATIENCE_SECONDS) == ("", "")
    assert process.returncode == 2
