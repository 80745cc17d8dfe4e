from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from launching import PROJECT, at_work, environment, free_port, run, warm
from live import PATIENCE_SECONDS

DOCTOR = PROJECT / "tools" / "doctor.py"
QUICK = ("--megabytes", "0.1", "--slow-factor", "1000")


def ranks(world_size, *arguments, started=None, last=()):
    """Processes as a launcher starts them; `started` of them, all if None. `last`: more arguments of the last one."""
    port = free_port()
    return [
        subprocess.Popen(
            warm([sys.executable, DOCTOR, *QUICK, *arguments, *(last if rank == world_size - 1 else ())]), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=PROJECT,
            env=environment(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=str(port), PYTHONPATH=str(PROJECT)),
        )
        for rank in range(world_size if started is None else started)
    ]  # fmt: skip


def ended(processes):
    """[(exit code, stdout, stderr)] of all."""
    outputs = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def test_this_machine():
    done = run([sys.executable, DOCTOR], PYTHONPATH=str(PROJECT))
    assert done.returncode == 0, done.stdout
    assert "torch " in done.stdout and "Start it under torchrun" in done.stdout
    variables = {"PYTHONPATH": str(PROJECT), "GLOO_SOCKET_IFNAME": "ib0_none"}
    report = json.loads(run([sys.executable, DOCTOR, "--json"], **variables).stdout)
    assert "GLOO_SOCKET_IFNAME=ib0_none: ib0_none is no interface of this machine" in "".join(report["warnings"])
    assert report["broken"] == [] and report["packages"]["torch"] and "python" in report["system"]


def test_it_never_imports_deepspeed():
    """So it works, and says so, where deepspeed is not installed."""
    script = (
        "import importlib.metadata as m, runpy, sys; original = m.version\n"
        "def version(name):\n    if name == 'deepspeed': raise m.PackageNotFoundError(name)\n    return "
        "original(name)\nm.version = version; sys.modules['deepspeed'] = None; sys.argv = ['doctor']\n"
        f"runpy.run_path({str(DOCTOR)!r}, run_name='__main__')"
    )
    done = run([sys.executable, "-c", script], PYTHONPATH=str(PROJECT))
    assert done.returncode == 0, done.stdout
    assert "missing        deepspeed is missing: needed for training." in done.stdout


def test_a_missing_essential_is_broken():
    script = (
        "import importlib.metadata as m, runpy, sys; original = m.version\n"
        "m.version = lambda name: '1.0' if name == 'torch' else original(name); sys.argv = ['doctor']\n"
        f"runpy.run_path({str(DOCTOR)!r}, run_name='__main__')"
    )
    done = run([sys.executable, "-c", script], PYTHONPATH=str(PROJECT))
    assert done.returncode == 1 and "BROKEN         torch 1.0 is not >=2.11,<2.14" in done.stdout


def test_without_torch_it_still_says_so():
    script = (
        "import importlib.metadata as m, runpy, sys; original = m.version\n"
        "def version(name):\n    if name == 'torch': raise m.PackageNotFoundError(name)\n    return original(name)\n"
        "m.version = version; sys.modules['torch'] = None; sys.argv = ['doctor']\n"
        f"runpy.run_path({str(DOCTOR)!r}, run_name='__main__')"
    )
    done = run([sys.executable, "-c", script], PYTHONPATH=str(PROJECT))
    assert done.returncode == 1 and "BROKEN         torch is missing: needed for everything" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout


def test_a_job_under_torchrun():
    command = ["torchrun", "--nproc-per-node", 2, "--master-port", free_port(), DOCTOR, *QUICK]
    done = run(command, PYTHONPATH=str(PROJECT))
    assert done.returncode == 0, done.stdout
    for text in ("2 ranks on 1 host", "1 link within a host", "all_reduce", "reduce_scatter", "all ranks are well"):
        assert text in done.stdout, done.stdout


@pytest.mark.slow
def test_a_job_under_deepspeed():
    command = ["deepspeed", "--num_accelerators", 2, "--master_port", free_port(), DOCTOR, *QUICK]
    done = run(command, PYTHONPATH=str(PROJECT))
    assert done.returncode == 0 and "all ranks are well" in done.stdout, done.stdout


def test_ranks_that_are_started_with_other_options():
    """Messages of other sizes would end in gloo's words."""
    first, second = ended(ranks(2, last=("--megabytes", "0.2")))
    assert first[0] == second[0] == 2
    assert first[2].count("error: ") == 1 and "--megabytes is 0.1 on rank 0 (" in first[2] and second[2] == ""


def test_a_rank_that_never_comes_is_named_by_rank_0():
    first, second = ended(ranks(3, "--timeout-seconds", 6, "--json", started=2))
    assert first[0] == second[0] == 1
    assert json.loads(first[1])["job"]["broken"] == ["rank 2 did not arrive in time: the roll call"]


@pytest.mark.slow
def test_a_rank_that_stops_is_named():
    processes = ranks(3, "--timeout-seconds", 6)
    try:
        while "devices" not in (line := processes[0].stdout.readline()) or line.startswith("devices"):
            assert line, "rank 0 ended early"
        os.kill(at_work(processes[1].pid), signal.SIGSTOP)
        first, third = ended([processes[0], processes[2]])
    finally:
        os.kill(at_work(processes[1].pid), signal.SIGKILL)
        processes[1].wait()
    assert first[0] == third[0] == 1
    assert "BROKEN: rank 1 (" in first[1] and "in time" in first[1], first
    assert "rank 2 (" not in first[1].partition("BROKEN")[2] or "did not finish" in first[1]


@pytest.mark.slow
def test_a_stopped_rank_0_is_told_by_the_others():
    processes = ranks(2, "--timeout-seconds", 5)
    try:
        while "... devices" not in processes[0].stdout.readline():
            assert processes[0].poll() is None
        os.kill(at_work(processes[0].pid), signal.SIGSTOP)
        began = time.monotonic()
        ((code, _, errors),) = ended(processes[1:])
    finally:
        os.kill(at_work(processes[0].pid), signal.SIGKILL)
        processes[0].wait()
    assert code == 1 and "BROKEN, says rank 1" in errors and "rank 0" in errors, errors
    assert time.monotonic() - began < 120


def test_mistakes_in_starting_it():
    done = run([sys.executable, DOCTOR], RANK="3", PYTHONPATH=str(PROJECT))
    assert done.returncode == 2 and done.stdout.startswith("error: RANK=3 set, but not WORLD_SIZE"), done.stdout
    done = run([sys.executable, DOCTOR, "--timeout-seconds", "0"], PYTHONPATH=str(PROJECT))
    assert done.returncode == 2 and "argument --timeout-seconds" in done.stdout
