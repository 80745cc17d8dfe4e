"""Ranks that do not belong together end before they train: one message, exit code 2, and nothing is written."""

from __future__ import annotations

import signal
import subprocess
import sys

from launching import EVALUATE, PROJECT, TRAIN, environment, free_port, train, warm
from live import PATIENCE_SECONDS

PATIENCE = "parallel.timeout_seconds=100"


def started(folder, *ranks, program=TRAIN):
    """[(exit code, output)] of ranks that are started by hand, each with (arguments, variables) of its own."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            warm([sys.executable, program, folder / "config.yml", *arguments]),
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(ranks)), MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=port, PYTHONPATH=str(PROJECT), **variables),
            cwd=PROJECT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank, (arguments, variables) in enumerate(ranks)
    ]  # fmt: skip
    try:
        first = processes[0].communicate(timeout=PATIENCE_SECONDS)[0]
        for process in processes[1:]:  # as launchers do when the first has ended
            process.terminate()
        outputs = [first, *(process.communicate(timeout=PATIENCE_SECONDS)[0] for process in processes[1:])]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs)]


def refused(results, *fragments, code_of_others=2):
    """All ranks end with code 2, and the first one alone says why."""
    (code, said), *others = results
    assert [code, *(other for other, _ in others)] == [2] + [code_of_others] * len(others), results
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    assert [output for _, output in others] == [""] * len(others)
    for fragment in fragments:
        assert fragment in said, said


def test_ranks_with_other_configurations_and_interfaces(folder):
    """Two mistakes in one message: a stale configuration on one node, an interface of another machine on both."""
    wrong = {"GLOO_SOCKET_IFNAME": "ib0_none"}
    other = ["optimizer.lr=0.5", "run.seed=7", f"run.dir={folder}/other"]
    results = started(folder, ([PATIENCE], wrong), ([PATIENCE, *other], {**wrong, "MEGATRON_TF_NATIVE": "0"}))
    refused(
        results, "  - optimizer.lr is 0.01 on rank 0 (", " and 0.5 on rank 1 (", "  - run.seed is 1234 on rank 0 (",
        f"  - run.dir is {folder}/run on rank 0 (", f" and {folder}/other on rank 1 (",
        "  - MEGATRON_TF_NATIVE is not set on rank 0 (", "GLOO_SOCKET_IFNAME=ib0_none: ib0_none is no interface",
    )  # fmt: skip
    assert not (folder / "run").exists() and not (folder / "other").exists()


def test_a_mistake_that_one_rank_alone_can_see(folder):
    results = started(folder, ([PATIENCE], {}), ([PATIENCE, "data.train=[{path: nowhere}]"], {}))
    refused(results, "error: rank 1 (", "data.train[0].path: nowhere.bin and nowhere.idx: no such file")
    assert not (folder / "run").exists()


def test_ranks_of_an_evaluation_with_other_options(folder):
    results = started(folder, (["--stride", "4"], {}), (["--stride", "8", PATIENCE], {}), program=EVALUATE)
    refused(results, "  - --stride is 4 on rank 0 (", " and 8 on rank 1 (", "  - parallel.timeout_seconds is 1800",
            code_of_others=-signal.SIGTERM)  # fmt: skip
    assert not (folder / "run").exists()


def test_a_single_process_needs_no_network(folder):
    """Whatever interface, host and port the environment names."""
    wrong = {"GLOO_SOCKET_IFNAME": "ib0_none", "NCCL_SOCKET_IFNAME": "ib0_none", "WORLD_SIZE": "1"}
    place = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "none"}
    result = train(folder, "training.train_steps=2", "evaluation.interval_steps=null", **wrong, **place)
    assert result.returncode == 0 and "step 2/2" in result.stdout, result.stdout
