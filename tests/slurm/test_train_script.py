"""What launch/slurm/train.sbatch does with its arguments and with the ranks' exit codes, with stand-ins for SLURM."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from launching import PROJECT
from live import PATIENCE_SECONDS

SCRIPT = PROJECT / "launch" / "slurm" / "train.sbatch"
REQUEUED = -signal.SIGTERM  # SLURM ends the script in this way when it puts its job back into the queue

STAND_INS = {
    # runs the command once, where SLURM would run it once a rank
    "srun": 'echo "srun $*" >>calls; while [[ $1 = --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "scontrol $*" >>calls; if [ $1 = show ]; then echo "A=1 Restarts=$RESTARTS B=2"; else kill '
    "$PPID; fi",
    "scancel": 'echo "scancel $*" >>calls; kill -USR1 $(cat rank.pid)',
    "apptainer": 'echo "apptainer $*" >>calls; while [[ $1 != *.sif ]]; do shift; done; shift; exec "$@"',
    "sleep": "exec /bin/sleep 0.1",
}
# in place of launch/train.py
RANK = """
import os, signal, sys, time
from pathlib import Path
Path("arguments").write_text("\\n".join(sys.argv[1:]))
Path("environment").write_text("\\n".join(f"{name}={value}" for name, value in os.environ.items()))
Path("rank.pid").write_text(str(os.getpid()))
while os.environ["MODE"] == "deaf" and not Path("listen").exists():
    time.sleep(0.02)
heard = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *what: heard.append(what))
Path("listens").touch()
while os.environ["MODE"] != "ends" and not heard:
    time.sleep(0.02)
time.sleep(0.3 if heard else 0)
sys.exit(int(os.environ["CODE"]))
"""


@pytest.fixture
def start(tmp_path):
    """A function that starts the script as SLURM would, in tmp_path."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "train.py").write_text(RANK)
    for name, lines in STAND_INS.items():
        (tmp_path / "bin" / name).write_text("#!/bin/bash\n" + lines)
        (tmp_path / "bin" / name).chmod(0o755)

    started: list[subprocess.Popen] = []

    def popen(*words, **extra) -> subprocess.Popen:
        own = {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SLURM_JOB_ID": "7",
            "CODE": "0",
            "MODE": "ends",
            "RESTARTS": "0",
        }
        started.append(subprocess.Popen(
            ["bash", SCRIPT, *words], env={**own, **extra}, cwd=tmp_path, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ))  # fmt: skip
        return started[-1]

    yield popen
    for process in started:
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left, as it should be
            os.killpg(process.pid, signal.SIGKILL)


def finish(process):
    out, _ = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, out


def calls(tmp_path):
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def requeued(tmp_path):
    return "scontrol requeue 7" in calls(tmp_path)


def test_arguments_and_environment_reach_the_ranks_as_they_are(start, tmp_path):
    words = ["my config.yml", "run.name=a 'b' $HOME *", "data.train=[{path: x}]"]
    left_over = {"RANK": "0", "WORLD_SIZE": "1"}
    assert finish(start(*words, SLURM_CPUS_PER_TASK="6", **left_over)) == (0, "")
    assert (tmp_path / "arguments").read_text().splitlines() == words
    assert calls(tmp_path)[0].startswith("srun --kill-on-bad-exit=1 bash -c")
    seen = (tmp_path / "environment").read_text().splitlines()
    assert {"SRUN_CPUS_PER_TASK=6", "OMP_NUM_THREADS=6", "PYTHONUNBUFFERED=1"} <= set(seen)
    assert not [line for line in seen if line.startswith(("RANK=", "WORLD_SIZE="))]


def test_outside_the_project_the_installed_package_is_run(start, tmp_path):
    (tmp_path / "launch" / "train.py").unlink()
    stand_in = tmp_path / "bin" / "python-of-mine"
    stand_in.write_text('#!/bin/bash\nif [ "$1" = -c ]; then exit $LACKS; fi; echo "$*" >ran')
    stand_in.chmod(0o755)
    code, out = finish(start("tiny", PYTHON="python-of-mine", LACKS="1"))
    assert code == 2 and "install megatron_tf for python-of-mine" in out and not calls(tmp_path)
    assert finish(start("tiny", PYTHON="python-of-mine", LACKS="0"))[0] == 0
    assert (tmp_path / "ran").read_text() == "-m megatron_tf train tiny\n"
    code, out = finish(start(PYTHON="python-of-mine", LACKS="0"))
    assert code == 2 and "no configuration" in out


