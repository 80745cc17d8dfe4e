"""What becomes of jobs of launch/slurm/train.sbatch on a real SLURM. A few lines stand in for training."""

from __future__ import annotations

import sys

import pytest
from launching import PROJECT

pytestmark = [pytest.mark.slow, pytest.mark.scale]

# in place of launch/train.py; its first argument says how it behaves
RANK = """
import os, signal, sys, time
from megatron_tf.runtime.environment import detect

heard = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: heard.append(number))
me, how, again = detect(os.environ), sys.argv[1], "SLURM_RESTART_COUNT" in os.environ
print(me.rank, me.world_size, me.local_rank, me.local_world_size, me.master_addr, me.master_port, sys.argv[2:],
      os.environ.get("OMP_NUM_THREADS"), os.environ.get("HOME"))
if how == "mistaken":
    time.sleep(3 * me.rank)
    sys.exit(2)
if how == "failing":
    time.sleep(me.rank)
    sys.exit(1)
deadline = time.monotonic() + 100
while not heard and not again and how in ("stopped", "cancelled") and time.monotonic() < deadline:
    time.sleep(0.05)
print("heard", *(signal.Signals(number).name for number in heard), flush=True)
os._exit(75 if heard else 0)  # as training does: Python's own way out lets go of the handlers, and srun may kill then
"""

OPTIONS = {
    "whole": "--nodes=2 --ntasks-per-node=2",
    "mistaken": "--nodes=2 --ntasks-per-node=1",
    "failing": "--nodes=2 --ntasks-per-node=1 --export=ALL,MAX_FAILURES=2",
    # the script asks for the signal two minutes before the end: at once, that is when SLURM next looks at its limits
    "stopped": "--nodes=2 --ntasks-per-node=1 --time=2",
    "cancelled": "--nodes=1 --ntasks-per-node=1",
    # the second component is on the first node
    "heterogeneous": "--nodelist=n2 --nodes=1 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0 : --nodelist=n1 "
    "--nodes=1 --ntasks-per-node=1",
    # neither the environment of who submits, nor that of the script for its ranks
    "bare": f"--nodes=1 --ntasks-per-node=1 --export=PYTHON={sys.executable}",
    "absent": "--nodes=2 --ntasks-per-node=1 --export=ALL,PYTHON=/no/such/python",
}


@pytest.fixture(scope="module")
def cluster(start_cluster):
    return start_cluster(2)


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory):
    """A job of each kind, all at once."""
    path = tmp_path_factory.mktemp("stand_in")
    (path / "launch").mkdir()
    (path / "launch" / "train.py").write_text(f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n{RANK}")
    return {
        kind: cluster.submit(kind, "run.name=two words", options=f"{words} --cpus-per-task=1 --gpus-per-node=0",
                             chdir=path)
        for kind, words in OPTIONS.items()
    }  # fmt: skip


def test_ranks_know_their_place_and_their_arguments(cluster, jobs):
    job = jobs["whole"]
    cluster.wait(job)
    port = 20000 + int(job)
    places = [line for line in cluster.output(job).splitlines() if "two words" in line]
    expected = [f"{rank} 4 {rank % 2} 2 n1 {port} ['run.name=two words'] 1" for rank in range(4)]
    assert sorted(line.rpartition(" ")[0] for line in places) == expected and cluster.restarts(job) == 0


def test_components_of_a_heterogeneous_job_are_one_run(cluster, jobs):
    """Rank 0 is not on the first node of the list."""
    job = jobs["heterogeneous"]
    cluster.until(lambda: cluster.state(job).split() == ["COMPLETED"] * 2, job=job)
    places = [line.split() for line in cluster.output(job).splitlines() if "two words" in line]
    assert sorted(place[:3] for place in places) == [["0", "2", "0"], ["1", "2", "0"]], cluster.report(job)
    assert {place[4] for place in places} == {"n2"}


def test_an_environment_that_is_not_passed_on_and_a_python_that_is_not_there(cluster, jobs):
    job = jobs["bare"]
    cluster.wait(job)
    (place,) = [line for line in cluster.output(job).splitlines() if "two words" in line]
    assert place.split()[-2] == "1" and place.split()[-1].startswith("/"), place
    job = jobs["absent"]
    cluster.wait(job, "FAILED")
    assert (cluster.exit_code(job), cluster.restarts(job)) == (127, 0)
    assert "error: /no/such/python cannot be run" in cluster.output(job)


def test_a_cancelled_job_saves_and_does_not_come_back(cluster, jobs):
    job = jobs["cancelled"]
    cluster.until(lambda: "two words" in cluster.output(job), job=job)
    cluster.run(f"scancel {job}")
    cluster.wait(job, "CANCELLED")
    assert "heard SIGTERM" in cluster.output(job) and "queue" not in cluster.output(job)


def test_a_mistake_is_not_tried_again(cluster, jobs):
    job = jobs["mistaken"]
    cluster.wait(job, "FAILED")
    assert (cluster.exit_code(job), cluster.restarts(job)) == (2, 0)


def test_a_failure_is_tried_again_but_not_for_ever(cluster, jobs):
    job = jobs["failing"]
    cluster.wait(job, "FAILED")
    assert (cluster.exit_code(job), cluster.restarts(job)) == (1, 1)
    assert "exit code 1, failure 2 in a row: given up" in cluster.output(job)


def test_the_time_limit_is_announced_and_the_job_goes_on(cluster, jobs):
    job = jobs["stopped"]
    cluster.wait(job)
    out = cluster.output(job)
    assert out.count("heard SIGUSR1") == 2 and out.count("two words") == 4 and cluster.restarts(job) == 1
    assert "stopped and saved; back into the queue" in out
