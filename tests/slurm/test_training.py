"""Training on a real SLURM of three nodes: preempted, killed, cut off, on other nodes. It ends where it would have."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from live import last_step, records

from megatron_tf.checkpoint import load_logical

pytestmark = [
    pytest.mark.slow,
    pytest.mark.scale,
    pytest.mark.timeout(900),
]  # a test starts the ranks up to three times

STEPS = 40
TWO_NODES = "--nodes=2 --ntasks-per-node=2 --cpus-per-task=1 --gpus-per-node=2"
ONE_NODE = "--nodes=1 --ntasks-per-node=2 --cpus-per-task=1 --gpus-per-node=2"


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["train/loss"]) for record in records(run) if "train/loss" in record]


def resumed_at(output: str) -> list[int]:
    words = [line.partition(" at step ")[2] for line in output.splitlines() if "resumed from" in line]
    return [int(word.replace(",", "")) for word in words]


def assert_same_weights(run: Path, other: Path) -> None:
    """Bit for bit."""
    one, two = load_logical(run), load_logical(other)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def assert_close_weights(run: Path, other: Path) -> None:
    """Another layout adds up in another order: fp32 rounding, which 40 steps at a learning rate of 1e-2 enlarge."""
    one, two = load_logical(run), load_logical(other)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def cluster(start_cluster):
    return start_cluster(3)


@pytest.fixture(scope="module")
def submit(folder):
    """A function that trains in the folder `name`, on two nodes as TP2 × DP2; returns the job and that folder."""

    def train(cluster, name, *overrides, options=TWO_NODES):
        words = (folder / "config.yml", f"run.dir={folder / name}", *overrides)
        return cluster.submit(*words, options=options, chdir=folder), folder / name

    return train


@pytest.fixture(scope="module")
def undisturbed(cluster, submit):
    """The folder of a run that nothing happens to."""
    return train_undisturbed(cluster, submit, "undisturbed")


def train_undisturbed(cluster, submit, *words):
    job, run = submit(cluster, *words)
    cluster.wait(job)
    assert cluster.restarts(job) == 0 and "4 ranks as TP2×PP1×DP2" in cluster.output(job)
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    return run


@pytest.mark.parametrize("engine", ["deepspeed", "torch"])
def test_preempted_and_then_a_rank_killed(cluster, submit, undisturbed, folder, engine):
    words = f"parallel.engine={engine}"
    if engine == "torch":
        undisturbed = train_undisturbed(cluster, submit, "undisturbed_torch", words)
    job, run = submit(cluster, f"disturbed_{engine}", words)
    cluster.until(lambda: last_step(run) >= 7, job=job)
    ranks = cluster.ranks(job)
    assert [rank.node for rank in ranks] == ["n1", "n1", "n2", "n2"]  # tensor parallel within a node
    for rank in ranks:  # a fast machine would be at the end before the signal has made its way through SLURM
        rank.signal(signal.SIGSTOP)
    cluster.warn(job)
    cluster.until(lambda: all(rank.has_waiting(signal.SIGUSR1) for rank in ranks), job=job)
    for rank in ranks:
        rank.signal(signal.SIGCONT)
    cluster.until(lambda: cluster.restarts(job) == 1, job=job)
    stopped = last_step(run)
    assert stopped < STEPS and (run / "checkpoints" / f"step_{stopped:08d}").exists()

    cluster.until(lambda: last_step(run) >= stopped + 3, job=job)
    cluster.ranks(job, start=1)[3].signal(signal.SIGKILL)
    cluster.wait(job)
    out = cluster.output(job)
    assert cluster.restarts(job) == 2, out
    assert (
        out.count("stopped and saved; back into the queue") == out.count("failure 1 in a row; back into the queue") == 1
    )
    first, second = resumed_at(out)
    assert first == stopped <= second < STEPS
    assert "task 3: Killed" in out and "rank 3 on n2 is silent" in out
    assert_same_weights(run, undisturbed)
    assert losses(run) == losses(undisturbed)
    assert not list(folder.glob("*.failures"))


def test_a_rank_that_hangs_is_named_and_the_job_requeued(cluster, submit, undisturbed):
    # the process group alone would wait for longer than the test
    job, run = submit(cluster, "hung", "run.hang_seconds=10", "parallel.timeout_seconds=1800")
    cluster.until(lambda: last_step(run) >= 7, job=job)
    (victim,) = (rank for rank in cluster.ranks(job) if rank.number == 2)
    victim.signal(signal.SIGSTOP)
    cluster.until(lambda: cluster.restarts(job) == 1, job=job)
    cluster.wait(job)
    out = cluster.output(job)
    # under load a rank may be silent for as long when it starts again
    hang, requeued, _ = out.partition("back into the queue")
    assert requeued and "no step ended for 10 s" in hang, out
    named = re.findall(r"(rank \d) on (n\d) is silent, or has ended, and was last heard in", hang)
    assert set(named) == {("rank 2", "n2")}, out
    stack = (run / "hang-rank0.txt").read_text()
    assert re.search("all_reduce|all_gather|reduce_scatter", stack) or (run / "hang-rank3.txt").exists(), stack
    assert_same_weights(run, undisturbed)
    assert losses(run) == losses(undisturbed)


def test_a_node_without_power_is_replaced(start_cluster, submit, undisturbed):
    cluster = start_cluster(3, 4)
    job, run = submit(cluster, "power", "parallel.pipeline=2")
    cluster.until(lambda: last_step(run) >= 7, job=job)
    cluster.cut_power("n2")  # has the second half of the pipeline
    cluster.wait(job)
    assert cluster.hosts(job) == "n[1,3]" and cluster.restarts(job) >= 1
    assert "4 ranks as TP2×PP2×DP1" in cluster.output(job) and 5 <= resumed_at(cluster.output(job))[0] < STEPS
    assert_close_weights(run, undisturbed)


def test_ranks_of_a_lost_node_come_back_and_do_no_harm(start_cluster, submit, undisturbed):
    """Split brain: rank 0 of the old start, which saves, and the new start in the same folder."""
    cluster = start_cluster(3, 4)
    job, run = submit(cluster, "cable", "checkpoint.interval_steps=1")
    cluster.until(lambda: last_step(run) >= 7, job=job)
    orphans = [rank for rank in cluster.ranks(job) if rank.node == "n1"]
    assert [rank.number for rank in orphans] == [0, 1]
    for rank in orphans:  # wherever they are, most probably in the save of a step
        rank.signal(signal.SIGSTOP)
    cluster.pull_cable("n1")
    (run / "run.lock").unlink()  # a file server lets go of the locks of a node that it no longer hears
    cluster.until(lambda: "loss" in cluster.output(job).partition("resumed from")[2], job=job)
    for rank in orphans:
        rank.signal(signal.SIGCONT)
    assert cluster.ranks(job) == orphans
    cluster.wait(job)
    assert cluster.hosts(job) == "n[2-3]" and len(resumed_at(cluster.output(job))) == 1, cluster.report(job)
    cluster.plug_in("n1")  # SLURM finds them and ends them, should they not have ended by themselves
    cluster.until(lambda: not cluster.ranks(job), job=job)
    assert_same_weights(run, undisturbed)
    assert losses(run) == losses(undisturbed)


def test_on_one_node(cluster, submit, undisturbed, folder):
    kept = min((undisturbed / "checkpoints").iterdir())
    shutil.copytree(kept, folder / "one_node" / "checkpoints" / kept.name)
    job, run = submit(cluster, "one_node", options=ONE_NODE)
    cluster.wait(job)
    assert "2 ranks as TP2×PP1×DP1" in cluster.output(job) and resumed_at(cluster.output(job)) == [30]
    assert_close_weights(run, undisturbed)