def test_threads_that_the_user_chose_are_kept(start, tmp_path):
    assert finish(start("c.yml", SLURM_CPUS_PER_TASK="6", OMP_NUM_THREADS="2"))[0] == 0
    assert "OMP_NUM_THREADS=2" in (tmp_path / "environment").read_text().splitlines()


def test_pyxis(start, tmp_path):
    assert finish(start("c.yml", CONTAINER_IMAGE="/images/train.sqsh", CONTAINER_MOUNTS="/data:/data"))[0] == 0
    options = f"--container-image=/images/train.sqsh --container-mounts={tmp_path}:{tmp_path},/data:/data"
    assert f"{options} --container-workdir={tmp_path} bash -c" in calls(tmp_path)[0]


def test_apptainer(start, tmp_path):
    extra = {"CONTAINER_IMAGE": "train.sif", "CONTAINER_RUNTIME": "apptainer"}
    assert finish(start("c.yml", "a.b=1", **extra))[0] == 0
    image = f"apptainer exec --nv --bind {tmp_path}:{tmp_path} --pwd {tmp_path} train.sif"
    expected = f"{image} {sys.executable} launch/train.py c.yml"
    assert calls(tmp_path)[1] == f"{expected} a.b=1"
    assert (tmp_path / "arguments").read_text().splitlines() == ["c.yml", "a.b=1"]


@pytest.mark.parametrize(
    "words, extra",
    [([], {}), (["c.yml"], {"CONTAINER_IMAGE": "i", "CONTAINER_RUNTIME": "docker"})],
)
def test_mistakes_start_nothing(start, tmp_path, words, extra):
    code, out = finish(start(*words, **extra))
    assert code == 2 and out.startswith("error: ") and not calls(tmp_path)


@pytest.mark.parametrize("code, back", [(0, False), (2, False), (75, True), (1, True), (69, True), (137, True)])
def test_what_becomes_of_a_job_by_the_ranks_exit_code(start, tmp_path, code, back):
    ended, out = finish(start("c.yml", CODE=str(code)))
    assert (ended, requeued(tmp_path)) == (REQUEUED if back else code, back), out


def python_of_mine(tmp_path, lines):
    """The name of an interpreter of the user's."""
    path = tmp_path / "bin" / "python-of-mine"
    path.write_text(lines)
    path.chmod(0o755)
    return path.name


@pytest.mark.parametrize(
    "how", ["absent", "not executable", "too old", "without the package", "alone in its container"]
)
def test_a_python_that_cannot_train_is_not_tried_again(start, tmp_path, how):
    code, extra = 1, {"PYTHON": python_of_mine(tmp_path, f'#!/bin/bash\nexec {sys.executable} -I -S "$@"\n')}
    if how == "absent":
        code, extra = 127, {"PYTHON": "/no/such/python"}
    elif how == "not executable":
        (tmp_path / "python").write_text("")
        code, extra = 126, {"PYTHON": f"{tmp_path}/python"}
    elif how == "too old":
        python_of_mine(tmp_path, "#!/bin/bash\necho 'SyntaxError: future feature annotations' >&2\nexit 1\n")
    elif how == "alone in its container":
        extra |= {"CONTAINER_IMAGE": "train.sif", "CONTAINER_RUNTIME": "apptainer"}
    (tmp_path / "launch" / "train.py").write_text("import megatron_tf")
    ended, out = finish(start("c.yml", **extra))
    assert (ended, requeued(tmp_path)) == (code, False), out
    assert out.count("error: ") == 1 and f"error: {extra['PYTHON']} cannot be run, is older than 3.10, or lacks" in out
    assert "--export=ALL,PYTHON=/path/to/python" in out and "queue" not in out


