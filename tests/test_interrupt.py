"""Ctrl-C in the first seconds of a command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from live import PATIENCE_SECONDS

PROJECT = Path(__file__).parents[1]
# A torch that takes for ever to load, and says when it begins to.
SLOW_TORCH = "import sys, time\nprint('loading', flush=True)\ntime.sleep(60)\n"


@pytest.mark.parametrize("script", ["tools/inspect_checkpoint.py", "launch/evaluate.py"])
def test_while_torch_is_loaded(tmp_path, script):
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    paths = os.pathsep.join((str(tmp_path), str(PROJECT)))
    words = [sys.executable, PROJECT / script, PROJECT / "configs" / "tiny.yml"]
    child = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "loading\n"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=PATIENCE_SECONDS)
    assert (child.returncode, out, err) == (130, "", "")


@pytest.mark.parametrize("words", [["-m", "megatron_tf"], ["-c", "from megatron_tf.entry import main; main()"]])
def test_while_the_command_itself_is_loaded(tmp_path, words):
    """Its first import is that of `platform`."""
    (tmp_path / "platform.py").write_text(SLOW_TORCH)
    paths = os.pathsep.join((str(tmp_path), str(PROJECT)))
    child = subprocess.Popen([sys.executable, *words, "config", "list"], env={**os.environ, "PYTHONPATH": paths},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "loading\n"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=PATIENCE_SECONDS)
    assert (child.returncode, out, err) == (130, "", "")


CHILDREN = """
import multiprocessing, os, signal
from megatron_tf.interrupt import kept_from_children

def blocked():
    os._exit(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with kept_from_children():
        children = [context.Process(target=blocked) for _ in range(2)]
        for child in children:
            child.start()
    for child in children:
        child.join()
    print([child.exitcode for child in children], signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_processes_that_never_get_it(tmp_path):
    script = tmp_path / "children.py"  # spawned processes load it again
    script.write_text(CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, timeout=PATIENCE_SECONDS
    )
    assert (done.returncode, done.stdout) == (0, "[1, 1] set()\n"), done.stderr


def handler_after(body: str, run: str = "run_command") -> str:
    head = "import signal\nfrom megatron_tf.errors import run_command, run_rank\n"
    head += "from megatron_tf.interrupt import end_quietly\n"
    tail = f"\n{run}(lambda: print(signal.getsignal(signal.SIGINT)))"
    done = subprocess.run([sys.executable, "-c", head + body + tail], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_command_has_pythons_own_handler():
    assert "default_int_handler" in handler_after("end_quietly()")


def test_a_rank_ends_at_once_whatever_library_it_is_in():
    assert "end_at_once" in handler_after("end_quietly()", run="run_rank")


def test_a_handler_of_the_users_and_an_ignored_signal_are_left():
    assert handler_after("signal.signal(signal.SIGINT, signal.SIG_IGN); end_quietly()") == "1\n"  # SIG_IGN
    assert "divmod" in handler_after("signal.signal(signal.SIGINT, divmod); end_quietly()")


TERMINATED = """
import os, signal, sys, time
from megatron_tf.errors import run_command

def main():
    read, write = os.pipe()
    forked = os.fork()
    if forked == 0:
        os.write(write, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(read, 1)  # a signal that comes before the child has left os.fork is lost
    os.kill(forked, signal.SIGTERM)
    how = os.WTERMSIG(os.waitpid(forked, 0)[1])
    try:
        print("child", how, flush=True)  # from here on the parent sends its signal
        time.sleep(60)
    finally:
        print("cleaned up")

run_command(main)
"""


def test_sigterm_lets_a_command_clean_up(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", TERMINATED], cwd=PROJECT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == f"child {signal.SIGTERM:d}\n"
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=PATIENCE_SECONDS)
    assert (child.returncode, out, err) == (143, "cleaned up\n", "stopped by SIGTERM\n")


def test_a_handler_of_sigterm_of_the_users_is_left_and_ours_goes_with_the_command():
    show = "import signal\nfrom megatron_tf.errors import run_command\ndef show(): print(signal.getsignal(15))\n"
    for before, during in (("SIG_IGN", "1\n"), ("SIG_DFL", "<function")):
        script = f"{show}signal.signal(15, signal.{before})\nrun_command(show)\nshow()"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PROJECT)
        first, last = done.stdout.splitlines(keepends=True)
        assert first.startswith(during) and last == f"{getattr(signal, before):d}\n", done.stderr
