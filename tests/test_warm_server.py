"""What stands in for Python in most tests behaves as Python does."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from launching import PROJECT, environment
from live import PATIENCE_SECONDS, until
from warm_server import warm_python

REPORT = """
import atexit, json, os, resource, signal, sys
atexit.register(lambda: print("at exit", file=sys.stderr))
print(json.dumps({
    "argv": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ), "path": sys.path, "main": __name__,
    "file": __file__, "input": sys.stdin.read(), "encodings": [s.encoding for s in (sys.stdin, sys.stdout, sys.stderr)],
    "by line": [s.line_buffering for s in (sys.stdout, sys.stderr)], "through": sys.stdout.write_through,
    "limit": resource.getrlimit(resource.RLIMIT_FSIZE), "umask": os.umask(0),
    "files": [name for name in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + name)],
    "signals": [str(signal.getsignal(n)) for n in sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})],
    "blocked": [int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
    "threads": len(os.listdir("/proc/self/task")),
}))
print("an error", file=sys.stderr)
sys.exit(7)
"""
ENDS = {
    "falls off the end": "print('a')",
    "exit with a message": "import sys; sys.exit('sorry')",
    "exit with a negative number": "import sys; sys.exit(-1)",
    "at exit, and a file left open": "import atexit; f = open(chr(120), chr(119)); atexit.register(print, 3); "
    "f.write(chr(97))",
    "exit now": "import os; os._exit(3)",
    "an exception": "raise ValueError('no')",
    "a signal": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "Ctrl-C": "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
    "a closed pipe": "import os; os.close(1); print('a', flush=True)",
    "a thread that goes on": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), "
    "print('b'))).start()",
}


@pytest.fixture(scope="module")
def warm() -> str:
    return str(warm_python() / "python")


def both(warm, words, **options):
    """Results of a real Python and of a warm one."""
    options = {"env": environment(), "capture_output": True, "text": True, "timeout": 200, **options}
    return [subprocess.run([python, *map(str, words)], **options) for python in (sys.executable, warm)]


@pytest.mark.parametrize(
    "words", [["script.py", "a", "--b=ä"], ["-u", "script.py"], ["-m", "script", "a b"], ["-u", "-m", "script"]]
)
def test_a_process_is_made_alike(warm, tmp_path, words):
    def limit():
        os.umask(0o077)
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    (tmp_path / "script.py").write_text(REPORT)
    real, served = both(
        warm,
        words,
        cwd=tmp_path,
        env=environment(MINE="\udcff"),
        input="some\ninput",
        preexec_fn=limit,
        errors="surrogateescape",
    )
    assert (real.returncode, real.stderr) == (served.returncode, served.stderr) == (7, "an error\nat exit\n")
    first, second = json.loads(real.stdout), json.loads(served.stdout)
    # the two differ in what the shell that starts the second one leaves
    for name in ("_", "SHLVL", "PWD", "OLDPWD"):
        first["environment"].pop(name, None), second["environment"].pop(name, None)
    assert second == first


@pytest.mark.parametrize("body", ENDS.values(), ids=ENDS)
def test_it_ends_alike(warm, tmp_path, body):
    (tmp_path / "script.py").write_text(body)
    real, served = both(warm, ["script.py"], cwd=tmp_path)
    assert (served.returncode, served.stdout) == (real.returncode, real.stdout)
    assert served.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_it_has_imported_what_takes_seconds_and_children_are_warm_as_well(warm, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess, sys\nprint('deepspeed' in sys.modules)\n"
        "if len(sys.argv) == 1: print(subprocess.run([sys.executable, __file__, 'x'], "
        "capture_output=True).stdout.decode())"
    )
    done = subprocess.run([warm, script], env=environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize(
    "changes", [{"OMP_NUM_THREADS": "2"}, {"PYTHONPATH": "/elsewhere"}, {"PYTHONHASHSEED": "0"}, {"LC_ALL": "C"}]
)
def test_what_is_read_at_import_is_left_to_a_real_python(warm, tmp_path, changes):
    (tmp_path / "script.py").write_text("import sys; print('deepspeed' in sys.modules)")
    words = [warm, tmp_path / "script.py"]
    done = subprocess.run(words, env=environment(**changes), capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_code_on_the_command_line_is_left_to_a_real_python(warm):
    words = [warm, "-c", "import sys; print('deepspeed' in sys.modules, sys.argv)", "a"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.stdout == "False ['-c', 'a']\n"


def test_signals_reach_it(warm, tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'heard\\n'))\nprint('ready', "
        "flush=True)\nfor _ in range(600): time.sleep(0.1)"
    )
    words = [warm, tmp_path / "script.py"]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "heard\n"
    process.terminate()
    assert process.wait(PATIENCE_SECONDS) == -signal.SIGTERM


def test_it_dies_with_the_one_that_stands_for_it(warm, tmp_path):
    (tmp_path / "script.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    process = subprocess.Popen([warm, tmp_path / "script.py"], env=environment(), stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.kill()
    until(lambda: not os.path.exists(f"/proc/{pid}"), "the process was gone")
    assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL


def test_nothing_is_left_when_the_session_ends_with_the_server(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, time\n"
        "forked = 'warm_server.serve' in open('/proc/self/cmdline').read()\n"
        "print(os.getpid(), forked, flush=True); time.sleep(60)"
    )
    session = (
        "import os, subprocess, sys; sys.path.insert(0, sys.argv[1]); import warm_server\n"
        # how it ends does not depend on what it has imported
        "warm_server.SERVE = 'warm_server.import_everything = lambda: None; ' + warm_server.SERVE\n"
        "from warm_server import warm_python\n"
        # of another cache it would get a real process, which is not the server's to end
        "words = [str(warm_python() / 'python'), sys.argv[2]]; own = {**os.environ, **warm_server.hugging_face()}\n"
        "process = subprocess.Popen(words, stdout=subprocess.PIPE, env=own)\n"
        "print(process.stdout.readline().decode(), warm_python())"
    )
    words = [sys.executable, "-c", session, PROJECT / "tests", tmp_path / "script.py"]
    done = subprocess.run(
        words, env=environment(PYTHONPATH=str(PROJECT)), capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    pid, forked, folder = done.stdout.split()
    assert forked == "True", done
    until(lambda: not os.path.exists(f"/proc/{pid}"), "the process was gone")
    assert not os.path.exists(folder)