def test_an_environment_that_sbatch_does_not_pass_on(start, tmp_path):
    """srun would not pass on either what this script sets."""
    assert finish(start("c.yml", SLURM_EXPORT_ENV="NONE", SLURM_CPUS_PER_TASK="6"))[0] == 0
    seen = (tmp_path / "environment").read_text().splitlines()
    assert {"SLURM_EXPORT_ENV=ALL", "OMP_NUM_THREADS=6", "PYTHONUNBUFFERED=1"} <= set(seen)
    assert [line for line in seen if line.startswith("HOME=/")] and [line for line in seen if line.startswith("PATH=/")]


def test_all_components_of_a_heterogeneous_job_train(start, tmp_path):
    assert finish(start("c.yml", SLURM_HET_SIZE="3"))[0] == 0
    assert calls(tmp_path)[0].startswith("srun --kill-on-bad-exit=1 --het-group=0-2 bash -c")


def test_a_task_of_an_array_is_put_back_alone(start, tmp_path):
    """The last task has the array's own number, which stands for all of them."""
    array = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert finish(start("c.yml", CODE="1", **array))[0] == REQUEUED
    assert [call for call in calls(tmp_path) if "scontrol" in call] == ["scontrol show job 7_3", "scontrol requeue 7_3"]


def test_failures_in_a_row_end_the_job_and_an_orderly_stop_between_counts_them_anew(start, tmp_path):
    def once(code):
        return finish(start("c.yml", CODE=str(code), MAX_FAILURES="3"))

    for code in (1, 137, 75, 1, 1):
        assert once(code)[0] == REQUEUED
    code, out = once(9)
    assert code == 9 and "exit code 9, failure 3 in a row: given up" in out
    assert not list(tmp_path.glob("*.failures"))


def wait_for(path):
    while not path.exists():
        time.sleep(0.02)


@pytest.mark.parametrize("own, job, back", [("", "0", True), ("12", "12", True), ("", "1", False), ("1", "12", False)])
def test_a_start_that_is_not_the_jobs_newest_leaves_it_alone(start, tmp_path, own, job, back):
    extra = {"SLURM_RESTART_COUNT": own} if own else {}
    code, out = finish(start("c.yml", CODE="1", RESTARTS=job, **extra))
    assert (code, requeued(tmp_path)) == (REQUEUED if back else 1, back), out


@pytest.mark.parametrize("number, back", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_the_script_outlives_ranks_that_save(start, tmp_path, number, back):
    """SIGUSR1 comes ahead of the limit, and the ranks are told; SIGTERM comes from scancel, to all processes."""
    process = start("c.yml", CODE="75", MODE="listens")
    wait_for(tmp_path / "listens")
    process.send_signal(number)
    if number == signal.SIGTERM:
        os.kill(int((tmp_path / "rank.pid").read_text()), number)
    code, out = finish(process)
    assert (code, requeued(tmp_path)) == (REQUEUED if back else 75, back), out
    assert ("scancel --quiet --signal=USR1 7" in calls(tmp_path)) == back


def test_ranks_that_were_asked_to_end_may_end_as_they_like(start, tmp_path):
    process = start("c.yml", CODE="143", MODE="listens", MAX_FAILURES="1")
    wait_for(tmp_path / "listens")
    process.send_signal(signal.SIGUSR1)
    code, out = finish(process)
    assert (code, requeued(tmp_path)) == (REQUEUED, True), out
    assert not list(tmp_path.glob("*.failures"))


def test_a_warning_that_comes_too_early_for_the_ranks_is_repeated(start, tmp_path):
    process = start("c.yml", CODE="75", MODE="deaf")
    wait_for(tmp_path / "rank.pid")
    process.send_signal(signal.SIGUSR1)
    wait_for(tmp_path / "calls")
    while sum(call.startswith("scancel") for call in calls(tmp_path)) < 3:
        time.sleep(0.02)
    (tmp_path / "listen").touch()
    code, out = finish(process)
    assert (code, requeued(tmp_path)) == (REQUEUED, True), out
